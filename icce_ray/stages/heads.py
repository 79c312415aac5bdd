"""Train the clustering heads with Ray Train and assign every image with each.

Worker w of W owns heads w, w + W, ...; all draw the same pairs, and exchange only the pair
agreements of their heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from icce_ray.config.schema import Config, MethodConfig
from icce_ray.core import method
from icce_ray.core.evaluation.labelfree import NEAREST
from icce_ray.core.heads.trainer import HeadTrainer, merge_states
from icce_ray.distributed import train as training
from icce_ray.distributed.checkpoints import TRAIN, Checkpoints
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.worker import Worker
from icce_ray.errors import ArtifactError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import tensor_column
from icce_ray.stages.base import Context, Outcome
from icce_ray.stages.table import ROWS_PER_FILE

FOLDER = "heads"
JUDGE = "judge"  # of a sweep: the search whose neighbors all of its trials are judged by
HISTORY_POINTS = 200  # loss values kept per head
PROBES = 10  # scores of an unfinished training, where a sweep asks for them
PROBE_ROWS = 20_000  # rows whose neighbors they look at, at most


# --- in the workers ------------------------------------------------------------------------------


def _train(worker: Worker, config: Mapping[str, Any]) -> None:
    """The loop of one worker: resume, step, checkpoint, assign."""
    chosen = MethodConfig.model_validate(config["method"])
    latest = worker.checkpoints.latest()
    if latest == method.head_steps(chosen) + 1:
        return  # lost after its last checkpoint: nothing is left to do
    embeddings = worker.run.matrix("embeddings", "embedding")
    ids, counts = worker.run.matrix("neighbors", "ids"), worker.run.matrix("selection", "count")
    data, projection = method.head_data(embeddings, ids, counts, chosen, worker.device)
    trainer = method.head_trainer(data, chosen, worker.collective)
    history = _History(trainer)
    watched = config["watched"] and worker.rank == 0
    probe = _Probe(worker.run, chosen.seed) if watched else None
    worker.progress(latest or 0, "starting", force=True)
    if latest is None:
        trainer.start()
    else:
        states = worker.checkpoints.load(latest)
        trainer.restore(states)
        history.restore(states)
    while trainer.step_number < trainer.steps:
        history.step()
        worker.progress(trainer.step_number, history.note)
        if probe is not None and probe.due(trainer):
            worker.progress(trainer.step_number, force=True, score=probe.score(trainer))
        if trainer.step_number % chosen.heads.checkpoint_every == 0:
            worker.save(trainer.step_number, trainer.state() | history.state())
    worker.progress(trainer.step_number, "assigning", force=True)

    def report(rows: int) -> None:
        worker.progress(trainer.step_number, f"assigned {rows:,} of {len(data):,} images")

    final = trainer.state() | history.state()
    final["assignments"] = torch.from_numpy(trainer.assign(report))
    if worker.rank == 0:
        final |= {f"projection.{k}": v.cpu() for k, v in projection.state_dict().items()}
    worker.save(trainer.steps + 1, final)


class _Probe:
    """What a sweep judges an unfinished training by: do neighbors share a cluster already?

    The lists are the sweep's own, equal for all of its trainings, so that scores compare.
    """

    def __init__(self, run: RunDirectory, seed: int) -> None:
        nearest = run.matrix(JUDGE, "ids")
        generator = np.random.default_rng(seed)
        most = min(len(nearest), PROBE_ROWS)
        self.rows = np.sort(generator.choice(len(nearest), most, replace=False))
        self.ids = np.asarray(nearest[self.rows, :NEAREST])

    def due(self, trainer: HeadTrainer) -> bool:
        return trainer.step_number % max(1, trainer.steps // PROBES) == 0

    def score(self, trainer: HeadTrainer) -> float:
        return trainer.consistency(self.rows, self.ids)


class _History:
    """The loss of each head at steps of equal distance."""

    def __init__(self, trainer: HeadTrainer) -> None:
        self.trainer = trainer
        self.every = max(1, trainer.steps // HISTORY_POINTS)
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self.last: Tensor | None = None  # [H], on the device

    def step(self) -> None:
        """One step of the training. Only where its loss is recorded is one computed, and waited
        for: else the device would have nothing to do until the host has prepared the next step."""
        trainer = self.trainer
        loss = trainer.step(want_loss=(trainer.step_number + 1) % self.every == 0)
        if loss is not None:
            self.last = loss
            self.steps.append(trainer.step_number)
            self.losses.append(loss.cpu())

    def note(self) -> str:
        """The last recorded loss as text."""
        return "" if self.last is None else f"loss {float(self.last.mean()):.3f}"

    def state(self) -> dict[str, Tensor]:
        heads = len(self.trainer.numbers)
        losses = torch.stack(self.losses, 1) if self.losses else torch.zeros(heads, 0)
        return {"history": losses, "history_steps": torch.tensor(self.steps, dtype=torch.long)}

    def restore(self, states: list[dict[str, Tensor]]) -> None:
        merged = merge_states(states)
        position = {int(n): i for i, n in enumerate(merged["numbers"].tolist())}
        rows = merged["history"][[position[n] for n in self.trainer.numbers]]
        self.steps = merged["history_steps"].tolist()
        self.losses = list(rows.unbind(1))


# --- in the driver -------------------------------------------------------------------------------


def run(context: Context) -> Outcome:
    """Train the heads and assign every image by each. Raises StageError: workers lost for good."""
    config, run, cluster = context.config, context.run, context.cluster
    rows = run.matrix("embeddings", "image_id").shape[0]
    steps = method.head_steps(config)
    gpus = cluster.gpus_each()
    workers = _workers(config, cluster, gpus)
    workers = min(workers, config.head_count)
    checkpoints = Checkpoints(run, FOLDER)
    if checkpoints.latest() != steps + 1:
        training.fit(
            context,
            FOLDER,
            _train,
            {
                "method": config.method.model_dump(mode="json"),
                "watched": context.on_progress is not None,
            },
            group=training.Group.plan(cluster, workers, gpus),
            title=f"training {config.head_count} heads",
            total=steps,
        )
    final = checkpoints.latest()
    if final is None:
        raise ArtifactError(f"{run.path(FOLDER)} has no checkpoint after training")
    results = _write(run, checkpoints.load(final), rows)
    run.delete(f"{FOLDER}/{TRAIN}")
    return Outcome(rows, {**results, "steps": steps, "workers": workers, "gpus_per_worker": gpus})


def _workers(config: Config, cluster: Cluster, gpus: float) -> int:
    """A single worker on this machine is the driver itself: to start the processes of Ray Train
    takes longer than many a training."""
    workers = cluster.workers(config.heads.num_workers, gpus)
    own = config.heads.num_workers is None and cluster.is_local and workers == 1
    return 0 if own else workers


def _write(run: RunDirectory, states: list[dict[str, Tensor]], rows: int) -> dict[str, Any]:
    """Write _heads.safetensors (projection, teachers), _history.json, assignments; head order."""
    from safetensors.torch import save

    assignments = torch.cat([s.pop("assignments") for s in states if "assignments" in s], 1)
    heads = {key: state.pop(key) for state in states for key in list(state) if "projection." in key}
    merged = merge_states(states)
    order = merged["numbers"].argsort()
    heads |= {
        key.removeprefix("teacher."): value[order]
        for key, value in merged.items()
        if key.startswith("teacher.")
    }
    run.write_bytes(
        save({k: v.contiguous() for k, v in heads.items()}), FOLDER, "_heads.safetensors"
    )
    losses = merged["history"][order]
    history = {"step": merged["history_steps"].tolist(), "loss": losses.T.tolist()}
    run.write_bytes(json.dumps(history).encode(), FOLDER, "_history.json")
    _write_assignments(run, assignments[:, order].numpy(), rows)
    final = losses[:, -1].tolist() if losses.shape[1] else []
    return {"final_loss": final, "clusters_used": _used(assignments[:, order])}


def _used(assignments: Tensor) -> list[int]:
    return [len(column.unique()) for column in assignments.unbind(1)]


def _write_assignments(run: RunDirectory, assignments: np.ndarray, rows: int) -> None:
    image_ids = run.matrix("embeddings", "image_id")
    value = pa.int16() if assignments.dtype == np.int16 else pa.int32()
    kind = pa.fixed_shape_tensor(value, [assignments.shape[1]])
    for part, start in enumerate(range(0, rows, ROWS_PER_FILE)):
        stop = min(start + ROWS_PER_FILE, rows)
        table = pa.table(
            {
                "image_id": pa.array(image_ids[start:stop]),
                "assignments": tensor_column(assignments[start:stop], kind),
            }
        )
        run.write_table(table, FOLDER, f"part-{part:05d}.parquet")
