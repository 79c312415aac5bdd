"""Stage 5: the heads' clusterings become one. A single Ray task. It reads label vectors, and
neighbor lists: to choose good heads, and to measure how sure each image is.

Writes consensus/part-00000.parquet: image_id, cluster, confidence, in the heads' row order.
Shapes: N images, H heads, L clusters per head, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import KEEP_LEAST, KEEP_SHARE, Config, settings
from icce_ray.core import method
from icce_ray.core.ensemble.base import Consensus
from icce_ray.core.ensemble.confidence import NEIGHBORS
from icce_ray.core.ensemble.consensus import FITTED_ROWS
from icce_ray.core.ensemble.graph import CSPA_ROWS
from icce_ray.core.evaluation.labelfree import EVIDENCE
from icce_ray.distributed.cluster import Cluster, Request, Wait, result
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import CONSENSUS_SCHEMA
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage

FOLDER = "consensus"


def _settings(config: Config) -> dict[str, Any]:
    keep = config.consensus.keep or [KEEP_SHARE, KEEP_LEAST]
    return {
        "consensus": {**settings(config.consensus), "keep": keep},
        "evidence": EVIDENCE,
        "confidence": NEIGHBORS,
        "num_classes": config.num_classes,
        "seed": config.seed,
    }


def _solve(run: RunDirectory, config: Config) -> Consensus:
    """Runs in the task, which opens the assignments on its own node."""
    assignments, ids = run.matrix("heads", "assignments"), run.matrix("neighbors", "ids")
    return method.merge(assignments, ids, config)


def _run(context: Context) -> Outcome:
    config, run = context.config, context.run
    merged = _solve(run, config) if context.in_process else _task(context)
    columns = [run.matrix("heads", "image_id"), merged.labels, merged.confidence]
    run.write_table(pa.table(columns, CONSENSUS_SCHEMA), FOLDER, "part-00000.parquet")
    confidence = float(merged.confidence.mean())
    context.reporter.say(_summary(merged.info, confidence, config.heads.count))
    sizes = np.bincount(merged.labels, minlength=config.num_classes).tolist()
    results = {**merged.info, "sizes": sizes, "confidence": confidence}
    return Outcome(len(merged.labels), results)


def _task(context: Context) -> Consensus:
    ray = context.cluster.start()
    ref = ray.remote(num_cpus=1)(_solve).remote(context.run, context.config)
    wait = Wait(context.cluster, context.reporter, [Request(1)], "Start a node with a CPU core")
    return result(ray, ref, wait)


def _summary(info: Mapping[str, Any], confidence: float, every: int) -> str:
    kept = f"{every}" if info["heads"] == every else f"{info['heads']} of {every}"
    aim = f" (heads.balance={info['balance']:g})" if "balance" in info else ""
    text = (
        f"consensus of {kept} heads{aim} by {info['method']}: heads agree with an NMI of "
        f"{info['head_agreement']:.2f}, mean confidence {confidence:.2f}"
    )
    if info["empty_clusters"]:
        text += f"; {info['empty_clusters']} of {info['num_clusters']} clusters are empty"
    return text


def _estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    """From measurements: the label matrix twice, and the graph or table of the method."""
    images, heads = size.images or 0, config.heads.count
    labels = 2 * images * heads * (2 if config.head_clusters < 2**15 else 4)
    fitted = min(images, FITTED_ROWS)
    graph = {
        "cspa": 26.0 * min(images, CSPA_ROWS) ** 2,
        "hbgf": 280.0 * fitted * heads,
        "dawid-skene": 60.0 * fitted * heads,
    }
    memory = 2e8 + labels + graph.get(config.consensus.method, 0.0)
    return Need(memory=memory, disk=16.0 * images, where="one task")


STAGE = Stage(
    name="consensus",
    folder=FOLDER,
    needs=("neighbors", "heads"),
    settings=_settings,
    run=_run,
    estimate=_estimate,
)
