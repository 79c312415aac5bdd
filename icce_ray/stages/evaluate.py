"""Scores of a run: against ground truth where there is any, and label-free ones always.

Reads embeddings, neighbors, head assignments, consensus and classifier predictions, all in the row
order of the embeddings (a quarantined image has no row). Writes, in evaluation/:

  metrics.json         every score (see `run`)
  clusters.parquet     cluster, size, confidence (mean), labeled, matched, majority, purity
  contingency.parquet  class, cluster, count: the non-zero cells   (with labels)
  classes.json         names of the classes, by code               (with labels)

Ground truth is read here and by `report`; by sweeps and `predict` through this file, when their
clusters are made.
Shapes: N rows, C classes, K clusters, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config
from icce_ray.config.schema import settings as slice_of
from icce_ray.core.ensemble.agreement import mean_nmi
from icce_ray.core.evaluation import kmeans as kmeans_
from icce_ray.core.evaluation import labelfree
from icce_ray.core.evaluation import truth as metrics
from icce_ray.distributed.cluster import Cluster, Request, Wait, result
from icce_ray.errors import ArtifactError, DataError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage

FOLDER = "evaluation"
CONTINGENCY_SCHEMA = pa.schema(
    [("class", pa.int32()), ("cluster", pa.int32()), ("count", pa.int64())]
)
CLUSTERS_SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("size", pa.int64()),
        ("confidence", pa.float32()),  # mean over its images; null where it is empty
        ("labeled", pa.int64()),
        ("matched", pa.int32()),  # class matched one to one, or null
        ("majority", pa.int32()),  # most frequent class, or null
        ("purity", pa.float32()),  # share of that class among the labeled images
    ]
)


@dataclass(frozen=True)
class Truth:
    """Ground truth in the row order of the embeddings."""

    codes: np.ndarray  # int64 [N], -1 where an image has no label
    names: list[str]  # [C]

    @property
    def known(self) -> np.ndarray:
        return self.codes >= 0


def settings(config: Config) -> dict[str, Any]:
    """The slice of the config that the scores depend on."""
    return {
        "evaluate": slice_of(config.evaluate),
        "labels": config.data.labels,
        "seed": config.seed,
        "num_classes": config.num_classes,
    }


def estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    """Memory is that of the k-means task: one float32 copy of what it holds at once."""
    rows, width = size.images or 0, size.features or 0
    large = kmeans_.kmeans_is_large(rows, width, config.num_classes)
    held = min(rows, max(100_000, 256 * config.num_classes)) if large else rows
    return Need(memory=4.0 * held * width * 2, disk=2e6, where="one task (k-means)")


def truth(config: Config, run: RunDirectory, image_ids: np.ndarray) -> Truth | None:
    """Labels of these images, or None where there are none. image_ids: int64 [N]."""
    from icce_ray.stages.index import load_labels

    labels = load_labels(config, run)
    if labels is None:
        return None
    codes, names = labels
    if len(image_ids) and int(image_ids.max()) >= len(codes):
        raise DataError(
            f"there are {len(codes)} labels for images numbered up to {int(image_ids.max())}; "
            "data.labels must have one label per listed image"
        )
    codes = np.asarray(codes)[np.asarray(image_ids)]
    return Truth(codes, [str(name) for name in names]) if (codes >= 0).any() else None


def column(run: RunDirectory, folder: str, name: str, rows: int) -> np.ndarray:
    """A column of a finished stage, checked to have one row per embedding."""
    values = run.matrix(folder, name)
    if len(values) != rows:
        raise ArtifactError(
            f"{run.path(folder)} has {len(values)} rows, the embeddings {rows}. "
            "They are of different runs: use --overwrite, or another run_dir."
        )
    return values


def run(context: Context) -> Outcome:
    """Score the run.

    metrics.json: `rows`, `num_classes`, `label_free` {head_agreement, neighbor_consistency,
    probe_agreement, confidence, confident, sizes {...}} and, with labels, `labeled`, `classes`,
    `acc`, `nmi`, `ari` (of the consensus), `classifier`, `kmeans` {acc, nmi, ari}, `heads`
    {acc [H], acc_mean, acc_best, acc_min}, `calibration`, `purity`, `matched`.

    Raises:
        ArtifactError: artifacts of different runs.
    """
    config, files = context.config, context.run
    known = truth(config, files, files.matrix("embeddings", "image_id"))
    rows = len(files.matrix("embeddings", "image_id"))
    clusters = np.asarray(column(files, "consensus", "cluster", rows))
    confidence = np.asarray(column(files, "consensus", "confidence", rows))
    probe = _probe(files, rows)
    result: dict[str, Any] = {"rows": rows, "num_classes": config.num_classes}
    result["label_free"] = _label_free(context, clusters, confidence, probe)
    if known is not None:
        result |= _against(context, known, clusters, confidence, probe)
        _write_contingency(files, known, clusters)
    _write_clusters(files, known, clusters, confidence, config.num_classes)
    files.write_json(result, FOLDER, "metrics.json")
    context.reporter.say(summary(result))
    return Outcome(rows=rows, results=_headline(result))


def summary(result: dict[str, Any]) -> str:
    """One line for a person, from the content of metrics.json."""
    free = result["label_free"]
    if "acc" not in result:
        return (
            f"No ground truth. Heads agree with an NMI of {free['head_agreement']:.2f}; "
            f"{free['neighbor_consistency']:.0%} of an image's neighbors share its cluster; "
            f"mean confidence {free['confidence']:.2f}."
        )
    line = f"Accuracy: consensus {result['acc']:.1%}"
    if "kmeans" in result:
        line += f", k-means on the same features {result['kmeans']['acc']:.1%}"
    if "classifier" in result:
        line += f", classifier {result['classifier']['acc']:.1%}"
    heads = result["heads"]
    return (
        f"{line}; single heads {heads['acc_mean']:.1%} on average, {heads['acc_best']:.1%} at best "
        f"(NMI {result['nmi']:.3f}, ARI {result['ari']:.3f}, {result['labeled']:,} labeled images)."
    )


# --- label-free ----------------------------------------------------------------------------------


def _probe(files: RunDirectory, rows: int) -> np.ndarray | None:
    """The classifier's own prediction per row, where that stage has written one."""
    if files.manifest("classifier") is None or not files.list("classifier", ".parquet"):
        return None
    return np.asarray(column(files, "classifier", "cluster", rows))


def _label_free(
    context: Context, clusters: np.ndarray, confidence: np.ndarray, probe: np.ndarray | None
) -> dict[str, Any]:
    files, rows = context.run, len(clusters)
    assignments = merged_heads(files, column(files, "heads", "assignments", rows))
    ids, counts = column(files, "neighbors", "ids", rows), column(files, "neighbors", "count", rows)
    sizes = labelfree.spread_of_sizes(clusters, context.config.num_classes)
    return {
        "head_agreement": mean_nmi(assignments),
        "neighbor_consistency": labelfree.neighbor_share(clusters, ids, counts),
        "probe_agreement": None if probe is None else float((probe == clusters).mean()),
        "confidence": float(confidence.mean()),
        "confident": float((confidence >= 0.9).mean()),
        "sizes": {name: value for name, value in sizes.items() if name != "sizes"},
    }


# --- against ground truth ------------------------------------------------------------------------


def _against(
    context: Context,
    known: Truth,
    clusters: np.ndarray,
    confidence: np.ndarray,
    probe: np.ndarray | None,
) -> dict[str, Any]:
    config, files = context.config, context.run
    rows = known.known
    labels = known.codes[rows]
    match = metrics.matching(labels, clusters[rows])
    result: dict[str, Any] = {"labeled": int(rows.sum()), "classes": len(known.names)}
    result |= metrics.scores(labels, clusters[rows])
    result["purity"] = float(match.confusion.max(axis=0).sum() / match.confusion.sum())
    correct = match.cluster_class[clusters[rows]] == labels
    result["calibration"] = metrics.calibration(confidence[rows], correct)
    merged = merged_heads(files, files.matrix("heads", "assignments"))
    result["heads"] = accuracy_of_heads(merged[rows], labels)
    if probe is not None:
        result["classifier"] = metrics.scores(labels, probe[rows])
    if config.evaluate.kmeans:
        result["kmeans"] = metrics.scores(labels, _kmeans(context, len(clusters))[rows])
    return result


def merged_heads(files: RunDirectory, assignments: np.ndarray) -> np.ndarray:
    """The heads that the consensus was made of, int [N, H]."""
    done = files.manifest("consensus")
    kept = done.results.get("kept") if done else None
    return np.asarray(assignments if kept is None else assignments[:, kept])


def accuracy_of_heads(assignments: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy of each single head. assignments: int [N, H]."""
    each = [metrics.accuracy(labels, assignments[:, h]) for h in range(assignments.shape[1])]
    return {
        "acc": each,
        "acc_mean": float(np.mean(each)),
        "acc_best": float(np.max(each)),
        "acc_min": float(np.min(each)),
    }


def _kmeans(context: Context, rows: int) -> np.ndarray:
    """k-means in a Ray task, which reads the features where it runs. Returns int32 [N]."""
    config, files, cluster = context.config, context.run, context.cluster
    ray = cluster.start()
    width = files.matrix("embeddings", "embedding").shape[1]
    large = kmeans_.kmeans_is_large(rows, width, config.num_classes)
    gpus = cluster.gpus_each(None) if large else 0
    context.reporter.say(
        f"k-means for comparison: {rows:,} x {width} features, K={config.num_classes}, "
        f"{kmeans_.RESTARTS} restarts"
    )
    request = Request(cluster.cpus_each(1, gpus), gpus)
    task = ray.remote(num_cpus=request.cpus, num_gpus=gpus)(_kmeans_task)
    ref = task.remote(files, config.num_classes, config.seed, gpus)
    return result(ray, ref, Wait(cluster, context.reporter, [request], "Set evaluate.kmeans=false"))


def _kmeans_task(files: RunDirectory, num_clusters: int, seed: int, gpus: float) -> np.ndarray:
    features = files.matrix("embeddings", "embedding")
    return kmeans_.kmeans_baseline(features, num_clusters, seed, gpu=gpus > 0)


# --- writing -------------------------------------------------------------------------------------


def _write_contingency(files: RunDirectory, known: Truth, clusters: np.ndarray) -> None:
    table = metrics.contingency(known.codes[known.known], clusters[known.known])
    classes, columns = np.nonzero(table)
    content = {"class": classes, "cluster": columns, "count": table[classes, columns]}
    files.write_table(pa.table(content).cast(CONTINGENCY_SCHEMA), FOLDER, "contingency.parquet")
    files.write_json({"names": known.names}, FOLDER, "classes.json")


def _write_clusters(
    files: RunDirectory,
    known: Truth | None,
    clusters: np.ndarray,
    confidence: np.ndarray,
    num_clusters: int,
) -> None:
    sizes = np.bincount(clusters, minlength=num_clusters)
    count = len(sizes)
    total = np.bincount(clusters, weights=confidence, minlength=count)
    labeled = np.zeros(count, np.int64)
    matched, majority = np.full(count, -1), np.full(count, -1)
    purity = np.zeros(count)
    if known is not None:
        table = metrics.contingency(known.codes[known.known], clusters[known.known])
        seen = table.shape[1]
        labeled[:seen] = table.sum(axis=0)
        matched[:seen] = metrics.match(table).cluster_class
        majority[:seen] = np.where(labeled[:seen] > 0, table.argmax(axis=0), -1)
        purity[:seen] = table.max(axis=0) / np.maximum(1, labeled[:seen])
    content = [
        pa.array(np.arange(count)),
        pa.array(sizes),
        pa.array(total / np.maximum(1, sizes), mask=sizes == 0),
        pa.array(labeled),
        pa.array(matched, mask=(matched < 0) | (labeled == 0)),
        pa.array(majority, mask=majority < 0),
        pa.array(purity, mask=labeled == 0),
    ]
    table = pa.Table.from_arrays(content, names=CLUSTERS_SCHEMA.names)
    files.write_table(table.cast(CLUSTERS_SCHEMA), FOLDER, "clusters.parquet")


def _headline(result: dict[str, Any]) -> dict[str, Any]:
    """The scores a table of runs shows, flat, for the manifest."""
    free = result["label_free"]
    names = ("head_agreement", "neighbor_consistency", "probe_agreement", "confidence")
    flat = {name: free[name] for name in names}
    flat |= {name: result[name] for name in ("acc", "nmi", "ari") if name in result}
    for part in ("kmeans", "classifier"):
        if part in result:
            flat[f"{part}_acc"] = result[part]["acc"]
    return flat


STAGE = Stage(
    name="evaluate",
    folder=FOLDER,
    needs=("index", "embed", "neighbors", "heads", "consensus", "classifier"),
    settings=settings,
    run=run,
    estimate=estimate,
)
