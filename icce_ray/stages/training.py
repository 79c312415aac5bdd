"""Ray Train glue shared by `heads` and `classifier`: fit, progress, checkpoints, restarts.

Checkpoints are our own files in the run directory, not Ray's: the same ones serve a restarted
worker group, a killed driver, another number of workers, and training without Ray Train workers.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from icce_ray import errors
from icce_ray.artifacts import RunDirectory
from icce_ray.core.collective import Alone, Collective, Distributed
from icce_ray.errors import ArtifactError, IcceError, StageError
from icce_ray.stages import Context

TRAIN = "train"  # working folder inside the stage's own
POLL = 0.5  # seconds between looks at the progress file
REMOTE_POLL = 5.0
PROGRESS_EVERY = 1.0  # seconds between progress files
REMOTE_PROGRESS_EVERY = 10.0


class Checkpoints:
    """Numbered checkpoints of a worker group, one file per worker, complete or ignored."""

    def __init__(self, run: RunDirectory, folder: str) -> None:
        self.run, self.folder = run, f"{folder}/{TRAIN}"

    def save(self, step: int, rank: int, world: int, state: Mapping[str, Tensor]) -> None:
        """Write one worker's share. Call `complete` on one worker once all have."""
        from safetensors.torch import save

        name = f"rank-{rank:05d}-of-{world:05d}.safetensors"
        self.run.write_bytes(save(dict(state)), self.folder, _step_name(step), name)

    def complete(self, step: int, world: int) -> None:
        """Declare the checkpoint of `world` workers usable and remove the older ones."""
        content = {"step": step, "world": world}
        self.run.write_json(content, self.folder, _step_name(step), "complete.json")
        for old in self._steps():
            if old < step:
                self.run.delete(f"{self.folder}/{_step_name(old)}")

    def latest(self) -> int | None:
        """The newest complete checkpoint's step."""
        done = [
            s for s in self._steps() if self.run.exists(self.folder, _step_name(s), "complete.json")
        ]
        return max(done, default=None)

    def load(self, step: int) -> list[dict[str, Tensor]]:
        """All workers' states. Raises ArtifactError for a damaged file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = f"{self.folder}/{_step_name(step)}"
        states = []
        # A group of another size may have been lost while it saved the same step.
        world = self.run.read_json(folder, "complete.json")["world"]
        for name in self.run.list(folder, f"-of-{world:05d}.safetensors"):
            try:
                states.append(load(self.run.read_bytes(folder, name)))
            except (SafetensorError, ValueError) as error:
                raise ArtifactError(
                    f"the checkpoint {self.run.path(folder, name)} cannot be read ({error}). "
                    f"Delete {self.run.path(folder)} to go on from the one before, or start over."
                ) from None
        return states

    def _steps(self) -> list[int]:
        import pyarrow.fs as pafs

        selector = pafs.FileSelector(self.run.path(self.folder), allow_not_found=True)
        found = self.run.filesystem.get_file_info(selector)
        return [int(i.base_name[5:]) for i in found if i.base_name.startswith("step-")]


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


class Worker:
    """What a training loop sees of the world."""

    def __init__(self, run: RunDirectory, folder: str, token: str) -> None:
        from ray import train

        context = train.get_context()
        self.run, self.folder, self.token = run, folder, token
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device = _device()
        self.collective: Collective = Distributed() if self.world > 1 else Alone()
        self.checkpoints = Checkpoints(run, folder)
        self._attempt = self._count_attempt()
        self._reported = 0.0

    def _count_attempt(self) -> int:
        """How often this fit has started its workers, read from the last one's progress."""
        last = _read_progress(self.run, self.folder)
        same = last is not None and last.get("token") == self.token
        return last["attempt"] + 1 if last is not None and same else 1

    def progress(self, done: int, note: str = "", force: bool = False) -> None:
        """Tell the driver how far the group is (one worker speaks, at most once a second)."""
        every = PROGRESS_EVERY if self.run.is_local else REMOTE_PROGRESS_EVERY
        now = time.monotonic()
        if self.rank != 0 or (now - self._reported < every and not force):
            return
        self._reported = now
        state = {"token": self.token, "attempt": self._attempt, "done": done, "note": note}
        self.run.write_json(state, self.folder, TRAIN, "progress.json")

    def barrier(self, metrics: Mapping[str, Any]) -> None:
        """Wait for all workers; `metrics` appear in Ray's dashboard."""
        from ray import train

        train.report(dict(metrics))

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """A checkpoint of all workers; every worker must call it at the same step."""
        self.checkpoints.save(step, self.rank, self.world, state)
        self.barrier({"step": step})
        if self.rank == 0:
            self.checkpoints.complete(step, self.world)


def _device() -> torch.device:
    if torch.cuda.is_available():
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cpu")


def _read_progress(run: RunDirectory, folder: str) -> dict[str, Any] | None:
    try:
        return run.read_json(folder, TRAIN, "progress.json")
    except (ArtifactError, OSError):
        return None


Loop = Callable[[Worker, Mapping[str, Any]], None]


def _worker_main(config: Mapping[str, Any]) -> None:
    """Runs in every worker. An error of ours is written down, since Ray would only retry it."""
    run = RunDirectory(config["run"])
    worker = Worker(run, config["folder"], config["token"])
    try:
        config["loop"](worker, config["config"])
    except IcceError as error:
        _write_error(run, config, type(error).__name__, str(error))
        if worker.world > 1:  # the others wait for this one; alone, ending is enough
            raise
    except Exception:
        _write_error(run, config, "", traceback.format_exc())
        raise


def _write_error(run: RunDirectory, config: Mapping[str, Any], kind: str, text: str) -> None:
    content = {"kind": kind, "text": text, "token": config["token"]}
    run.write_json(content, config["folder"], TRAIN, "error.json")


def fit(
    context: Context,
    folder: str,
    loop: Loop,
    config: Mapping[str, Any],
    *,
    workers: int,
    gpus_each: float,
    title: str,
    total: int,
    unit: str = "steps",
    datasets: Mapping[str, Any] | None = None,
    spare_cpus: int = 0,
) -> None:
    """Run `loop(worker, config)` on a group of Ray Train workers and wait, showing progress.

    Args:
        folder: the stage's folder; working files go to its `train/`.
        workers: 0 runs the loop in this process.
        total: the value of `worker.progress(done)` at the end.
        datasets: Ray Data sets, for `ray.train.get_dataset_shard`.
        spare_cpus: cores to leave for Ray Data's own tasks.

    Raises:
        StageError: for what the loop raised, workers lost too often, or resources never provided.
    """
    context.cluster.start()
    token = uuid.uuid4().hex
    trainer = _trainer(
        context, folder, loop, config, token, workers, gpus_each, datasets, spare_cpus
    )
    outcome: list[BaseException] = []
    thread = threading.Thread(target=_run_trainer, args=(trainer, outcome), daemon=True)
    thread.start()
    done = _resume_point(context.run, folder)
    with context.reporter.bar(title, total, unit, done=0) as bar:
        _watch(context, folder, token, thread, bar.update, done)
    thread.join()
    ours = _written_error(context.run, folder, token)
    if ours is not None:
        raise ours
    if outcome:
        raise _explain(context.run, folder, token, outcome[0])


def _trainer(
    context: Context,
    folder: str,
    loop: Loop,
    config: Mapping[str, Any],
    token: str,
    workers: int,
    gpus_each: float,
    datasets: Mapping[str, Any] | None,
    spare_cpus: int,
) -> Any:
    from ray import train
    from ray.train.torch import TorchTrainer

    resources: dict[str, float] = {}
    if workers:
        cpus = context.cluster.cpus_each(workers, gpus_each)
        resources["CPU"] = max(1, cpus - spare_cpus)
    if gpus_each:
        resources["GPU"] = gpus_each
    run = context.run
    return TorchTrainer(
        _worker_main,
        train_loop_config={
            "run": run.uri,
            "folder": folder,
            "token": token,
            "loop": loop,
            "config": dict(config),
        },
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu=bool(gpus_each),
            resources_per_worker=resources or None,
        ),
        # A fresh name per fit: Ray would otherwise resume by itself, past our own checkpoints.
        run_config=train.RunConfig(
            name=f"ray-{token[:8]}",
            storage_path=run.path(folder, TRAIN),
            storage_filesystem=None if run.is_local else run.filesystem,
            failure_config=train.FailureConfig(max_failures=context.config.ray.max_failures),
        ),
        datasets=dict(datasets) if datasets else None,
    )


def _run_trainer(trainer: Any, outcome: list[BaseException]) -> None:
    # Outside the main thread Ray leaves Ctrl-C to us; its own handler would exit with status 0.
    try:
        trainer.fit()
    except BaseException as error:
        outcome.append(error)


def _resume_point(run: RunDirectory, folder: str) -> int:
    return Checkpoints(run, folder).latest() or 0


def _watch(
    context: Context,
    folder: str,
    token: str,
    thread: threading.Thread,
    update: Callable[[int, str], None],
    resumed_at: int,
) -> None:
    run, attempts, seen = context.run, 0, ""
    deadline = time.monotonic() + context.config.ray.worker_wait
    poll = POLL if run.is_local else REMOTE_POLL
    while thread.is_alive():
        thread.join(poll)
        ours = _written_error(run, folder, token)
        if ours is not None:  # Ray would start the group again, to fail in the same way
            raise ours
        state = _read_progress(run, folder)
        if state is None or state.get("token") != token:
            if attempts == 0 and time.monotonic() > deadline:
                raise StageError(
                    f"no workers after {context.config.ray.worker_wait} s: the cluster has "
                    f"{context.cluster.resources().describe()}, which does not carry what "
                    "was asked for. Ask for fewer workers or GPUs, or raise ray.worker_wait."
                )
            continue
        if state["attempt"] > attempts:
            _say_attempt(context, state, attempts, resumed_at)
            attempts = state["attempt"]
        if json.dumps(state) != seen:
            seen = json.dumps(state)
            update(state["done"], state["note"])


def _say_attempt(context: Context, state: Mapping[str, Any], before: int, resumed: int) -> None:
    if before:
        context.reporter.event(f"workers were lost; a new group goes on from {state['done']:,}")
    elif resumed:
        context.reporter.event(f"resumed from the checkpoint at {resumed:,}")


def _read_error(run: RunDirectory, folder: str, token: str) -> dict[str, str]:
    try:
        written = run.read_json(folder, TRAIN, "error.json")
    except (ArtifactError, OSError):
        return {}
    return written if written.get("token") == token else {}


def _written_error(run: RunDirectory, folder: str, token: str) -> IcceError | None:
    """The error of ours that a worker of this fit raised, if one did."""
    written = _read_error(run, folder, token)
    if not written.get("kind"):
        return None
    kind: type[IcceError] = getattr(errors, written["kind"], StageError)
    return kind(written["text"])


def _explain(run: RunDirectory, folder: str, token: str, error: BaseException) -> BaseException:
    """Ray's error, with what the worker said."""
    if isinstance(error, IcceError):
        return error
    detail = _read_error(run, folder, token).get("text")
    reason = detail or str(error) or type(error).__name__
    return StageError(
        f"training in {folder} failed, after {type(error).__name__}. Run the same command again "
        f"to go on from the last checkpoint. What the worker said:\n{reason.strip()[-2000:]}"
    )
