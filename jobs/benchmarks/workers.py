"""Time and traffic of the heads' training by several workers, each with its own heads.

Shapes: N rows, D features, H heads, K clusters, B pairs, W workers.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import markdown


@dataclass(frozen=True)
class Work:
    """The training that is timed."""

    rows: int
    features: int
    classes: int
    heads: int
    batch: int
    steps: int
    threads: int  # per worker


@dataclass(frozen=True)
class Pace:
    """How fast one group trains."""

    workers: int
    seconds: float  # per step, median
    sent: float  # bytes per step, by each worker


WARM_UP = 2  # steps before the clock starts


def time_steps(rank: int, world: int, work: Work, folder: str) -> None:
    """One worker of a group: train, and (the first one) write what it took."""
    import torch
    import torch.distributed as dist

    from icce_ray.core.collective import Alone, Counted, Distributed

    torch.set_num_threads(work.threads)
    place = f"file://{folder}/meeting-{world}"
    if world > 1:
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    group = Counted(Distributed() if world > 1 else Alone())
    try:
        pace = measure_pace(group, work)
        if rank == 0:
            name = Path(folder) / f"{world}.json"
            name.write_text(json.dumps(asdict(pace)))
    finally:
        if world > 1:
            dist.destroy_process_group()


def measure_pace(group: Any, work: Work) -> Pace:
    """Time and traffic of one worker's steps."""
    trainer = _trainer(group, work)
    times: list[float] = []
    sent = 0.0
    for step in range(WARM_UP + work.steps):
        before, started = sum(group.bytes.values()), time.perf_counter()
        trainer.step()
        if step >= WARM_UP:
            times.append(time.perf_counter() - started)
            sent += sum(group.bytes.values()) - before
    return Pace(group.world, statistics.median(times), sent / work.steps)


def _trainer(group: Any, work: Work) -> Any:
    """A trainer on random vectors and random neighbors, the same in every worker."""
    import torch

    from icce_ray.config.schema import HeadsConfig
    from icce_ray.core.heads.trainer import Data, HeadTrainer

    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(work.rows, work.features, generator=generator).half()
    ids = torch.randint(work.rows, (work.rows, 20), generator=generator, dtype=torch.int32)
    counts = torch.full((work.rows,), 20, dtype=torch.int32)
    data = Data(vectors, ids, counts, torch.device("cpu"))
    chosen = HeadsConfig.model_validate(
        {"count": work.heads, "batch_size": work.batch, "pca": None}
    )
    return HeadTrainer(data, chosen, work.classes, 0, WARM_UP + work.steps, group)


def measure_workers(work: Work, workers: Sequence[int]) -> list[Pace]:
    """The same training by each number of workers."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        for world in workers:
            processes.spawn(time_steps, (world, work, folder), nprocs=world)
        paces = [Pace(**json.loads(file.read_text())) for file in Path(folder).glob("*.json")]
    return sorted(paces, key=lambda pace: pace.workers)


def workers_table(paces: Sequence[Pace]) -> str:
    """Time relative to that of the smallest group."""
    base = paces[0].seconds
    lines = [
        [
            *(str(pace.workers), f"{1000 * pace.seconds:.1f}", f"{pace.seconds / base:.2f}"),
            f"{pace.sent / 1e6:.3f}",
        ]
        for pace in paces
    ]
    return markdown(["workers", "ms per step", "relative", "MB sent per worker"], lines)
