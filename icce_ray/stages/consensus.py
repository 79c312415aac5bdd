"""Stage 5: the heads' clusterings become one. A single Ray task; only label vectors are read.

Writes consensus/part-00000.parquet: image_id, cluster, confidence, in the heads' row order.
Shapes: N images, H heads, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.artifacts import CONSENSUS_SCHEMA, RunDirectory
from icce_ray.cluster import Cluster, fetch
from icce_ray.config import Config, ConsensusConfig, settings
from icce_ray.core import consensus as core
from icce_ray.stages import Context, Need, Outcome, Size, Stage

FOLDER = "consensus"


def _settings(config: Config) -> dict[str, Any]:
    return {
        "consensus": settings(config.consensus),
        "num_classes": config.num_classes,
        "seed": config.seed,
    }


def _solve(
    run: RunDirectory, config: ConsensusConfig, num_clusters: int, seed: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Runs in the task, which opens the assignments on its own node."""
    assignments = run.matrix("heads", "assignments")
    found = core.consensus(
        assignments,
        num_clusters,
        config.method,
        max_rows=config.max_rows,
        iterations=config.iterations,
        seed=seed,
    )
    agreement = core.head_agreement(assignments, num_clusters, max_rows=config.max_rows)
    return found.labels, found.confidence, {**found.info, "head_agreement": agreement}


def _run(context: Context) -> Outcome:
    config, run = context.config, context.run
    ray = context.cluster.start()
    task = ray.remote(num_cpus=1)(_solve)
    ref = task.remote(run, config.consensus, config.num_classes, config.seed)
    labels, confidence, info = fetch(ray, ref)
    table = pa.table([run.matrix("heads", "image_id"), labels, confidence], CONSENSUS_SCHEMA)
    run.write_table(table, FOLDER, "part-00000.parquet")
    context.reporter.say(_summary(info, float(confidence.mean())))
    sizes = np.bincount(labels, minlength=config.num_classes).tolist()
    results = {**info, "sizes": sizes, "confidence": float(confidence.mean())}
    return Outcome(len(labels), results)


def _summary(info: dict[str, Any], confidence: float) -> str:
    text = (
        f"consensus of {info['heads']} heads by {info['method']}: heads agree with an NMI of "
        f"{info['head_agreement']:.2f}, mean confidence {confidence:.2f}"
    )
    if info["empty_clusters"]:
        text += f"; {info['empty_clusters']} of {info['num_clusters']} clusters are empty"
    return text


def _estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    """From measurements: the label matrix twice, and the graph or table of the method."""
    images, heads = size.images or 0, config.heads.count
    labels = 2 * images * heads * (2 if config.num_classes < 2**15 else 4)
    fitted = min(images, config.consensus.max_rows)
    graph = {
        "cspa": 26.0 * min(images, core.CSPA_ROWS) ** 2,
        "hgpa": 300.0 * fitted * max(core.CLIQUE_DEGREE // 2, heads),
        "hbgf": 280.0 * fitted * heads,
        "dawid-skene": 60.0 * fitted * heads,
    }
    memory = 2e8 + labels + graph.get(config.consensus.method, 0.0)
    return Need(memory=memory, disk=16.0 * images, where="one task")


STAGE = Stage(
    name="consensus",
    folder=FOLDER,
    needs=("heads",),
    settings=_settings,
    run=_run,
    estimate=_estimate,
)
