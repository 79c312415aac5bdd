"""Images through Ray Data: addresses in, one result of a model per image out, in any order.

Blocks of addresses stream through CPU tasks, which read and decode, to a pool of actors, each of
which holds a model. Nothing here imports torch at the top: decoding tasks do without it.

What is not obvious in Ray Data, and why the code is as it is:

- Errors of single images travel as data (`reason`). An exception in a task loses its whole block.
- Errors of ours in an actor travel as data, too (`note`): Ray would wrap them in its own type.
- Work is repeated after a lost node, so every consumer must accept a result twice.
- Two operators that reserve the same resources are fused into one actor, which then decodes and
  embeds one after the other; `_reservation` keeps them apart.

Shapes: N images, B batch, S side of the input.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from icce_ray import errors
from icce_ray.config.schema import EmbedConfig
from icce_ray.core import preprocess as preprocess_
from icce_ray.core.preprocess import BadImage, Preprocess
from icce_ray.core.samples import AS_IS, Levels
from icce_ray.data import reading as images
from icce_ray.distributed import compat
from icce_ray.distributed.cluster import LOOK_EVERY, STOP_WITHIN, Cluster, Request, Wait
from icce_ray.errors import IcceError, StageError
from icce_ray.rundir.progress import Reporter

if TYPE_CHECKING:
    import torch


ADDRESS = ("image_id", "uri", "offset", "size")  # columns of the index that the pipeline reads
TASK_ROWS = (64, 2048)  # images per decoding task, at least and at most
TASKS_PER_CPU = 4  # decoding tasks per core, where the images suffice for that
CHUNK_ROWS = 64  # images decoded between two outputs of a task, at most ...
CHUNK_BYTES = 8 << 20  # ... and their pixels
BLOCK_BYTES = 32 << 20  # pixels per Ray Data block
TRIED, ALIKE = 4, 1e-2  # images that another device is tried on, and how far off it may be
AHEAD = 2  # batches of results that wait for the driver
ADVICE = "Lower ray.num_gpus"

Columns = dict[str, np.ndarray]


class Model(Protocol):
    """What the actors compute. Travels to them unloaded."""

    product: str  # what one image gives, in the plural, for messages

    def load(self, device: torch.device) -> list[dict[str, Any]]:
        """Load the weights; return Backbone.describe() of each backbone."""

    def compute(self, pixels: Sequence[torch.Tensor]) -> Columns:
        """Results [B, ...] of one uint8 batch [B, 3, S, S] per distinct preparation, and `valid`
        bool [B]: finite, and usable."""


@dataclass(frozen=True)
class Job:
    """What to do with each image, apart from where."""

    model: Model
    preprocess: tuple[Preprocess, ...]  # distinct ones
    settings: EmbedConfig
    levels: Levels = AS_IS


def decode_rows(
    table: pa.Table, preprocess: Sequence[Preprocess], max_pixels: int, levels: Levels = AS_IS
) -> Iterator[Columns]:
    """Read and decode the images of a table of ADDRESS columns, a chunk at a time.

    Yields image_id, reason ("" where all is well) and pixels0, pixels1, ...: uint8 [B, 3, S, S],
    zeros where the image is bad.
    """
    size = sum(one.nbytes for one in preprocess)
    step = max(1, min(CHUNK_ROWS, CHUNK_BYTES // size))
    for start in range(0, table.num_rows, step):
        part = table.slice(start, step)
        addresses = (part[name].to_pylist() for name in ("uri", "offset", "size"))
        pixels = [np.zeros((part.num_rows, 3, p.size, p.size), np.uint8) for p in preprocess]
        reasons = [""] * part.num_rows
        for row, data in enumerate(images.read_many(*addresses)):
            try:
                if isinstance(data, BadImage):
                    raise data
                each = preprocess_.pixels_of(data, preprocess, max_pixels, levels)
                for array, one in zip(pixels, each, strict=True):
                    array[row] = one
            except BadImage as error:
                reasons[row] = str(error)
        columns = {f"pixels{number}": array for number, array in enumerate(pixels)}
        ids = part["image_id"].to_numpy()
        yield {"image_id": ids, "reason": np.array(reasons, dtype=object), **columns}


class Actor:
    """An actor of the pool: a model on its device.

    Apple's GPU is taken where it gives the first images what the CPU gives them: it lacks some
    operations, and got others wrong.
    """

    def __init__(self, model: Model, threads: int, gpu: bool) -> None:
        import torch

        from icce_ray.core.device import apples_gpu

        self.model, self.note = model, ""
        if not gpu:
            torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self.device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        self.faster = None if gpu else apples_gpu()  # not tried yet
        self.error: IcceError | None = None
        try:
            self._load(self.device)
        except IcceError as error:
            self.error = error

    def _load(self, device: torch.device) -> None:
        loaded, self.device = self.model.load(device), device
        self.note = json.dumps({"backbones": loaded, "restart": _restart()})

    def __call__(self, batch: Columns) -> Columns:
        """Results of one batch; `note` of its first row says, as JSON, what was loaded, and which
        restart of an actor this is. Every batch does: Ray drops what it got before a loss.

        An error of ours comes back as data: Ray would hide its type behind one of its own.
        """
        notes = np.full(len(batch["image_id"]), "", dtype=object)
        common = {"image_id": batch["image_id"], "reason": batch["reason"], "note": notes}
        try:
            results = self._results(batch)
        except IcceError as error:
            notes[0] = json.dumps({"error": type(error).__name__, "message": str(error)})
            return common
        notes[0] = self.note
        return {**common, **results}

    def _results(self, batch: Columns) -> Columns:
        import torch

        if self.error is not None:
            raise self.error
        names = sorted(name for name in batch if name.startswith("pixels"))
        pixels = [torch.from_numpy(np.array(batch[name])) for name in names]
        if self.faster is not None:
            self._try(self.faster, [each[:TRIED] for each in pixels])
            self.faster = None
        return self._compute(pixels)

    def _try(self, device: torch.device, pixels: Sequence[torch.Tensor]) -> None:
        """Move to a device that computes these images as this one does, else stay."""
        before, exact = self.device, self._compute(pixels)
        try:
            self._load(device)
            found = self._compute(pixels)
            same = all(
                np.allclose(found[name], exact[name], atol=ALIKE, equal_nan=True) for name in exact
            )
        except (RuntimeError, TypeError):  # an operation, or a number format, that it lacks
            same = False
        if not same:
            self._load(before)

    def _compute(self, pixels: Sequence[torch.Tensor]) -> Columns:
        """Halves the batch where the device's memory does not suffice."""
        import torch

        try:
            return self.model.compute([p.to(self.device) for p in pixels])
        except RuntimeError as error:
            # Apple's GPU has no class for it.
            if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
                raise
            half = len(pixels[0]) // 2
            if not half:
                raise StageError(
                    "the device's memory does not suffice for one image; use a smaller backbone or "
                    "backbone.image_size"
                ) from None
            torch.cuda.empty_cache()
        parts = [self._compute([p[s] for p in pixels]) for s in (slice(half), slice(half, None))]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _restart() -> str | None:
    """A name for this life of the actor, if it is not the first: Ray runs it anew after a loss."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    actor = context.get_actor_id()
    if actor is None or not context.was_current_actor_reconstructed:
        return None
    return f"{actor}-{os.getpid()}"


@dataclass(frozen=True)
class Pool:
    """How the cluster's devices are shared."""

    most: int  # actors
    gpus: float  # per actor
    cpus: float  # reserved per actor
    threads: int  # an actor's, on the CPU
    decode_cpus: float  # reserved per decoding task
    task_rows: int

    def requests(self) -> list[Request]:
        """The least that lets the pipeline run: an actor and a decoding task."""
        return [Request(self.cpus, self.gpus), Request(self.decode_cpus)]


def plan_pool(cluster: Cluster, settings: EmbedConfig, rows: int) -> Pool:
    """Actors and reservations for `rows` images.

    Without GPUs all actors of a node together reserve half of its cores, so that decoding tasks
    always find room, and use all cores as threads: the operating system balances better than a
    fixed division, since either side waits for the other most of the time.
    """
    have = cluster.resources()
    gpus = cluster.gpus_each()
    most = settings.max_actors or cluster.workers(None, gpus)
    most = min(most, max(1, math.ceil(rows / settings.batch_size)))
    cores = cluster.cpus_each(1, 0)
    large = sum(1 for cpus, _ in have.each if cpus >= cores)
    per_node = math.ceil(most / max(1, large))
    low, high = TASK_ROWS
    wanted = math.ceil(rows / (TASKS_PER_CPU * max(1, have.cpus)))
    return Pool(
        most=most,
        gpus=gpus,
        cpus=0.0 if gpus else _reservation(cores / 2 / per_node),
        threads=max(1, cores // per_node),
        decode_cpus=1.0 if cores >= 2 else 0.5,
        task_rows=min(max(wanted, low), high),
    )


def _reservation(cpus: float) -> float:
    """Whole cores from 2 on. Never what a decoding task reserves: Ray would run both in the actor,
    one after the other."""
    return float(int(cpus)) if cpus >= 2 else 0.9 * cpus


def stream(cluster: Cluster, table: pa.Table, job: Job, reporter: Reporter) -> Iterator[Columns]:
    """Results of the images of a table of ADDRESS columns, in whatever order they come.

    Yields image_id, reason, note and what the model computes.

    Raises:
        IcceError: what an actor raised of our own.
        StageError: anything else that went wrong in tasks or actors, or too long a wait for nodes.
    """
    ray = cluster.start()
    gpus = cluster.gpus_each()
    Wait(cluster, reporter, [Request(0.0 if gpus else 1.0, gpus)], ADVICE).until_there()
    pool = plan_pool(cluster, job.settings, table.num_rows)
    wait = Wait(cluster, reporter, pool.requests(), ADVICE)

    def start() -> Iterator[Columns]:
        dataset = _dataset(ray, table, job, pool)
        return iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))

    restarts: set[str] = set()
    try:
        with compat.silenced_data():
            for batch in _polled(start, wait):
                restarts |= raise_error(batch)
                yield batch
    except IcceError:
        raise
    except Exception as error:
        raise StageError(f"a worker failed: {_reason(error)}") from None
    finally:
        if restarts:
            were = "1 actor was" if len(restarts) == 1 else f"{len(restarts)} actors were"
            reporter.event(f"{were} lost and restarted: the images in work were done again")


def here(table: pa.Table, job: Job) -> Iterator[Columns]:
    """The same in this process, without Ray, whose start takes longer than a few images do."""
    actor = Actor(job.model, os.cpu_count() or 1, gpu=True)
    for batch in decode_rows(table, job.preprocess, job.settings.max_pixels, job.levels):
        results = actor(batch)
        raise_error(results)
        yield results


def _polled(start: Callable[[], Iterator[Columns]], wait: Wait) -> Iterator[Columns]:
    """Iterate in a thread, while the driver looks whether the cluster still carries the work."""
    batches: queue.Queue[Columns | BaseException | None] = queue.Queue(AHEAD)
    ended = threading.Event()
    feeding = threading.Thread(target=_feed, args=(start, batches, ended), daemon=True)
    feeding.start()
    try:
        while True:
            try:
                item = batches.get(timeout=LOOK_EVERY)
            except queue.Empty:
                wait.check()
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        feeding.join(STOP_WITHIN)  # else it would call a Ray that is shut down


def _feed(
    start: Callable[[], Iterator[Columns]],
    batches: queue.Queue[Columns | BaseException | None],
    ended: threading.Event,
) -> None:
    def put(item: Columns | BaseException | None) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                return batches.put(item, timeout=1)

    try:
        for batch in start():
            put(batch)
            if ended.is_set():
                return
        put(None)
    except BaseException as error:
        put(error)


def raise_error(batch: Columns) -> set[str]:
    """Raise the error that a batch brings. Returns the restarts of actors that it comes from."""
    restarts = set()
    for note in batch["note"][batch["note"].astype(bool)]:
        said = json.loads(note)
        if "error" in said:
            raise getattr(errors, said["error"], StageError)(said["message"])
        restarts.add(said["restart"])
    return restarts - {None}


def _reason(error: BaseException) -> str:
    """The line that matters in Ray's report of an exception."""
    text = str(error).split("The above exception was the direct cause")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:500]


def _dataset(ray: Any, table: pa.Table, job: Job, pool: Pool) -> Any:
    table = table.select(ADDRESS).combine_chunks()
    blocks = [table.slice(i, pool.task_rows) for i in range(0, table.num_rows, pool.task_rows)]
    dataset = ray.data.from_arrow(blocks)
    dataset.context.target_max_block_size = BLOCK_BYTES
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    decoded = dataset.map_batches(
        decode_rows,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={
            "preprocess": job.preprocess,
            "max_pixels": job.settings.max_pixels,
            "levels": job.levels,
        },
        num_cpus=pool.decode_cpus,
    )
    return decoded.map_batches(
        Actor,
        fn_constructor_kwargs={
            "model": job.model,
            "threads": pool.threads,
            "gpu": pool.gpus > 0,
        },
        batch_size=job.settings.batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=pool.most,
            # A GPU computes one batch while the next one is copied to it.
            max_concurrent_calls_per_actor=2 if pool.gpus else None,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
