"""What a training loop reports, and that it does not wait for the device to do so."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from icce_ray.distributed import worker as workers
from icce_ray.distributed.worker import Worker, read_error, run_loop
from icce_ray.errors import DataError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages import heads


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(str(tmp_path))


def test_a_note_is_made_only_where_there_is_a_report(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = types.SimpleNamespace(now=50.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(workers, "time", clock)
    states: list[Any] = []
    worker = Worker(run, "x", "t", states.append)
    made: list[int] = []
    for step in range(100):
        worker.progress(step, lambda: str(made.append(1) or len(made)))
        clock.now += 0.1
    assert len(made) == len(states) <= 11
    assert (states[0]["done"], states[0]["note"], states[1]["note"]) == (0, "1", "2")


def test_scores_reach_the_driver_with_the_next_report(run: RunDirectory) -> None:
    states: list[Any] = []
    worker = Worker(run, "x", "t", states.append)
    worker.progress(1)
    worker.progress(2, score=0.5)
    worker.progress(3, "end", force=True)
    assert [state["done"] for state in states] == [1, 3]
    assert states[-1]["scores"] == [(2, 0.5)]


class Stepping:
    """Stands for a trainer."""

    steps, step_number, numbers = 1000, 0, (0, 1, 2)

    def step(self, want_loss: bool) -> torch.Tensor | None:
        self.step_number += 1
        return torch.tensor([1.0, 2.0, 6.0]) if want_loss else None


def test_the_losses_of_heads_are_computed_only_where_they_are_recorded() -> None:
    trainer: Any = Stepping()
    history = heads._History(trainer)
    for _ in range(history.every - 1):
        history.step()
    assert not history.losses and history.note() == ""
    history.step()
    assert history.steps == [history.every] and history.note() == "loss 3.000"


def test_an_error_of_ours_in_a_single_worker_is_written_and_not_raised(run: RunDirectory) -> None:
    def loop(worker: Worker, config: Any) -> None:
        raise DataError("no labels") if config["ours"] else ValueError("who knows")

    work = {"run": run, "folder": "x", "token": "t", "loop": loop, "listen": lambda state: None}
    run_loop({**work, "config": {"ours": True}})
    assert read_error(work) == {"kind": "DataError", "text": "no labels", "token": "t"}
    assert read_error({**work, "token": "another"}) == {}
    with pytest.raises(ValueError, match="who knows"):
        run_loop({**work, "config": {"ours": False}})
    assert read_error(work)["kind"] == "" and "who knows" in read_error(work)["text"]
