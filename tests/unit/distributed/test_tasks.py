"""Ray tasks whose driver gives up are ended; their errors come back as they were raised."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest

from icce_ray.distributed.tasks import collect
from icce_ray.errors import DataError, StageError


class TaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__(f"task failed: {cause}")
        self.cause = cause


class Lost(Exception):
    """Base of Ray's errors."""


class FakeRay:
    """Tasks are numbers, which end in that order; `results` has what each gives or raises."""

    exceptions = types.SimpleNamespace(RayTaskError=TaskError, RayError=Lost)

    def __init__(self, *results: Any) -> None:
        self.results = results
        self.cancelled: list[int] = []

    def wait(self, refs: Sequence[int], **_: Any) -> tuple[list[int], list[int]]:
        first, *rest = sorted(refs)
        return ([], list(refs)) if self.results[first] is None else ([first], rest)

    def get(self, ref: int) -> Any:
        if isinstance(self.results[ref], Exception):
            raise self.results[ref]
        return self.results[ref]

    def cancel(self, ref: int, force: bool) -> None:
        assert force
        self.cancelled.append(ref)


class Room:
    """As cluster.Wait, of a cluster that has no room from the third look on."""

    def __init__(self) -> None:
        self.looks = 0

    def check(self) -> None:
        self.looks += 1
        if self.looks == 3:
            raise StageError("no room")


def results(ray: FakeRay, **more: Any) -> list[Any]:
    return list(collect(ray, range(len(ray.results)), Room(), **more))  # type: ignore[arg-type]


def test_results_come_with_their_position_and_nothing_is_ended() -> None:
    ray = FakeRay("a", "b", "c")
    assert results(ray) == [(0, "a"), (1, "b"), (2, "c")]
    assert not ray.cancelled


def test_what_a_task_said_before_it_ended_is_seen_by_who_wants_one_result() -> None:
    """Its last progress may come after the last look, as that of a task that takes no time."""
    looks: list[str] = []
    ray = FakeRay("a")
    tasks = collect(ray, [0], Room(), tick=lambda: looks.append("looked"))  # type: ignore[arg-type]
    assert next(tasks) == (0, "a")
    assert looks == ["looked"]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (TaskError(DataError("no labels")), DataError, "no labels"),
        (TaskError(ValueError("who knows")), StageError, "a Ray task failed:\ntask failed: who"),
        (Lost("a node"), StageError, "a Ray task was lost: a node"),
    ],
)
def test_the_first_error_ends_the_other_tasks(error: Exception, kind: type, text: str) -> None:
    ray = FakeRay("a", error, None, None)
    with pytest.raises(kind, match=text):
        results(ray)
    assert ray.cancelled == [2, 3]


def test_tasks_that_find_no_room_are_ended() -> None:
    ray = FakeRay("a", None)
    with pytest.raises(StageError, match="no room"):
        results(ray)
    assert ray.cancelled == [1]


def test_ctrl_c_ends_tasks_in_the_way_that_was_asked_for() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    ray, ended = FakeRay(None, None), []
    with pytest.raises(KeyboardInterrupt):
        results(ray, tick=interrupt, end=ended.append)
    assert ended == [0, 1] and not ray.cancelled
