"""How fast heads get good: accuracy over time of our recipe beside TEMI's, in the same code.

Both train on the same embeddings and neighbor lists, in this process. The clock runs for training
alone; labels are looked at between steps, for the curve.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import markdown, open_labeled

POINTS = 40  # of a curve
SCORED_ROWS = 20_000  # that accuracy is measured on
TEMI_EPOCHS = 100
TEMI_BATCH = 512

# TEMI (arXiv 2303.17896) and its public code; without what ICCE and we add.
TEMI: Mapping[str, Any] = {
    "hidden": (512, 256),
    "batch_norm": False,
    "pca": None,
    "start": "random",
    "batch_size": TEMI_BATCH,
    "lr": 1e-4,
    "cross_entropy": 0.0,
    "sinkhorn": False,
    "teacher_momentum": 0.996,
    "warmup": 0.1,
}


@dataclass
class Point:
    """A moment of a training."""

    seconds: float
    step: int
    loss: float  # mean over heads
    mean: float  # accuracy of the heads, mean
    best: float


def recipes(rows: int) -> dict[str, dict[str, Any]]:
    """Settings of each recipe; TEMI's lasts 100 epochs."""
    return {
        "ours": {},
        "ours, random start": {"start": "random"},
        "ours, slow teacher": {"teacher_momentum": 0.996},
        "TEMI": {**TEMI, "steps": TEMI_EPOCHS * rows // TEMI_BATCH},
    }


def measure_pace(
    run_dir: str, heads: int, seconds: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Train by each recipe until it is through, or for so many seconds; the curves."""
    import torch

    from icce_ray.config import HeadsConfig
    from icce_ray.core import head_trainer as core
    from icce_ray.stages.heads import load_data

    run, config, known = open_labeled(run_dir)
    matrix, curves = run.matrix("embeddings", "embedding"), {}
    for name, changes in recipes(len(matrix)).items():
        settings = HeadsConfig.model_validate({"count": heads, **changes})
        projection = core.fit_projection(matrix, settings.pca, seed)
        data = load_data(run, projection, torch.device("cpu"))
        steps = settings.steps or core.default_steps(config.num_classes)
        trainer = core.HeadTrainer(data, settings, config.num_classes, seed, steps)
        curves[name] = [asdict(point) for point in _curve(trainer, known.codes, seconds)]
    return curves


def _curve(trainer: Any, codes: np.ndarray, seconds: float) -> Iterator[Point]:
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(np.flatnonzero(codes >= 0))[:SCORED_ROWS])
    began = time.perf_counter()
    trainer.start()
    spent, every = time.perf_counter() - began, seconds / POINTS
    yield _point(trainer, codes, rows, spent, float("nan"))
    shown = spent
    while trainer.step_number < trainer.steps and spent < seconds:
        began = time.perf_counter()
        loss = float(trainer.step().mean())
        spent += time.perf_counter() - began
        if spent - shown >= every or trainer.step_number == trainer.steps:
            yield _point(trainer, codes, rows, spent, loss)
            shown = spent


def _point(trainer: Any, codes: np.ndarray, rows: np.ndarray, spent: float, loss: float) -> Point:
    from icce_ray.stages import evaluate

    found = evaluate.heads_alone(trainer.assign(rows=rows), codes[rows])
    return Point(spent, trainer.step_number, loss, found["acc_mean"], found["acc_best"])


# --- for a person --------------------------------------------------------------------------------


def pace_table(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line for each recipe: where it ended, and when it was first within a point of that."""
    head = ["recipe", "steps", "s", "single heads at the end", "best head", "s to within a point"]
    lines = []
    for name, points in curves.items():
        last = points[-1]
        near = next(one["seconds"] for one in points if one["mean"] >= last["mean"] - 0.01)
        lines.append(
            [
                name,
                f"{last['step']:,}",
                f"{last['seconds']:.0f}",
                f"{100 * last['mean']:.1f}",
                f"{100 * last['best']:.1f}",
                f"{near:.0f}",
            ]
        )
    return markdown(head, lines)


STYLE = """
svg{font:11px sans-serif;background:#fff} text{fill:#555} .note{font-weight:600}
.rule{stroke:#ddd;fill:none} .axis{stroke:#888;fill:none}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
"""
COLORS = ("#1764ab", "#6baed6", "#31a354", "#d95f0e")


def pace_chart(curves: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Accuracy of the mean head over seconds, as an SVG file."""
    from icce_ray import charts

    every = [point for points in curves.values() for point in points]
    times, values = ([p[key] for p in every] for key in ("seconds", "mean"))
    plot = charts.Plot(
        (0, max(times)),
        charts.padded(values),
        label="Accuracy of single heads over the seconds of their training, by recipe",
        x_title="seconds of training",
        y_format=charts.percent,
    )
    ends = []
    for number, (name, points) in enumerate(curves.items()):
        plot.line([p["seconds"] for p in points], [p["mean"] for p in points], f"line c{number}")
        ends.append((points[-1]["mean"], number, name))
    for place, (_, number, name) in enumerate(sorted(ends, reverse=True)):
        plot.text(charts.WIDTH - 14, 96 + 14 * place, name, "end", f"note t{number}")
    colors = "".join(f".c{i}{{stroke:{c}}} .t{i}{{fill:{c}}}" for i, c in enumerate(COLORS))
    text = str(plot.svg()).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="570" height="315" ', 1
    )
    text = text.replace(">", f"><style>{STYLE}{colors}</style>", 1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
