"""The results of a sweep: the ranking, results.json, best.yaml, and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from icce_ray import config as configs
from icce_ray.config import loading
from icce_ray.core.evaluation import truth as metrics
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import duration
from icce_ray.stages import evaluate
from icce_ray.sweeps import space, store
from icce_ray.sweeps.trials import CHAIN, STAGES, Sweep, Trial, groups

TABLE_ROWS = 15


def rank(sweep: Sweep) -> list[Trial]:
    """Finished trials, best first. Looks only at label-free scores; ties keep the drawn order."""
    name = sweep.space.objective
    done = [t for t in sweep.trials if t.state == "done" and math.isfinite(t.scores[name])]
    return sorted(done, key=lambda trial: -trial.scores[name])


def add_accuracy(sweep: Sweep) -> None:
    """Where there is ground truth, how well each trial meets it. Called after the ranking."""
    done = [trial for trial in sweep.trials if trial.state == "done"]
    for group in groups(done, "consensus").values():
        view = group[0].view
        ids = view.matrix("embeddings", "image_id")
        known = evaluate.truth(group[0].config, view, np.asarray(ids))
        if known is None:
            return
        clusters = view.read_table("consensus", columns=["cluster"])["cluster"].to_numpy()
        scores = metrics.scores(known.codes[known.known], clusters[known.known])
        merged = evaluate.merged_heads(view, view.matrix("heads", "assignments"))
        single = evaluate.accuracy_of_heads(merged[known.known], known.codes[known.known])
        accuracy = {name: float(scores[name]) for name in ("acc", "nmi", "ari")}
        accuracy |= {name: single[name] for name in ("acc_mean", "acc_best")}
        for trial in group:
            trial.accuracy = accuracy


def collect(
    sweep: Sweep, ranked: Sequence[Trial], made: Mapping[str, int], seconds: float
) -> dict[str, Any]:
    """The content of results.json: trials best first, then those without a score."""
    places = {trial.id: place for place, trial in enumerate(ranked)}
    order = sorted(sweep.trials, key=lambda trial: places.get(trial.id, len(ranked)))
    states = [trial.state for trial in sweep.trials]
    return {
        "name": sweep.name,
        "config": configs.settings(sweep.config),
        "objective": sweep.space.objective,
        "space": space.describe(sweep.space),
        "trials": [_plain(trial) for trial in order],
        "best": ranked[0].id,
        "seconds": round(seconds, 3),
        "counts": {
            **{s: states.count(s) for s in ("done", "stopped", "failed")},
            "made": dict(made),
        },
    }


def _plain(trial: Trial) -> dict[str, Any]:
    names = ("id", "settings", "state", "scores", "seconds", "reused", "stopped_at", "accuracy")
    return {**{name: getattr(trial, name) for name in names}, "error": trial.error}


def write_best(sweep: Sweep, best: Trial) -> str:
    """Write best.yaml, whose run already has the trial's artifacts. Returns its path."""
    name = f"{sweep.folder}/best-{best.id}"
    target = RunDirectory(f"{sweep.run.uri}/{name}")
    store.place_copies(best.view, [STAGES[stage].folder for stage in CHAIN], target)
    config = best.config.model_copy(update={"run_dir": target.uri})
    value = best.scores[sweep.space.objective]
    lines = [
        f"# The best of {len(sweep.trials)} trials of the sweep {sweep.name}: "
        f"{sweep.space.objective} {value:.4f}, a label-free score.",
        *(f"#   {key}: {loading.scalar(given)}" for key, given in best.settings.items()),
        "# What the sweep made is in run_dir: `icce-ray run` of this file resumes there.",
    ]
    text = "\n".join(lines) + "\n\n" + configs.to_yaml(config)
    sweep.run.write_bytes(text.encode(), sweep.folder, "best.yaml")
    return sweep.run.address(sweep.folder, "best.yaml")


def show(results: Mapping[str, Any], console: Console) -> None:
    """The ranked table, and where the report and the best config are."""
    trials, objective = results["trials"], results["objective"]
    labeled = any(trial["accuracy"] for trial in trials)
    keys = list(results["space"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", objective, *(["accuracy"] if labeled else []), *keys):
        table.add_column(title, justify="right" if title in (objective, "accuracy") else "left")
    done = [trial for trial in trials if trial["state"] == "done"]
    for place, trial in enumerate(done[:TABLE_ROWS], 1):
        accuracy = [f"{100 * trial['accuracy']['acc']:.1f} %"] if trial["accuracy"] else []
        values = [str(trial["settings"][key]) for key in keys]
        table.add_row(str(place), f"{trial['scores'][objective]:.4f}", *accuracy, *values)
    console.print(table)
    for line in _closing(results):
        console.print(line, markup=False)


def _closing(results: Mapping[str, Any]) -> Iterator[str]:
    counted = results["counts"]
    rest = counted["done"] - TABLE_ROWS
    if rest > 0:
        yield f"and {rest} more, all in the report"
    if counted["stopped"]:
        yield f"{counted['stopped']} trials stopped early, behind the others"
    failed = [trial for trial in results["trials"] if trial["state"] == "failed"]
    if failed:
        reason = failed[0]["error"].splitlines()[0]
        trials = f"{len(failed)} trial{'s' * (len(failed) != 1)}"
        yield f"{trials} failed, for example {failed[0]['id']}: {reason}"
        yield "the same command tries those again"
    yield f"report    {results['report']}"
    yield f"best      {results['best_config']}"
    yield f"time      {duration(results['seconds'])}"
