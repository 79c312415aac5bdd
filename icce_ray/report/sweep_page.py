"""One self-contained HTML page about a sweep: best settings, all trials, what each setting does.

Reads SWEEP/results.json, writes SWEEP/report/index.html. Trials are ranked by the label-free
objective alone; where there is ground truth, the page shows how well that ranking agrees with it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from icce_ray.core.evaluation.labelfree import SCORES
from icce_ray.errors import ArtifactError
from icce_ray.report import charts
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import duration

FOLDER = "report"


PAGE = "index.html"


LONGEST = 26  # characters of a value before it is cut


ROWS = 14  # categories a chart shows


PARTS = 4  # a running median looks at one part in so many of the points


FEWEST = 12  # points from which one is drawn


DISTINCT = 12  # values up to which a chart joins the means of each


MIN_PAIRS = 3  # trials from which a rank correlation is shown


LOG_RANGE = 20.0  # largest over smallest choice from which an axis is logarithmic


KEYS = ("name", "objective", "space", "trials", "best", "seconds")


def build(run: RunDirectory, folder: str) -> str:
    """Write the page of a sweep in a run directory. Returns its address.

    Raises:
        ArtifactError: where folder/results.json is missing or not a sweep's.
    """
    results = run.read_json(folder, "results.json")
    lacking = [key for key in KEYS if not isinstance(results, dict) or key not in results]
    if lacking:
        raise ArtifactError(
            f"{run.address(folder, 'results.json')} is not a sweep's result: it lacks {lacking[0]}"
        )
    page = render(results, run.address(folder, "best.yaml"))
    run.write_bytes(page.encode(), f"{folder}/{FOLDER}", PAGE)
    return run.address(folder, FOLDER, PAGE)


def render(results: Mapping[str, Any], best_config: str) -> str:
    """The page. best_config: path of the best trial's config."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icce_ray.report", "templates"),
        autoescape=True,  # values and errors are not ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "n": lambda value: f"{value:,}"}
    found = _load(results)
    content = _content(found) | {"command": f"icce-ray run {shlex.quote(best_config)}"}
    return environment.get_template("sweep.html.j2").render(**content)


@dataclass(frozen=True)
class _Sweep:
    results: Mapping[str, Any]
    ranked: list[dict[str, Any]]  # done, with a score, best first
    rest: list[dict[str, Any]]  # stopped early, failed, or without a score

    @property
    def objective(self) -> str:
        return str(self.results["objective"])

    def value(self, trial: Mapping[str, Any], name: str | None = None) -> float | None:
        """A score of a trial; None where it has none, or it is not finite."""
        found = (trial.get("scores") or {}).get(name or self.objective)
        return float(found) if found is not None and math.isfinite(found) else None

    def accuracy(self, trial: Mapping[str, Any]) -> float | None:
        return (trial.get("accuracy") or {}).get("acc")

    @property
    def labeled(self) -> bool:
        return any(self.accuracy(trial) is not None for trial in self.ranked)

    @property
    def every(self) -> list[dict[str, Any]]:
        return self.ranked + self.rest

    @property
    def keys(self) -> list[str]:
        """Settings of the space, then any other that trials name."""
        found = dict.fromkeys(self.results["space"])
        for trial in self.every:
            found |= dict.fromkeys(trial["settings"])
        return list(found)


def _load(results: Mapping[str, Any]) -> _Sweep:
    ordered = _Sweep(results, [], [])
    sign = -1.0 if results.get("direction", "max") == "max" else 1.0
    for trial in results["trials"]:
        scored = trial["state"] == "done" and ordered.value(trial) is not None
        (ordered.ranked if scored else ordered.rest).append(trial)
    ordered.ranked.sort(key=lambda trial: sign * (ordered.value(trial) or 0.0))
    ordered.rest.sort(key=lambda trial: (trial["state"] == "failed", trial["state"]))
    return ordered


def _content(found: _Sweep) -> dict[str, Any]:
    results, best = found.results, found.ranked[0] if found.ranked else None
    varying = _varying(found)
    names = _score_names(found)
    return {
        "name": results["name"],
        "objective": found.objective,
        "meaning": SCORES.get(found.objective, ""),
        "best": best and _best(found, best, varying),
        "labeled": found.labeled,
        "states": {s: sum(t["state"] == s for t in found.every) for s in _STATES},
        "total": len(found.every),
        "seconds": results["seconds"],
        "counts": _counts(results.get("counts") or {}),
        "keys": varying,
        "fixed": _fixed(found, varying),
        "scores": names,
        "meanings": [(name, SCORES.get(name, "")) for name in names],
        "rows": [_row(found, trial, varying, names) for trial in found.every],
        "effects": [chart for key in varying if (chart := _effect(found, key))],
        "truth": _against_truth(found, names),
        "settings": yaml.safe_dump(results.get("config") or {}, sort_keys=False, width=110),
    }


_STATES = ("done", "stopped", "failed")


def _best(found: _Sweep, best: Mapping[str, Any], varying: Sequence[str]) -> dict[str, Any]:
    keys = varying or list(best["settings"])
    return {
        "id": best["id"],
        "score": _number(found.value(best)),
        "settings": [(key, _shown(best["settings"].get(key))) for key in keys],
        "accuracy": found.accuracy(best),
        "seconds": best.get("seconds") or 0.0,
    }


def _counts(counts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was computed and how often, flat; the numbers of trials by state are shown anyhow."""
    flat: dict[str, Any] = {}
    for key, value in counts.items():
        flat |= dict(value) if isinstance(value, Mapping) else {key: value}
    return [(key.replace("_", " "), v) for key, v in flat.items() if key not in _STATES]


def _varying(found: _Sweep) -> list[str]:
    """Settings that differ between trials."""
    return [
        key
        for key in found.keys
        if len({_code(trial["settings"].get(key)) for trial in found.every}) > 1
    ]


def _fixed(found: _Sweep, varying: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Settings that all trials share; the headline has them already where nothing varies."""
    if not found.every or not varying:
        return []
    first = found.every[0]["settings"]
    return [(key, _shown(first.get(key))) for key in found.keys if key not in varying]


def _score_names(found: _Sweep) -> list[str]:
    """The objective, then every other score that a trial has."""
    names = {found.objective: None}
    for trial in found.every:
        names |= dict.fromkeys(trial.get("scores") or {})
    return list(names)


def _code(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    """A setting's value as one would write it on the command line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else _code(value)


def _shown(value: Any) -> dict[str, str]:
    """A value to print, and in full where it was cut."""
    text = _text(value)
    full = value if isinstance(value, str) else _code(value)
    return {"text": _cut(text), "full": full if _cut(text) != full else ""}


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _row(
    found: _Sweep, trial: Mapping[str, Any], varying: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    ranked = trial in found.ranked
    accuracy = trial.get("accuracy") or {}
    extra = [f"{key.upper()} {accuracy[key]:.3f}" for key in ("nmi", "ari") if key in accuracy]
    return {
        "place": found.ranked.index(trial) + 1 if ranked else None,  # type: ignore[arg-type]
        "id": _cut(str(trial["id"]), 14),
        "full_id": str(trial["id"]),
        "best": bool(found.ranked) and trial is found.ranked[0],
        "state": trial["state"],
        "settings": [_shown(trial["settings"].get(key)) for key in varying],
        "scores": [_number(found.value(trial, name)) for name in names],
        "accuracy": found.accuracy(trial),
        "extra": ", ".join(extra),
        "seconds": trial.get("seconds"),
        "reused": ", ".join(trial.get("reused") or ()),
        "reason": "" if ranked else _reason(found, trial),
    }


def _reason(found: _Sweep, trial: Mapping[str, Any]) -> str:
    if trial["state"] == "stopped":
        at = trial.get("stopped_at")
        return "stopped early" + (f" at {at:.0f}% of its training" if at is not None else "")
    if trial["state"] == "done":
        return f"no finite {found.objective}"
    return str(trial.get("error") or "failed without a message")


def _effect(found: _Sweep, key: str) -> dict[str, Any] | None:
    """A chart of the objective over one setting; None where fewer than two trials can be shown."""
    trials = [trial for trial in found.ranked if key in trial["settings"]]
    if len(trials) < 2:
        return None
    values = [trial["settings"][key] for trial in trials]
    numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    drawing, text = (_numeric if numeric else _categorical)(found, key, trials)
    return {"title": key, "drawing": drawing, "text": text}


def _title(found: _Sweep, trial: Mapping[str, Any], key: str) -> str:
    return f"{trial['id']}: {key}={_text(trial['settings'][key])}, {_number(found.value(trial))}"


def _numeric(found: _Sweep, key: str, trials: Sequence[Mapping[str, Any]]) -> tuple[Markup, str]:
    x = [float(trial["settings"][key]) for trial in trials]
    y = [found.value(trial) or 0.0 for trial in trials]
    distinct = sorted(set(x))
    trend, name = _trend(np.array(x), np.array(y))
    at = f"{found.objective} over {key}"
    best = _text(trials[0]["settings"][key])
    drawing = charts.scatter(
        [
            (a, b, _title(found, trial, key), trial is found.ranked[0])
            for a, b, trial in zip(x, y, trials, strict=True)
        ],
        label=f"{at} for {len(x)} trials; the best one has {best}",
        x_title=_cut(key, 40),
        x_log=_is_log(found.results["space"].get(key) or {}, distinct),
        x_whole=all(value == int(value) for value in distinct),
        x_ticks=distinct if 1 < len(distinct) <= 5 else None,
        trend=trend,
    )
    return drawing, f"{found.objective} of {len(x)} trials{name}; the ring marks the best one."


def _is_log(space: Mapping[str, Any], distinct: Sequence[float]) -> bool:
    if distinct[0] <= 0 or len(distinct) < 2:
        return False
    return bool(space.get("log")) or (
        "choices" in space and distinct[-1] / distinct[0] >= LOG_RANGE
    )


def _trend(x: np.ndarray, y: np.ndarray) -> tuple[tuple[list[float], list[float]] | None, str]:
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
    found: _Sweep, key: str, trials: Sequence[Mapping[str, Any]]
) -> tuple[Markup, str]:
    groups: dict[str, list[tuple[float, str, bool]]] = {}
    for trial in trials:
        point = (found.value(trial) or 0.0, _title(found, trial, key), trial is found.ranked[0])
        groups.setdefault(_text(trial["settings"][key]), []).append(point)
    ordered = sorted(groups, key=lambda g: -float(np.mean([point[0] for point in groups[g]])))
    shown = [(_cut(name, 22), groups[name]) for name in ordered[:ROWS]]
    left = len(ordered) - len(shown)
    drawing = charts.categories(
        shown,
        label=f"{found.objective} by {key} for {len(trials)} trials; the highest mean has "
        f"{ordered[0]}",
        x_title=_cut(found.objective, 40),
    )
    text = f"{found.objective} of {len(trials)} trials; bars are means"
    return drawing, text + (f". {left} values of lower means are left out." if left else ".")


def _against_truth(found: _Sweep, names: Sequence[str]) -> dict[str, Any] | None:
    """How well label-free scores rank the trials: Spearman's correlation with accuracy.

    None for fewer than MIN_PAIRS trials with labels, which tell nothing.
    """
    rows = []
    for name in names:
        pairs = [
            (value, accuracy)
            for trial in found.ranked
            if (value := found.value(trial, name)) is not None
            and (accuracy := found.accuracy(trial)) is not None
        ]
        rows.append({"name": name, "n": len(pairs), "rho": spearman(pairs)})
    points = [
        (
            found.value(trial) or 0.0,
            accuracy,
            f"{trial['id']}: {_number(found.value(trial))}, {accuracy:.1%}",
            trial is found.ranked[0],
        )
        for trial in found.ranked
        if (accuracy := found.accuracy(trial)) is not None
    ]
    if len(points) < MIN_PAIRS:
        return None
    chart = charts.scatter(
        points,
        label=f"Accuracy over {found.objective} for {len(points)} trials",
        x_title=_cut(found.objective, 40),
        y_format=charts.percent,
    )
    highest = max(point[1] for point in points)
    return {"rows": rows, "chart": chart, "n": len(points), "highest": highest}


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation of pairs; None for fewer than 3, or where one side is constant."""
    from scipy.stats import spearmanr

    if len(pairs) < MIN_PAIRS:
        return None
    x, y = np.array(pairs, dtype=np.float64).T
    if (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(spearmanr(x, y).statistic)
