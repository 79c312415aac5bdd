"""num_classes=auto: how many classes there are, where nobody knows.

A sweep over numbers of classes, on the run's own embeddings and neighbors. Its score is the
modularity of the clusters on the graph of nearest neighbors, which rises with each further cluster
that costs fewer agreements between neighbors than it takes from chance. The run then continues from
the heads of the best number. .github/docs/search.md says how close it came.
"""

from __future__ import annotations

import re
import sys
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
from icce_ray.rundir.lock import exclusive
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

    Finds it by a sweep, RUN/sweeps/classes, which resumes where it was interrupted, and puts what
    the sweep made for the best number into the run. Returns None where only the plan of that sweep
    was asked for. overwrite: as of `pipeline.run`, and of that sweep's results.

    Raises:
        ConfigError, DataError, ArtifactError, StageError: as `config.load` and `running.run`.
    """
    tree = configs.merge(source, overrides, None if quiet else _say)
    numbers = numbers_to_try(tree.get("num_classes"))
    if numbers is None:
        return configs.validate(tree)
    from icce_ray.sweeps import running  # imports torch: only where there is a sweep

    base = configs.validate({**tree, "num_classes": numbers[0]})
    content, _ = loading.read_named("space", SPACE, space.golden_spaces())
    content["space"] = {"num_classes": numbers}
    if not plan_only:
        _search(base, overwrite, quiet)
    results = running.run(
        base, (SPACE, content), overwrite=overwrite, plan_only=plan_only, quiet=quiet
    )
    if results is None:
        return None
    best = results["trials"][0]["settings"]["num_classes"]
    config = configs.validate({**tree, "num_classes": best})
    _take_best(config, results, overwrite)
    return config


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def numbers_to_try(value: Any) -> list[int] | None:
    """Of `auto` those of the golden space, of "LOW-HIGH" up to 16 between; None: a plain number.

    Raises:
        ConfigError: for a range that is none.
    """
    if value == "auto":
        return list(space.load(SPACE)[0].space["num_classes"])
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


def _take_best(config: Config, results: Mapping[str, Any], overwrite: bool) -> None:
    """Put the best trial's heads and consensus into the run, which need not make them again.

    Artifacts of other settings stay where they may not be overwritten; the run then refuses them.
    """
    from icce_ray.sweeps import store
    from icce_ray.sweeps.trials import CHAIN, STAGES

    best = RunDirectory(configs.load(results["best_config"]).run_dir)
    run, keys = RunDirectory(config.run_dir), pipeline.fingerprints(config)
    with exclusive(run):
        free = [
            STAGES[name].folder
            for name in CHAIN
            if overwrite or store.may_be_own(run.look(STAGES[name].folder), keys[name])
        ]
        store.place_copies(best, free, run)
