"""The numbers and texts on the page of a sweep, prepared from its results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icce_ray.core.evaluation.labelfree import SCORES
from icce_ray.report.pages import cut

LONGEST = 26  # characters of a value before it is cut
MIN_PAIRS = 3  # trials from which a rank correlation is shown
STATES = ("done", "stopped", "failed")


@dataclass(frozen=True)
class Ranking:
    """The trials of a sweep, ranked by its label-free objective alone (the higher, the better)."""

    results: Mapping[str, Any]  # results.json
    ranked: list[dict[str, Any]]  # done, with a finite score, best first
    rest: list[dict[str, Any]]  # stopped early, failed, or without a score

    @classmethod
    def of(cls, results: Mapping[str, Any]) -> Ranking:
        """Rank the trials of a results.json."""
        ranking = cls(results, [], [])
        for trial in results["trials"]:
            scored = trial["state"] == "done" and ranking.value(trial) is not None
            (ranking.ranked if scored else ranking.rest).append(trial)
        ranking.ranked.sort(key=lambda trial: -(ranking.value(trial) or 0.0))
        ranking.rest.sort(key=lambda trial: (trial["state"] == "failed", trial["state"]))
        return ranking

    @property
    def objective(self) -> str:
        """Name of the score that trials are ranked by."""
        return str(self.results["objective"])

    @property
    def best(self) -> dict[str, Any] | None:
        """The trial with the highest objective; None where no trial has one."""
        return self.ranked[0] if self.ranked else None

    @property
    def trials(self) -> list[dict[str, Any]]:
        """All trials, ranked ones first."""
        return self.ranked + self.rest

    @property
    def labeled(self) -> bool:
        """Whether any ranked trial has an accuracy."""
        return any(self.accuracy(trial) is not None for trial in self.ranked)

    def value(self, trial: Mapping[str, Any], name: str | None = None) -> float | None:
        """A score of a trial (default: the objective); None where it has none or it is infinite."""
        score = (trial.get("scores") or {}).get(name or self.objective)
        return float(score) if score is not None and math.isfinite(score) else None

    def accuracy(self, trial: Mapping[str, Any]) -> float | None:
        """Accuracy against labels, which the ranking never sees; None without labels."""
        return (trial.get("accuracy") or {}).get("acc")

    def settings(self) -> list[str]:
        """Settings of the space, then any other that trials name."""
        names = dict.fromkeys(self.results["space"])
        for trial in self.trials:
            names |= dict.fromkeys(trial["settings"])
        return list(names)

    def varying(self) -> list[str]:
        """Settings that differ between trials."""
        return [
            key
            for key in self.settings()
            if len({_code(trial["settings"].get(key)) for trial in self.trials}) > 1
        ]

    def scores(self) -> list[str]:
        """The objective, then every other score that a trial has."""
        names = {self.objective: None}
        for trial in self.trials:
            names |= dict.fromkeys(trial.get("scores") or {})
        return list(names)


def table(ranking: Ranking) -> dict[str, Any]:
    """What the template shows of the trials: the best one, totals, and a row per trial."""
    results = ranking.results
    varying, scores = ranking.varying(), ranking.scores()
    return {
        "name": results["name"],
        "objective": ranking.objective,
        "meaning": SCORES.get(ranking.objective, ""),
        "best": _best(ranking, varying),
        "labeled": ranking.labeled,
        "states": {s: sum(t["state"] == s for t in ranking.trials) for s in STATES},
        "total": len(ranking.trials),
        "seconds": results["seconds"],
        "counts": _counts(results.get("counts") or {}),
        "keys": varying,
        "fixed": _fixed(ranking, varying),
        "scores": scores,
        "meanings": [(name, SCORES.get(name, "")) for name in scores],
        "rows": [
            _row(ranking, trial, place, varying, scores)
            for place, trial in enumerate(ranking.trials, start=1)
        ],
    }


def _best(ranking: Ranking, varying: Sequence[str]) -> dict[str, Any] | None:
    best = ranking.best
    if best is None:
        return None
    keys = varying or list(best["settings"])
    return {
        "id": best["id"],
        "score": number(ranking.value(best)),
        "settings": [(key, _shown(best["settings"].get(key))) for key in keys],
        "accuracy": ranking.accuracy(best),
    }


def _counts(counts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was computed and how often, flat, without the trials by state (shown elsewhere)."""
    flat: dict[str, Any] = {}
    for key, value in counts.items():
        flat |= dict(value) if isinstance(value, Mapping) else {key: value}
    return [(key.replace("_", " "), value) for key, value in flat.items() if key not in STATES]


def _fixed(ranking: Ranking, varying: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Settings that all trials share; none where nothing varies: then `_best` has them."""
    if not ranking.trials or not varying:
        return []
    first = ranking.trials[0]["settings"]
    return [(key, _shown(first.get(key))) for key in ranking.settings() if key not in varying]


def _row(
    ranking: Ranking,
    trial: Mapping[str, Any],
    place: int,
    varying: Sequence[str],
    scores: Sequence[str],
) -> dict[str, Any]:
    ranked = place <= len(ranking.ranked)
    accuracy = trial.get("accuracy") or {}
    extra = [f"{key.upper()} {accuracy[key]:.3f}" for key in ("nmi", "ari") if key in accuracy]
    return {
        "place": place if ranked else None,
        "id": cut(str(trial["id"]), 14),
        "full_id": str(trial["id"]),
        "best": trial is ranking.best,
        "state": trial["state"],
        "settings": [_shown(trial["settings"].get(key)) for key in varying],
        "scores": [number(ranking.value(trial, name)) for name in scores],
        "accuracy": ranking.accuracy(trial),
        "extra": ", ".join(extra),
        "seconds": trial.get("seconds"),
        "reused": ", ".join(trial.get("reused") or ()),
        "reason": "" if ranked else _reason(ranking, trial),
    }


def _reason(ranking: Ranking, trial: Mapping[str, Any]) -> str:
    if trial["state"] == "stopped":
        at = trial.get("stopped_at")
        return "stopped early" + (f" at {at:.0f}% of its training" if at is not None else "")
    if trial["state"] == "done":
        return f"no finite {ranking.objective}"
    return str(trial.get("error") or "failed without a message")


def number(value: float | None) -> str:
    """A score with four decimals; empty where there is none."""
    return "" if value is None else f"{value:.4f}"


def text_of(value: Any) -> str:
    """A setting's value as one would write it on the command line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else _code(value)


def _code(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _shown(value: Any) -> dict[str, str]:
    """A value to print, and in full where it was cut."""
    text = text_of(value)
    full = value if isinstance(value, str) else _code(value)
    short = cut(text, LONGEST)
    return {"text": short, "full": full if short != full else ""}


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation of pairs; None for fewer than 3, or where one side is constant."""
    from scipy.stats import spearmanr

    if len(pairs) < MIN_PAIRS:
        return None
    x, y = np.array(pairs, dtype=np.float64).T
    if (x == x[0]).all() or (y == y[0]).all():
        return None
    return float(spearmanr(x, y).statistic)
