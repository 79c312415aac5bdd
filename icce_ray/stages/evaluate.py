"""Scores of a run: label-free ones always, and against ground truth where there is any.

Reads embeddings, neighbors, head assignments, consensus and classifier predictions, all in the row
order of the embeddings (a quarantined image has no row). Writes, in evaluation/:

  metrics.json         every score (see `run`)
  clusters.parquet     cluster, size, confidence (mean), labeled, matched, majority, purity
  contingency.parquet  class, cluster, count: the non-zero cells   (with labels)
  classes.json         names of the classes, by code               (with labels)

Ground truth is read here, and by `report`, sweeps and `predict` through this file, after their
clusters are made.
Shapes: N rows, C classes, K clusters, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config
from icce_ray.core.ensemble.agreement import mean_nmi
from icce_ray.core.evaluation import kmeans as kmeans_
from icce_ray.core.evaluation import labelfree
from icce_ray.core.evaluation import truth as metrics
from icce_ray.distributed.cluster import Request
from icce_ray.distributed.tasks import run_task
from icce_ray.errors import DataError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages.base import Context, Outcome

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
        """Which rows have a label, bool [N]."""
        return self.codes >= 0


def truth(config: Config, run: RunDirectory, image_ids: np.ndarray) -> Truth | None:
    """Labels of these images, or None where there are none. image_ids: int64 [N]."""
    from icce_ray.data.labels import load_labels

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
    clusters = np.asarray(files.matrix("consensus", "cluster", rows))
    confidence = np.asarray(files.matrix("consensus", "confidence", rows))
    probe = _probe(files, rows)
    result: dict[str, Any] = {"rows": rows, "num_classes": config.num_classes}
    result["label_free"] = _label_free(context, clusters, confidence, probe)
    contingency = None
    if known is not None:
        result |= _against(context, known, clusters, confidence, probe)
        contingency = metrics.contingency(known.codes[known.known], clusters[known.known])
        _write_contingency(files, contingency, known.names)
    table = cluster_table(clusters, confidence, config.num_classes, contingency)
    files.write_table(table, FOLDER, "clusters.parquet")
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
    return np.asarray(files.matrix("classifier", "cluster", rows))


def _label_free(
    context: Context, clusters: np.ndarray, confidence: np.ndarray, probe: np.ndarray | None
) -> dict[str, Any]:
    files, rows = context.run, len(clusters)
    assignments = merged_heads(files, files.matrix("heads", "assignments", rows))
    ids, counts = files.matrix("neighbors", "ids", rows), files.matrix("selection", "count", rows)
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
    width = files.matrix("embeddings", "embedding").shape[1]
    large = kmeans_.kmeans_is_large(rows, width, config.num_classes)
    gpus = cluster.gpus_each() if large else 0
    context.reporter.say(
        f"k-means for comparison: {rows:,} x {width} features, K={config.num_classes}, "
        f"{kmeans_.RESTARTS} restarts"
    )
    request = Request(cluster.cpus_each(1, gpus), gpus)
    return run_task(
        context,
        _kmeans_task,
        *(files, config.num_classes, config.seed, gpus),
        request=request,
        advice="Set evaluate.kmeans=false",
    )


def _kmeans_task(files: RunDirectory, num_clusters: int, seed: int, gpus: float) -> np.ndarray:
    features = files.matrix("embeddings", "embedding")
    return kmeans_.kmeans_baseline(features, num_clusters, seed, gpu=gpus > 0)


# --- writing -------------------------------------------------------------------------------------


def _write_contingency(files: RunDirectory, contingency: np.ndarray, names: list[str]) -> None:
    """contingency: images per class and cluster, int64 [C, K]. Most cells of many classes are 0."""
    classes, clusters = np.nonzero(contingency)
    cells = {"class": classes, "cluster": clusters, "count": contingency[classes, clusters]}
    files.write_table(pa.table(cells).cast(CONTINGENCY_SCHEMA), FOLDER, "contingency.parquet")
    files.write_json({"names": names}, FOLDER, "classes.json")


def cluster_table(
    clusters: np.ndarray, confidence: np.ndarray, num_clusters: int, contingency: np.ndarray | None
) -> pa.Table:
    """A row per cluster: CLUSTERS_SCHEMA.

    clusters: int [N]. confidence: float [N]. contingency: labeled images per class and cluster,
    int64 [C, at most K], or None without labels.
    """
    sizes = np.bincount(clusters, minlength=num_clusters)
    count = len(sizes)
    total = np.bincount(clusters, weights=confidence, minlength=count)
    labeled = np.zeros(count, np.int64)
    matched, majority = np.full(count, -1), np.full(count, -1)
    purity = np.zeros(count)
    if contingency is not None:
        seen = contingency.shape[1]  # the last clusters may have no labeled image
        labeled[:seen] = contingency.sum(axis=0)
        matched[:seen] = metrics.match(contingency).cluster_class
        majority[:seen] = np.where(labeled[:seen] > 0, contingency.argmax(axis=0), -1)
        purity[:seen] = contingency.max(axis=0) / np.maximum(1, labeled[:seen])
    content = [
        pa.array(np.arange(count)),
        pa.array(sizes),
        pa.array(total / np.maximum(1, sizes), mask=sizes == 0),
        pa.array(labeled),
        pa.array(matched, mask=(matched < 0) | (labeled == 0)),
        pa.array(majority, mask=majority < 0),
        pa.array(purity, mask=labeled == 0),
    ]
    return pa.Table.from_arrays(content, names=CLUSTERS_SCHEMA.names).cast(CLUSTERS_SCHEMA)


def _headline(result: dict[str, Any]) -> dict[str, Any]:
    """The main scores, flat, for the manifest."""
    free = result["label_free"]
    names = ("head_agreement", "neighbor_consistency", "probe_agreement", "confidence")
    flat = {name: free[name] for name in names}
    flat |= {name: result[name] for name in ("acc", "nmi", "ari") if name in result}
    for part in ("kmeans", "classifier"):
        if part in result:
            flat[f"{part}_acc"] = result[part]["acc"]
    return flat
