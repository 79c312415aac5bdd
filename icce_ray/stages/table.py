"""The chain: every stage's name, folder and inputs, the settings its result depends on, its needs.

Nothing heavy is imported here: a stage's own file is imported when the stage runs, so that a
command that only looks at a run, or skips all of it, starts at once. Even the settings' tree takes
a third of a second to define, which `icce-ray status` does not need.

Shapes: N images, D features, M neighbors, H heads, K clusters.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from icce_ray.core import constants
from icce_ray.core.evaluation.kmeans import kmeans_is_large
from icce_ray.errors import IcceError
from icce_ray.stages.base import Need, Size, Stage

if TYPE_CHECKING:
    from icce_ray.config.schema import Config
    from icce_ray.distributed.cluster import Cluster

FEATURES = 1024  # D of a plan, while it is not known
PROCESS = 5.2e8  # bytes of a process with torch and Ray before it works: 0.47 to 0.56 GB measured
LISTING = 450  # bytes of memory per image while listing, as measured
WRITING = 20  # bytes per number while a column of lists is read or written as Parquet: the values,
# two levels each, pages before and after compression, which Arrow keeps for the next
IMAGE = 6e6  # bytes of activations per image of 224 x 224 in a batch: measured 4e6 to 7e6 of
# ResNet-18, 7e6 of DINOv2's ViT-S, 15e6 of EfficientNet-Lite0
VIT_L = 304e6  # weights; a backbone's own number is not known before it is made

BROWSE_BYTES = 5000  # of an image on the pages of report.browse, photos, as measured

ROWS_PER_FILE = 1_000_000  # of the index, and of the heads' clusters
QUERY_ROWS = 65_536  # of one Ray task of the search, and of the file that it writes
SEARCHED = ("pca", "search", "nprobe", "max_neighbors")  # of the group neighbors
SELECTED = ("rule", "k", "threshold", "min_neighbors")  # of the same group


def settings(group: Any) -> Any:
    """The values of a group of settings that can change a result. See config.schema.settings."""
    from icce_ray.config import schema

    return schema.settings(group)


def _content(name: str, uri: str, modes: Sequence[str]) -> dict[str, str | None]:
    """What a text file holds that a setting names, so that an edited one counts as another setting.

    modes: values of the setting that name no file. A file that cannot be read is None: the checks
    before a run say so.
    """
    if uri in modes:
        return {}
    from icce_ray.rundir.storage import Storage

    try:
        info = Storage(uri).info()
        return {f"{name}_sha256": _digest(uri, info.size, info.mtime_ns)}
    except (OSError, IcceError):
        return {f"{name}_sha256": None}


@functools.lru_cache(maxsize=8)  # the chain asks before every stage
def _digest(uri: str, size: int | None, changed: int | None) -> str:
    from icce_ray.rundir import storage

    return hashlib.sha256(storage.read(uri)).hexdigest()[:16]


# --- index ---------------------------------------------------------------------------------------


def _index_settings(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = settings(config.data)
    del data["labels"]  # ground truth is evaluate's
    return {"data": data}


def _index_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    images = size.images or 0
    return Need(memory=PROCESS + images * LISTING, disk=images * 10.0, where="driver")


# --- embed ---------------------------------------------------------------------------------------


def _embed_settings(config: Config) -> dict[str, Any]:
    if config.data.embeddings:  # which is in the settings of `index`
        return {"source": "embeddings that were given"}
    embed = settings(config.embed)
    del embed["max_bad_fraction"]  # decides whether there is a result, not which
    return {"backbone": settings(config.backbone), "embed": embed}


def _embed_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    rows, width = size.images or 0, size.features or FEATURES
    disk = 2.0 * rows * width
    if config.data.embeddings:
        # A shard as float16 as it was read, twice as float32, normalized, three times as it is put
        # in order; and what writes it.
        shard = min(rows, config.embed.shard_size) * width
        return Need(memory=PROCESS + (18.0 + WRITING) * shard, disk=disk, where="driver")
    # A batch's activations depend on the backbone, which is not known before it is made.
    side = max((one.image_size or 224) for one in config.backbone)
    memory = PROCESS + min(rows, config.embed.batch_size) * IMAGE * (side / 224) ** 2
    return Need(memory=memory, disk=disk, where="Ray Data: CPU tasks decode, actors embed")


# --- search and select ---------------------------------------------------------------------------


def _search_settings(config: Config) -> dict[str, Any]:
    return {"neighbors": {name: getattr(config.neighbors, name) for name in SEARCHED}}


def _search_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    images, given = size.images or 0, size.features or FEATURES
    features = min(given, config.neighbors.pca or given)
    most = min(config.neighbors.max_neighbors, max(images, 1))
    # What one task finds, as arrays and as it is written; and the rows that it compares.
    asked = (12.0 + WRITING) * min(images, QUERY_ROWS) * most
    asked += 4.0 * features * (min(images, constants.BASE_CHUNK) + constants.QUERY_CHUNK)
    # Nothing is started to find out what there is; a cluster is taken to search exactly.
    cores = os.cpu_count() or 1
    seconds = constants.exact_seconds(images, features, cores, 0) if cluster.is_local else 0.0
    approximate = constants.is_approximate(config.neighbors.search, seconds)
    index = constants.ivf_bytes(images, features) if approximate else 0.0
    fitted = _projection_bytes(images, given, config.neighbors.pca)
    memory = PROCESS + max(fitted, index, asked)
    # As arrays on the node: the embeddings and their numbers, their components, the index.
    arrays = 2.0 * images * given + 8.0 * images
    arrays += 2.0 * images * features * ((config.neighbors.pca is not None) + approximate)
    disk = 6.0 * images * most
    return Need(memory=memory, disk=disk, cache=arrays, where="Ray tasks")


def _projection_bytes(images: int, given: int, components: int | None) -> float:
    """Memory while principal components are fitted: the sample as float32 and float64, its
    components likewise, and the similarities of some rows with it, which are there twice."""
    if components is None:
        return 0.0
    rows = min(images, constants.STATISTICS_ROWS)
    return rows * (12.0 * (given + min(given, components)) + 8.0 * constants.COMPARED_ROWS)


def _select_settings(config: Config) -> dict[str, Any]:
    """With num_classes, which cuts k."""
    chosen = {name: getattr(config.neighbors, name) for name in SELECTED}
    return {"neighbors": chosen, "num_classes": config.num_classes}


def _select_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    """A shard as it is read, and which of all similarities suffice. As arrays, the lists."""
    images = size.images or 0
    most = min(config.neighbors.max_neighbors, max(images, 1))
    lists, shard = 1.0 * images * most, WRITING * min(images, QUERY_ROWS) * most
    return Need(PROCESS + shard + lists + 16.0 * images, disk=2.0 * images, cache=6 * lists)


# --- heads and consensus -------------------------------------------------------------------------


def _heads_settings(config: Config) -> dict[str, Any]:
    """With what stands for the settings not given, so that other defaults make other heads."""
    heads, clusters = config.heads, config.head_clusters
    resolved = {
        "clusters": clusters,
        "steps": heads.steps_of(clusters),
        "start": heads.start_of(clusters),
        "batch_size": heads.batch_size or constants.default_batch(clusters),
        "count": config.head_count,
        "balance": settings(heads.balances_of(clusters)),
    }
    return {"heads": {**settings(heads), **resolved}, "seed": config.seed}


def _heads_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    images, features = size.images or 0, size.features or FEATURES
    inputs = min(features, config.heads.pca or features)
    widths = [inputs, *config.heads.hidden, config.head_clusters]
    weights = sum(i * o for i, o in itertools.pairwise(widths)) * config.head_count
    pairs = config.heads.batch_size or constants.default_batch(config.head_clusters)
    own = math.ceil(config.head_count / max(1, config.heads.num_workers or 1))
    # Float32 copies of the logits at one time: on a GPU those of student and teacher, in half
    # precision; on a CPU the temporary ones as well. Both measured, as are the hidden layers'.
    logits = config.head_clusters * (1 if config.ray.num_gpus else 7)
    activations = 2 * pairs * own * (6 * sum(config.heads.hidden) + logits) * 4
    matrix = images * (inputs * 2 + config.neighbors.max_neighbors * 4 + 4)
    assigned = images * config.head_count * (2 if config.head_clusters < 2**15 else 4)
    # student, teacher, gradient and AdamW's two moments: five copies of the weights, float32
    training = 5 * 4 * weights + activations
    # At the end: as they are computed, in the checkpoint and its bytes, and twice in the driver.
    ending = 5 * assigned + WRITING * config.head_count * min(images, ROWS_PER_FILE)
    fitted = _projection_bytes(images, features, config.heads.pca)
    work = max(training, ending - matrix, _start_bytes(config, images, inputs))
    # Arrays of the fit that are too small for pages of their own stay with the allocator.
    memory = PROCESS + max(fitted, 0.3 * fitted + matrix + work)
    disk = assigned + 4 * 4 * weights
    return Need(memory=memory, disk=disk, cache=16.0 * images, where="train workers")


def _start_bytes(config: Config, images: int, inputs: int) -> float:
    """Memory while linear heads get their first clusters."""
    clusters = config.head_clusters
    kind = config.heads.start_of(clusters)
    if kind == "random":
        return 0.0
    # Rows as float32, smoothed, and the part of one head; and how near they are to each cluster.
    rows = min(images, max(constants.START_ROWS, 50 * clusters))
    sample = 12.0 * rows * inputs + 2.0 * rows * clusters
    if kind == "kmeans":
        return sample
    # Before, images are averaged with their neighbors, from one array into another, the first of
    # which takes the variance of some rows, float64; then a tree takes the distances of all pairs
    # of some rows, float64, twice.
    averaging = images * (2.0 * 2 * inputs + 40)
    averaging += 3 * 8.0 * min(images, constants.STATISTICS_ROWS) * inputs
    points = min(rows, max(constants.TREE_ROWS, constants.TREE_ROWS_PER_CLUSTER * clusters))
    return max(averaging, sample + 8.0 * points**2)


def _consensus_settings(config: Config) -> dict[str, Any]:
    from icce_ray.config.schema import KEEP_LEAST, KEEP_SHARE

    keep = config.consensus.keep or [KEEP_SHARE, KEEP_LEAST]
    return {
        "consensus": {**settings(config.consensus), "keep": keep},
        "evidence": constants.EVIDENCE,
        "confidence": [constants.CONFIDENCE_NEIGHBORS, constants.CONFIDENCE_WIDE],
        "num_classes": config.num_classes,
        "seed": config.seed,
    }


def _consensus_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    """The labels of the merged heads twice, a few columns, and what the method makes."""
    images, heads = size.images or 0, config.kept_heads(config.head_count)
    assigned = images * heads * (2 if config.head_clusters < 2**15 else 4)
    fitted = min(images, constants.FITTED_ROWS)
    graph = {
        "cspa": 26.0 * min(images, constants.CSPA_ROWS) ** 2,
        "hbgf": 280.0 * fitted * heads,
        "dawid-skene": 100.0 * fitted * heads,
    }
    # Scores of the clusters that the heads hold possible, 56 bytes each in several arrays: a few
    # where heads agree, half of all where they hardly do. Here, a quarter.
    threads = config.ray.num_cpus or (os.cpu_count() if cluster.is_local else 1) or 1
    scored = min(images, threads * constants.SCORED_ROWS) * config.num_classes
    graph["dawid-skene"] += 14.0 * scored
    memory = PROCESS + 2 * assigned + 80.0 * images + graph.get(config.consensus.method, 0.0)
    every = assigned / heads * config.head_count
    return Need(memory=memory, disk=6.0 * images, cache=every, where="one task")


# --- answer --------------------------------------------------------------------------------------


def _answer_settings(config: Config) -> dict[str, Any]:
    """The seed, which draws the images that the distance of duplicates is taken from. And what the
    names are taken from, where it was chosen: runs of earlier versions stay finished."""
    from icce_ray.config.schema import NAMING_MODES, AnswerConfig

    if config.answer == AnswerConfig():
        return {"seed": config.seed}
    words = _content("vocabulary", config.answer.vocabulary, NAMING_MODES)
    return {"seed": config.seed, "answer": {**settings(config.answer), **words}}


def _answer_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    """In the task, rows compared at once; in the driver, addresses and two files of them."""
    images = size.images or 0
    compared = min(1.2e8, 80.0 * images * (size.features or FEATURES))
    memory = PROCESS + max(compared, 300.0 * images)
    return Need(memory=memory, disk=100.0 * images, where="driver, one task")


# --- classify ------------------------------------------------------------------------------------


def _classify_settings(config: Config) -> dict[str, Any]:
    return {
        "classifier": settings(config.classifier),
        "num_classes": config.num_classes,
        "seed": config.seed,
    }


def _classify_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    count, features, chosen = size.images or 0, size.features or FEATURES, config.classifier
    clusters = config.num_classes
    answers = 8.0 * count
    head = features * constants.HIDDEN if chosen.kind == "mlp" else features * clusters
    if chosen.kind != "finetune":
        # On a CPU the rows are read from the mapped file; a GPU holds all of them.
        matrix = count * features * 2 if config.ray.num_gpus else 0
        batch = chosen.batch_size * (features + clusters) * 4 * 4
        calibrated = min(count, constants.CALIBRATED_ROWS) * (6 * features + 12 * clusters)
        memory = PROCESS + matrix + max(batch, calibrated) + 16 * head + 60.0 * count
        where = "train workers" if chosen.num_workers else "one Ray task"
        # Rows that new images are compared with, also in what the task returned.
        kept = 4.0 * min(count, constants.REFERENCES) * features
        disk = answers + kept + 8 * head
        return Need(memory=memory, disk=disk, cache=answers / 2, where=where)
    pixels = 3 * (config.backbone[0].image_size or 224) ** 2
    buffer = constants.SHUFFLE_BATCHES * chosen.batch_size * pixels
    weights = 4 * 4 * VIT_L  # with their gradient and two moments
    disk = answers + 2 * 3 * 4 * VIT_L
    memory = PROCESS + weights + buffer
    return Need(memory=memory, disk=disk, cache=answers / 2, where="train workers")


# --- evaluate and report -------------------------------------------------------------------------


def _evaluate_settings(config: Config) -> dict[str, Any]:
    from icce_ray.config.schema import LABEL_MODES

    return {
        "evaluate": settings(config.evaluate),
        "labels": config.data.labels,
        **_content("labels", config.data.labels, LABEL_MODES),
        "seed": config.seed,
        "num_classes": config.num_classes,
    }


def _evaluate_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    """Of k-means, the rows that it holds at once, twice as float32; or of the scores, images and
    whether their neighbors share their cluster, and a few columns."""
    rows, width = size.images or 0, size.features or 0
    large = kmeans_is_large(rows, width, config.num_classes)
    held = min(rows, max(100_000, 256 * config.num_classes)) if large else rows
    near = 14.0 * min(rows, QUERY_ROWS) * config.neighbors.max_neighbors + 100.0 * rows
    memory = PROCESS + max(8.0 * held * width if config.evaluate.kmeans else 0.0, near)
    return Need(memory=memory, disk=1e6, cache=4.0 * rows, where="driver, one task (k-means)")


def _report_settings(config: Config) -> dict[str, Any]:
    return {**_evaluate_settings(config), "report": settings(config.report)}


def _report_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    """Columns per image, the page three times (pieces, text, bytes); the pages of all images are
    collected in the node's cache."""
    page, images = config.report.max_megabytes * 1e6, size.images or 0
    browsed = images if config.report.browse and not config.data.embeddings else 0
    pages = 1.0 * BROWSE_BYTES * browsed
    return Need(memory=PROCESS + 150.0 * images + 3 * page, disk=page + pages, cache=pages)


STAGES: tuple[Stage, ...] = (
    Stage("index", "index", (), _index_settings, _index_needs),
    Stage("embed", "embeddings", ("index",), _embed_settings, _embed_needs),
    Stage("search", "neighbors", ("embed",), _search_settings, _search_needs),
    Stage("select", "selection", ("embed", "search"), _select_settings, _select_needs),
    Stage("heads", "heads", ("embed", "search", "select"), _heads_settings, _heads_needs),
    Stage("consensus", "consensus", ("search", "heads"), _consensus_settings, _consensus_needs),
    Stage(
        "answer",
        "answer",
        ("index", "embed", "search", "consensus"),
        _answer_settings,
        _answer_needs,
    ),
    Stage(
        "classify",
        "classifier",
        ("index", "embed", "consensus"),
        _classify_settings,
        _classify_needs,
    ),
    Stage(
        "evaluate",
        "evaluation",
        ("index", "embed", "search", "select", "heads", "consensus", "classify"),
        _evaluate_settings,
        _evaluate_needs,
    ),
    Stage(
        "report",
        "report",
        (
            *("index", "embed", "search", "select", "heads", "consensus"),
            *("answer", "classify", "evaluate"),
        ),
        _report_settings,
        _report_needs,
        is_view=True,
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def stage(name: str) -> Stage:
    """The stage of that name."""
    return STAGES[NAMES.index(name)]
