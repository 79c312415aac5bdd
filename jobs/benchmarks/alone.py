"""The method in this process, without Ray and without artifacts: for a machine that has a GPU and
little else, and to compare recipes on equal data.

Shapes: N rows, D features, H heads, K clusters, M neighbors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tables import markdown
from icce_ray.config.loading import check
from icce_ray.config.schema import MethodConfig
from icce_ray.core import method
from icce_ray.core.classifier import probe as probe_
from icce_ray.core.evaluation import truth as metrics
from icce_ray.core.unit_rows import unit_rows
from icce_ray.errors import DataError

WARM_UP = 5  # steps before the clock starts


@dataclass(frozen=True)
class Case:
    """Embeddings, their neighbors, and the truth that results are compared with."""

    embeddings: np.ndarray  # float16 [N, D], unit rows
    ids: np.ndarray  # int32 [N, M]
    counts: np.ndarray  # int32 [N]
    codes: np.ndarray  # int64 [N], -1 where a row has no label
    clusters: int  # K


def settings(clusters: int, heads: Mapping[str, Any] | None = None, seed: int = 0) -> MethodConfig:
    """The defaults, with these settings of the heads."""
    tree = {"num_classes": clusters, "seed": seed, "heads": dict(heads or {})}
    return check(MethodConfig, tree)


def case_of(embeddings: np.ndarray, codes: np.ndarray, clusters: int, device: torch.device) -> Case:
    """A case whose neighbors are searched now. embeddings: float16 [N, D], unit rows."""
    chosen = settings(clusters)
    ids, similarity = method.search(embeddings, chosen, device)
    near = method.select(ids, similarity, chosen)
    return Case(embeddings, near.ids, near.counts, codes, clusters)


def case_of_files(embeddings: Path, labels: Path, device: torch.device) -> Case:
    """N x D embeddings and N labels in .npy files; neighbors are searched."""
    x, codes = embeddings_of(str(embeddings), labels)
    return case_of(x, codes, int(codes.max()) + 1, device)


def embeddings_of(source: str, labels: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows, float16 [N, D], and classes, int64 [N], of a run, or of two .npy files.

    Raises:
        DataError: files that are not there, or do not belong together.
    """
    if labels is None:
        from benchmarks.tables import open_labeled

        run, _, known = open_labeled(source)
        return run.matrix("embeddings", "embedding"), known.codes
    x, truth = array_of(Path(source)), array_of(labels)
    if truth.shape != x.shape[:1]:
        raise DataError(f"{labels} is {truth.shape}, {source} {x.shape}: a label for each row")
    return unit_rows(x), np.unique(truth, return_inverse=True)[1].astype(np.int64)


def array_of(file: Path) -> np.ndarray:
    """A .npy file, memory-mapped. Raises DataError: there is none."""
    if not file.is_file():
        raise DataError(f"no file {file}: give embeddings and --labels as .npy files")
    return np.asarray(np.load(file, mmap_mode="r"))


def case_of_run(run_dir: str) -> Case:
    """A run whose neighbors are there, with ground truth."""
    from benchmarks.tables import open_labeled

    run, config, known = open_labeled(run_dir)
    ids, counts = run.matrix("neighbors", "ids"), run.matrix("selection", "count")
    return Case(run.matrix("embeddings", "embedding"), ids, counts, known.codes, config.num_classes)


# --- how long each part takes --------------------------------------------------------------------


@dataclass
class Part:
    """A part of the method, and what it took."""

    name: str
    seconds: float
    memory: float  # bytes of the GPU at most; 0 without one


@dataclass
class Stopwatch:
    """Times the parts of the method, one after another."""

    device: torch.device
    parts: list[Part] = field(default_factory=list)
    say: Callable[[str], None] = print

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        yield
        if gpu:
            torch.cuda.synchronize(self.device)
        memory = float(torch.cuda.max_memory_allocated(self.device)) if gpu else 0.0
        self.parts.append(Part(name, time.perf_counter() - began, memory))
        self.say(f"{name}: {self.parts[-1].seconds:.1f} s")


def measure_parts(
    embeddings: np.ndarray,
    codes: np.ndarray,
    clusters: int,
    heads: Mapping[str, Any],
    steps: int | None,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> tuple[list[Part], dict[str, float]]:
    """Neighbors, heads, consensus and classifier, each timed; and remarks.

    steps: of the heads' training that are taken, more than WARM_UP. Default: all.
    """
    config, watch = settings(clusters, heads), Stopwatch(device, say=say)
    with watch.part("neighbors, exact"):
        case = case_of(embeddings, codes, clusters, device)
    with watch.part("heads: k-means start"):
        data, _ = method.head_data(embeddings, case.ids, case.counts, config, device)
        trainer = method.head_trainer(data, config)
        trainer.start()
    whole = trainer.steps
    for _ in range(WARM_UP):
        trainer.step()
    taken = min(steps or whole, whole) - WARM_UP
    with watch.part(f"heads: {taken:,} steps"):
        for _ in range(taken):
            trainer.step()
    remarks = {"ms per step": 1000 * watch.parts[-1].seconds / taken}
    remarks[f"s that all {whole:,} steps would take"] = remarks["ms per step"] * whole / 1000
    with watch.part("heads: assign all rows"):
        assignments = trainer.assign()
    del trainer, data
    with watch.part("consensus"):
        merged = method.merge(assignments, case.ids, config, device)
    with watch.part("classifier: linear probe"):
        model, _ = method.train_classifier(
            embeddings, merged.labels, merged.confidence, config, device
        )
    predicted, _ = probe_.predict(model, embeddings, device)
    if taken + WARM_UP == whole:  # heads of a training cut short say nothing
        for name, labels in (("consensus", merged.labels), ("classifier", predicted)):
            remarks[f"accuracy of the {name}, %"] = 100 * metrics.accuracy(codes, labels)
    remarks["neighbors of the same class, %"] = 100 * _right(case)
    return watch.parts, remarks


def _right(case: Case, rows: int = 2000) -> float:
    chosen = np.linspace(0, len(case.ids) - 1, min(len(case.ids), rows)).astype(int)
    return float((case.codes[case.ids[chosen]] == case.codes[chosen, None]).mean())


def parts_table(parts: list[Part]) -> str:
    """Seconds, and GB of the GPU where there is one."""
    gpu = any(part.memory for part in parts)
    lines = [
        [part.name, f"{part.seconds:.1f}", *([f"{part.memory / 1e9:.1f}"] if gpu else [])]
        for part in parts
    ]
    return markdown(["part", "s", *(["GPU memory, GB"] if gpu else [])], lines)
