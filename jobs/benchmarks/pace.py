"""How fast heads get good: accuracy over time of our recipe beside TEMI's, in the same code.

Both train on the same embeddings and neighbor lists, in this process. The clock runs only while
they train; labels are looked at between steps, for the curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import alone
from benchmarks.tables import markdown
from icce_ray.core import method
from icce_ray.core.evaluation import truth as metrics
from icce_ray.core.heads.trainer import HeadTrainer
from icce_ray.errors import ConfigError

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
    "sinkhorn_iterations": 0,
    "balance": 1.0,
    "teacher_momentum": 0.996,
}

# What ICCE's abstract adds to it.
ICCE: Mapping[str, Any] = {
    **TEMI,
    "batch_norm": True,
    "cross_entropy": 0.1,
    "sinkhorn_iterations": 3,
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
    """Settings of each recipe; those on TEMI's heads last 100 epochs."""
    whole = {"steps": TEMI_EPOCHS * rows // TEMI_BATCH}
    return {
        "ours": {**OURS},
        "ours, random start": {**OURS, "start": "random"},
        "ours, slow teacher": {**OURS, "teacher_momentum": 0.996},
        "TEMI": {**TEMI, **whole},
        "TEMI with ICCE's additions": {**ICCE, **whole},
        "the same without batch norm": {**ICCE, **whole, "batch_norm": False},
    }


def measure_pace(
    case: alone.Case,
    heads: int,
    seconds: float,
    seed: int,
    device: torch.device,
    only: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Train by each recipe, or only by some, until it is through or for `seconds` at most.

    Returns, by recipe: `steps` of the whole, `curve`, and the accuracy of the `consensus` of the
    heads at its end.

    Raises:
        ConfigError: a recipe that does not exist.
    """
    known = recipes(len(case.embeddings))
    if unknown := sorted(set(only) - set(known)):
        raise ConfigError(f"no recipe {unknown[0]!r}; there are {', '.join(known)}")
    found: dict[str, dict[str, Any]] = {}
    for name, changes in known.items():
        if only and name not in only:
            continue
        config = alone.settings(case.clusters, {"count": heads, **changes}, seed)
        data, _ = method.head_data(case.embeddings, case.ids, case.counts, config, device)
        trainer = method.head_trainer(data, config)
        curve = [asdict(point) for point in _curve(trainer, case.codes, seconds)]
        merged = method.merge(trainer.assign(), case.ids, config).labels
        labeled = case.codes >= 0
        acc = metrics.accuracy(case.codes[labeled], merged[labeled])
        found[name] = {"steps": trainer.steps, "consensus": acc, "curve": curve}
    return found


def _curve(trainer: HeadTrainer, codes: np.ndarray, seconds: float) -> Iterator[Point]:
    generator = np.random.default_rng(0)
    rows = np.sort(generator.permutation(np.flatnonzero(codes >= 0))[:SCORED_ROWS])
    began = time.perf_counter()
    trainer.start()
    spent = time.perf_counter() - began
    yield _point(trainer, codes, rows, spent, float("nan"))
    shown, every = trainer.step_number, max(1, trainer.steps // POINTS)
    last = spent
    while trainer.step_number < trainer.steps and spent < seconds:
        began = time.perf_counter()
        loss = float(trainer.step().mean())  # waits for the device
        spent += time.perf_counter() - began
        done = trainer.step_number == trainer.steps or spent >= seconds
        if done or trainer.step_number - shown >= every or spent - last >= seconds / POINTS:
            yield _point(trainer, codes, rows, spent, loss)
            shown, last = trainer.step_number, spent


def _point(
    trainer: HeadTrainer, codes: np.ndarray, rows: np.ndarray, spent: float, loss: float
) -> Point:
    each = [metrics.accuracy(codes[rows], column) for column in trainer.assign(rows=rows).T]
    return Point(spent, trainer.step_number, loss, float(np.mean(each)), float(np.max(each)))


# --- for a person --------------------------------------------------------------------------------


def pace_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each recipe: where it ended, and when it was first within a point of that."""
    head = ["recipe", "steps", "s", "single heads", "best head", "consensus"]
    head += ["s to within a point"]
    lines = []
    for name, one in found.items():
        last = one["curve"][-1]
        near = next(p["seconds"] for p in one["curve"] if p["mean"] >= last["mean"] - 0.01)
        whole = "" if last["step"] == one["steps"] else f" of {one['steps']:,}"
        lines.append(
            [
                name,
                f"{last['step']:,}{whole}",
                f"{last['seconds']:.0f}",
                f"{100 * last['mean']:.1f}",
                f"{100 * last['best']:.1f}",
                f"{100 * one['consensus']:.1f}",
                f"{near:.0f}",
            ]
        )
    return markdown(head, lines)


STYLE = """
svg{font:11px sans-serif;background:#fff} text{fill:#555} .note{font-weight:600}
.rule{stroke:#ddd;fill:none} .axis{stroke:#888;fill:none}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
"""
COLORS = ("#1764ab", "#6baed6", "#31a354", "#d95f0e", "#756bb1", "#bc80bd")


def pace_chart(curves: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Accuracy and loss of the mean head over seconds, side by side, as an SVG file.

    curves: by recipe.
    """
    from icce_ray.report import charts

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
    from icce_ray.report import charts

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
