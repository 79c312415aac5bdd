"""num_classes=auto: a run's number of classes, from its own embeddings.

The run embeds its images, which depends on no number of classes. Then the number is estimated, in
about a minute, and the run continues with it. RUN/num_classes.json keeps it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.config import Config, Range
from icce_ray.distributed.cluster import Cluster
from icce_ray.rundir import results
from icce_ray.rundir.directory import RunDirectory, fingerprint
from icce_ray.rundir.progress import Reporter

if TYPE_CHECKING:  # torch is imported where there is something to estimate
    from icce_ray.core.num_classes import NumClasses

CLEAR = 0.5  # agreement below which there are hardly clusters; of noise it is 0.2, of images 0.9


def resolve(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    plan_only: bool = False,
    quiet: bool = False,
) -> Config | None:
    """`config.load`, but with num_classes estimated where it is `auto` or a range such as 4-30.

    Runs the chain until embed, if it is not done. Returns None where only a plan was asked for and
    the number is not known yet. overwrite: as of `pipeline.run`.

    Raises:
        ConfigError, DataError, ArtifactError, StageError: as `config.load` and `pipeline.run`.
    """
    tree = configs.merge(source, overrides, None if quiet else _say)
    between = configs.parse_range(tree.get("num_classes"))
    if between is None:
        return configs.validate(tree)
    base = configs.validate({**tree, "num_classes": between[0]})
    directory = RunDirectory(base.run_dir)
    steps = pipeline.make_steps(base, directory)
    if any(step.stage.name == "embed" and step.state != "done" for step in steps):
        pipeline.run(base, last="embed", overwrite=overwrite, plan_only=plan_only, quiet=quiet)
    key = _key(base, directory, between)
    best = _known(directory, key)
    if best is None and plan_only:
        _say("num_classes is estimated once the images are embedded, in about a minute")
        return None
    if best is None:
        best = _estimate(base, directory, key, between, quiet)
    return configs.validate({**tree, "num_classes": best})


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _key(config: Config, run: RunDirectory, between: Range) -> str:
    """Of everything that the estimate depends on."""
    heads, embedded = config.heads, run.look("embeddings").manifest
    settings = {"between": between, "pca": heads.pca, "most": heads.clusters, "seed": config.seed}
    return fingerprint("num_classes", settings, {"embed": embedded.id if embedded else ""})


def _known(run: RunDirectory, key: str) -> int | None:
    found = results.read_estimate(run)
    return found["best"] if found is not None and found["key"] == key else None


def _estimate(config: Config, run: RunDirectory, key: str, between: Range, quiet: bool) -> int:
    from icce_ray.core import num_classes

    reporter = Reporter(run, quiet)
    with pipeline.running(run, reporter, Cluster(config.ray), "done until embed"):
        with reporter.bar("number of classes", num_classes.TREES, "trees") as bar:
            embeddings = run.matrix("embeddings", "embedding")
            found = num_classes.estimate(
                embeddings, between, config, lambda done, _: bar.update(done)
            )
        run.write_json({"key": key, **asdict(found)}, results.NUM_CLASSES)
        reporter.say(_said(found))
    return found.best


def _said(found: NumClasses) -> str:
    """The number, and how far to trust it."""
    text = f"num_classes: {found.best:,}; {found.low:,} to {found.high:,} fit almost as well. "
    if max(found.agreement) < CLEAR:
        text += "No number stands out: clusterings of different images hardly agree. "
    elif found.best in (found.tried[0], found.tried[-1]):
        text += "It is the end of the range: others may fit better. "
    return f"{text}It is an estimate: the report has the curve, and -k N sets another number"
