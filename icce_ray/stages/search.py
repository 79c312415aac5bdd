"""Search: the M nearest neighbors of each image, as Ray tasks over shards of query rows.

Nothing but the embeddings, `neighbors.pca`, `search`, `nprobe` and `max_neighbors` decides the
result, so that other numbers of classes and other rules of selection reuse it. Each task writes its
shard of the artifact, and a resumed search runs the missing ones.

Shapes: N images, D features, P components, M neighbors, Q query rows of one task.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import NeighborsConfig
from icce_ray.core import method
from icce_ray.core import neighbors as core
from icce_ray.core.constants import exact_seconds, is_approximate
from icce_ray.distributed.cluster import Request, Wait
from icce_ray.distributed.tasks import run_tasks
from icce_ray.errors import DataError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import duration
from icce_ray.rundir.schemas import neighbors_schema, tensor_column
from icce_ray.stages.base import Context, Outcome
from icce_ray.stages.table import QUERY_ROWS

FOLDER = "neighbors"
CHOICE = "_search.json"  # in FOLDER: whether the search is approximate, settled once
ADVICE = "Lower ray.num_gpus"


# --- in the tasks --------------------------------------------------------------------------------


def searched(run: RunDirectory, pca: int | None) -> np.ndarray:
    """What neighbors are searched in: the embeddings, or their leading principal components, which
    the first task of a node writes to a file. float16 [N, D or P], unit rows."""
    import torch

    from icce_ray.core.projection import projected

    matrix = run.matrix("embeddings", "embedding")
    if pca is None:
        return matrix

    def build(path: Path) -> None:
        projection = method.search_projection(matrix, pca)
        assert projection is not None
        parts = projected(matrix, projection, torch.device("cpu"))
        run.write_matrix(path, len(matrix), (part.numpy() for part in parts))

    path = _derived(run, f"components-{pca}", ".npy", build)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _ivf_index(run: RunDirectory, matrix: np.ndarray) -> Any:
    """The inverted lists of `matrix` [N, P], which the first task of a node writes to a file."""
    import faiss
    import torch

    def build(path: Path) -> None:
        with run.writing(path):
            core.build_ivf(matrix, path, method.SEARCH_SEED)

    path = _derived(run, f"ivf-{matrix.shape[1]}", ".faiss", build)
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def _derived(run: RunDirectory, kind: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """A file that this node makes of the embeddings, once. Files that were made of earlier
    embeddings are as large and of no use any more: they go when a new one is built."""
    done, place = run.manifest("embeddings"), run.matrix_name("embeddings")
    assert done is not None  # the caller has read the embeddings
    path = run.node_file(f"{place}-{kind}-{done.id}{suffix}")
    with run.node_lock(path):
        if not path.exists():
            for old in path.parent.glob(f"{place}-{kind.partition('-')[0]}-*{suffix}"):
                if done.id not in old.name:
                    old.unlink(missing_ok=True)
            build(path)
    return path


def _search_task(
    run: RunDirectory,
    start: int,
    stop: int,
    most: int,
    ivf: bool,
    config: NeighborsConfig,
    cpus: int,
) -> int:
    """Search for rows start..stop and write their shard. Returns the number of rows."""
    import torch

    torch.set_num_threads(cpus)
    matrix = searched(run, config.pca)
    if ivf:
        index = _ivf_index(run, matrix)
        ids, similarity = core.search_ivf(index, matrix, start, stop, most, config.nprobe)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ids, similarity = core.search(matrix, start, stop, most, device)
    image_ids = run.matrix("embeddings", "image_id")[start:stop]
    run.write_table(_table(image_ids, ids, similarity), FOLDER, _shard(start, stop))
    return stop - start


def _table(image_ids: np.ndarray, ids: np.ndarray, similarity: np.ndarray) -> pa.Table:
    """One shard: image_ids [Q], ids and similarity [Q, M]."""
    schema = neighbors_schema(ids.shape[1])
    columns = [
        pa.array(image_ids),
        tensor_column(ids, schema.field("ids").type),
        tensor_column(similarity.astype(np.float16), schema.field("similarity").type),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _shard(start: int, stop: int) -> str:
    """The file of rows start..stop; in the order of their names, shards are in that of the rows."""
    return f"rows-{start:010d}-{stop:010d}.parquet"


# --- in the driver -------------------------------------------------------------------------------


def run(context: Context) -> Outcome:
    """Find each image's nearest neighbors. Raises DataError: fewer than 2 images."""
    rows, features = context.run.matrix("embeddings", "embedding").shape
    if rows < 2:
        raise DataError(f"neighbors need at least 2 images; {rows} could be used")
    ivf = _search_shards(context, rows, features)
    return Outcome(rows, {"search": "ivf" if ivf else "exact"})


def _search_shards(context: Context, rows: int, features: int) -> bool:
    """Run the missing query shards as Ray tasks. Returns whether the search is approximate."""
    config, run, cluster = context.config.neighbors, context.run, context.cluster
    most = min(config.max_neighbors, rows - 1)
    shards = [(start, min(start + QUERY_ROWS, rows)) for start in range(0, rows, QUERY_ROWS)]
    done = set(run.list(FOLDER, ".parquet"))
    missing = [shard for shard in shards if _shard(*shard) not in done]
    gpus = cluster.gpus_each()
    Wait(cluster, context.reporter, [Request(1, gpus)], ADVICE).until_there()
    have, cpus = cluster.resources(), cluster.cpus_each(1, gpus)
    width = min(features, config.pca or features)
    ivf = _settle(context, exact_seconds(rows, width, have.cpus, have.gpus if gpus else 0))
    calls = [(run, start, stop, most, ivf, config, cpus) for start, stop in missing]
    tasks = run_tasks(context, _search_task, calls, request=Request(cpus, gpus), advice=ADVICE)
    finished = rows - sum(stop - start for start, stop in missing)
    with context.reporter.bar("neighbors", rows, "images", done=finished) as bar:
        for _, count in tasks:
            finished += count
            bar.update(finished)
    return ivf


def _settle(context: Context, exact: float) -> bool:
    """Whether this search is approximate, where an exact one would take that many seconds. Settled
    once: a search that resumes, perhaps on other machines, does not become a mixture."""
    config, run = context.config.neighbors, context.run
    if run.exists(FOLDER, CHOICE):
        return bool(run.read_json(FOLDER, CHOICE)["ivf"])
    ivf = is_approximate(config.search, exact)
    if config.search == "auto" and ivf:
        context.reporter.say(
            f"exact search would take about {duration(exact)} here: using approximate search "
            "(neighbors.search=exact to insist)"
        )
    run.write_json({"ivf": ivf}, FOLDER, CHOICE)
    return ivf
