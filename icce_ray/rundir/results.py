"""The answer of a finished run: a row for every image, at the top of its directory."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pyarrow as pa

from icce_ray.errors import ArtifactError
from icce_ray.rundir import curated
from icce_ray.rundir.directory import RunDirectory

LABELS, LABELS_CSV = "labels.parquet", "labels.csv"
NUM_CLASSES = "num_classes.json"  # how their number was found, where it was `auto` or a range


def read_estimate(run: RunDirectory) -> dict[str, Any] | None:
    """NUM_CLASSES of a run: `key` of all that it depends on, `best`, `low` and `high`, and for each
    number `tried` the `agreement`. None where there is none, or it is damaged."""
    with contextlib.suppress(ArtifactError, KeyError, TypeError, ValueError):
        found = run.read_json(NUM_CLASSES)
        numbers = {name: int(found[name]) for name in ("best", "low", "high")}
        tried = [int(number) for number in found["tried"]]
        agreement = [float(value) for value in found["agreement"]]
        if len(tried) == len(agreement) > 0 and all(map(math.isfinite, agreement)):
            return {"key": found["key"], **numbers, "tried": tried, "agreement": agreement}
    return None


def require(run: RunDirectory, folder: str) -> None:
    """Raise ArtifactError where the stage of a folder is not finished."""
    if run.manifest(folder) is None:
        raise ArtifactError(f"{run.uri} has no finished {folder}/; finish it by icce-ray run")


def read_labels(run: RunDirectory) -> pa.Table:
    """LABELS_SCHEMA, a row for every image of the index, in its order, also for those that could
    not be read. Clusters are the curated ones, where there are any.

    Raises ArtifactError where there is none, or the clusters have changed since.
    """
    run = curated.current(run)
    require(run, "answer")
    made, of = run.manifest("answer"), run.manifest("consensus")
    if made is None or of is None or made.inputs["consensus"] != of.id:
        raise ArtifactError(
            f"{run.path(LABELS)} is of an earlier consensus; finish the run by icce-ray run"
        )
    return run.read_table(LABELS)
