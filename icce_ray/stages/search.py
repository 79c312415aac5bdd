"""Stage 3: top-M neighbors of every image, as Ray tasks over query shards; then the rule."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config, NeighborsConfig, settings
from icce_ray.core import method
from icce_ray.core import neighbors as core
from icce_ray.distributed.cluster import Cluster, Request, Wait, completed
from icce_ray.errors import DataError
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import duration
from icce_ray.rundir.schemas import neighbors_schema, tensor_column, to_matrix
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage

FOLDER = "neighbors"


SEARCHED = ("pca", "search", "nprobe")  # settings of the search; the others are the rule's


RAW = "top"  # working folder: what the tasks write, before the rule is applied


TOP = f"{FOLDER}/{RAW}"


CHOICE = "search.json"  # beside them: which search it is


NEAREST = "nearest"  # of a sweep: the best few ids of every row, which all its trials share


ROWS_PER_FILE = 250_000


ADVICE = "Lower neighbors.num_gpus"


def _settings(config: Config) -> dict[str, Any]:
    return {"neighbors": settings(config.neighbors), "num_classes": config.num_classes}


def searched(run: RunDirectory, pca: int | None) -> np.ndarray:
    """What neighbors are searched in: the embeddings, or their leading principal components, which
    the first task of a node writes to a file. float16 [N, D or P], unit rows."""
    import torch

    from icce_ray.core.projection import projected

    matrix, done = run.matrix("embeddings", "embedding"), run.manifest("embeddings")
    assert done is not None
    if pca is None or pca >= matrix.shape[1]:
        return matrix
    path = run.node_file(f"components-{pca}-{done.id}.npy")
    with run.node_lock(path):
        if not path.exists():
            for old in path.parent.glob(f"components-{pca}-*.npy"):
                old.unlink(missing_ok=True)
            projection = method.search_projection(matrix, pca)
            assert projection is not None
            parts = projected(matrix, projection, torch.device("cpu"))
            run.write_matrix(path, len(matrix), (part.numpy() for part in parts))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _search_task(
    run: RunDirectory,
    start: int,
    stop: int,
    most: int,
    ivf: bool,
    config: NeighborsConfig,
    cpus: int,
) -> int:
    """Search one query shard and write it. Returns the rows done."""
    import torch

    torch.set_num_threads(cpus)
    matrix = searched(run, config.pca)
    if ivf:
        index = _ivf_index(run, matrix)
        ids, similarity = core.search_ivf(index, matrix, start, stop, most, config.nprobe)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        ids, similarity = core.search(matrix, start, stop, most, device)
    run.write_table(_lists(ids, similarity), FOLDER, RAW, _shard(start, stop))
    return stop - start


def _lists(ids: np.ndarray, similarity: np.ndarray) -> pa.Table:
    """One shard of top lists, [Q, M] each."""
    schema = neighbors_schema(ids.shape[1])
    scores = tensor_column(similarity.astype(np.float16), schema.field("similarity").type)
    return pa.table({"ids": tensor_column(ids, schema.field("ids").type), "similarity": scores})


def _ivf_index(run: RunDirectory, matrix: np.ndarray) -> Any:
    """The node's index file, built by the first task that needs it."""
    import faiss
    import torch

    done = run.manifest("embeddings")
    path = run.node_file(f"ivf-{matrix.shape[1]}-{done.id if done else 'none'}.faiss")
    with run.node_lock(path):
        if not path.exists():
            with run.writing(path):
                core.build_ivf(matrix, path, seed=method.SEARCH_SEED)
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def _shard(start: int, stop: int) -> str:
    """Both ends are named: a resumed run may cut the rows into shards of another size."""
    return f"rows-{start:010d}-{stop:010d}.parquet"


def _run(context: Context) -> Outcome:
    config, run = context.config, context.run
    rows, features = run.matrix("embeddings", "embedding").shape
    if rows < 2:
        raise DataError(f"neighbors need at least 2 images; {rows} could be used")
    most = min(config.neighbors.max_neighbors, rows - 1)
    kept = run.manifest(TOP)  # of a sweep, whose trials differ in the rule alone
    ivf = kept.results["ivf"] if kept else _search_shards(context, rows, features, most)
    ids, similarity = _read_shards(run, rows, most)
    selection = method.select(ids, similarity, config)
    _write(run, selection)
    if kept is None:
        run.delete(TOP)
    results = core.describe(selection, config.neighbors.min_neighbors)
    q = results["quantiles"]
    context.reporter.say(
        f"neighbors per image: median {q['50']:.0f}, 5-95 % {q['5']:.0f}-{q['95']:.0f}"
        + ("" if selection.threshold is None else f", cosine >= {selection.threshold:.3f}")
    )
    return Outcome(rows, {**results, "k": selection.k, "search": "ivf" if ivf else "exact"})


def _search_shards(context: Context, rows: int, features: int, most: int) -> bool:
    """Run the missing query shards as Ray tasks. Returns whether the search is approximate."""
    config, run, cluster = context.config.neighbors, context.run, context.cluster
    step = config.query_rows
    shards = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    done = set(run.list(TOP, ".parquet"))
    missing = [shard for shard in shards if _shard(*shard) not in done]
    ray = cluster.start()
    gpus = cluster.gpus_each(config.num_gpus)
    Wait(cluster, context.reporter, [Request(1, gpus)], ADVICE).until_there()
    have, cpus = cluster.resources(), cluster.cpus_each(1, gpus)
    width = min(features, config.pca or features)
    seconds = core.exact_seconds(rows, width, have.cpus, have.gpus if gpus else 0)
    ivf = _settle(context, seconds)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD")(_search_task)
    refs = [task.remote(run, start, stop, most, ivf, config, cpus) for start, stop in missing]
    finished = rows - sum(stop - start for start, stop in missing)
    wait = Wait(cluster, context.reporter, [Request(cpus, gpus)], ADVICE)
    with context.reporter.bar("neighbors", rows, "images", done=finished) as bar:
        for _, count in completed(ray, refs, wait):
            finished += count
            bar.update(finished)
    return ivf


def _settle(context: Context, exact: float) -> bool:
    """Whether this search is approximate, where an exact one would take so many seconds. Settled
    once: a search that goes on, perhaps on other machines, does not become a mixture."""
    config, run = context.config.neighbors, context.run
    if run.exists(TOP, CHOICE):
        return bool(run.read_json(TOP, CHOICE)["ivf"])
    ivf = core.approximate(config.search, exact)
    if config.search == "auto" and ivf:
        context.reporter.say(
            f"exact search would take about {duration(exact)} here: using approximate search "
            "(neighbors.search=exact to insist)"
        )
    run.write_json({"ivf": ivf}, TOP, CHOICE)
    return ivf


def _read_shards(run: RunDirectory, rows: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `most` of each row's list, which may be longer: ids, similarity [N, most]."""
    ids = np.empty((rows, most), np.int32)
    similarity = np.empty((rows, most), np.float16)
    for name in run.list(TOP, ".parquet"):
        table = run.read_table(FOLDER, RAW, name)
        start = int(name[5:15])
        ids[start : start + len(table)] = to_matrix(table["ids"])[:, :most]
        similarity[start : start + len(table)] = to_matrix(table["similarity"])[:, :most]
    return ids, similarity


def search_kept(context: Context, print_: str, most: int) -> None:
    """Search once for all trials: finished lists of `most` neighbors stay in neighbors/top.

    print_: fingerprint of what the lists are made of; a search begun with it is gone on with.
    """
    run = context.run
    done = run.manifest("embeddings")
    rows, features = run.matrix("embeddings", "embedding").shape
    inputs = {"embed": done.id if done else ""}
    run.begin(TOP, {"fingerprint": print_, "settings": {}, "inputs": inputs})
    most = min(most, rows - 1)
    ivf = _search_shards(context, rows, features, most)
    results = {"ivf": ivf, "most": most}
    run.finish(TOP, Manifest("top", print_, {}, inputs, rows, 0.0, results))


def take_kept(run: RunDirectory, source: RunDirectory, print_: str) -> None:
    """Make the shared lists from the finished neighbors of `source`, instead of a search."""
    done = source.manifest(FOLDER)
    assert done is not None
    ids, similarity = source.matrix(FOLDER, "ids"), source.matrix(FOLDER, "similarity")
    mark = {"fingerprint": print_, "settings": {}, "inputs": dict(done.inputs)}
    run.begin(TOP, mark)
    for start in range(0, len(ids), ROWS_PER_FILE):
        stop = min(start + ROWS_PER_FILE, len(ids))
        table = _lists(ids[start:stop], similarity[start:stop])
        run.write_table(table, FOLDER, RAW, _shard(start, stop))
    results = {"ivf": done.results["search"] == "ivf", "most": ids.shape[1]}
    run.finish(TOP, Manifest("top", print_, {}, done.inputs, len(ids), 0.0, results))


def write_nearest(run: RunDirectory, print_: str, count: int) -> None:
    """Keep the best `count` ids of every row from the shared lists, in `nearest`."""
    kept = run.manifest(TOP)
    assert kept is not None
    run.begin(NEAREST, {"fingerprint": print_, "settings": {}, "inputs": dict(kept.inputs)})
    count = min(count, kept.results["most"])
    ids, _ = _read_shards(run, kept.rows, count)
    kind = neighbors_schema(count).field("ids").type
    for part, start in enumerate(range(0, kept.rows, ROWS_PER_FILE)):
        table = pa.table({"ids": tensor_column(ids[start : start + ROWS_PER_FILE], kind)})
        run.write_table(table, NEAREST, f"part-{part:05d}.parquet")
    run.finish(NEAREST, Manifest("nearest", print_, {}, kept.inputs, kept.rows, 0.0))


def _write(run: RunDirectory, selection: core.Selection) -> None:
    image_ids = run.matrix("embeddings", "image_id")
    schema = neighbors_schema(selection.ids.shape[1])
    for part, start in enumerate(range(0, len(image_ids), ROWS_PER_FILE)):
        rows = slice(start, start + ROWS_PER_FILE)
        columns = [
            pa.array(image_ids[rows]),
            tensor_column(selection.ids[rows], schema.field("ids").type),
            tensor_column(selection.similarity[rows], schema.field("similarity").type),
            pa.array(selection.counts[rows]),
        ]
        table = pa.Table.from_arrays(columns, schema=schema)
        run.write_table(table, FOLDER, f"part-{part:05d}.parquet")


def _estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    images, given = size.images or 0, size.features or 1024
    features = min(given, config.neighbors.pca or given)
    components = 2.0 * images * features if features < given else 0.0
    lists = images * min(config.neighbors.max_neighbors, max(images, 1)) * 6
    chunk = (core.QUERY_CHUNK + features) * core.BASE_CHUNK * 4
    # Nothing is started to find out what there is; a cluster is taken to search exactly.
    cores = os.cpu_count() or 1
    seconds = core.exact_seconds(images, features, cores, 0) if cluster.is_local else 0.0
    index = (
        core.ivf_bytes(images, features)
        if core.approximate(config.neighbors.search, seconds)
        else 0.0
    )
    return Need(
        memory=max(2 * lists, index) + chunk, disk=2 * lists + components, where="Ray tasks"
    )


STAGE = Stage(
    name="neighbors",
    folder=FOLDER,
    needs=("embed",),
    settings=_settings,
    run=_run,
    estimate=_estimate,
)
