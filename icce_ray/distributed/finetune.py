"""Fine-tuning: Ray Data decodes images on CPU cores and feeds Ray Train workers.

Shapes: N rows, B batch, K clusters, S image side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import torch as safetensors
from torch import Tensor

from icce_ray.config.schema import BackboneConfig, ClassifierConfig, MethodConfig
from icce_ray.core import backbone as backbones
from icce_ray.core.classifier import finetune as finetune_
from icce_ray.core.classifier import model as core
from icce_ray.core.classifier import training as training_
from icce_ray.core.classifier.training import pseudo_labels
from icce_ray.core.samples import with_levels
from icce_ray.data import reading
from icce_ray.distributed import compat, stream
from icce_ray.distributed import train as training
from icce_ray.distributed.checkpoints import TRAIN
from icce_ray.distributed.context import Context
from icce_ray.distributed.inference import (
    CLASSIFIER,
    DESCRIPTION,
    levels_of_run,
    local_weights,
    preparations,
)
from icce_ray.distributed.probe import (
    PROBE,
    as_module,
    describe_backbones,
    pack_history,
    probe_in_task,
    unpack_history,
    write_classifier,
)
from icce_ray.distributed.worker import Worker
from icce_ray.errors import ConfigError
from icce_ray.rundir.directory import RunDirectory

BLOCK_ROWS = 256  # images per decoding task
SHUFFLE_BATCHES = 8  # batches in a worker's shuffle buffer; the rows are permuted once before


# --- in the driver -------------------------------------------------------------------------------


def finetune(context: Context, task: Mapping[str, Any], table: pa.Table) -> dict[str, Any]:
    """Train the classifier with its backbone and write it, unless that is done already.

    Args:
        task: see `probe.task_of`.
        table: where each embedded image is: the ADDRESS columns, [N].

    Returns: for the manifest, the number of workers and their GPUs.
    """
    config, run, cluster = context.config, context.run, context.cluster
    gpus = cluster.gpus_each()
    workers = worker_count(context, gpus)
    _, steps = steps_of(len(table), config.classifier.batch_size, workers)
    if not run.exists(CLASSIFIER, DESCRIPTION):
        probe_in_task(context, task)
        shuffled = table.take(pa.array(feeding_order(table, config.seed)))
        have = cluster.resources()
        group = training.Group.plan(cluster, workers, gpus, fed=True)
        with compat.silenced_data():
            training.fit(
                context,
                CLASSIFIER,
                _loop,
                task,
                group=group,
                title="fine-tuning",
                total=steps * config.classifier.epochs,
                datasets={"train": _dataset(context, shuffled, group.decode_cpus(have))},
            )
    return {"workers": workers, "gpus_per_worker": gpus}


def worker_count(context: Context, gpus: float) -> int:
    """Ray Train workers; on a local Ray they must leave a core to decode images, or all wait."""
    wanted, cluster = context.config.classifier.num_workers, context.cluster
    workers = cluster.workers(wanted, gpus)
    cores = cluster.resources().cpus
    if not cluster.is_local or workers < cores:
        return workers
    if wanted is None:
        return 0
    raise ConfigError(
        f"classifier.num_workers={wanted} leaves none of the {cores} CPU cores to decode images; "
        f"use at most {cores - 1}, or 0 to train in the driver's process"
    )


def feeding_order(table: pa.Table, seed: int) -> np.ndarray:
    """The order in which the rows are fed: random, so that no batch is of one class folder.

    Images packed in tars or Parquet are read in stretches (one at a time would read a whole row
    group for each), and only the stretches are shuffled: such files are random inside by custom.
    """
    rng = np.random.default_rng(seed)
    packed = table["offset"][0].is_valid or reading.is_row(table["uri"][0].as_py())
    if not packed:
        return rng.permutation(len(table))
    starts = rng.permutation(np.arange(0, len(table), BLOCK_ROWS))
    every = (starts[:, None] + np.arange(BLOCK_ROWS)).reshape(-1)
    return every[every < len(table)]


def _dataset(context: Context, table: pa.Table, cpus: float) -> Any:
    """A Ray Data set that decodes the images of a table as it is read: image_id, reason, pixels0.

    Labels are not in it: workers look them up by image_id, in arrays that a node's workers share.
    A task reserves `cpus`.
    """
    ray, config = context.cluster.start(), context.config
    blocks = [table.slice(i, BLOCK_ROWS) for i in range(0, len(table), BLOCK_ROWS)]
    dataset = ray.data.from_arrow(blocks)
    dataset.context.target_max_block_size = stream.BLOCK_BYTES
    dataset.context.enable_progress_bars = False
    preprocess, _ = preparations(config.backbone)
    options = {"preprocess": preprocess, "max_pixels": config.embed.max_pixels}
    return dataset.map_batches(
        stream.decode_rows,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={**options, "levels": levels_of_run(context.run)},
        num_cpus=cpus,
    )


# --- in the workers ------------------------------------------------------------------------------


class Labeler:
    """Adds pseudo-labels and weights to decoded images."""

    def __init__(self, run: RunDirectory, chosen: ClassifierConfig) -> None:
        self.image_ids = np.asarray(run.matrix("embeddings", "image_id"))
        clusters, sure = (run.matrix("consensus", name) for name in ("cluster", "confidence"))
        self.labels, self.weights = pseudo_labels(clusters, sure, chosen)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        """image uint8 [B, 3, S, S], label int64 [B], weight float32 [B].

        Embedding has read every image, so one that cannot be read now is rare. It gets weight 0:
        left out, it would leave the workers with unequal numbers of steps.
        """
        rows = np.searchsorted(self.image_ids, batch["image_id"])
        good = np.array([not reason for reason in batch["reason"]])
        return {
            "image": torch.from_numpy(np.array(batch["pixels0"])),
            "label": torch.from_numpy(self.labels[rows]),
            "weight": torch.from_numpy(np.where(good, self.weights[rows], np.float32(0))),
        }


def steps_of(rows: int, batch: int, workers: int) -> tuple[int, int]:
    """Rows per step of one worker, and steps per epoch; Ray Data gives all workers equally many."""
    workers = max(1, workers)
    each = max(1, batch // workers)
    return each, max(1, math.ceil((rows // workers) / each))


def _loop(worker: Worker, task: Mapping[str, Any]) -> None:
    """One Ray Train worker: resume, epochs, a checkpoint after each, the artifact at the end."""
    from ray.train.torch import prepare_model

    chosen, seed = MethodConfig.model_validate(task["method"]).classifier, task["method"]["seed"]
    model = _starting_point(worker.run, task, chosen).to(worker.device)
    optimizer = finetune_.finetune_optimizer(model, chosen)
    history = _resume(worker, model, optimizer)
    # Some backbones have parameters that the chosen pooling leaves out.
    wrapped = prepare_model(model, parallel_strategy_kwargs={"find_unused_parameters": True})
    labeler = Labeler(worker.run, chosen)
    each, steps = steps_of(len(labeler.labels), chosen.batch_size, worker.world)
    worker.progress(len(history) * steps, force=True)
    for epoch in range(len(history), chosen.epochs):
        position = finetune_.Position(epoch, steps, chosen.epochs)
        batches = _batches(worker, labeler, each, seed + epoch)
        history.append(_epoch(worker, wrapped, optimizer, batches, position, task))
        state = training_.pack_state(model, optimizer) if worker.rank == 0 else {}
        if worker.rank == 0:
            state["history"] = pack_history(history)
        worker.save(epoch + 1, state)  # not in steps, whose number changes with that of workers
    if worker.rank == 0:
        # By the worker, since only it has the model; the driver may have no room for it.
        configs = [BackboneConfig.model_validate(one) for one in task["backbone"]]
        described = model.backbone.describe()  # type: ignore[operator]
        described = with_levels(described, levels_of_run(worker.run))
        origin = describe_backbones(configs, [described])
        write_classifier(worker.run, model, origin, history)
    worker.barrier({"epoch": len(history)})


def _epoch(
    worker: Worker,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Tensor]],
    position: finetune_.Position,
    task: Mapping[str, Any],
) -> dict[str, float]:
    def progress(done: int, total: int, loss: float) -> None:
        worker.progress(done, f"loss {loss:.3f}")

    return finetune_.finetune_epoch(
        model,
        optimizer,
        batches,
        position,
        task["method"]["seed"],
        bfloat16=backbones.arithmetic(task["precision"], worker.device) == "bfloat16",
        collective=worker.collective,
        on_step=progress,
    )


def _batches(
    worker: Worker, labeler: Labeler, rows: int, seed: int
) -> Iterable[Mapping[str, Tensor]]:
    from ray import train

    return train.get_dataset_shard("train").iter_torch_batches(
        batch_size=rows,
        collate_fn=labeler,
        local_shuffle_buffer_size=SHUFFLE_BATCHES * rows,
        local_shuffle_seed=seed,
        prefetch_batches=2,
        device=worker.device,
    )


def _starting_point(
    run: RunDirectory, task: Mapping[str, Any], chosen: ClassifierConfig
) -> core.FineTuned:
    """The pretrained backbone and, as its head, the probe trained on its features."""
    probe = safetensors.load(run.read_bytes(CLASSIFIER, TRAIN, PROBE))
    config = BackboneConfig.model_validate(task["backbone"][0])
    backbone = backbones.load(config, local_weights(config))
    return core.FineTuned(backbone, as_module(probe, chosen))


def _resume(
    worker: Worker, model: core.FineTuned, optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    latest = worker.checkpoints.latest()
    if latest is None:
        return []
    state = worker.checkpoints.load(latest)[0]
    history = unpack_history(state.pop("history"))
    training_.unpack_state(state, model, optimizer)
    return history
