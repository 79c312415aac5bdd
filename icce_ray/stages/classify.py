"""Stage 6: train the classifier that labels new images, on the consensus as pseudo-labels.

A probe reads the embeddings and trains in one Ray task, or by data on Ray Train workers.
Fine-tuning first trains such a probe, then goes on from it with the backbone: Ray Data decodes
images on CPU cores and feeds Ray Train workers. Both write the same artifact:

    classifier/classifier.safetensors + classifier.json   see core/classifier.py; loads without Ray
    classifier/history.json                               per epoch: loss, agreement with consensus
    classifier/part-00000.parquet                         the classifier's own opinion of each row

Rows are those of embeddings/: an image in quarantine is never fed.
Shapes: N rows, B batch, D features, K clusters, S image side.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import torch as safetensors
from torch import Tensor

from icce_ray.config.schema import (
    BackboneConfig,
    ClassifierConfig,
    Config,
    MethodConfig,
    settings,
)
from icce_ray.core import backbone as backbones
from icce_ray.core import method
from icce_ray.core.classifier import finetune as finetune_
from icce_ray.core.classifier import model as core
from icce_ray.core.classifier import probe as probe_
from icce_ray.core.classifier import training as training_
from icce_ray.core.collective import Collective
from icce_ray.core.device import default_device
from icce_ray.core.tensors import below
from icce_ray.distributed import inference as streaming
from icce_ray.distributed import train as training
from icce_ray.distributed.cluster import Cluster, Request, Wait, fetch
from icce_ray.errors import ArtifactError, ConfigError, StageError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import CONSENSUS_SCHEMA
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage
from icce_ray.stages.embed import Embedder
from icce_ray.stages.predict import Predictor

FOLDER = "classifier"


WEIGHTS, DESCRIPTION = "classifier.safetensors", "classifier.json"


HISTORY, OPINIONS, PROBE = "history.json", "part-00000.parquet", "probe.safetensors"


_PARQUET_ROW = re.compile(r"#([^#]+/)?\d+$")


POLL = 0.5  # seconds between looks at a Ray task


BLOCK_ROWS = 256  # images per decoding task


SHUFFLE_BATCHES = 8  # batches in a worker's shuffle buffer; the rows are permuted once before


def _settings(config: Config) -> dict[str, Any]:
    return {
        "classifier": settings(config.classifier),
        "num_classes": config.num_classes,
        "seed": config.seed,
    }


def _task(config: Config) -> dict[str, Any]:
    """What the workers need of the settings, as plain data."""
    return {
        "method": config.method.model_dump(mode="json"),
        "backbone": [one.model_dump(mode="json") for one in config.backbone],
        "precision": config.embed.precision,
    }


def _fit_probe(
    run: RunDirectory,
    task: Mapping[str, Any],
    on_step: training_.OnStep,
    collective: Collective | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Train a probe; its weights, history, and opinion of every row, as named tensors.

    All workers of a group end with the same classifier, so only the first one predicts; the others
    return their weights and history.
    """
    features = run.matrix("embeddings", "embedding")
    labels, sure = (np.asarray(run.matrix("consensus", name)) for name in ("cluster", "confidence"))
    chosen = MethodConfig.model_validate(task["method"])
    device = device or default_device()
    model, history = method.train_classifier(
        features, labels, sure, chosen, device, collective, on_step
    )
    result = {f"model.{k}": v.cpu().contiguous() for k, v in model.state_dict().items()}
    result["history"] = _pack_history(history)
    if collective is None or collective.rank == 0:
        clusters, confidence = probe_.predict(model, features, device)
        result["clusters"] = torch.from_numpy(clusters)
        result["confidence"] = torch.from_numpy(confidence)
    return result


def _pack_history(history: list[dict[str, float]]) -> Tensor:
    rows = [[entry["epoch"], entry["loss"], entry["agreement"]] for entry in history]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def _unpack_history(packed: Tensor) -> list[dict[str, float]]:
    return [
        {"epoch": int(epoch), "loss": loss, "agreement": agreement}
        for epoch, loss, agreement in packed.tolist()
    ]


def _probe_task(run: RunDirectory, task: Mapping[str, Any]) -> bytes:
    """The body of the Ray task. Its progress is a file that the driver looks at."""
    reported = 0.0
    every = training.PROGRESS_EVERY if run.is_local else training.REMOTE_PROGRESS_EVERY

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal reported
        if time.monotonic() - reported < every:
            return
        reported = time.monotonic()
        state = {"done": done, "total": total, "note": f"loss {loss:.3f}" if done else "starting"}
        run.write_json(state, FOLDER, training.TRAIN, "probe.json")

    progress(0, 0, math.nan)
    return safetensors.save(_fit_probe(run, task, progress))


def _probe_in_task(context: Context, task: Mapping[str, Any]) -> dict[str, Tensor]:
    """Train a probe in one Ray task. What it returned is kept, for a restarted driver."""
    run, cluster, config = context.run, context.cluster, context.config
    if not run.exists(FOLDER, training.TRAIN, PROBE):
        ray = cluster.start()
        gpus = cluster.gpus_each(config.classifier.num_gpus)
        request = Request(cluster.cpus_each(1, gpus), gpus)
        remote = ray.remote(
            num_cpus=request.cpus,
            num_gpus=gpus,
            max_retries=config.ray.max_failures,
        )(_probe_task)
        ref = remote.remote(run, task)
        rows = run.matrix("embeddings", "image_id").shape[0]
        total = probe_.probe_steps(rows, probe_.probe_settings(config.classifier))
        wait = Wait(cluster, context.reporter, [request], "Lower classifier.num_gpus")
        try:
            _watch(context, ray, ref, total, wait)
        except BaseException:
            ray.cancel(ref, force=True)
            raise
        run.write_bytes(fetch(ray, ref), FOLDER, training.TRAIN, PROBE)
    return safetensors.load(run.read_bytes(FOLDER, training.TRAIN, PROBE))


def _watch(context: Context, ray: Any, ref: Any, total: int, wait: Wait) -> None:
    """Show the task's progress until it ends. Raises StageError where it can never start."""
    run = context.run
    poll = POLL if run.is_local else training.REMOTE_POLL
    with context.reporter.bar("training the classifier", total, "steps") as bar:
        while not ray.wait([ref], timeout=poll)[0]:
            wait.check()
            if run.exists(FOLDER, training.TRAIN, "probe.json"):
                state = run.read_json(FOLDER, training.TRAIN, "probe.json")
                bar.update(state["done"], state["note"])


def _probe_loop(worker: training.Worker, task: Mapping[str, Any]) -> None:
    """One Ray Train worker. A probe is short: a group that lost a worker starts it over."""
    worker.progress(0, force=True)

    def progress(done: int, total: int, loss: float) -> None:
        worker.progress(done, f"loss {loss:.3f}")

    result = _fit_probe(worker.run, task, progress, worker.collective, worker.device)
    worker.save(len(result["history"]), result if worker.rank == 0 else {})


def _probe_in_group(context: Context, task: Mapping[str, Any], workers: int) -> dict[str, Tensor]:
    rows = context.run.matrix("embeddings", "image_id").shape[0]
    checkpoints = training.Checkpoints(context.run, FOLDER)
    if checkpoints.latest() is None:
        gpus = context.cluster.gpus_each(context.config.classifier.num_gpus)
        least = context.config.classifier.min_workers
        training.fit(
            context,
            FOLDER,
            _probe_loop,
            task,
            group=training.Group.plan(context.cluster, workers, gpus, least),
            title="training the classifier",
            total=probe_.probe_steps(rows, context.config.classifier),
        )
    return checkpoints.load(_latest(context.run))[0]


def _latest(run: RunDirectory) -> int:
    latest = training.Checkpoints(run, FOLDER).latest()
    if latest is None:
        raise ArtifactError(f"{run.path(FOLDER)} has no checkpoint after training")
    return latest


def _as_module(result: Mapping[str, Tensor], chosen: ClassifierConfig) -> core.Classifier:
    """The classifier that `_fit_probe` describes by tensors."""
    state = below(result, "model.")
    kind = "mlp" if chosen.kind == "mlp" else "linear"
    clusters, features = len(state["out.bias"]), len(state["shift"])
    model = core.Classifier(kind, features, clusters)  # type: ignore[arg-type]
    model.load_state_dict(state)
    return model


def _run_probe(context: Context, task: Mapping[str, Any]) -> dict[str, Any]:
    chosen, run = context.config.classifier, context.run
    if chosen.num_workers:
        result = _probe_in_group(context, task, chosen.num_workers)
    else:
        result = _probe_in_task(context, task)
    model = _as_module(result, chosen)
    extra = _origin(context) | {"clusters": _sizes(run, model.num_clusters)}
    weights, description = core.save(model, extra)
    run.write_bytes(weights, FOLDER, WEIGHTS)
    run.write_json(description, FOLDER, DESCRIPTION)
    run.write_json(_unpack_history(result["history"]), FOLDER, HISTORY)
    _write_opinions(run, result["clusters"].numpy(), result["confidence"].numpy())
    return {"workers": chosen.num_workers or 0}


def _origin(context: Context) -> dict[str, Any]:
    """What the features came from, so that new images get the same ones."""
    if context.config.data.embeddings:
        return {"backbone": [], "transform": []}
    done = context.run.manifest("embeddings")
    found = list(done.results.get("backbones", [])) if done else []
    return _with_backbones(context.config.backbone, found)


def _with_backbones(configs: Any, described: list[Mapping[str, Any]]) -> dict[str, Any]:
    described = described or [{} for _ in configs]
    pairs = list(zip(configs, described, strict=True))
    return {
        "backbone": [{**one.model_dump(mode="json"), **more} for one, more in pairs],
        "transform": [more.get("transform") for _, more in pairs],
    }


def _sizes(run: RunDirectory, clusters: int) -> list[int]:
    """Training images per cluster, [K]."""
    return np.bincount(run.matrix("consensus", "cluster"), minlength=clusters).tolist()


def _write_opinions(run: RunDirectory, clusters: np.ndarray, confidence: np.ndarray) -> None:
    table = pa.table(
        {
            "image_id": np.asarray(run.matrix("embeddings", "image_id")),
            "cluster": clusters,
            "confidence": confidence,
        }
    )
    run.write_table(table.cast(CONSENSUS_SCHEMA), FOLDER, OPINIONS)


def _addresses(run: RunDirectory) -> pa.Table:
    """Where each embedded image is: the columns that decoding needs, [N]."""
    index = run.read_table("index", columns=list(streaming.ADDRESS))
    image_ids = np.asarray(run.matrix("embeddings", "image_id"))
    table = index.take(pa.array(image_ids))  # image_id is the position in the index
    if not np.array_equal(table["image_id"].to_numpy(), image_ids):
        raise ArtifactError(f"{run.path('index')} is not in the order of image_id")
    return table


def _order(table: pa.Table, seed: int) -> np.ndarray:
    """The order in which the rows are fed: random, so that no batch is of one class folder.

    Images packed in tars or Parquet are read in stretches (one at a time would read a whole row
    group for each), and only the stretches are shuffled: such files are random inside by custom.
    """
    rng = np.random.default_rng(seed)
    packed = table["offset"][0].is_valid or _PARQUET_ROW.search(table["uri"][0].as_py())
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
    dataset.context.target_max_block_size = streaming.BLOCK_BYTES
    preprocess, _ = streaming.preparations(config.backbone)
    return dataset.map_batches(
        streaming.decode_rows,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"preprocess": preprocess, "max_pixels": config.embed.max_pixels},
        num_cpus=cpus,
    )


class _Labeler:
    """Adds pseudo-labels and weights to decoded images."""

    def __init__(self, run: RunDirectory, chosen: ClassifierConfig) -> None:
        self.image_ids = np.asarray(run.matrix("embeddings", "image_id"))
        clusters, sure = (run.matrix("consensus", name) for name in ("cluster", "confidence"))
        self.labels, self.weights = training_.pseudo_labels(clusters, sure, chosen)

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


def _steps(rows: int, batch: int, workers: int) -> tuple[int, int]:
    """Rows per step of one worker, and steps per epoch; Ray Data gives all workers equally many."""
    workers = max(1, workers)
    each = max(1, batch // workers)
    return each, max(1, math.ceil((rows // workers) / each))


def _finetune_loop(worker: training.Worker, task: Mapping[str, Any]) -> None:
    """One Ray Train worker: resume, epochs, a checkpoint after each, the artifact at the end."""
    from ray.train.torch import prepare_model

    chosen, seed = MethodConfig.model_validate(task["method"]).classifier, task["method"]["seed"]
    model = _starting_point(worker.run, task, chosen).to(worker.device)
    optimizer = finetune_.finetune_optimizer(model, chosen)
    history = _resume(worker, model, optimizer)
    # Some backbones have parameters that the chosen pooling leaves out.
    wrapped = prepare_model(model, parallel_strategy_kwargs={"find_unused_parameters": True})
    labeler = _Labeler(worker.run, chosen)
    each, steps = _steps(len(labeler.labels), chosen.batch_size, worker.world)
    worker.progress(len(history) * steps, force=True)
    for epoch in range(len(history), chosen.epochs):
        position = finetune_.Position(epoch, steps, chosen.epochs)
        batches = _batches(worker, labeler, each, seed + epoch)
        history.append(_epoch(worker, wrapped, optimizer, batches, position, task))
        state = training_.pack_state(model, optimizer) if worker.rank == 0 else {}
        if worker.rank == 0:
            state["history"] = _pack_history(history)
        worker.save(epoch + 1, state)  # not in steps, whose number changes with that of workers
    if worker.rank == 0:
        _write_finetuned(worker.run, model, task, history)
    worker.barrier({"epoch": len(history)})


def _epoch(
    worker: training.Worker,
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
    worker: training.Worker, labeler: _Labeler, rows: int, seed: int
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
    probe = safetensors.load(run.read_bytes(FOLDER, training.TRAIN, PROBE))
    backbone = backbones.load(BackboneConfig.model_validate(task["backbone"][0]))
    return core.FineTuned(backbone, _as_module(probe, chosen))


def _resume(
    worker: training.Worker, model: core.FineTuned, optimizer: torch.optim.Optimizer
) -> list[dict[str, float]]:
    latest = worker.checkpoints.latest()
    if latest is None:
        return []
    state = worker.checkpoints.load(latest)[0]
    history = _unpack_history(state.pop("history"))
    training_.unpack_state(state, model, optimizer)
    return history


def _write_finetuned(
    run: RunDirectory,
    model: core.FineTuned,
    task: Mapping[str, Any],
    history: list[dict[str, float]],
) -> None:
    configs = [BackboneConfig.model_validate(one) for one in task["backbone"]]
    extra = _with_backbones(configs, [model.backbone.describe()])  # type: ignore[operator]
    extra["clusters"] = _sizes(run, model.head.num_clusters)
    weights, description = core.save(model, extra)
    run.write_bytes(weights, FOLDER, WEIGHTS)
    run.write_json(history, FOLDER, HISTORY)
    run.write_json(description, FOLDER, DESCRIPTION)


def _run_finetune(context: Context, task: Mapping[str, Any]) -> dict[str, Any]:
    config, run, cluster = context.config, context.run, context.cluster
    table = _addresses(run)
    gpus = cluster.gpus_each(config.classifier.num_gpus)
    workers = _workers(context, gpus)
    _, steps = _steps(len(table), config.classifier.batch_size, workers)
    if not run.exists(FOLDER, DESCRIPTION):
        _probe_in_task(context, task)
        shuffled = table.take(pa.array(_order(table, config.seed)))
        least, have = config.classifier.min_workers, cluster.resources()
        group = training.Group.plan(cluster, workers, gpus, least, fed=True)
        training.fit(
            context,
            FOLDER,
            _finetune_loop,
            task,
            group=group,
            title="fine-tuning",
            total=steps * config.classifier.epochs,
            datasets={"train": _dataset(context, shuffled, group.decode_cpus(have))},
        )
    _write_opinions(run, *_ask(context, table))
    return {"workers": workers, "gpus_per_worker": gpus}


def _workers(context: Context, gpus: float) -> int:
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


def _ask(context: Context, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Cluster int32 [N] and confidence float32 [N] of every row by the fine-tuned model."""
    config, total = context.config, len(table)
    preprocess, slots = streaming.preparations(config.backbone)
    embedder = Embedder(config.backbone, slots, config.embed.precision)  # for its precision alone
    model = Predictor(context.run, embedder, finetuned=True)
    batches = streaming.stream(
        context.cluster, table, streaming.Job(model, preprocess, config.embed), context.reporter
    )
    image_ids = table["image_id"].to_numpy()
    clusters = np.full(total, -1, np.int32)
    confidence = np.zeros(total, np.float32)

    def take(batch: streaming.Columns) -> int:
        good = np.array([not reason for reason in batch["reason"]])
        rows = np.searchsorted(image_ids, batch["image_id"])[good]
        clusters[rows] = batch["cluster"][good]
        confidence[rows] = batch["confidence"][good]
        return len(good)

    title = "classifying the training images"
    streaming.gather(batches, take, context.reporter, title, 0, total)
    _check_answers(clusters, table)
    return clusters, confidence


def _check_answers(clusters: np.ndarray, table: pa.Table) -> None:
    missing = np.flatnonzero(clusters < 0)
    if len(missing):
        raise StageError(
            f"{len(missing)} images that were embedded can no longer be read, the first is "
            f"{table['uri'][int(missing[0])].as_py()}. Restore them and run the same command "
            "again: the trained classifier is kept."
        )


def _run(context: Context) -> Outcome:
    config, run = context.config, context.run
    task = _task(config)
    finetune = config.classifier.kind == "finetune"
    results = _run_finetune(context, task) if finetune else _run_probe(context, task)
    history = run.read_json(FOLDER, HISTORY)
    opinions = run.read_table(FOLDER, OPINIONS, columns=["cluster"])["cluster"].to_numpy()
    agreement = float((opinions == run.matrix("consensus", "cluster")).mean())
    run.delete(f"{FOLDER}/{training.TRAIN}")
    return Outcome(
        len(opinions),
        {
            "kind": config.classifier.kind,
            "agreement": agreement,
            "final_loss": history[-1]["loss"],
            "epochs": len(history),
            **results,
        },
    )


def _estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    count, features, chosen = size.images or 0, size.features or 1024, config.classifier
    answers = count * 16
    head = features * core.HIDDEN if chosen.kind == "mlp" else features * config.num_classes
    if chosen.kind != "finetune":
        batch = chosen.batch_size * (features + config.num_classes) * 4 * 4
        where = "train workers" if chosen.num_workers else "one Ray task"
        return Need(memory=count * features * 2 + batch + 16 * head, disk=answers, where=where)
    # The backbone's size is not known before it is made: a ViT-L, with gradient and two moments.
    weights = 4 * 4 * 304e6
    buffer = SHUFFLE_BATCHES * chosen.batch_size * 3 * (config.backbone[0].image_size or 224) ** 2
    disk = answers + 2 * 3 * 4 * 304e6
    return Need(memory=weights + buffer, disk=disk, where="train workers")


STAGE = Stage(
    name="classifier",
    folder=FOLDER,
    needs=("index", "embed", "consensus"),
    settings=_settings,
    run=_run,
    estimate=_estimate,
)
