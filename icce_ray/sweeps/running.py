"""Hyperparameter sweeps without labels: many clusterings, ranked by a label-free score.

    from icce_ray import config
    from icce_ray.sweeps import running
    running.run(config.load("fashion-mnist"), "ensemble")

What trials share is made once (see store.py), in phases: index, embeddings, searches and selections
in the driver; head trainings with Ray Tune; ensembles and their scores with Ray Tune; the ranking.
Every result is written as soon as it is there, in

    RUN/sweeps/NAME/  results.json  best.yaml  log  status.json  report/index.html
                      trials/ID.json    heads/FINGERPRINT.json    best-ID/ (a run of its own)
    RUN/store/        artifacts by fingerprint

so the same command resumes after a crash, and one with more trials extends the sweep. Ground truth
is looked at once the ranking is final, to be shown beside it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.config.schema import Config
from icce_ray.core.evaluation.labelfree import ACROSS_CLUSTERS, SCORES
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ArtifactError, StageError
from icce_ray.rundir.directory import RunDirectory, Snapshot, differing_keys
from icce_ray.rundir.progress import Reporter
from icce_ray.stages.base import Context
from icce_ray.sweeps import space
from icce_ray.sweeps.phases import make_ensembles, prepare, stopped_at, train_heads
from icce_ray.sweeps.results import add_accuracy, collect, rank, write_best
from icce_ray.sweeps.space import Draws
from icce_ray.sweeps.trials import CHAIN, SWEEPS, Sweep, groups, make_trials

NOUNS = {
    "embed": ("embedding", "embeddings"),
    "search": ("neighbor search", "neighbor searches"),
    "select": ("selection", "selections"),
    "heads": ("head training", "head trainings"),
    "consensus": ("ensemble", "ensembles"),
}


def run(
    config: Config,
    source: str | tuple[str, Mapping[str, Any]],
    *,
    overwrite: bool = False,
    plan_only: bool = False,
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Do a sweep and return the content of results.json; None where only the plan was asked for.

    Args:
        config: the settings that trials do not vary; run_dir is where the sweep goes.
        source: a golden space's name, a YAML file, or a name and the content of one.
        overwrite: forget this sweep's results. Artifacts in the store are used all the same: they
            are found by all that they depend on.

    Raises:
        ConfigError, DataError, ArtifactError: for what is wrong before anything is started.
        StageError: where no trial succeeded, or what all trials need failed.
    """
    chosen, name = space.load(source)
    draws = space.draw(chosen, config.model_dump(mode="json"), config.seed)
    directory = RunDirectory(config.run_dir)
    own = RunDirectory(f"{directory.uri}/{SWEEPS}/{name}")
    tracking = pipeline.tracking_of(config, own, space=space.describe(chosen))
    reporter = Reporter(own, quiet, tracking=tracking)
    wide = config.heads.num_workers not in (None, 0)
    cluster = Cluster(config.ray, dashboard=wide)
    snapshot = Snapshot()
    trials = make_trials(config, draws, directory, snapshot)
    for group in groups(trials, "embed").values():
        pipeline.preflight(group[0].config, snapshot=snapshot)
    context = Context(config, directory, reporter, cluster)
    sweep = Sweep(name, chosen, config, directory, trials, context, snapshot)
    if not overwrite:
        _check_same(sweep)
    for line in plan_lines(sweep, draws):
        reporter.say(line, log=not plan_only)
    if plan_only:
        return None
    with pipeline.running(directory, reporter, cluster):
        if overwrite:
            sweep.records.delete()
        return _run_phases(sweep)


def _run_phases(sweep: Sweep) -> dict[str, Any]:
    started = time.monotonic()
    reporter = sweep.context.reporter
    base = {"config": configs.settings(sweep.config), "objective": sweep.space.objective}
    sweep.run.write_json(base, sweep.folder, "sweep.json")
    made = {NOUNS[name][1]: n["total"] - n["there"] for name, n in counts(sweep).items()}
    for trial in sweep.trials:
        steps = sweep.steps(trial)
        trial.reused = [name for name in CHAIN if steps[name].state == "done"]
    phases = {"prepare": prepare, "heads": train_heads, "ensembles": make_ensembles}
    for name, phase in phases.items():
        reporter.stage = name
        phase(sweep)
    reporter.stage = ""
    ranked = rank(sweep)
    if not ranked:
        raise StageError(_all_failed(sweep))
    add_accuracy(sweep)
    for trial in ranked:
        reporter.trial(trial.id, trial.settings, {**trial.scores, **(trial.accuracy or {})})
    results = collect(sweep, ranked, made, time.monotonic() - started)
    results["best_config"] = write_best(sweep, ranked[0])
    sweep.run.write_json(results, sweep.folder, "results.json")
    from icce_ray.report import sweep_page as sweep_report

    results["report"] = sweep_report.build(sweep.run, sweep.folder)
    return results


def _check_same(sweep: Sweep) -> None:
    """Refuse to mix results of other settings into one sweep."""
    if not sweep.run.exists(sweep.folder, "sweep.json"):
        return
    old = sweep.run.read_json(sweep.folder, "sweep.json")["config"]
    keys = differing_keys(old, configs.settings(sweep.config))
    if keys:
        lines = "\n  ".join(keys)
        raise ArtifactError(
            f"the sweep {sweep.name} in {sweep.run.uri} was made with other settings:\n  {lines}\n"
            "Add --overwrite to replace its results, copy the space file to another name, or "
            "choose another run_dir=..."
        )


def _all_failed(sweep: Sweep) -> str:
    failed = [trial for trial in sweep.trials if trial.state == "failed"]
    if not failed:
        return f"all {len(sweep.trials)} trials were stopped early; set early_stop: false"
    return (
        f"no trial succeeded ({len(failed)} of {len(sweep.trials)} failed). The first, "
        f"{space.show(failed[0].settings)}: {failed[0].error}"
    )


# --- the plan ------------------------------------------------------------------------------------


def counts(sweep: Sweep) -> dict[str, dict[str, int]]:
    """How many of each a sweep needs, and how many of those are there, by stage name."""
    steps = {trial.id: sweep.steps(trial) for trial in sweep.trials}
    counted = {}
    for name in NOUNS:
        firsts = [group[0] for group in groups(sweep.trials, name).values()]
        there = [trial for trial in firsts if steps[trial.id][name].state == "done"]
        if name == "heads":  # those that were stopped early are not trained again either
            rest = [trial for trial in firsts if trial not in there]
            there += [trial for trial in rest if stopped_at(sweep, trial) is not None]
        counted[name] = {"total": len(firsts), "there": len(there)}
    return counted


def plan_lines(sweep: Sweep, draws: Draws) -> list[str]:
    """What will happen, for a person."""
    counted = counts(sweep)
    parts = [f"{counted[n]['total']} {NOUNS[n][counted[n]['total'] != 1]}" for n in NOUNS]
    total = len(sweep.trials)
    lines = [f"sweep {sweep.name}: {total} trial{'s' * (total != 1)}: {', '.join(parts)}"]
    there = [
        f"{counted[n]['there']} of {counted[n]['total']} {NOUNS[n][counted[n]['total'] != 1]}"
        for n in NOUNS
        if counted[n]["there"]
    ]
    if there:
        lines.append(f"already there: {', '.join(there)}")
    lines.append(f"objective: {sweep.space.objective}, {SCORES[sweep.space.objective]}")
    if draws.dropped:
        lines.append(f"left out: {draws.dropped} combinations that are not valid ({draws.why})")
    if sweep.space.search == "random" and total < sweep.space.trials:
        lines.append(f"the space has only {total} valid combinations, fewer than trials asks for")
    several = len({trial.config.num_classes for trial in sweep.trials}) > 1
    if several and sweep.space.objective not in ACROSS_CLUSTERS:
        lines.append(
            "! num_classes differs between trials: this score favors fewer classes, so compare "
            f"trials of equal num_classes, or take objective: {ACROSS_CLUSTERS[0]}"
        )
    if len(groups(sweep.trials, "embed")) > 1:
        lines.append(
            "! embeddings differ between trials, and each is judged by its own neighbors: compare "
            "trials of equal embeddings"
        )
    return lines
