"""How fast each part of the method is: beside a baseline in the same run, and beside the ceiling.

The ceiling is what this machine reaches in plain matrix products and copies, measured first. No
part needs Ray. faiss is compared with where it is installed.

Shapes: N rows, D features, P components, H heads, K clusters, B pairs, M neighbors.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.recorded import LoopedTrainer, RecordedTrainer, plain_search
from benchmarks.scale import IMAGENET, blocks, center_of
from benchmarks.tables import markdown
from icce_ray.config.schema import HeadsConfig, MethodConfig
from icce_ray.core import method, neighbors
from icce_ray.core.classifier import probe as probe_
from icce_ray.core.evaluation.kmeans import kmeans_baseline
from icce_ray.core.evaluation.truth import accuracy
from icce_ray.core.heads.trainer import Data, HeadTrainer

Say = Callable[[str], None]
TEMI = {"hidden": (512, 256), "batch_norm": False, "start": "random"}


@dataclass
class Row:
    """One part: what it took, and what its baseline took in the same run."""

    part: str
    work: str
    seconds: float
    baseline: str = ""
    baseline_seconds: float | None = None
    flop: float | None = None  # operations of its matrix products
    bytes: float | None = None  # that it has to read and write at least
    gigabytes: float | None = None  # of memory that it took at most: the GPU's, where there is one
    note: str = ""


@dataclass(frozen=True)
class Ceiling:
    """What the machine reaches in plain work."""

    products: float  # FLOP per second, in the arithmetic that the parts use
    copies: float  # bytes per second, read and written


class HostMemory:
    """What this process takes at most, by the kernel's own record (Linux)."""

    def __init__(self) -> None:
        self.before = 0.0
        self.peak()

    def peak(self) -> float | None:
        """GB at most since the last call, beyond what there was then."""
        try:
            status = Path("/proc/self/status").read_text()
            Path("/proc/self/clear_refs").write_text("5")  # the record begins anew
        except OSError:
            return None
        now = {key: float(status.split(f"{key}:")[1].split()[0]) for key in ("VmHWM", "VmRSS")}
        most = (now["VmHWM"] - self.before) * 1024 / 1e9
        self.before = now["VmRSS"]
        return most


@dataclass(frozen=True)
class Place:
    """Where and how large."""

    device: torch.device
    rows: int  # N of the parts that work on all rows
    say: Say
    host: HostMemory = field(default_factory=HostMemory)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], Any], repeats: int = 1) -> float:
        """Median seconds."""
        taken = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def peak(self) -> float | None:
        """GB at most since the last call: of the GPU; else of this process, beyond what it had."""
        if not self.gpu:
            return self.host.peak()
        most = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return most


def measure_ceiling(place: Place) -> Ceiling:
    """Plain products and copies."""
    kind = torch.float16 if place.gpu else torch.float32
    size = 8192 if place.gpu else 2048
    a = torch.randn(size, size, device=place.device).to(kind)
    x = torch.randn(2**28 if place.gpu else 2**25, device=place.device)
    y = torch.empty_like(x)
    place.time(lambda: a @ a)
    products = 2 * size**3 / place.time(lambda: a @ a, 9)
    copies = 2 * x.nbytes / place.time(lambda: y.copy_(x), 9)
    return Ceiling(products, copies)


# --- parts ---------------------------------------------------------------------------------------


def random_data(place: Place, rows: int, components: int, most: int = 50) -> Data:
    """Unit rows with random neighbors: what a step costs does not depend on their values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(rows, components, generator=generator), dim=1)
    ids = torch.randint(rows, (rows, most), generator=generator, dtype=torch.int32)
    counts = torch.full((rows,), most)
    parts = (x.half(), ids, counts)
    return Data(*(part.to(place.device) for part in parts), place.device)


def heads(place: Place) -> list[Row]:
    """A training step of linear heads, beside the same step recorded by autograd."""
    cases = [(50, 1000, 4096)] if place.gpu else [(24, 10, 1024), (24, 100, 1024), (8, 1000, 4096)]
    return [_step(place, "heads, linear", 256, *case, {}) for case in cases]


def hidden(place: Place) -> list[Row]:
    """A training step of TEMI's heads, beside the same step recorded by autograd in float32, and
    beside a loop over the heads."""
    count, clusters, pairs = case = (50, 1000, 512) if place.gpu else (4, 10, 512)
    row = _step(place, "heads, hidden 512 and 256", 1024, *case, TEMI)
    data = random_data(place, 100_000 if place.gpu else 20_000, 1024)
    settings = HeadsConfig.model_validate({"count": count, "batch_size": pairs, **TEMI})
    looped, _ = _pace(place, LoopedTrainer(data, settings, clusters), 5)
    place.say(f"a loop over the heads: {1000 * looped:.2f} ms")
    return [row, replace(row, baseline="TEMI's loop", baseline_seconds=looped)]


def _step(
    place: Place,
    part: str,
    width: int,
    count: int,
    clusters: int,
    pairs: int,
    more: Mapping[str, Any],
) -> Row:
    data = random_data(place, 100_000 if place.gpu else 20_000, width)
    settings = HeadsConfig.model_validate(
        {"count": count, "batch_size": pairs, "start": "random", **more}
    )
    taken, memory = _pace(place, HeadTrainer(data, settings, clusters, 0, 10**6), 30)
    before, _ = _pace(place, RecordedTrainer(data, settings, clusters, 0, 10**6), 5)
    widths = [width, *settings.hidden, clusters]
    weights = count * sum(i * o for i, o in itertools.pairwise(widths))
    half = 2 if place.gpu else 4
    row = Row(
        part=part,
        work=f"H {count}, K {clusters:,}, B {pairs:,}, P {width}",
        seconds=taken,
        baseline="autograd, float32",
        baseline_seconds=before,
        flop=3 * 2 * 2 * pairs * weights,
        bytes=9.0 * half * 2 * pairs * count * clusters,
        gigabytes=memory,
    )
    place.say(f"{row.part}, {row.work}: {1000 * taken:.2f} ms, autograd {1000 * before:.2f} ms")
    return row


def _pace(
    place: Place, trainer: HeadTrainer | LoopedTrainer, most: int
) -> tuple[float, float | None]:
    """Seconds of a step that needs no loss, as nearly all do, and GPU memory."""
    place.time(lambda: trainer.step(want_loss=False), 3)
    place.peak()
    steps = most if place.gpu else 5
    taken = place.time(lambda: [trainer.step(want_loss=False) for _ in range(steps)], 3)
    return taken / steps, place.peak()


def start(place: Place) -> list[Row]:
    """First clusters of all heads, by k-means and by Ward's trees; on a GPU also on the CPU."""
    rows = min(place.rows, 200_000)
    cases = [("kmeans", 50, 1000)] if place.gpu else [("kmeans", 24, 10)]
    cases += [("ward", 50, 1000)] if place.gpu else [("ward", 24, 62)]
    out = []
    for kind, count, clusters in cases:
        data = random_data(place, rows, 256)
        taken = _start_time(place, data, kind, count, clusters)
        row = Row("first clusters", f"{kind}, H {count}, K {clusters:,}, {rows:,} rows", taken)
        row.gigabytes = place.peak()
        if place.gpu and kind == "kmeans":  # of two heads, as of all of them it takes minutes
            parts = (part.cpu() for part in (data.features, data.ids, data.counts))
            host = Data(*parts, torch.device("cpu"))
            row.baseline = "CPU"
            row.baseline_seconds = _start_time(place, host, kind, 2, clusters) * count / 2
        place.say(f"{row.part}, {row.work}: {taken:.2f} s")
        out.append(row)
    return out


def _start_time(place: Place, data: Data, kind: str, count: int, clusters: int) -> float:
    settings = HeadsConfig.model_validate({"count": count, "start": kind})
    trainer = HeadTrainer(data, settings, clusters, 0, 1)
    place.peak()
    return place.time(trainer.start)


def search(place: Place) -> list[Row]:
    """Exact neighbors, top 100, beside topk over all similarities, and faiss where it is there."""
    rows, width, k = place.rows, 256, 100
    matrix = np.concatenate(list(blocks(rows, width, 1000)))
    queries = rows if place.gpu else min(rows, 8192)
    neighbors.search(matrix, 0, 512, k, place.device)
    place.peak()
    taken = place.time(lambda: neighbors.search(matrix, 0, queries, k, place.device))
    memory = place.peak()
    work = f"{queries:,} of {rows:,} x {width}, top {k}"
    flop = 2.0 * queries * rows * width
    some = min(queries, 65_536 if place.gpu else 2048)
    plain = place.time(lambda: plain_search(matrix, some, k, place.device)) * queries / some
    out = [Row("exact neighbors", work, taken, "topk of all", plain, flop, gigabytes=memory)]
    ids, _ = neighbors.search(matrix, 0, 2048, k, place.device)
    expected, _ = plain_search(matrix, 2048, k, place.device)
    same = np.mean([len(set(a) & set(b)) / k for a, b in zip(ids, expected, strict=True)])
    out[0].note = f"{100 * same:.2f} % of the ids as by float32"
    index = _faiss(matrix, place)
    if index is not None:
        few = np.ascontiguousarray(matrix[:some], np.float32)
        other = place.time(lambda: index.search(few, k + 1)) * queries / some
        out.append(Row("exact neighbors", work, taken, "faiss, brute force", other, flop))
    for row in out:
        place.say(f"{row.part}: {taken:.2f} s, {row.baseline} {row.baseline_seconds:.2f} s")
    return out


def _faiss(matrix: np.ndarray, place: Place) -> Any:
    try:
        import faiss
    except ImportError:
        return None
    faiss.omp_set_num_threads(torch.get_num_threads())
    index: Any = faiss.IndexFlatIP(matrix.shape[1])
    if place.gpu:
        if not hasattr(faiss, "get_num_gpus") or not faiss.get_num_gpus():
            return None
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(matrix.astype(np.float32))
    return index


def assign(place: Place) -> list[Row]:
    """The clusters that all heads give all rows, beside float32 products."""
    count, clusters = (50, 1000) if place.gpu else (24, 10)
    data = random_data(place, place.rows, 256)
    chosen = {"count": count, "start": "random"}
    half = HeadTrainer(data, HeadsConfig(**chosen), clusters, 0, 10)
    full = HeadTrainer(data, HeadsConfig(**chosen, precision="float32"), clusters, 0, 10)
    half.assign(rows=np.arange(1000))
    taken, before = place.time(half.assign), place.time(full.assign)
    flop = 2.0 * place.rows * 256 * count * clusters
    work = f"{place.rows:,} rows, H {count}, K {clusters:,}"
    place.say(f"assigning all rows: {taken:.2f} s, float32 {before:.2f} s")
    return [Row("assigning all rows", work, taken, "float32", before, flop)]


def probe(place: Place) -> list[Row]:
    """The classifier: a linear probe at its default settings."""
    clusters, width = (1000, 1024) if place.gpu else (10, 1280)
    matrix = np.concatenate(list(blocks(place.rows, width, clusters)))
    labels = center_of(np.arange(place.rows), clusters)
    settings = MethodConfig(num_classes=clusters)
    sure = np.ones(place.rows, np.float32)
    place.peak()
    taken = place.time(
        lambda: method.train_classifier(matrix, labels, sure, settings, place.device)
    )
    steps = probe_.probe_steps(place.rows, settings.classifier)
    flop = 3 * 2.0 * settings.classifier.epochs * place.rows * width * clusters
    work = f"{place.rows:,} x {width:,}, K {clusters:,}, {steps:,} steps"
    place.say(f"classifier: {taken:.1f} s")
    return [Row("classifier, linear probe", work, taken, flop=flop, gigabytes=place.peak())]


def consensus(place: Place) -> list[Row]:
    """50 heads of 1,000 clusters, of which a third of the rows are wrong, by the default method,
    beside MCLA."""
    clusters, count, rows = 1000, 50, IMAGENET
    rng = np.random.default_rng(0)
    truth = center_of(np.arange(rows), clusters)
    heads = np.empty((rows, count), np.int16)
    for head in range(count):
        wrong = rng.random(rows) < 1 / 3
        given = np.where(wrong, rng.integers(0, clusters, rows), truth)
        heads[:, head] = rng.permutation(clusters)[given]
    steps = rng.integers(1, 100, (rows, 20)) * clusters  # neighbors are of the same class
    ids = ((np.arange(rows)[:, None] + steps) % rows).astype(np.int32)
    out = []
    for name in ("dawid-skene", "mcla"):
        more = {"heads": {"count": count}, "consensus": {"method": name}}
        settings = MethodConfig.model_validate({"num_classes": clusters, **more})
        place.peak()
        began = time.perf_counter()
        found = method.merge(heads, ids, settings, place.device)
        out.append((time.perf_counter() - began, place.peak(), accuracy(truth, found.labels)))
        place.say(f"consensus by {name}: {out[-1][0]:.1f} s")
    (taken, memory, right), (before, _, _) = out
    work = f"{rows:,} rows, H {count}, K {clusters:,}"
    row = Row("consensus", work, taken, "MCLA", before, gigabytes=memory)
    row.note = f"accuracy {100 * right:.1f} %"
    return [row]


def whole(place: Place) -> list[Row]:
    """From embeddings to the classifier, all defaults, on synthetic embeddings."""
    return [_whole(place, place.rows, *((1000, 1024) if place.gpu else (10, 1280)))]


def many(place: Place) -> list[Row]:
    """24,800 embeddings of 62 classes to the classifier, beside k-means with 10 restarts."""
    rows, clusters, width = 24_800, 62, 1280
    row = _whole(place, rows, clusters, width)
    matrix = np.concatenate(list(blocks(rows, width, clusters)))
    row.baseline = "k-means, 10 restarts"
    row.baseline_seconds = place.time(lambda: kmeans_baseline(matrix, clusters, 0, gpu=place.gpu))
    place.say(f"k-means: {row.baseline_seconds:.1f} s")
    return [row]


def _whole(place: Place, rows: int, clusters: int, width: int) -> Row:
    matrix = np.concatenate(list(blocks(rows, width, clusters)))
    codes = center_of(np.arange(rows), clusters)
    more = {"heads": {"count": 50}} if clusters == 1000 else {}
    settings = MethodConfig.model_validate({"num_classes": clusters, **more})
    marks = [("", time.perf_counter())]

    def mark(part: str) -> None:
        place.wait()
        marks.append((part, time.perf_counter()))
        place.say(f"  {part}: {marks[-1][1] - marks[-2][1]:.1f} s")

    place.peak()
    ids, similarity = method.search(matrix, settings, place.device)
    mark("search")
    counts = method.select(ids, similarity, settings).counts
    mark("select")
    assignments = method.train_heads(matrix, ids, counts, settings, place.device)
    mark("heads")
    merged = method.merge(assignments, ids, settings, place.device)
    mark("consensus")
    method.train_classifier(matrix, merged.labels, merged.confidence, settings, place.device)
    mark("classifier")
    taken = marks[-1][1] - marks[0][1]
    parts = itertools.pairwise(marks)
    note = ", ".join(f"{name} {at - before:.1f} s" for (_, before), (name, at) in parts)
    note += f"; accuracy {100 * accuracy(codes, merged.labels):.1f} %"
    work = f"{rows:,} x {width:,}, K {clusters:,}, H {settings.head_count}"
    return Row("embeddings to classifier", work, taken, gigabytes=place.peak(), note=note)


def embed(place: Place) -> list[Row]:
    """Images through a backbone by the command, beside a plain torch loop. Needs Ray."""
    from benchmarks import embedding

    work = embedding.Work(600, "test_vit", 96, 64)
    if place.gpu:
        work = embedding.Work(12_000, "vit_large_patch14_dinov2", 224, 256)
    loop, command = embedding.measure(work, place.say)
    about = f"{work.images:,} JPEG files, {work.backbone} at {work.size}"
    thousand = Row("embedding 1,000 images", about, 1000 / command.rate)
    first = Row("embedding, command to first batch", about, command.first)
    thousand.baseline_seconds, first.baseline_seconds = 1000 / loop.rate, loop.first
    thousand.baseline = first.baseline = loop.name
    return [thousand, first]


def listing(place: Place) -> list[Row]:
    """1.28 million image files in 1,000 folders, beside a plain walk that sorts their names. Needs
    pyarrow."""
    from icce_ray.config.schema import DataConfig
    from icce_ray.data.listing import list_images

    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, f"class-{number:03d}") for number in range(1000)]
        for folder in folders:
            folder.mkdir()
        for number in range(IMAGENET):
            os.close(os.open(folders[number % 1000] / f"{number:07d}.jpg", os.O_CREAT))
        plain = place.time(
            lambda: sorted(os.path.join(d, f) for d, _, files in os.walk(name) for f in files)  # noqa: PTH118
        )
        place.peak()
        taken = place.time(lambda: list_images(DataConfig(path=name)))
    work = f"{IMAGENET:,} files in 1,000 folders"
    place.say(f"listing: {taken:.1f} s, os.walk {plain:.1f} s")
    row = Row("listing", work, taken, "os.walk, sorted", plain)
    row.gigabytes = place.host.peak()
    return [row]


PARTS: Mapping[str, Callable[[Place], list[Row]]] = {
    "heads": heads,
    "hidden": hidden,
    "start": start,
    "search": search,
    "assign": assign,
    "consensus": consensus,
    "probe": probe,
    "whole": whole,
    "many": many,
    "embed": embed,
    "listing": listing,
}


def measure(
    parts: list[str], device: torch.device, rows: int | None, say: Say
) -> tuple[Ceiling, list[Row]]:
    """The chosen parts, one after the other."""
    place = Place(device, rows or (IMAGENET if device.type == "cuda" else 60_000), say)
    ceiling = measure_ceiling(place)
    say(f"products {ceiling.products / 1e12:.3g} TFLOP/s, copies {ceiling.copies / 1e9:.0f} GB/s")
    return ceiling, [row for part in parts for row in PARTS[part](place)]


def table(ceiling: Ceiling, rows: list[Row]) -> str:
    """Seconds, share of the ceiling, and the ratio to the baseline."""
    head = ["part", "work", "s", "TFLOP/s", "of ceiling", "baseline", "its s", "ratio", "GB"]
    return markdown(head, [_line(ceiling, row) for row in rows])


def _line(ceiling: Ceiling, row: Row) -> list[str]:
    least = max((row.flop or 0) / ceiling.products, (row.bytes or 0) / ceiling.copies)
    before = row.baseline_seconds
    return [
        row.part,
        row.work,
        f"{row.seconds:.3g}",
        f"{row.flop / row.seconds / 1e12:.3g}" if row.flop else "-",
        f"{100 * least / row.seconds:.0f} %" if least else "-",
        row.baseline or "-",
        f"{before:.3g}" if before else "-",
        f"{before / row.seconds:.2f}" if before else "-",
        f"{row.gigabytes:.1f}" if row.gigabytes else "-",
    ]
