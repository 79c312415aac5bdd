"""What runs in the workers of a training, and the files by which they report.

The state of a training is in files of the run directory, below STAGE/train/:

    step-*/         checkpoints; see checkpoints.py
    progress.json   how far the group is, written by its first worker, at most once a second
    error.json      what a worker raised

Files, since nothing else reaches the driver from a worker that Ray Train has started: its own
reports are barriers of all workers, and come with a checkpoint or not at all. Each fit has a token,
by which its files differ from those of an earlier driver.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from icce_ray.core.collective import Alone, Collective, Distributed
from icce_ray.distributed import compat
from icce_ray.distributed.checkpoints import TRAIN, Checkpoints
from icce_ray.errors import ArtifactError, IcceError
from icce_ray.rundir.directory import RunDirectory

PROGRESS_EVERY = 1.0  # seconds between progress files
REMOTE_PROGRESS_EVERY = 10.0

State = Mapping[str, Any]  # what a progress file holds
Note = Callable[[], str]


class Worker:
    """What a training loop sees of the world.

    Args:
        token: of the `fit` that started it.
        listen: where the loop runs in the driver's process: called with each progress.
    """

    def __init__(
        self, run: RunDirectory, folder: str, token: str, listen: Callable[[State], None] | None
    ) -> None:
        self.run, self.folder, self.token, self.listen = run, folder, token, listen
        self.in_group = listen is None
        self.rank, self.world = _rank_and_world() if self.in_group else (0, 1)
        self.device = _device(self.in_group)
        self.collective: Collective = Distributed() if self.world > 1 else Alone()
        self.checkpoints = Checkpoints(run, folder)
        self._attempt = self._count_attempt()
        self._reported = -math.inf
        self._scores: list[tuple[int, float]] = []
        # A killed driver cannot give these back; its successor reads them in the progress file.
        self._placement = compat.placement() if self.in_group else None
        self._reservation = compat.reservation() if self.in_group else None

    def _count_attempt(self) -> int:
        """How often this fit has started its workers, read from the last one's progress."""
        last = read_progress(self.run, self.folder)
        same = last is not None and last.get("token") == self.token
        return last["attempt"] + 1 if last is not None and same else 1

    def progress(
        self, done: int, note: Note | str = "", force: bool = False, score: float | None = None
    ) -> None:
        """Report how far the group is. Call it at every step: only the first worker reports, and
        at most once a second.

        Args:
            note: shown beside the number. A function is called only where there is a report: to
                read a loss makes the host wait for the device.
            score: of the work so far, without labels; passed on to `Context.on_progress`.
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
            "note": note if isinstance(note, str) else note(),
            "scores": self._scores,
            "placement": self._placement,
            "reservation": self._reservation,
        }
        if self.listen is not None:
            self.listen(state)
        else:
            self.run.write_json(state, self.folder, TRAIN, "progress.json")

    def barrier(self, metrics: Mapping[str, Any]) -> None:
        """Wait for all workers; `metrics` appear in Ray's dashboard."""
        if not self.in_group:
            return
        from ray import train

        train.report(dict(metrics))

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """A checkpoint of all workers; every worker must call it at the same step."""
        self.checkpoints.save(step, self.rank, self.world, state)
        self.barrier({"step": step})
        # Only now are all shares written. Before, the one of a lost worker might be missing.
        if self.rank == 0:
            self.checkpoints.complete(step, self.world)


def _rank_and_world() -> tuple[int, int]:
    from ray import train

    context = train.get_context()
    return context.get_world_rank(), context.get_world_size()


def _device(in_group: bool) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not in_group:
        return torch.device("cuda")
    from ray.train.torch import get_device

    return get_device()


Loop = Callable[[Worker, Mapping[str, Any]], None]


def run_loop(work: Mapping[str, Any]) -> None:
    """Runs in every worker. An error of ours is written down, since Ray would only retry it.

    Args:
        work: run, folder, token, loop, its config, and `listen` in the driver's process.
    """
    run: RunDirectory = work["run"]
    worker = Worker(run, work["folder"], work["token"], work.get("listen"))
    try:
        work["loop"](worker, work["config"])
    except IcceError as error:
        _write_error(work, type(error).__name__, str(error))
        if worker.world > 1:  # the others wait for this one; of one worker, ending is enough
            raise
    except Exception:
        _write_error(work, "", traceback.format_exc())
        raise


def _write_error(work: Mapping[str, Any], kind: str, text: str) -> None:
    content = {"kind": kind, "text": text, "token": work["token"]}
    work["run"].write_json(content, work["folder"], TRAIN, "error.json")


def read_progress(run: RunDirectory, folder: str) -> dict[str, Any] | None:
    """The last progress that was reported, of whichever fit."""
    try:
        return run.read_json(folder, TRAIN, "progress.json")
    except (ArtifactError, OSError):
        return None


def read_error(work: Mapping[str, Any]) -> dict[str, str]:
    """What a worker of this fit raised: `kind` of ours, else "", and `text`. {} where none did."""
    try:
        written = work["run"].read_json(work["folder"], TRAIN, "error.json")
    except (ArtifactError, OSError):
        return {}
    return written if written.get("token") == work["token"] else {}
