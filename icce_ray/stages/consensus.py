"""Consensus: the heads' clusterings become one. A single Ray task. It reads label vectors, and
neighbor lists: some to tell good heads by, all to tell how sure an image is.

Writes consensus/part-00000.parquet: image_id, cluster, confidence, in the heads' row order.
Shapes: N images, H heads, L clusters per head, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config
from icce_ray.core.constants import CONFIDENCE_NEIGHBORS
from icce_ray.core.ensemble import agreement as agreement_
from icce_ray.core.ensemble import selection
from icce_ray.core.ensemble.confidence import supported
from icce_ray.core.neighbors import reference_k
from icce_ray.distributed.cluster import Request
from icce_ray.distributed.tasks import run_task
from icce_ray.errors import ArtifactError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import CONSENSUS_SCHEMA
from icce_ray.stages.base import Context, Outcome

FOLDER = "consensus"
LAST_LOSSES = 0.05  # share of the recorded losses whose mean is a head's final loss


def final_losses(run: RunDirectory) -> np.ndarray:
    """Loss of each head at the end of training, float64 [H]: the mean over its last records.

    One record is the loss of one batch; all heads saw the same ones.

    Raises:
        ArtifactError: where the heads' history holds none.
    """
    losses = np.array(run.read_json("heads", "history.json")["loss"], dtype=np.float64)
    if losses.ndim != 2 or not losses.size:
        raise ArtifactError(
            f"{run.path('heads', 'history.json')} holds no losses, which consensus.keep_by=loss "
            "and consensus.weights=loss need; use agreement"
        )
    return losses[-max(1, round(LAST_LOSSES * len(losses))) :].mean(axis=0)


def _solve(run: RunDirectory, config: Config) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Runs in the task, which opens the assignments on its own node."""
    assignments, ids = run.matrix("heads", "assignments"), run.matrix("neighbors", "ids")
    chosen = config.consensus
    by_loss = "loss" in (chosen.keep_by, chosen.weights)
    losses = final_losses(run) if by_loss else None
    weights, choice = selection.choose(assignments, ids, config, losses)
    found = selection.merge(assignments, weights, config)
    merged = assignments[:, weights > 0]
    agreement = agreement_.head_agreement(merged, config.head_clusters, max_rows=chosen.max_rows)
    confidence = supported(found.confidence, found.labels, _nearest(ids, config))
    told = {"head_weights": weights.tolist(), "head_agreement": agreement, **choice}
    info = {**found.info, **told}
    return found.labels, confidence, info


def _nearest(ids: np.ndarray, config: Config) -> np.ndarray:
    """The neighbors that confidence goes by, int [N, M]."""
    return ids[:, : reference_k(CONFIDENCE_NEIGHBORS, len(ids), config.num_classes, ids.shape[1])]


def run(context: Context) -> Outcome:
    """Merge the heads' clusterings into one, with a confidence for each image."""
    config, run = context.config, context.run
    labels, confidence, info = _solve(run, config) if context.in_process else _task(context)
    table = pa.table([run.matrix("heads", "image_id"), labels, confidence], CONSENSUS_SCHEMA)
    run.write_table(table, FOLDER, "part-00000.parquet")
    context.reporter.say(_summary(info, float(confidence.mean())))
    sizes = np.bincount(labels, minlength=config.num_classes).tolist()
    results = {**info, "sizes": sizes, "confidence": float(confidence.mean())}
    return Outcome(len(labels), results)


def _task(context: Context) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    advice = "Start a node with a CPU core"
    return run_task(context, _solve, context.run, context.config, request=Request(1), advice=advice)


def _summary(info: dict[str, Any], confidence: float) -> str:
    every = len(info["head_weights"])
    kept = f"{every}" if info["heads"] == every else f"{info['heads']} of {every}"
    aim = f" (heads.balance={info['balance']:g})" if "balance" in info else ""
    text = (
        f"consensus of {kept} heads{aim} by {info['method']}: heads agree with an NMI of "
        f"{info['head_agreement']:.2f}, mean confidence {confidence:.2f}"
    )
    if info["empty_clusters"]:
        text += f"; {info['empty_clusters']} of {info['num_clusters']} clusters are empty"
    return text
