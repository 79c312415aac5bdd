"""The probe: trained in one Ray task, or by a group of Ray Train workers.

Here is also what fine-tuning shares with it: the pseudo-labels, the files of a classifier, and the
probe itself, which is the head that fine-tuning starts from.
Shapes: N rows, D features, K clusters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors
from torch import Tensor

from icce_ray.config.schema import ClassifierConfig, Config, MethodConfig
from icce_ray.core import method, outliers
from icce_ray.core.classifier import model as core
from icce_ray.core.classifier import probe as probe_
from icce_ray.core.classifier import training as training_
from icce_ray.core.collective import Collective
from icce_ray.core.device import default_device
from icce_ray.core.tensors import below
from icce_ray.distributed import train as training
from icce_ray.distributed.checkpoints import TRAIN, Checkpoints
from icce_ray.distributed.cluster import Request
from icce_ray.distributed.context import Context
from icce_ray.distributed.inference import CLASSIFIER, DESCRIPTION, WEIGHTS
from icce_ray.distributed.tasks import run_task
from icce_ray.distributed.worker import PROGRESS_EVERY, REMOTE_PROGRESS_EVERY, Worker
from icce_ray.errors import ArtifactError
from icce_ray.rundir.curated import naming
from icce_ray.rundir.directory import RunDirectory

HISTORY = "_history.json"
PROBE = "probe.safetensors"  # in the working folder: what the task returned
POLL = 0.5  # seconds between looks at the task's progress file


def task_of(config: Config) -> dict[str, Any]:
    """What tasks and workers need of the settings, as plain data."""
    return {
        "method": config.method.model_dump(mode="json"),
        "backbone": [one.model_dump(mode="json") for one in config.backbone],
        "precision": config.embed.precision,
    }


def _fit(
    run: RunDirectory,
    task: Mapping[str, Any],
    on_step: training_.OnStep,
    collective: Collective | None = None,
    device: torch.device | None = None,
) -> dict[str, Tensor]:
    """Train a probe; its weights, history, and predictions of every row, as named tensors.

    All workers of a group end with the same classifier, so only the first one predicts; the others
    return their history.
    """
    features = run.matrix("embeddings", "embedding")
    labels, sure = (np.asarray(run.matrix("consensus", name)) for name in ("cluster", "confidence"))
    chosen = MethodConfig.model_validate(task["method"])
    device = device or default_device()
    model, history = method.train_classifier(
        features, labels, sure, chosen, device, collective, on_step
    )
    packed = {"history": pack_history(history)}
    if collective is not None and collective.rank:
        return packed
    clusters, confidence = probe_.predict(model, features, device)
    reference = outliers.make_reference(features, chosen.seed, device)
    state = {f"model.{k}": v.cpu().contiguous() for k, v in model.state_dict().items()}
    return {
        **state,
        **packed,
        **{f"novelty.{name}": value for name, value in reference.tensors().items()},
        "clusters": torch.from_numpy(clusters),
        "confidence": torch.from_numpy(confidence),
    }


def pack_history(history: list[dict[str, float]]) -> Tensor:
    """float64 [epochs, 3]: epoch, loss, agreement. For checkpoints, which hold only tensors."""
    rows = [[entry["epoch"], entry["loss"], entry["agreement"]] for entry in history]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def unpack_history(packed: Tensor) -> list[dict[str, float]]:
    """The inverse of `pack_history`."""
    return [
        {"epoch": int(epoch), "loss": loss, "agreement": agreement}
        for epoch, loss, agreement in packed.tolist()
    ]


def _probe_task(run: RunDirectory, task: Mapping[str, Any]) -> bytes:
    """The body of the Ray task. Its progress is a file that the driver looks at."""
    reported = -math.inf
    every = PROGRESS_EVERY if run.is_local else REMOTE_PROGRESS_EVERY

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal reported
        if time.monotonic() - reported < every:
            return
        reported = time.monotonic()
        state = {"done": done, "total": total, "note": f"loss {loss:.3f}" if done else "starting"}
        run.write_json(state, CLASSIFIER, TRAIN, "probe.json")

    progress(0, 0, math.nan)
    return safetensors.save(_fit(run, task, progress))


def probe_in_task(context: Context, task: Mapping[str, Any]) -> dict[str, Tensor]:
    """Train a probe in one Ray task. What it returned is kept, for a restarted driver.

    Returns: named tensors; see `_fit`.
    """
    run, cluster, config = context.run, context.cluster, context.config
    if not run.exists(CLASSIFIER, TRAIN, PROBE):
        gpus = cluster.gpus_each()
        rows = run.matrix("embeddings", "image_id").shape[0]
        total = probe_.probe_steps(rows, probe_.probe_settings(config.classifier))
        with context.reporter.bar("training the classifier", total, "steps") as bar:

            def look() -> None:
                if run.exists(CLASSIFIER, TRAIN, "probe.json"):
                    state = run.read_json(CLASSIFIER, TRAIN, "probe.json")
                    bar.update(state["done"], state["note"])

            trained = run_task(
                context,
                _probe_task,
                *(run, task),
                request=Request(cluster.cpus_each(1, gpus), gpus),
                advice="Lower ray.num_gpus",
                retries=config.ray.max_failures,
                tick=look,
                every=POLL if run.is_local else training.REMOTE_POLL,
            )
        run.write_bytes(trained, CLASSIFIER, TRAIN, PROBE)
    return safetensors.load(run.read_bytes(CLASSIFIER, TRAIN, PROBE))


def _probe_loop(worker: Worker, task: Mapping[str, Any]) -> None:
    """One Ray Train worker. A probe is short: a group that lost a worker starts it over."""
    worker.progress(0, force=True)

    def progress(done: int, total: int, loss: float) -> None:
        worker.progress(done, f"loss {loss:.3f}")

    result = _fit(worker.run, task, progress, worker.collective, worker.device)
    worker.save(len(result["history"]), result if worker.rank == 0 else {})


def probe_in_group(context: Context, task: Mapping[str, Any], workers: int) -> dict[str, Tensor]:
    """Train a probe by data on several Ray Train workers. Returns: named tensors; see `_fit`."""
    rows = context.run.matrix("embeddings", "image_id").shape[0]
    checkpoints = Checkpoints(context.run, CLASSIFIER)
    if checkpoints.latest() is None:
        gpus = context.cluster.gpus_each()
        training.fit(
            context,
            CLASSIFIER,
            _probe_loop,
            task,
            group=training.Group.plan(context.cluster, workers, gpus),
            title="training the classifier",
            total=probe_.probe_steps(rows, context.config.classifier),
        )
    latest = checkpoints.latest()
    if latest is None:
        raise ArtifactError(f"{context.run.path(CLASSIFIER)} has no checkpoint after training")
    return checkpoints.load(latest)[0]


def as_module(result: Mapping[str, Tensor], chosen: ClassifierConfig) -> core.Classifier:
    """The classifier that `_fit` describes by tensors."""
    state = below(result, "model.")
    kind = "mlp" if chosen.kind == "mlp" else "linear"
    clusters, features = len(state["out.bias"]), len(state["shift"])
    model = core.Classifier(kind, features, clusters)  # type: ignore[arg-type]
    model.load_state_dict(state)
    return model


def write_classifier(
    run: RunDirectory,
    model: core.Classifier | core.FineTuned,
    origin: Mapping[str, Any],
    history: list[dict[str, float]],
) -> None:
    """Write the artifact; `origin` says which backbones its features come from."""
    head = model.head if isinstance(model, core.FineTuned) else model
    sizes = np.bincount(run.matrix("consensus", "cluster"), minlength=head.num_clusters).tolist()
    known = naming(run)
    named = {"names": [*known.names], "dropped": known.dropped} if known.names else {}
    weights, description = core.save(model, {**origin, "clusters": sizes, **named})
    run.write_bytes(weights, CLASSIFIER, WEIGHTS)
    run.write_json(history, CLASSIFIER, HISTORY)
    run.write_json(description, CLASSIFIER, DESCRIPTION)


def describe_backbones(configs: Any, described: list[Mapping[str, Any]]) -> dict[str, Any]:
    """For classifier.json: the backbones' settings with what their weights and transforms turned
    out to be, so that new images get the same features."""
    described = described or [{} for _ in configs]
    pairs = list(zip(configs, described, strict=True))
    return {
        "backbone": [{**one.model_dump(mode="json"), **more} for one, more in pairs],
        "transform": [more.get("transform") for _, more in pairs],
    }
