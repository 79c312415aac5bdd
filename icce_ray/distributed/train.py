"""Ray Train: a loop on a group of workers, or in this process, with progress and restarts."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from icce_ray import errors
from icce_ray.distributed import compat
from icce_ray.distributed.checkpoints import TRAIN, Checkpoints
from icce_ray.distributed.cluster import Cluster, Request, Resources, Wait
from icce_ray.distributed.context import Context
from icce_ray.distributed.tasks import collect
from icce_ray.distributed.worker import Loop, State, read_error, read_progress, run_loop
from icce_ray.errors import IcceError, StageError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import Bar

POLL = 0.5  # seconds between looks at the progress file
REMOTE_POLL = 5.0
GROW_EVERY = 60.0  # seconds between looks whether a group that lost workers can have them back
GIVE_BACK = 10.0  # seconds a group gets to end its workers in order, before it is killed
AFTERMATH = 3.0  # seconds after which nothing of an ended group can turn up any more

# How long Ray Train waits for a place for a group it believes to fit before it counts anew. After a
# lost node its belief is up to 20 s old; the default of 60 s is spent waiting for nothing.
START_TIMEOUT = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")


@dataclass(frozen=True)
class Group:
    """The workers of a training."""

    workers: int  # 0: none, the work is done in the driver's process
    least: int  # workers that suffice to resume
    cpus: float  # each
    gpus: float
    grow_every: float = GROW_EVERY  # seconds

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
        return cls(workers, min(least, workers), cpus, gpus_each, GROW_EVERY)

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
            elastic_resize_monitor_interval_s=self.grow_every,
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

    When it returns or raises, by Ctrl-C as well, the group has ended: a next one finds its places.

    Args:
        folder: of the stage; progress, errors and checkpoints go below it.
        config: for the loop, as plain data.
        group: with no workers, the loop runs in this process. A group that may shrink resumes from
            the last checkpoint while `group.least` workers are there, and takes in new ones.
        total: the value of `worker.progress(done)` at the end.
        datasets: Ray Data sets, for `ray.train.get_dataset_shard`.

    Raises:
        StageError: for what the loop raised, workers lost too often, or resources never provided.
    """
    work = {
        "run": context.run,
        "folder": folder,
        "token": uuid.uuid4().hex,
        "loop": loop,
        "config": dict(config),
    }
    with context.reporter.bar(title, total, unit, done=0) as bar:
        watch = _Watch(context, work, group, bar)
        if group.workers and not context.in_process:
            _fit_in_group(context, work, group, datasets, watch)
        else:
            failures = context.config.ray.max_failures
            _fit_here({**work, "listen": watch.see}, datasets, failures)
    error = watch.error()  # of a single worker, which has ended as if all were well
    if error is not None:
        raise error


def _fit_here(work: Mapping[str, Any], datasets: Any, failures: int) -> None:
    """In this process and thread, so that Ctrl-C ends the training itself."""
    try:
        if not datasets:
            run_loop(work)
        else:  # Ray Train without workers hands the loop its part of the data
            _trainer(work, Group(0, 0, 0.0, 0.0), datasets, failures).fit()
    except IcceError:
        raise
    except Exception as error:
        raise _explain(work, type(error).__name__, str(error)) from None
    finally:
        torch.cuda.empty_cache()  # the next stages' tasks are other processes


def _fit_in_group(
    context: Context, work: Mapping[str, Any], group: Group, datasets: Any, watch: _Watch
) -> None:
    """The group's owner is a Ray task, not a thread of ours.

    A thread cannot be ended: Ray Train would continue, and retry, behind the back of a driver that
    has given up. The task can. Interrupted, it does what Ray Train does on Ctrl-C, which is to end
    its workers; killed, its workers end with it, as Ray ends what a dead process owns.
    """
    ray = context.cluster.start()
    release(context.run, work["folder"])  # what an earlier driver, killed since, may still hold
    variables = {k: v for k, v in os.environ.items() if k.startswith("RAY_TRAIN_")}
    variables.setdefault(*START_TIMEOUT)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=_here(ray))(_fit_task)
    ref = task.remote(work, group, datasets, context.config.ray.max_failures, variables)
    poll = POLL if context.run.is_local else REMOTE_POLL
    wait = group.wait(context, work["folder"])
    end = partial(_end_group, ray, context, work)
    failed = next(collect(ray, [ref], wait, watch.look, poll, end))[1]
    if failed is not None:
        raise _explain(work, *failed)


def _here(ray: Any) -> Any:
    """Beside the driver, which is often on a head node that is not lost with a spot node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        node = ray.get_runtime_context().get_node_id()
    except Exception:  # a driver outside of the cluster (ray://) is on no node
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(node, soft=True)


def _fit_task(
    work: Mapping[str, Any],
    group: Group,
    datasets: Any,
    failures: int,
    variables: Mapping[str, str],
) -> tuple[str, str] | None:
    """The body of the task that owns the group. Returns Ray's error, by name and text, if any."""
    with compat.environment(variables):
        try:
            _trainer(work, group, datasets, failures).fit()
        except Exception as error:
            return type(error).__name__, str(error)
        except KeyboardInterrupt:
            # By `_end_group`; Ray Train has ended the workers. Its controller forgets an abort that
            # comes while it starts a group, and would ask for places for good. It ends with its
            # owner, which is this process.
            os._exit(0)
    return None


def _trainer(work: Mapping[str, Any], group: Group, datasets: Any, failures: int) -> Any:
    from ray import train
    from ray.train.torch import TorchTrainer

    run: RunDirectory = work["run"]
    trainer = TorchTrainer(
        run_loop,
        train_loop_config=dict(work),
        scaling_config=group.scaling(),
        # A fresh name per fit: Ray would otherwise resume by itself, past our own checkpoints.
        run_config=train.RunConfig(
            name=f"ray-{work['token'][:8]}",
            storage_path=run.path(work["folder"], TRAIN),
            storage_filesystem=None if run.is_local else run.filesystem,
            failure_config=train.FailureConfig(max_failures=failures),
        ),
        datasets=dict(datasets) if datasets else None,
    )
    compat.without_servants(trainer, fed=bool(datasets))
    return trainer


def _end_group(ray: Any, context: Context, work: Mapping[str, Any], ref: Any) -> None:
    """End the task and its group, whatever it is doing: at work, waiting for a place, retrying."""
    if context.cluster.is_local and compat.local_ray_ended():
        return
    ray.cancel(ref)  # Ray Train then ends its workers and gives back their places
    if not ray.wait([ref], timeout=GIVE_BACK)[0]:
        ray.cancel(ref, force=True)
    release(work["run"], work["folder"])
    for _ in range(round(AFTERMATH / POLL)):
        time.sleep(POLL)
        compat.release_orphans()


def release(run: RunDirectory, folder: str) -> None:
    """Give back what the workers of a training hold whose driver was ended, as by Ray Tune.

    Ray leaves this to a watchdog that needs the dashboard, and no second Ray on the machine. Nodes
    that a killed driver had reserved it keeps for 3 minutes from a group that may shrink.
    """
    held = read_progress(run, folder) or {}
    if held.get("placement"):
        compat.release_placement(held["placement"])
    if held.get("reservation"):
        compat.cancel_reservation(held["reservation"])
    compat.release_orphans()


class _Watch:
    """Shows what the workers report, and notices what they raise."""

    def __init__(self, context: Context, work: Mapping[str, Any], group: Group, bar: Bar) -> None:
        self.context, self.work, self.bar = context, work, bar
        self.attempts = _Attempts(context, _resumed_at(context.run, work["folder"]), group)
        self._deadline = time.monotonic() + context.config.ray.worker_wait
        self._wait = group.wait(context, work["folder"])
        self._seen = ""
        self._scored = 0  # step of the last score that was passed on

    def look(self) -> None:
        """Read the workers' files.

        Raises:
            IcceError: what a worker raised. Ray would start the group again, to fail alike.
            StageError: where no worker has begun for `ray.worker_wait` seconds.
        """
        error = self.error()
        if error is not None:
            raise error
        state = read_progress(self.work["run"], self.work["folder"])
        if state is not None and state.get("token") == self.work["token"]:
            self._deadline = math.inf
            self.see(state)
        elif time.monotonic() > self._deadline:
            raise self._wait.error()

    def see(self, state: State) -> None:
        """Take in one progress of this fit, unless it is the last one again."""
        text = json.dumps(state)
        if text == self._seen:
            return
        self._seen = text
        self.attempts.see(state)
        self.bar.update(state["done"], state["note"])
        for step, score in state.get("scores", ()):
            if step > self._scored and self.context.on_progress is not None:
                self.context.on_progress(step, score)
                self._scored = step

    def error(self) -> IcceError | None:
        """The error of ours that a worker of this fit raised, if one did."""
        written = read_error(self.work)
        if not written.get("kind"):  # one that is not ours: Ray Train restarts the group
            return None
        kind: type[IcceError] = getattr(errors, written["kind"], StageError)
        return kind(written["text"])


def _resumed_at(run: RunDirectory, folder: str) -> int:
    return Checkpoints(run, folder).latest() or 0


class _Attempts:
    """Reports how the group starts, and how it resumes after it lost workers or got new ones."""

    def __init__(self, context: Context, resumed_at: int, group: Group) -> None:
        self.reporter, self.resumed_at, self.group = context.reporter, resumed_at, group
        self.attempt = self.workers = 0

    def see(self, state: State) -> None:
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
        number = "1 worker resumes" if workers == 1 else f"{workers} workers resume"
        if workers > self.workers:
            return f"the cluster has room again: {number} from {done:,}, before {self.workers}"
        if workers < self.workers:
            return f"workers were lost; {number} from {done:,}, before {self.workers}"
        return f"workers were lost; a new group of {workers} resumes from {done:,}"


def _explain(work: Mapping[str, Any], name: str, text: str) -> StageError:
    """What to raise for Ray's error of that name and text: with what the worker said, if it did,
    since Ray only says that it was lost."""
    reason = read_error(work).get("text") or text or name
    return StageError(
        f"training in {work['folder']} failed, after {name}. Run the same command again to resume "
        f"from the last checkpoint. What the worker said:\n{reason.strip()[-2000:]}"
    )
