"""What the user sees while a run works: a bar in a terminal, a line at a time elsewhere.

Both also go to RUN/log and RUN/status.json, which `icce-ray status` reads.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from icce_ray.errors import IcceError, printable_lines
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.lock import this_process
from icce_ray.rundir.storage import hastily, listening
from icce_ray.rundir.tracking import Tracker, Tracking, numbers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_EVERY = 15.0  # seconds between progress lines where there is no terminal
STATUS_EVERY = 3.0  # seconds between writes of status.json
REMOTE_EVERY = 30.0  # the same on object stores, where each write costs
LOSS = re.compile(r"loss (-?\d+\.?\d*)")  # how the note of a training begins
LOG_EVERY = 60.0  # seconds between writes of the log on object stores


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 8.1 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _encode(text: str) -> bytes:
    return text.encode(errors="backslashreplace")  # file names need not be text


class Bar:
    """One long step: how far it is, and how long it will still take."""

    def __init__(self, reporter: Reporter, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._reporter, self._start_at = reporter, done
        self._first: tuple[float, int] | None = None  # time and count at the first unit done here
        self.line_at = time.monotonic()  # of the last progress line

    def update(self, done: int, note: str = "") -> None:
        """Set how many are done (not an increment); `note` is shown beside it."""
        self.done = done
        if self._first is None and done > self._start_at:
            self._first = (time.monotonic(), done)
        self._reporter.moved(self, note)

    def remaining(self) -> float | None:
        """Seconds still to go, or None before there is a measurement.

        The rate is that since the first unit done in this session: what came before it was
        start-up (importing, compiling, filling buffers), which will not come again.
        """
        if self._first is None or self.done <= self._first[1]:
            return None
        started, count = self._first
        return (self.total - self.done) * (time.monotonic() - started) / (self.done - count)


class Reporter:
    """Progress, messages, the log file and status.json of one run.

    Args:
        quiet: nothing in the terminal.
        silent: no log and no status.json, as inside a sweep's trial, where many write at once and
            the sweep itself reports.
        tracking: an experiment tracker that is to know the same.
    """

    def __init__(
        self,
        run: RunDirectory,
        quiet: bool = False,
        silent: bool = False,
        tracking: Tracking | None = None,
    ) -> None:
        from rich.console import Console

        self.run, self.tracking = run, tracking
        self.quiet, self.silent = quiet, silent
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.stage = ""
        self.events: list[str] = []
        self._lines: list[str] = []  # of a remote log, not written yet
        self._written: bytes | None = None  # the remote log as it is; None before it is read
        self._flushed_at = time.monotonic()
        self._lock = threading.Lock()
        self._silent = False  # the storage does not answer
        self._status_at = 0.0
        self._progress: Progress | None = None
        self._task: Any = None

    # messages

    def say(self, text: str, log: bool = True) -> None:
        """A line for the user and the log."""
        text = printable_lines(text)
        if not self.quiet:
            self.console.print(text, markup=False)
        if log:
            self.log(text)

    def event(self, text: str) -> None:
        """A line that the report shows again: a lost worker, a resumed stage."""
        self.events.append(text)
        self.say(f"! {text}")
        self._track(lambda tracker: tracker.note(text))

    def log(self, text: str) -> None:
        """A line for the log only; on object stores it is written with later ones."""
        if self.silent:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        line = f"{stamp} {self.stage or '-':<10} {printable_lines(text)}\n"
        if self.run.is_local:
            path = self.run.path("log")
            os.makedirs(self.run.root, exist_ok=True)  # noqa: PTH103
            with contextlib.suppress(OSError), open(path, "ab") as stream:  # noqa: PTH123
                stream.write(_encode(line))
            return
        self._lines.append(line)
        if time.monotonic() - self._flushed_at >= LOG_EVERY and not self._silent:
            self.flush()

    def flush(self) -> None:
        """Write the log of a remote run, whole: objects cannot be appended to.

        Losing it must not stop a run; the next call tries again.
        """
        if self.run.is_local or not self._lines or not self._lock.acquire(blocking=False):
            return
        self._flushed_at = time.monotonic()
        try:
            with hastily(), contextlib.suppress(IcceError, OSError):
                if self._written is None:
                    there = self.run.exists("log")
                    self._written = self.run.read_bytes("log") if there else b""
                count = len(self._lines)
                whole = self._written + _encode("".join(self._lines[:count]))
                self.run.write_bytes(whole, "log")
                self._written = whole
                del self._lines[:count]
        finally:
            self._lock.release()

    # an experiment tracker

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Meanwhile the tracker, if there is one, gets what is reported; then how it ended."""
        if self.tracking is None:
            yield
            return
        with self.tracking.open(self.event):
            yield

    def measured(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Results of the current stage, for the tracker alone. What is no number is left out."""
        named = {f"{self.stage}/{key}": value for key, value in numbers(values).items()}
        self._track(lambda tracker: tracker.measure(named, step))

    def trial(self, name: str, settings: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        """The result of one trial of a sweep, for the tracker alone."""
        self._track(lambda tracker: tracker.trial(name, settings, numbers(scores)))

    def _track(self, call: Callable[[Tracker], None]) -> None:
        if self.tracking is not None:
            self.tracking.send(call)

    # a storage that fails for a while

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile report storage failures that are waited out to the user."""
        with listening(self._storage):
            yield

    def _storage(self, text: str, well: bool) -> None:
        if self._silent == (not well):
            if not well:  # the next try of the same trouble
                self.say(text)
            return
        self._silent = not well
        self.event(text)

    # status

    def status(self, state: str, **more: Any) -> None:
        """Write status.json: state, stage, process, time, and whatever is known of progress."""
        self._status_at = time.monotonic()
        if self.silent:
            return
        content = {"state": state, "stage": self.stage, "time": time.time(), **this_process()}
        # Losing one status line must not stop a run, nor hold it up.
        with hastily(), contextlib.suppress(Exception):
            self.run.write_json({**content, **more}, "status.json")

    # progress

    @contextlib.contextmanager
    def bar(self, title: str, total: int, unit: str = "", done: int = 0) -> Iterator[Bar]:
        """Show progress of a step of `total` units, `done` of which an earlier run finished."""
        bar = Bar(self, title, total, unit, done)
        if not self.console.is_terminal or self.quiet:
            yield bar
            return
        with _progress(self.console, unit) as progress:
            self._progress = progress
            self._task = progress.add_task(title, total=total, completed=done, note="")
            try:
                yield bar
            finally:
                self._progress = None

    def moved(self, bar: Bar, note: str) -> None:
        """Show where a bar is: in the terminal at once, elsewhere from time to time."""
        now = time.monotonic()
        if self._progress is not None:
            self._progress.update(self._task, completed=bar.done, note=note)
        if now - bar.line_at >= LINE_EVERY:
            bar.line_at = now
            self._line(bar, note)
        every = STATUS_EVERY if self.run.is_local else REMOTE_EVERY
        if now - self._status_at >= every:
            self.status(
                "running",
                step=bar.title,
                done=bar.done,
                total=bar.total,
                unit=bar.unit,
                remaining_seconds=bar.remaining(),
            )
            if loss := LOSS.match(note):
                self.measured({"loss": float(loss[1])}, bar.done)

    def _line(self, bar: Bar, note: str) -> None:
        left = bar.remaining()
        text = f"{bar.title}: {bar.done:,} of {bar.total:,} {bar.unit}".rstrip()
        text += f", {duration(left)} left" if left is not None else ""
        text += f" ({note})" if note else ""
        if self._progress is None and not self.quiet:
            print(text, file=sys.stderr, flush=True)
        self.log(text)


def _progress(console: Console, unit: str) -> Progress:
    """A bar of a terminal. Its library is imported where there is one to show."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn(unit + " {task.fields[note]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console, transient=True)
