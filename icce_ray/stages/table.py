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
FAISS = 2e8  # bytes that exact search takes beside its rows
LISTING = 450  # bytes of memory per image while listing, as measured
VIT_L = 304e6  # weights; a backbone's own number is not known before it is made

BROWSE_BYTES = 5000  # of an image on the pages of report.browse, photos, as measured

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
    return Need(memory=images * LISTING, disk=images * 40.0, where="driver")


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
        memory = 8.0 * min(rows, config.embed.shard_size) * width
        return Need(memory=memory, disk=disk, where="driver")
    flight = min(rows, 4 * config.embed.shard_size)
    where = "Ray Data: CPU tasks decode, actors embed"
    return Need(memory=1e9 + 4.0 * flight * width, disk=disk, where=where)


# --- search and select ---------------------------------------------------------------------------


def _search_settings(config: Config) -> dict[str, Any]:
    return {"neighbors": {name: getattr(config.neighbors, name) for name in SEARCHED}}


def _search_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    images, given = size.images or 0, size.features or FEATURES
    features = min(given, config.neighbors.pca or given)
    lists = 6.0 * images * min(config.neighbors.max_neighbors, max(images, 1))
    one = lists * min(1.0, QUERY_ROWS / max(images, 1))  # what one task finds
    chunk = 4.0 * features * (constants.BASE_CHUNK + constants.QUERY_CHUNK) + FAISS
    # Nothing is started to find out what there is; a cluster is taken to search exactly.
    cores = os.cpu_count() or 1
    seconds = constants.exact_seconds(images, features, cores, 0) if cluster.is_local else 0.0
    approximate = constants.is_approximate(config.neighbors.search, seconds)
    index = constants.ivf_bytes(images, features) if approximate else 0.0
    # As arrays on the node: the embeddings and their numbers, their components, the index.
    arrays = 2.0 * images * given + 8.0 * images
    arrays += 2.0 * images * features * ((config.neighbors.pca is not None) + approximate)
    return Need(memory=max(2 * one, index) + chunk, disk=lists, cache=arrays, where="Ray tasks")


def _select_settings(config: Config) -> dict[str, Any]:
    """With num_classes, which cuts k."""
    chosen = {name: getattr(config.neighbors, name) for name in SELECTED}
    return {"neighbors": chosen, "num_classes": config.num_classes}


def _select_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    """The similarities as a mapped array and as what is compared; the lists as arrays; counts."""
    images = size.images or 0
    lists = 1.0 * images * min(config.neighbors.max_neighbors, max(images, 1))
    return Need(memory=3 * lists + 16.0 * images, disk=16.0 * images, cache=6 * lists)


# --- heads and consensus -------------------------------------------------------------------------


def _heads_settings(config: Config) -> dict[str, Any]:
    """With what stands for the settings not given, so that other defaults make other heads."""
    heads, clusters = config.heads, config.head_clusters
    resolved = {
        "clusters": clusters,
        "steps": heads.steps_of(clusters),
        "start": heads.start_of(clusters),
        "batch_size": heads.batch_size or constants.default_batch(clusters),
        "balance": settings(heads.balances),
    }
    return {"heads": {**settings(heads), **resolved}, "seed": config.seed}


def _heads_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    images, features = size.images or 0, size.features or FEATURES
    inputs = min(features, config.heads.pca or features)
    widths = [inputs, *config.heads.hidden, config.head_clusters]
    weights = sum(i * o for i, o in itertools.pairwise(widths)) * config.heads.count
    pairs = config.heads.batch_size or constants.default_batch(config.head_clusters)
    own = math.ceil(config.heads.count / max(1, config.heads.num_workers or 1))
    # Float32 copies of the logits at one time: on a GPU those of student and teacher, in half
    # precision; on a CPU the temporary ones as well. Both measured, as are the hidden layers'.
    logits = config.head_clusters * (1 if config.ray.num_gpus else 7)
    activations = 2 * pairs * own * (6 * sum(config.heads.hidden) + logits) * 4
    matrix = images * (inputs * 2 + config.neighbors.max_neighbors * 4)
    assigned = images * config.heads.count * 2
    # student, teacher, gradient and AdamW's two moments: five copies of the weights, float32
    training = 5 * 4 * weights + activations
    # Before it, images are averaged with their neighbors, from one array into another.
    by_tree = config.heads.start_of(config.head_clusters) == "ward"
    averaging = images * (2 * 2 * inputs + 40) if by_tree else 0
    memory = matrix + max(training, averaging) + assigned
    disk = assigned + 4 * 4 * weights
    return Need(memory=memory, disk=disk, cache=16.0 * images, where="train workers")


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
    """From measurements: the label matrix twice, and the graph or table of the method."""
    images, heads = size.images or 0, config.heads.count
    assigned = images * heads * (2 if config.head_clusters < 2**15 else 4)
    fitted = min(images, constants.FITTED_ROWS)
    graph = {
        "cspa": 26.0 * min(images, constants.CSPA_ROWS) ** 2,
        "hbgf": 280.0 * fitted * heads,
        "dawid-skene": 60.0 * fitted * heads,
    }
    memory = 2e8 + 2 * assigned + graph.get(config.consensus.method, 0.0)
    return Need(memory=memory, disk=16.0 * images, cache=1.0 * assigned, where="one task")


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
    """Addresses, and the two files of them as text; the scores take little."""
    images = size.images or 0
    return Need(memory=2e8 + 800.0 * images, disk=300.0 * images, where="one task")


# --- classify ------------------------------------------------------------------------------------


def _classify_settings(config: Config) -> dict[str, Any]:
    return {
        "classifier": settings(config.classifier),
        "num_classes": config.num_classes,
        "seed": config.seed,
    }


def _classify_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    count, features, chosen = size.images or 0, size.features or FEATURES, config.classifier
    answers = 16.0 * count
    head = features * constants.HIDDEN if chosen.kind == "mlp" else features * config.num_classes
    if chosen.kind != "finetune":
        batch = chosen.batch_size * (features + config.num_classes) * 4 * 4
        memory = count * features * 2 + batch + 16 * head
        where = "train workers" if chosen.num_workers else "one Ray task"
        return Need(memory=memory, disk=answers, cache=answers, where=where)
    pixels = 3 * (config.backbone[0].image_size or 224) ** 2
    buffer = constants.SHUFFLE_BATCHES * chosen.batch_size * pixels
    weights = 4 * 4 * VIT_L  # with their gradient and two moments
    disk = answers + 2 * 3 * 4 * VIT_L
    return Need(memory=weights + buffer, disk=disk, cache=answers, where="train workers")


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
    """Memory is that of the k-means task: one float32 copy of what it holds at once."""
    rows, width = size.images or 0, size.features or 0
    large = kmeans_is_large(rows, width, config.num_classes)
    held = min(rows, max(100_000, 256 * config.num_classes)) if large else rows
    memory = 4.0 * held * width * 2
    return Need(memory=memory, disk=2e6, cache=16.0 * rows, where="one task (k-means)")


def _report_settings(config: Config) -> dict[str, Any]:
    return {**_evaluate_settings(config), "report": settings(config.report)}


def _report_needs(config: Config, size: Size, cluster: Cluster) -> Need:
    """Columns of a few bytes per image, the page twice (pieces and text); the pages of all images
    are collected in the node's cache."""
    page, images = config.report.max_megabytes * 1e6, size.images or 0
    browsed = images if config.report.browse and not config.data.embeddings else 0
    pages = 1.0 * BROWSE_BYTES * browsed
    return Need(memory=150.0 * images + 3 * page, disk=page + pages, cache=pages)


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
