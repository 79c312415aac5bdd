"""The method in memory with one setting changed at a time: what each setting earns, how far to
trust the confidence, and how well each label-free score ranks the settings.

Labels are looked at when a clustering is made. Shapes: N images, D features, M neighbors.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.peers import UMAP
from benchmarks.tables import markdown, spread
from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.core import layout, method
from icce_ray.core.device import default_device
from icce_ray.core.evaluation import labelfree, truth
from icce_ray.core.sampling import sample_rows
from icce_ray.report.sweep_numbers import spearman
from icce_ray.sweeps import space as spaces

DEFAULTS = "defaults"
PLANE_ROWS = 10_000  # images whose silhouette is measured
Say = Callable[[str], None]
Lists = tuple[np.ndarray, np.ndarray]  # ids int32 [N, M], similarity float16 [N, M]


@dataclass(frozen=True)
class Trial:
    """One setting and seed. Shares are of 1."""

    setting: str
    seed: int
    true: Mapping[str, float]  # consensus, classifier, heads, best head, nmi, ranking, gap
    free: Mapping[str, float]  # label-free scores by name
    balances: Mapping[str, float]  # accuracy of the heads of each balance, merged by themselves
    seconds: float  # from neighbor lists to classifier


# --- data ----------------------------------------------------------------------------------------


def long_tail(codes: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Sorted rows of a subset whose class sizes fall geometrically, the last 1 / ratio of the
    first. codes: int [N], -1 for no label. Which class is large is drawn by the seed."""
    generator = np.random.default_rng(seed)
    classes = generator.permutation(int(codes.max()) + 1)
    full = int(np.bincount(codes[codes >= 0]).min())
    kept = []
    for place, one in enumerate(classes):
        size = round(full * ratio ** (-place / max(1, len(classes) - 1)))
        kept.append(generator.choice(np.flatnonzero(codes == one), size, replace=False))
    return np.sort(np.concatenate(kept))


def some_classes(codes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows of `count` random classes, drawn by that number, and their codes from 0 on."""
    drawn = np.random.default_rng(count).permutation(int(codes.max()) + 1)[:count]
    rows = np.flatnonzero(np.isin(codes, drawn))
    return rows, np.unique(codes[rows], return_inverse=True)[1].astype(np.int64)


def choices(source: str | None) -> tuple[list[str], list[int]]:
    """The settings of a space, as KEY=VALUE, and its seeds. None: only the defaults."""
    if source is None:
        return [], [0, 1, 2]
    described = spaces.describe(spaces.load(source)[0])
    seeds = described.pop("seed", {"choices": [0, 1, 2]})["choices"]
    pairs = [(key, value) for key, one in described.items() for value in one["choices"]]
    return [f"{key}={json.dumps(value)}" for key, value in pairs], seeds


# --- trials --------------------------------------------------------------------------------------


def measure(
    embeddings: np.ndarray,
    codes: np.ndarray,
    settings: Sequence[str],
    overrides: Sequence[str],
    seeds: Sequence[int],
    by_balance: bool,
    say: Say,
) -> list[Trial]:
    """The defaults, then each setting; of each, all seeds. float16 [N, D], unit rows; int [N].

    by_balance: also merge the heads of each balance by themselves.
    """
    work = _Work(embeddings, codes, overrides, default_device(), ranked=bool(settings))
    trials = []
    for setting in (DEFAULTS, *settings):
        for seed in seeds:
            trials.append(work.trial(setting, seed, by_balance))
            true = " ".join(f"{name} {100 * of:.1f}" for name, of in trials[-1].true.items())
            say(f"{setting}, seed {seed}: {true}, {trials[-1].seconds:.0f} s")
    return trials


class _Work:
    """Data and what trials share: the neighbor lists, and the spaces silhouettes are taken in."""

    def __init__(
        self,
        x: np.ndarray,
        codes: np.ndarray,
        overrides: Sequence[str],
        device: torch.device,
        ranked: bool,
    ) -> None:
        self.x, self.codes, self.overrides, self.device = x, codes, list(overrides), device
        self._lists: dict[str, Lists] = {}
        self.near = self.lists(self.config(DEFAULTS, 0))[0]  # the same for all scores
        self.rows = sample_rows(len(x), PLANE_ROWS, 0)
        self.spaces = dict(_spaces(np.asarray(x[self.rows]))) if ranked else {}

    def config(self, setting: str, seed: int, *more: str) -> Config:
        """The defaults with a setting ("defaults": none), a seed, and more settings."""
        tree = {"num_classes": int(self.codes.max()) + 1, "data": {"embeddings": "in memory"}}
        changed = [] if setting == DEFAULTS else [setting]
        return configs.load(tree, [*self.overrides, *changed, f"seed={seed}", *more])

    def lists(self, config: Config) -> Lists:
        """The neighbors that a config searches; those of equal settings are searched once."""
        chosen = config.neighbors
        key = f"{chosen.pca} {chosen.max_neighbors} {chosen.search} {chosen.nprobe}"
        if key not in self._lists:
            self._lists[key] = method.search(self.x, config, self.device)
        return self._lists[key]

    def trial(self, setting: str, seed: int, by_balance: bool) -> Trial:
        """Train, merge and classify; then compare with the truth."""
        config = self.config(setting, seed)
        ids, similarity = self.lists(config)
        began = time.perf_counter()
        counts = method.select(ids, similarity, config).counts
        heads = method.train_heads(self.x, ids, counts, config, self.device)
        merged = method.merge(heads, ids, config, self.device)
        model, _ = method.train_classifier(
            self.x, merged.labels, merged.confidence, config, self.device
        )
        seconds = time.perf_counter() - began
        balances = dict(self._balances(setting, seed, heads, ids)) if by_balance else {}
        known = self.codes >= 0
        codes, labels = self.codes[known], np.asarray(merged.labels)[known]
        each = [truth.accuracy(codes, heads[known, one]) for one in merged.info["kept"]]
        matched = truth.matching(codes, labels).cluster_class[labels] == codes
        trust = truth.calibration(merged.confidence[known], matched)
        true = {
            "consensus": truth.accuracy(codes, labels),
            "classifier": truth.accuracy(codes, method.predict(model, self.x)[0][known]),
            "heads": statistics.mean(each),
            "best head": max(each),
            "nmi": truth.nmi(codes, labels),
            "ranking": math.nan if trust["ranking"] is None else trust["ranking"],
            "gap": trust["error"],
        }
        return Trial(setting, seed, true, self._scores(config, merged, heads), balances, seconds)

    def _balances(
        self, setting: str, seed: int, heads: np.ndarray, ids: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        config, known = self.config(setting, seed), self.codes >= 0
        clusters = config.head_clusters
        of_each = [config.heads.balance_of(head, clusters) for head in range(heads.shape[1])]
        for balance in sorted(set(of_each), reverse=True):
            mine = heads[:, [one == balance for one in of_each]]
            only = self.config(setting, seed, f"heads.balance={balance}")
            labels = np.asarray(method.merge(mine, ids, only, self.device).labels)
            yield f"balance {balance:g}", truth.accuracy(self.codes[known], labels[known])

    def _scores(self, config: Config, merged: Any, heads: np.ndarray) -> dict[str, float]:
        from sklearn.metrics import silhouette_score

        found = labelfree.score(
            labelfree.SCORES,
            clusters=merged.labels,
            num_clusters=config.num_classes,
            assignments=heads[:, merged.info["kept"]],
            ids=self.near,
            features=self.x,
            seed=0,
        )
        mine = np.asarray(merged.labels)[self.rows]
        for name, matrix in self.spaces.items():
            found[f"silhouette, {name}"] = float(silhouette_score(matrix, mine))
        return found


def _spaces(x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Where a silhouette is measured (Lowe et al. 2024, arXiv 2406.02465, in UMAP's space)."""
    yield "features", np.asarray(x, np.float32)
    near = layout.neighbors_of_sample(x, 256, 0)
    yield "t-SNE", layout.coordinates(*near, x, 0)
    if importlib.util.find_spec("umap") is not None:
        import umap

        yield "UMAP", umap.UMAP(random_state=0, **UMAP).fit_transform(np.asarray(x, np.float32))


# --- tables --------------------------------------------------------------------------------------


def _by_setting(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    names = dict.fromkeys(trial.setting for trial in trials)
    return {name: [trial for trial in trials if trial.setting == name] for name in names}


def table(trials: Sequence[Trial]) -> str:
    """A line for each setting: mean and deviation over seeds. Percent and seconds."""
    columns, balances = list(trials[0].true), list(trials[0].balances)
    lines = []
    for name, mine in _by_setting(trials).items():
        cells = [spread([100 * trial.true[one] for trial in mine]) for one in columns]
        cells += [spread([100 * trial.balances[one] for trial in mine]) for one in balances]
        lines.append([name, *cells, f"{statistics.mean(trial.seconds for trial in mine):.0f}"])
    return markdown(["setting", *columns, *balances, "s"], lines)


def correlations(trials: Sequence[Trial]) -> dict[str, dict[str, float | None]]:
    """Spearman's rank correlation of each score with the consensus' accuracy over the settings
    (means of the seeds): over all, and over those of the neighbors, heads or consensus."""
    groups = _by_setting(trials)
    found: dict[str, dict[str, float | None]] = {}
    for score in trials[0].free:
        points = {
            name: (
                statistics.mean(trial.free[score] for trial in mine),
                statistics.mean(trial.true["consensus"] for trial in mine),
            )
            for name, mine in groups.items()
        }
        found[score] = {"all": spearman(list(points.values()))}
        for part in ("neighbors", "heads", "consensus"):
            chosen = [p for name, p in points.items() if name.startswith((part, DEFAULTS))]
            found[score][part] = spearman(chosen)
    return dict(sorted(found.items(), key=lambda one: -(one[1]["all"] or 0)))


def correlation_table(trials: Sequence[Trial]) -> str:
    """A line for each score."""
    found = correlations(trials)
    parts = ("all", "neighbors", "heads", "consensus")
    lines = [
        [
            name.replace("_", " "),
            *("-" if one[part] is None else f"{one[part]:+.2f}" for part in parts),
        ]
        for name, one in found.items()
    ]
    head = [f"all {len(_by_setting(trials))} settings", *(f"of {part}" for part in parts[1:])]
    return markdown(["score", *head], lines)
