"""What a run or a sweep reports, sent to an experiment tracker as well: the setting `track`.

A thread sends it, so that a slow server never holds up the work. A tracker that fails is given up,
with a line that begins with `!`; the run continues.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from icce_ray.errors import ConfigError, one_line
from icce_ray.rundir.directory import RunDirectory

MODULES = {"mlflow": "mlflow", "wandb": "wandb", "tensorboard": "tensorboardX"}
PROJECT = "icce_ray"  # unless MLFLOW_EXPERIMENT_NAME or WANDB_PROJECT names another
SERVER = "MLFLOW_TRACKING_URI"
FOLDER = "tensorboard"  # of a run
END_WITHIN = 30.0  # seconds that a tracker gets at the end of a run


class Tracker(Protocol):
    """One run of a tracker. May raise anything."""

    def measure(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name."""

    def note(self, text: str) -> None:
        """A line that the report shows again: a lost worker, a resumed stage."""

    def trial(self, name: str, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """The result of one trial of a sweep."""

    def end(self, state: str) -> None:
        """state: done, stopped, failed."""


def check(kind: str | None, run: RunDirectory) -> None:
    """What can be wrong before anything is started. Raises ConfigError."""
    if kind is None:
        return
    if importlib.util.find_spec(MODULES[kind]) is None:
        raise ConfigError(f"track={kind} needs a package: pip install '.[{kind}]'")
    if kind == "mlflow" and not os.environ.get(SERVER):
        raise ConfigError(
            f"track=mlflow: say where, as {SERVER}=http://HOST:5000 in the environment"
        )
    if kind == "tensorboard" and not run.is_local:
        raise ConfigError(
            f"track=tensorboard writes beside a run on a disk, but {run.uri} is an object store; "
            "use mlflow or wandb"
        )


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those values that are finite numbers."""
    kept = {k: v for k, v in values.items() if isinstance(v, (int, float))}
    return {k: float(v) for k, v in kept.items() if math.isfinite(v) and not isinstance(v, bool)}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names: heads.count, backbone.0.name."""
    if isinstance(tree, Mapping):
        pairs = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)) and any(isinstance(one, Mapping) for one in tree):
        pairs = [(str(number), value) for number, value in enumerate(tree)]
    else:
        return {prefix.rstrip("."): tree}
    return {k: v for key, value in pairs for k, v in flat(value, f"{prefix}{key}.").items()}


class Tracking:
    """Sends calls to a tracker, in order, from a thread of its own.

    Args:
        kind: a key of MODULES.
        run: the run directory, or a sweep's folder, which names the tracked run.
        settings: a tree of settings.
    """

    def __init__(self, kind: str, run: RunDirectory, settings: Mapping[str, Any]) -> None:
        self.kind = kind
        self._make = lambda: _START[kind](run, flat(settings))
        self._calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._given_up = False

    def send(self, call: Callable[[Tracker], None]) -> None:
        """Have the tracker called soon. Returns at once."""
        if not self._given_up:
            self._calls.put(call)

    @contextlib.contextmanager
    def open(self, on_failure: Callable[[str], None]) -> Iterator[None]:
        """Meanwhile the tracker takes calls; then it learns how the work ended.

        on_failure: called once with a sentence, from another thread, where the tracker fails.
        """
        thread = threading.Thread(
            target=self._work, args=(on_failure,), name="tracking", daemon=True
        )
        thread.start()
        state = "failed"
        try:
            yield
            state = "done"
        except (KeyboardInterrupt, SystemExit):
            state = "stopped"
            raise
        finally:
            self.send(lambda tracker: tracker.end(state))
            self._calls.put(None)
            thread.join(END_WITHIN)

    def _work(self, on_failure: Callable[[str], None]) -> None:
        try:
            tracker = self._make()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:
            self._given_up = True
            on_failure(f"tracking by {self.kind} is given up: {one_line(error)}")


# --- the trackers --------------------------------------------------------------------------------


class _MLflow:
    ENDS = {"done": "FINISHED", "stopped": "KILLED"}  # noqa: RUF012

    def __init__(self, run: RunDirectory, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=os.environ[SERVER])
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        self.experiment = known.experiment_id if known else self.client.create_experiment(name)
        self.id = self._start(_name(run), {"run_dir": run.uri}, settings)
        self.notes = 0

    def _start(self, name: str, tags: Mapping[str, str], settings: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        started = self.client.create_run(self.experiment, run_name=name, tags=dict(tags))
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        for first in range(0, len(params), 100):  # the most that a call takes
            self.client.log_batch(started.info.run_id, params=params[first : first + 100])
        return str(started.info.run_id)

    def _measure(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, step) for key, value in values.items()]
        self.client.log_batch(run_id, metrics=metrics)

    def measure(self, values: Mapping[str, float], step: int) -> None:
        self._measure(self.id, values, step)

    def note(self, text: str) -> None:
        self.notes += 1
        self.client.set_tag(self.id, f"note.{self.notes:03d}", text[:5000])

    def trial(self, name: str, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        child = self._start(name, {"mlflow.parentRunId": self.id}, settings)
        self._measure(child, scores, 0)
        self.client.set_terminated(child)

    def end(self, state: str) -> None:
        self.client.set_terminated(self.id, self.ENDS.get(state, "FAILED"))


class _Wandb:
    def __init__(self, run: RunDirectory, settings: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(run),
            config={**settings, "run_dir": run.uri},
            settings=wandb.Settings(silent=True),
        )
        self.notes = 0

    def measure(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})  # its own step counts calls

    def note(self, text: str) -> None:
        self.notes += 1
        self.run.summary[f"note.{self.notes:03d}"] = text

    def trial(self, name: str, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        self.run.log({"trial": name, **settings, **scores})

    def end(self, state: str) -> None:
        self.run.summary["state"] = state
        self.run.finish(exit_code=int(state != "done"))


class _TensorBoard:
    def __init__(self, run: RunDirectory, settings: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(run.path(FOLDER), flush_secs=10)
        rows = [f"| {key} | {value} |" for key, value in settings.items()]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        self.notes = 0

    def measure(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def note(self, text: str) -> None:
        self.notes += 1
        self.writer.add_text("notes", text, self.notes)

    def trial(self, name: str, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        plain = {k: v if isinstance(v, (int, float)) else str(v) for k, v in settings.items()}
        self.writer.add_hparams(plain, dict(scores), name=name)

    def end(self, state: str) -> None:
        self.writer.add_text("state", state)
        self.writer.close()


_START: dict[str, Callable[[RunDirectory, Mapping[str, Any]], Tracker]] = {
    "mlflow": _MLflow,
    "wandb": _Wandb,
    "tensorboard": _TensorBoard,
}


def _name(run: RunDirectory) -> str:
    """The last folder of a run; of a sweep, its run's as well: mine/sweeps/ensemble."""
    parts = run.uri.partition("?")[0].rstrip("/").split("/")
    return "/".join(parts[-3:] if parts[-2:-1] == ["sweeps"] else parts[-1:])
