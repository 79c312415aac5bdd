"""Workers as threads of one process: a collective for tests, without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

T = TypeVar("T")
DEADLINE = 60.0  # seconds; a worker that waits longer has lost the others


class _Room:
    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=DEADLINE)
        self.slots: list[Tensor] = [torch.empty(0)] * world


class ThreadGroup:
    """One worker's end of a group. `calls` counts its exchanges and `sent` the numbers sent."""

    def __init__(self, room: _Room, rank: int, world: int) -> None:
        self.room, self.rank, self.world = room, rank, world
        self.calls = self.sent = 0

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self.calls, self.sent = self.calls + 1, self.sent + tensor.numel()
        self.room.slots[self.rank] = tensor.detach().clone()
        self.room.barrier.wait()
        out = list(self.room.slots)
        self.room.barrier.wait()
        if len({part.shape for part in out}) != 1:
            raise ValueError(f"shapes differ: {[part.shape for part in out]}")
        return out

    def all_reduce_sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(torch.stack(self.all_gather(tensor)).sum(0))

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        self.all_reduce_sum_(tensors)
        for tensor in tensors:
            tensor.div_(self.world)


def _run_workers(world: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """Call `work` in `world` threads at once; results in rank order; raises what a worker did."""
    room = _Room(world)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def main(rank: int) -> None:
        try:
            results[rank] = work(ThreadGroup(room, rank, world))
        except BaseException as error:
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return [results[rank] for rank in range(world)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_workers() -> Callable[..., Any]:
    """run_workers(world, work) calls `work(collective)` in `world` threads at once."""
    return _run_workers
