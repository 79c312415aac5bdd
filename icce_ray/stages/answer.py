"""Answer: what the run found of every image, in two files that need nothing else.

Beside the folders, a row for every image of the index, in its order (LABELS_SCHEMA):

    labels.parquet, labels.csv

In answer/, in the row order of the embeddings, part-00000.parquet (ANSWER_SCHEMA), for the report.
Shapes: N images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from icce_ray.core import duplicates, preprocess
from icce_ray.core.ensemble.second import second_choice
from icce_ray.core.outliers import outlier_scores
from icce_ray.data import naming, reading
from icce_ray.distributed.cluster import Request
from icce_ray.distributed.inference import levels_of_run
from icce_ray.distributed.tasks import run_task
from icce_ray.errors import ConfigError
from icce_ray.report.galleries import choose
from icce_ray.rundir import curated
from icce_ray.rundir.directory import MANIFEST, RunDirectory
from icce_ray.rundir.results import LABELS, LABELS_CSV
from icce_ray.rundir.schemas import ANSWER_SCHEMA, LABELS_SCHEMA, QUARANTINE, as_csv
from icce_ray.stages.base import Context, Outcome

FOLDER = "answer"
ADVICE = "Start a node with a CPU core"
SHOWN = 9  # images of a cluster that answer.namer gets


def run(context: Context) -> Outcome:
    """Write the answer. Raises ArtifactError: artifacts of different runs."""
    files, config = context.run, context.config
    request = Request(context.cluster.cpus_each(1, 0), 0)
    work = (files, config.num_classes, config.seed)
    found, threshold = run_task(context, _find, *work, request=request, advice=ADVICE)
    files.write_table(found, FOLDER, "part-00000.parquet")
    if not files.places and files.exists(curated.FOLDER, MANIFEST):
        files.delete_file(curated.FOLDER, MANIFEST)
        context.reporter.event(
            "the labels are made anew: they are not curated any more. Edits that still fit are "
            f"applied by icce-ray curate RUN {files.address(curated.FOLDER, curated.EDITS)}"
        )
    words = _words(context)
    kept = curated.naming(files)
    labels = write_labels(files, found, curated.Naming(kept.names, kept.dropped, words))
    copies = int((found["duplicate_of"].to_numpy() >= 0).sum())
    context.reporter.say(
        f"labels of {labels.num_rows:,} images: {files.address(LABELS)}, and {LABELS_CSV}"
        + (f"; {copies:,} of them repeat another" if copies else "")
    )
    results = {"duplicates": copies, "duplicate_distance": threshold, "words": words}
    return Outcome(found.num_rows, results)


def write_labels(
    files: RunDirectory, found: pa.Table, known: curated.Naming | None = None
) -> pa.Table:
    """Write labels.parquet and labels.csv of a run, or of its curated clusters. found: the table of
    its answer. known: what the clusters are called, if not what the answer says. Returns
    LABELS_SCHEMA."""
    labels = _labels(files, found, known or curated.naming(files))
    files.write_table(labels, LABELS)
    files.write_bytes(as_csv(labels), LABELS_CSV)
    return labels


def _find(files: RunDirectory, num_clusters: int, seed: int) -> tuple[pa.Table, float]:
    """Runs in the task: ANSWER_SCHEMA, and the distance up to which two are duplicates."""
    image_ids = np.asarray(files.matrix("embeddings", "image_id"))
    rows = len(image_ids)
    ids, similarity = (files.matrix("neighbors", name, rows) for name in ("ids", "similarity"))
    clusters = np.asarray(files.matrix("consensus", "cluster", rows))
    same = duplicates.find(files.matrix("embeddings", "embedding"), ids, seed)
    columns = [
        image_ids,
        second_choice(ids, similarity, clusters, num_clusters),
        outlier_scores(similarity),
        np.where(same.later, image_ids[same.first], -1),
    ]
    return pa.table([pa.array(column) for column in columns], ANSWER_SCHEMA), same.threshold


def _labels(files: RunDirectory, found: pa.Table, known: curated.Naming) -> pa.Table:
    """LABELS_SCHEMA of all images of the index."""
    uris = files.read_table("index", columns=["uri"])["uri"].combine_chunks()
    count, rows = len(uris), found["image_id"].to_numpy()

    def spread(values: np.ndarray, nothing: Any) -> np.ndarray:
        """Values of the rows, at the places of their images."""
        out = np.full(count, nothing, values.dtype)
        out[rows] = values
        return out

    consensus = files.read_table("consensus")
    cluster = spread(consensus["cluster"].to_numpy(), -1)
    second = spread(found["second_choice"].to_numpy(), -1)
    unread, reasons = cluster < 0, _reasons(files, count)
    if known.dropped is not None:
        dropped = pa.array(cluster == known.dropped)
        reasons = pc.if_else(dropped, "dropped", reasons)
        cluster, second = (np.where(one == known.dropped, -1, one) for one in (cluster, second))
    clusters = int(cluster.max()) + 1
    names = pa.array([*known.all(clusters), None], pa.string())
    named = np.where(cluster < 0, clusters, cluster)
    copied = spread(found["duplicate_of"].to_numpy(), -1)
    columns = {
        "uri": uris,
        "cluster": pa.array(cluster),
        "name": names.take(pa.array(named)),
        "confidence": pa.array(spread(consensus["confidence"].to_numpy(), 0), mask=unread),
        "second_choice": pa.array(second, mask=second < 0),
        "outlier": pa.array(spread(found["outlier"].to_numpy(), 0), mask=unread),
        "duplicate_of": uris.take(pa.array(copied, mask=copied < 0)),
        "reason": reasons,
    }
    return pa.table(columns).cast(LABELS_SCHEMA)


# --- names in words ------------------------------------------------------------------------------


def _words(context: Context) -> naming.Names:
    """Suggested names, [K]; empty where there are none. That costs no run: a line says why."""
    chosen = context.config.answer
    if chosen.namer is None and chosen.vocabulary == "none":
        return []
    if chosen.namer is None and (why := naming.lacks(context.config)):
        asked = chosen.vocabulary != "auto"  # else most runs would print what nobody asked for
        (context.reporter.say if asked else context.reporter.log)(f"no names in words: {why}")
        return []
    try:
        if chosen.namer is not None:
            return _called(context, naming.namer(chosen.namer))
        return _compared(context)
    except ConfigError as error:
        context.reporter.event(f"no names in words: {error}")
        return []


def _compared(context: Context) -> naming.Names:
    """The nearest words of a vocabulary, found in one task."""
    files, config = context.run, context.config
    gpus = context.cluster.gpus_each()
    request = Request(context.cluster.cpus_each(1, gpus), gpus)
    work = (files, config.backbone, config.answer.vocabulary, config.num_classes, request.cpus)
    found: naming.Names = run_task(context, _near, *work, request=request, advice=ADVICE)
    return found


def _near(files: RunDirectory, backbones: Any, vocabulary: str, count: int, cpus: int) -> Any:
    """Runs in the task: see naming.by_vocabulary."""
    torch.set_num_threads(cpus)
    return naming.by_vocabulary(files, backbones, vocabulary, count)


def _called(context: Context, function: naming.Namer) -> naming.Names:
    """What a function of the user's calls the clusters, by the images that the report would show
    first."""
    files, config = context.run, context.config
    clusters, confidence = (
        np.asarray(files.matrix("consensus", name)) for name in ("cluster", "confidence")
    )
    picks = choose(clusters, confidence, config.num_classes, SHOWN, config.seed)
    index = files.read_table("index", columns=["uri", "offset", "size"])
    image_ids, levels = files.matrix("embeddings", "image_id"), levels_of_run(files)
    wrong: list[str] = []

    def images(rows: np.ndarray) -> Iterator[Any]:
        places = index.take(pa.array(np.asarray(image_ids[rows]))).to_pydict()
        for data in reading.read_many(places["uri"], places["offset"], places["size"]):
            with contextlib.suppress(preprocess.BadImage):  # it was moved or deleted since
                if isinstance(data, bytes):
                    yield preprocess.decode(data, config.embed.max_pixels, levels)

    names = naming.by_function(
        function,
        (list(images(sure)) for sure, _ in picks),
        lambda cluster, reason: wrong.append(f"cluster {cluster}: {reason}"),
    )
    if wrong:
        context.reporter.event(
            f"answer.namer failed for {len(wrong):,} of {len(names):,} clusters; the first is "
            f"{wrong[0]}"
        )
    return names


def _reasons(files: RunDirectory, count: int) -> pa.Array:
    """Why an image could not be read, else null: string [N of the index]."""
    reasons: list[str | None] = [None] * count
    if files.exists("embeddings", QUARANTINE):
        for bad in files.read_table("embeddings", QUARANTINE).to_pylist():
            reasons[bad["image_id"]] = bad["reason"]
    return pa.array(reasons, pa.string())
