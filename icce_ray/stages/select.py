"""Select: how many of its nearest neighbors each image keeps, from the first one on.

Dense regions keep many, outliers few. That takes a second on the lists of `search`, which stay as
they are: image i keeps the first `count[i]` ids of its list.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from icce_ray.core import method, neighbors
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import SELECTION_SCHEMA
from icce_ray.stages.base import Context, Outcome

FOLDER = "selection"


def run(context: Context) -> Outcome:
    """Choose how many of its neighbors each image keeps."""
    run, config = context.run, context.config
    ids, similarity = (run.matrix("neighbors", name) for name in ("ids", "similarity"))
    selection = method.select(ids, similarity, config)
    _write(run, selection.counts)
    results = neighbors.describe(selection, config.neighbors.min_neighbors)
    q = results["quantiles"]
    context.reporter.say(
        f"neighbors per image: median {q['50']:.0f}, 5-95 % {q['5']:.0f}-{q['95']:.0f}"
        + ("" if selection.threshold is None else f", cosine >= {selection.threshold:.3f}")
    )
    return Outcome(len(ids), {**results, "k": selection.k})


def _write(run: RunDirectory, counts: np.ndarray) -> None:
    """counts: int32 [N]."""
    image_ids = pa.array(run.matrix("embeddings", "image_id"))
    table = pa.Table.from_arrays([image_ids, pa.array(counts)], schema=SELECTION_SCHEMA)
    run.write_table(table, FOLDER, "part-00000.parquet")
