"""num_classes=auto: how many classes there are, where nobody knows.

A sweep over numbers of classes, on embeddings that the run goes on with; its score is the
modularity of the clusters on the graph of nearest neighbors, which rises with each further cluster
that costs fewer agreements between neighbors than it takes from chance. README says how close it
came, and how far to trust it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.config import loading
from icce_ray.config.schema import Config
from icce_ray.errors import ConfigError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.sweeps import space

SPACE = "classes"  # the golden space, and the sweep's name
MOST_TRIED = 16  # numbers of a range, spread evenly by ratio


def resolve(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    plan_only: bool = False,
    quiet: bool = False,
) -> Config | None:
    """`config.load`, but with num_classes found where it is `auto` or a range such as 4-30.

    Finds it by a sweep, RUN/sweeps/classes, which goes on where it was interrupted. Returns None
    where only the plan of that sweep was asked for. overwrite: as of `pipeline.run`, of the
    embeddings and of that sweep's results.

    Raises:
        ConfigError, DataError, ArtifactError, StageError: as `config.load` and `sweep.run`.
    """
    tree = configs.merge(source, overrides)
    numbers = numbers_to_try(tree.get("num_classes"))
    if numbers is None:
        return configs.validate(tree)
    from icce_ray.sweeps import running as sweep  # imports torch: only where there is a sweep

    base = configs.validate({**tree, "num_classes": numbers[0]})
    chosen = space.golden_spaces()[SPACE]
    content = {**loading.parse_yaml(chosen.read_bytes(), SPACE), "space": {"num_classes": numbers}}
    if not plan_only:
        _search(base, overwrite, quiet)
    found = sweep.run(base, (SPACE, content), overwrite=overwrite, plan_only=plan_only, quiet=quiet)
    if found is None:
        return None
    best = found["trials"][0]["settings"]["num_classes"]
    return configs.validate({**tree, "num_classes": best})


def numbers_to_try(value: Any) -> list[int] | None:
    """Of `auto` those of the golden space, of "LOW-HIGH" up to 16 between; None: a plain number.

    Raises:
        ConfigError: for a range that is none.
    """
    if value == "auto":
        from icce_ray.core.evaluation.labelfree import SCORES

        return list(space.load(SPACE, list(SCORES))[0].space["num_classes"])
    ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", value) if isinstance(value, str) else None
    if ends is None:
        return None
    low, high = int(ends[1]), int(ends[2])
    if not 2 <= low < high:
        raise ConfigError(
            f"num_classes={value}: a range goes from 2 or more to a higher number, such as 4-30"
        )
    if high - low < MOST_TRIED:
        return list(range(low, high + 1))
    return sorted({round(number) for number in np.geomspace(low, high, MOST_TRIED)})


def _search(config: Config, overwrite: bool, quiet: bool) -> None:
    """Have the run embed the images and search for neighbors, which do not depend on num_classes:
    the sweep uses them, and the run finds them when the sweep is over."""
    steps = pipeline.make_steps(config, RunDirectory(config.run_dir))
    if any(step.stage.name == "search" and step.state != "done" for step in steps):
        pipeline.run(config, last="search", overwrite=overwrite, quiet=quiet)
