"""The heads' clusterings become one, in one Ray task.

Reads label vectors, and neighbor lists: to choose good heads, and to measure how sure each image
is. Writes consensus/part-00000.parquet: image_id, cluster, confidence, in the heads' row order.
Shapes: N images, H heads, L clusters per head, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from icce_ray.config.schema import Config
from icce_ray.core import method
from icce_ray.core.device import default_device
from icce_ray.core.ensemble.base import Consensus
from icce_ray.distributed.cluster import Request
from icce_ray.distributed.tasks import run_task
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import CONSENSUS_SCHEMA
from icce_ray.stages.base import Context, Outcome

FOLDER = "consensus"
ADVICE = "Start a node with a CPU core, or set ray.num_gpus=0"


def _solve_task(run: RunDirectory, config: Config, cpus: int, gpu: bool) -> Consensus:
    """Runs in the task, which opens the assignments on its own node."""
    torch.set_num_threads(cpus)
    return _solve(run, config, gpu)


def _solve(run: RunDirectory, config: Config, gpu: bool) -> Consensus:
    assignments, ids = run.matrix("heads", "assignments"), run.matrix("neighbors", "ids")
    return method.merge(assignments, ids, config, default_device() if gpu else None)


def run(context: Context) -> Outcome:
    """Merge the heads' clusterings into one, with a confidence for each image."""
    config, run = context.config, context.run
    if context.in_process:
        merged = _solve(run, config, gpu=False)  # the trials of a sweep share the machine
    else:
        cluster = context.cluster
        gpus = cluster.gpus_each() if config.consensus.method == "dawid-skene" else 0.0
        cpus = cluster.cpus_each(1, gpus)
        work, request = (run, config, cpus, gpus > 0), Request(cpus, gpus)
        merged = run_task(context, _solve_task, *work, request=request, advice=ADVICE)
    columns = [run.matrix("heads", "image_id"), merged.labels, merged.confidence]
    run.write_table(pa.table(columns, CONSENSUS_SCHEMA), FOLDER, "part-00000.parquet")
    confidence = float(merged.confidence.mean())
    context.reporter.say(_summary(merged.info, confidence, config.head_count))
    sizes = np.bincount(merged.labels, minlength=config.num_classes).tolist()
    results = {**merged.info, "sizes": sizes, "confidence": confidence}
    return Outcome(len(merged.labels), results)


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
