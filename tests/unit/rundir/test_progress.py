"""What the user sees: lines, the log, status.json."""

from __future__ import annotations

import errno
import io
import os
import re

import pyarrow.fs as pafs
import pytest
from rich.console import Console

from icce_ray.rundir import progress
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import Reporter, duration
from icce_ray.rundir.storage import Storage


@pytest.fixture
def run(tmp_path):
    return RunDirectory(str(tmp_path / "run"))


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.13, "8.1 s"),
        (42.4, "42 s"),
        (60, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (7199.6, "2 h 00 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_line_goes_to_the_user_and_the_log(run, capsys):
    reporter = Reporter(run)
    reporter.stage = "heads"
    reporter.say("loss [bold] 0.5")  # no markup of its own is read
    reporter.say("shown alone", log=False)
    assert capsys.readouterr().err == "loss [bold] 0.5\nshown alone\n"
    log = run.read_bytes("log").decode()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d heads {6}loss \[bold\] 0\.5\n", log)


def test_silent_writes_nothing_at_all(run, capsys):
    reporter = Reporter(run, quiet=True, silent=True)
    reporter.say("one")
    reporter.event("a worker was lost")
    reporter.status("running")
    with reporter.bar("work", 10) as bar:
        bar.update(10)
    reporter.flush()
    assert capsys.readouterr() == ("", "")
    assert reporter.events == ["a worker was lost"] and not run.list("")


def test_quiet_still_writes_the_log(run, capsys):
    reporter = Reporter(run, quiet=True)
    reporter.say("one")
    reporter.event("a worker was lost")
    with reporter.bar("work", 10) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")
    assert reporter.events == ["a worker was lost"]
    assert run.read_bytes("log").decode().count("\n") == 2


def test_file_names_that_are_no_text_can_be_logged(run):
    Reporter(run, quiet=True).say("cannot read " + os.fsdecode(b"caf\xe9.png"))
    assert b"caf\\udce9.png" in run.read_bytes("log")


def test_what_a_terminal_would_act_on_is_escaped(run, capsys):
    Reporter(run).say("one\ntwo \x1b[31mred\r\x07.png")
    shown = "one\ntwo \\x1b[31mred\\r\\x07.png\n"
    assert capsys.readouterr().err == shown
    assert run.read_bytes("log").decode().endswith(shown)


def test_a_log_that_cannot_be_written_stops_nothing(run):
    os.makedirs(run.path("log"))  # noqa: PTH103
    reporter = Reporter(run, quiet=True)
    reporter.say("one")


def test_remote_lines_are_collected_and_appended(tmp_path):
    from fsspec.implementations.memory import MemoryFileSystem

    run = RunDirectory("store://bucket/run")
    store = MemoryFileSystem(skip_instance_cache=True)
    run.storage._opened = (pafs.PyFileSystem(pafs.FSSpecHandler(store)), f"/bucket/{tmp_path.name}")
    for text in ("one", "two"):
        reporter = Reporter(run, quiet=True)
        reporter.say(text)
        reporter.flush()
        reporter.flush()
    lines = run.read_bytes("log").decode().splitlines()
    assert [line[-3:] for line in lines] == ["one", "two"]


def test_status(run):
    reporter = Reporter(run, quiet=True)
    reporter.stage = "embed"
    reporter.status("failed", error="why")
    found = run.read_json("status.json")
    assert (found["state"], found["stage"], found["error"]) == ("failed", "embed", "why")
    assert found["pid"] == os.getpid() and found["time"] > 1.7e9


def test_a_status_that_cannot_be_written_stops_nothing(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Storage, "_write_local", full)
    Reporter(run, quiet=True).status("running")


def test_lines_come_now_and_then_where_there_is_no_terminal(run, capsys, clock):
    reporter = Reporter(run)
    with reporter.bar("training", 1000, "steps") as bar:
        bar.update(1)
        clock(10)
        bar.update(100)
        assert capsys.readouterr().err == ""
        clock(10)
        bar.update(501, "loss 0.5")
        assert capsys.readouterr().err == ("training: 501 of 1,000 steps, 20 s left (loss 0.5)\n")
        clock(1)
        bar.update(600)
        assert capsys.readouterr().err == ""
    assert "501 of 1,000" in run.read_bytes("log").decode()


def test_status_of_a_bar_comes_no_more_than_every_few_seconds(run, clock, monkeypatch):
    written = []
    monkeypatch.setattr(Reporter, "status", lambda self, state, **more: written.append(more))
    reporter = Reporter(run, quiet=True)
    with reporter.bar("embed", 100, "images", done=20) as bar:
        bar.update(20)
        for _ in range(100):
            clock(0.5)
            bar.update(bar.done)
        # the stub does not note the time: every update past the limit writes
        assert len(written) == 101
    monkeypatch.undo()


def test_remaining_counts_what_this_session_did_after_its_start_up(run, clock):
    reporter = Reporter(run, quiet=True)
    with reporter.bar("embed", 100, done=60) as bar:
        assert bar.remaining() is None
        clock(300)  # start-up
        bar.update(60)
        assert bar.remaining() is None
        bar.update(70)
        assert bar.remaining() is None  # one measurement is none: when did it begin?
        clock(10)
        bar.update(80)
        assert bar.remaining() == pytest.approx(20)
        status = run.read_json("status.json")
        assert (status["done"], status["total"], status["step"]) == (80, 100, "embed")
        assert status["remaining_seconds"] == pytest.approx(20)
        clock(progress.STATUS_EVERY)
        bar.update(90)
        status = run.read_json("status.json")
        assert status["done"] == 90 and status["remaining_seconds"] == pytest.approx(13 / 2)
        bar.update(95)  # too soon
        assert run.read_json("status.json")["done"] == 90


def test_the_first_step_says_no_time(run, capsys, clock):
    reporter = Reporter(run)
    with reporter.bar("training", 400, "steps") as bar:
        clock(19)
        bar.update(1)
        assert capsys.readouterr().err == "training: 1 of 400 steps\n"  # once: 2 h 07 min left


def test_a_terminal_gets_a_bar_that_goes_away(run):
    reporter = Reporter(run)
    screen = io.StringIO()
    reporter.console = Console(file=screen, force_terminal=True, width=100)
    with pytest.raises(KeyError), reporter.bar("training", 50, "steps") as bar:
        bar.update(20, "loss 0.5")
        reporter._progress.refresh()
        raise KeyError
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "20/50" in shown and "loss 0.5" in shown
    assert reporter._progress is None
    with reporter.bar("again", 5) as bar:  # and another may follow
        bar.update(5)
