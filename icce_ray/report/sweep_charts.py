"""The charts on the page of a sweep: what each setting does, and accuracy over the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from icce_ray.report import charts
from icce_ray.report.pages import cut
from icce_ray.report.sweep_numbers import MIN_PAIRS, Ranking, number, spearman, text_of

ROWS = 14  # categories a chart shows
PARTS = 4  # a running median takes a quarter of the points at a time
FEWEST = 12  # points from which one is drawn
DISTINCT = 12  # values up to which a chart joins the means of each
LOG_RANGE = 20.0  # largest over smallest choice from which an axis is logarithmic


def effect(ranking: Ranking, key: str) -> dict[str, Any] | None:
    """A chart of the objective over one setting; None where fewer than two trials can be shown."""
    trials = [trial for trial in ranking.ranked if key in trial["settings"]]
    if len(trials) < 2:
        return None
    values = [trial["settings"][key] for trial in trials]
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    drawing, text = (_numeric if numeric else _categorical)(ranking, key, trials)
    return {"title": key, "drawing": drawing, "text": text}


def _title(ranking: Ranking, trial: Mapping[str, Any], key: str) -> str:
    return f"{trial['id']}: {key}={text_of(trial['settings'][key])}, {number(ranking.value(trial))}"


def _numeric(ranking: Ranking, key: str, trials: Sequence[Mapping[str, Any]]) -> tuple[Markup, str]:
    x = [float(trial["settings"][key]) for trial in trials]
    y = [ranking.value(trial) or 0.0 for trial in trials]
    distinct = sorted(set(x))
    trend, name = trend_of(np.array(x), np.array(y))
    at = f"{ranking.objective} over {key}"
    best = text_of(trials[0]["settings"][key])
    drawing = charts.scatter(
        [
            (a, b, _title(ranking, trial, key), trial is ranking.best)
            for a, b, trial in zip(x, y, trials, strict=True)
        ],
        label=f"{at} for {len(x)} trials; the best one has {best}",
        x_title=cut(key, 40),
        x_log=_is_log(ranking.results["space"].get(key) or {}, distinct),
        x_whole=all(value == int(value) for value in distinct),
        x_ticks=distinct if 1 < len(distinct) <= 5 else None,
        trend=trend,
    )
    return drawing, f"{ranking.objective} of {len(x)} trials{name}; the ring marks the best one."


def _is_log(space: Mapping[str, Any], distinct: Sequence[float]) -> bool:
    if distinct[0] <= 0 or len(distinct) < 2:
        return False
    return bool(space.get("log")) or (
        "choices" in space and distinct[-1] / distinct[0] >= LOG_RANGE
    )


def trend_of(x: np.ndarray, y: np.ndarray) -> tuple[tuple[list[float], list[float]] | None, str]:
    """Means of each value where they are few, else a running median; and what it is. x, y: [n]."""
    distinct = np.unique(x)
    if len(distinct) <= DISTINCT and len(distinct) < len(x):
        means = [float(y[x == value].mean()) for value in distinct]
        return (distinct.tolist(), means), " and their mean"
    if len(x) < FEWEST:
        return None, ""
    order = np.argsort(x, kind="stable")
    width = max(5, len(x) // PARTS)
    windows = np.lib.stride_tricks.sliding_window_view(order, width)
    middle = np.median(x[windows], axis=1), np.median(y[windows], axis=1)
    return (middle[0].tolist(), middle[1].tolist()), " and their running median"


def _categorical(
    ranking: Ranking, key: str, trials: Sequence[Mapping[str, Any]]
) -> tuple[Markup, str]:
    groups: dict[str, list[tuple[float, str, bool]]] = {}
    for trial in trials:
        point = (ranking.value(trial) or 0.0, _title(ranking, trial, key), trial is ranking.best)
        groups.setdefault(text_of(trial["settings"][key]), []).append(point)
    ordered = sorted(groups, key=lambda g: -float(np.mean([point[0] for point in groups[g]])))
    shown = [(cut(name, 22), groups[name]) for name in ordered[:ROWS]]
    left = len(ordered) - len(shown)
    drawing = charts.categories(
        shown,
        label=f"{ranking.objective} by {key} for {len(trials)} trials; the highest mean has "
        f"{ordered[0]}",
        x_title=cut(ranking.objective, 40),
    )
    text = f"{ranking.objective} of {len(trials)} trials; bars are means"
    return drawing, text + (f". {left} values of lower means are left out." if left else ".")


def against_truth(ranking: Ranking) -> dict[str, Any] | None:
    """How well label-free scores rank the trials: Spearman's correlation with accuracy.

    None for fewer than MIN_PAIRS trials with labels: they show nothing.
    """
    labeled = [
        (trial, accuracy)
        for trial in ranking.ranked
        if (accuracy := ranking.accuracy(trial)) is not None
    ]
    if len(labeled) < MIN_PAIRS:
        return None
    rows = []
    for name in ranking.scores():
        pairs = [(v, a) for t, a in labeled if (v := ranking.value(t, name)) is not None]
        rows.append({"name": name, "n": len(pairs), "rho": spearman(pairs)})
    chart = charts.scatter(
        [
            (
                ranking.value(trial) or 0.0,
                accuracy,
                f"{trial['id']}: {number(ranking.value(trial))}, {accuracy:.1%}",
                trial is ranking.best,
            )
            for trial, accuracy in labeled
        ],
        label=f"Accuracy over {ranking.objective} for {len(labeled)} trials",
        x_title=cut(ranking.objective, 40),
        y_format=charts.percent,
    )
    highest = max(accuracy for _, accuracy in labeled)
    return {"rows": rows, "chart": chart, "n": len(labeled), "highest": highest}
