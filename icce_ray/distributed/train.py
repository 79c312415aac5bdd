"""Ray Train glue shared by `heads` and `classifier`: fit, progress, checkpoints, restarts.

Checkpoints are our own files in the run directory, not Ray's: the same ones serve a restarted
worker group, a killed driver, another number of workers, and training without Ray Train workers.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icce_ray import errors
from icce_ray.core.collective import Alone, Collective, Distributed
from icce_ray.distributed.cluster import Cluster, Request, Resources, Wait
from icce_ray.distributed.context import Context
from icce_ray.errors import ArtifactError, IcceError, StageError
from icce_ray.rundir.directory import RunDirectory

TRAIN = "train"  # working folder inside the stage's own


POLL = 0.5  # seconds between looks at the progress file


REMOTE_POLL = 5.0


PROGRESS_EVERY = 1.0  # seconds between progress files


REMOTE_PROGRESS_EVERY = 10.0


GROW_EVERY = 60.0  # seconds between looks whether a group that lost workers can have them back


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
        names = self.run.folders(self.folder)
        return [int(name[5:]) for name in names if name.startswith("step-")]


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


class Worker:
    """What a training loop sees of the world."""

    def __init__(self, run: RunDirectory, folder: str, token: str, alone: bool) -> None:
        self.run, self.folder, self.token = run, folder, token
        self.alone = alone  # one process, without Ray Train
        self.rank, self.world = (0, 1) if alone else _rank_and_world()
        self.device = _device(alone)
        self.collective: Collective = Distributed() if self.world > 1 else Alone()
        self.checkpoints = Checkpoints(run, folder)
        self._attempt = self._count_attempt()
        self._reported = 0.0
        self._scores: list[tuple[int, float]] = []
        self._placement = None if alone else _placement_group()
        self._reservation = None if alone else _reservation()

    def _count_attempt(self) -> int:
        """How often this fit has started its workers, read from the last one's progress."""
        last = _read_progress(self.run, self.folder)
        same = last is not None and last.get("token") == self.token
        return last["attempt"] + 1 if last is not None and same else 1

    def progress(
        self, done: int, note: str = "", force: bool = False, score: float | None = None
    ) -> None:
        """Tell the driver how far the group is (one worker speaks, at most once a second).

        A label-free score of the work so far is passed on to `Context.on_progress`.
        """
        every = PROGRESS_EVERY if self.run.is_local else REMOTE_PROGRESS_EVERY
        now = time.monotonic()
        if score is not None:
            self._scores.append((done, score))
        if self.rank != 0 or (now - self._reported < every and not force):
            return
        self._reported = now
        state = {
            "token": self.token,
            "attempt": self._attempt,
            "workers": self.world,
            "done": done,
            "note": note,
            "scores": self._scores,
            "placement": self._placement,
            "reservation": self._reservation,
        }
        self.run.write_json(state, self.folder, TRAIN, "progress.json")

    def barrier(self, metrics: Mapping[str, Any]) -> None:
        """Wait for all workers; `metrics` appear in Ray's dashboard."""
        if self.alone:
            return
        from ray import train

        train.report(dict(metrics))

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """A checkpoint of all workers; every worker must call it at the same step."""
        self.checkpoints.save(step, self.rank, self.world, state)
        self.barrier({"step": step})
        if self.rank == 0:
            self.checkpoints.complete(step, self.world)


def _rank_and_world() -> tuple[int, int]:
    from ray import train

    context = train.get_context()
    return context.get_world_rank(), context.get_world_size()


def _placement_group() -> str | None:
    """Id of the reservation that this worker's group lives in."""
    from ray.util import get_current_placement_group

    found = get_current_placement_group()
    return found.id.hex() if found is not None else None


def _reservation() -> str | None:
    """The name under which Ray Train keeps nodes for this worker's group."""
    with contextlib.suppress(Exception):  # not part of Ray's interface
        from ray.train.v2._internal.execution.context import get_train_context

        return f"train-{get_train_context().train_run_context.run_id}"
    return None


def release(run: RunDirectory, folder: str) -> None:
    """Give back what the workers of a training hold whose driver was ended, as by Ray Tune.

    Ray leaves this to a watchdog that needs the dashboard, and no second Ray on the machine. Nodes
    that a killed driver had reserved it keeps for 3 minutes from a group that may shrink.
    """
    held = _read_progress(run, folder) or {}
    if held.get("placement"):
        from ray import PlacementGroupID
        from ray.util import remove_placement_group
        from ray.util.placement_group import PlacementGroup

        with contextlib.suppress(Exception):  # already gone
            group = PlacementGroupID(bytes.fromhex(held["placement"]))
            remove_placement_group(PlacementGroup(group))
    if held.get("reservation"):
        import ray

        with contextlib.suppress(Exception):  # there is no such actor, or Ray changed it
            name = "AutoscalingCoordinator"
            coordinator = ray.get_actor(name, namespace=name)
            ray.get(coordinator.cancel_request.remote(held["reservation"]), timeout=5)


def _device(alone: bool) -> torch.device:
    if alone:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    run: RunDirectory = config["run"]
    worker = Worker(run, config["folder"], config["token"], config["alone"])
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


@dataclass(frozen=True)
class Group:
    """The workers of a training."""

    workers: int  # 0: none, the work is done in the driver's process
    least: int  # workers that suffice to go on
    cpus: float  # each
    gpus: float

    @classmethod
    def plan(
        cls,
        cluster: Cluster,
        workers: int,
        gpus_each: float,
        fed: bool = False,
    ) -> Group:
        """The group for `workers`; see `fit`. One that is `fed` by Ray Data leaves it cores."""
        least = cluster.settings.min_workers or workers
        cpus = float(cluster.cpus_each(workers, gpus_each)) if workers else 0.0
        if fed and workers and not gpus_each:
            cpus -= _spare(cpus)
        return cls(workers, min(least, workers), cpus, gpus_each)

    def decode_cpus(self, have: Resources) -> float:
        """What a task of Ray Data that feeds the group may reserve."""
        if self.workers and not self.gpus:
            return min(1.0, _spare(math.ceil(self.cpus)))
        return 1.0 if have.cpus >= 2 else 0.5

    def scaling(self) -> Any:
        """Ray Train's description of the group."""
        from ray import train

        make: Any = train.ScalingConfig  # its published types are those of an older version
        elastic = self.least < self.workers
        share = {"CPU": self.cpus, "GPU": self.gpus}
        return make(
            num_workers=(self.least, self.workers) if elastic else self.workers,
            elastic_resize_monitor_interval_s=GROW_EVERY,
            use_gpu=bool(self.gpus),
            resources_per_worker={name: much for name, much in share.items() if much} or None,
            # GPUs of one node talk faster to each other; cores are better not shared.
            placement_strategy="PACK" if self.gpus else "SPREAD",
        )

    def wait(self, context: Context, folder: str) -> Wait:
        """What says that the cluster lacks room for the group."""
        requests = [Request(self.cpus, self.gpus, self.least)] if self.workers else []
        advice = f"Lower {folder}.num_workers or ray.num_gpus, set ray.min_workers"
        return Wait(context.cluster, context.reporter, requests, advice)


def _spare(cpus: float) -> float:
    """The part of a worker's cores that is left to the tasks that feed it.

    Less than a worker takes: in the place that lost workers leave on another node, a further worker
    would fit, and the tasks would find none.
    """
    return 1.0 if cpus >= 3 else 0.25


def fit(
    context: Context,
    folder: str,
    loop: Loop,
    config: Mapping[str, Any],
    *,
    group: Group,
    title: str,
    total: int,
    unit: str = "steps",
    datasets: Mapping[str, Any] | None = None,
) -> None:
    """Run `loop(worker, config)` on a group of Ray Train workers and wait, showing progress.

    Args:
        folder: the stage's folder; working files go to its `train/`.
        group: its workers, as `Group.plan` says. With fewer than all a training goes on from its
            last checkpoint, as long as `group.least` are there, and takes in new ones.
        total: the value of `worker.progress(done)` at the end.
        datasets: Ray Data sets, for `ray.train.get_dataset_shard`.

    Raises:
        StageError: for what the loop raised, workers lost too often, or resources never provided.
    """
    context.cluster.start()
    if group.workers:
        release(context.run, folder)  # what an earlier driver, killed since, may still hold
    token = uuid.uuid4().hex
    direct = context.in_process or not (group.workers or datasets)
    work = {
        "run": context.run,
        "folder": folder,
        "token": token,
        "loop": loop,
        "config": dict(config),
        "alone": direct,
    }
    trainer = _Direct(work) if direct else _trainer(context, work, group, datasets)
    outcome: list[BaseException] = []
    thread = threading.Thread(target=_run_trainer, args=(trainer, outcome), daemon=True)
    thread.start()
    with context.reporter.bar(title, total, unit, done=0) as bar:
        _watch(context, folder, token, thread, bar.update, group)
    thread.join()
    ours = _written_error(context.run, folder, token)
    if ours is not None:
        raise ours
    if outcome:
        raise _explain(context.run, folder, token, outcome[0])


class _Direct:
    """Runs the loop as Ray Train does without workers, but without Ray Train."""

    def __init__(self, work: Mapping[str, Any]) -> None:
        self.work = work

    def fit(self) -> None:
        _worker_main(self.work)


def _trainer(
    context: Context, work: Mapping[str, Any], group: Group, datasets: Mapping[str, Any] | None
) -> Any:
    from ray import train
    from ray.train.torch import TorchTrainer

    run = context.run
    return TorchTrainer(
        _worker_main,
        train_loop_config=dict(work),
        scaling_config=group.scaling(),
        # A fresh name per fit: Ray would otherwise resume by itself, past our own checkpoints.
        run_config=train.RunConfig(
            name=f"ray-{work['token'][:8]}",
            storage_path=run.path(work["folder"], TRAIN),
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


def _watch(
    context: Context,
    folder: str,
    token: str,
    thread: threading.Thread,
    update: Callable[[int, str], None],
    group: Group,
) -> None:
    run, seen, scored = context.run, "", 0
    told = _Attempts(context, Checkpoints(run, folder).latest() or 0, group)
    wait = group.wait(context, folder)
    deadline = time.monotonic() + context.config.ray.worker_wait
    poll = POLL if run.is_local else REMOTE_POLL
    while thread.is_alive():
        thread.join(poll)
        ours = _written_error(run, folder, token)
        if ours is not None:  # Ray would start the group again, to fail in the same way
            raise ours
        wait.check()
        state = _read_progress(run, folder)
        if state is None or state.get("token") != token:
            if group.workers and time.monotonic() > deadline:
                raise wait.error()
            continue
        told.see(state)
        if json.dumps(state) != seen:
            seen = json.dumps(state)
            update(state["done"], state["note"])
            scored = _pass_scores(context, state, scored)


def _pass_scores(context: Context, state: Mapping[str, Any], after: int) -> int:
    """Tell of the scores of later steps than `after`. Returns the last step told of."""
    for step, score in state.get("scores", ()):
        if step > after and context.on_progress is not None:
            context.on_progress(step, score)
            after = step
    return after


class _Attempts:
    """Tells how the group starts, and how it goes on after it lost workers or got new ones."""

    def __init__(self, context: Context, resumed_at: int, group: Group) -> None:
        self.reporter, self.resumed_at, self.group = context.reporter, resumed_at, group
        self.attempt = self.workers = 0

    def see(self, state: Mapping[str, Any]) -> None:
        """Take in a progress file of this fit."""
        if state["attempt"] <= self.attempt:
            return
        if self.attempt:
            self.reporter.event(self._change(state["workers"], state["done"]))
        elif self.resumed_at:
            self.reporter.event(f"resumed from the checkpoint at {self.resumed_at:,}")
        if not self.attempt and state["workers"] < self.group.workers:
            self.reporter.say(f"begins with {state['workers']} of {self.group.workers} workers")
        self.attempt, self.workers = state["attempt"], state["workers"]

    def _change(self, workers: int, done: int) -> str:
        number = "1 worker goes" if workers == 1 else f"{workers} workers go"
        if workers > self.workers:
            return f"the cluster has room again: {number} on from {done:,}, before {self.workers}"
        if workers < self.workers:
            return f"workers were lost; {number} on from {done:,}, before {self.workers}"
        return f"workers were lost; a new group of {workers} goes on from {done:,}"


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
