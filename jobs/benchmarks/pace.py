"""How fast heads get good: accuracy over time of our recipe beside TEMI's, in the same code.

Both train on the same embeddings and neighbor lists, in this process. The clock runs for training
alone; labels are looked at between steps, for the curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import markdown, open_labeled

POINTS = 40  # of a curve
SCORED_ROWS = 20_000  # that accuracy is measured on
FIRST_SECOND = 1.0  # where drawings begin
TEMI_EPOCHS = 100
TEMI_BATCH = 512

OURS: Mapping[str, Any] = {"balance": 0.5}  # one of those taken in turn by default

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
    "balance": 1.0,
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
        "ours": OURS,
        "ours, random start": {**OURS, "start": "random"},
        "ours, slow teacher": {**OURS, "teacher_momentum": 0.996},
        "TEMI": {**TEMI, "steps": TEMI_EPOCHS * rows // TEMI_BATCH},
    }


def measure_pace(
    run_dir: str, heads: int, seconds: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Train by each recipe until it is through, or for so many seconds; the curves."""
    import torch

    from icce_ray.config import HeadsConfig
    from icce_ray.core import head_trainer as core
    from icce_ray.core.projection import fit_projection
    from icce_ray.stages.heads import load_data

    run, config, known = open_labeled(run_dir)
    matrix, curves = run.matrix("embeddings", "embedding"), {}
    for name, changes in recipes(len(matrix)).items():
        settings = HeadsConfig.model_validate({"count": heads, **changes})
        projection = fit_projection(matrix, settings.pca, seed)
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
    """Accuracy and loss of the mean head over seconds, side by side, as an SVG file."""
    from icce_ray import charts

    panels = [
        _panel(curves, "mean", "accuracy of single heads", charts.percent),
        _panel(curves, "loss", "loss, each recipe's own", charts.short),
    ]
    for line, name in enumerate(curves):
        height = charts.HEIGHT - charts.BOTTOM - 10 - 14 * (len(curves) - 1 - line)
        panels[0].text(charts.WIDTH - 14, height, name, "end", f"note t{line}")
    width, height = 2 * charts.WIDTH, charts.HEIGHT
    colors = "".join(f".c{i}{{stroke:{c}}} .t{i}{{fill:{c}}}" for i, c in enumerate(COLORS))
    parts = "".join(
        f'<svg x="{place * charts.WIDTH}" width="{charts.WIDTH}" height="{height}">'
        f"{''.join(panel.marks)}</svg>"
        for place, panel in enumerate(panels)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{1.25 * width}" role="img" aria-label="{panels[0].label}; {panels[1].label}">'
        f"<style>{STYLE}{colors}</style>{parts}</svg>\n"
    )


def _panel(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str, shown: Any
) -> Any:
    """One value over the seconds, on a scale of powers: the recipes differ by as much."""
    from icce_ray import charts

    drawn = {
        name: [p for p in points if p["seconds"] >= FIRST_SECOND and math.isfinite(p[key])]
        for name, points in curves.items()
    }
    every = [point for points in drawn.values() for point in points]
    plot = charts.Plot(
        (FIRST_SECOND, max((point["seconds"] for point in every), default=2 * FIRST_SECOND)),
        charts.padded([point[key] for point in every]),
        label=f"{title} over the seconds of training, by recipe",
        x_title=f"{title}, over seconds of training",
        x_log=True,
        y_format=shown,
    )
    for number, points in enumerate(drawn.values()):
        places, values = ([point[name] for point in points] for name in ("seconds", key))
        plot.line(places, values, f"line c{number}")
    return plot
