"""TODO"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from icce_ray import config as configs
from icce_ray import pipeline
from icce_ray.config.schema import Config
from icce_ray.core.evaluation.labelfree import ACROSS_CLUSTERS, SCORES, score
from icce_ray.core.heads.trainer import default_steps
from icce_ray.distributed import train as training
from icce_ray.distributed import tune as tuning
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.tune import Ended, Placement, Report, Share, Silent
from icce_ray.errors import ArtifactError, IcceError, StageError
from icce_ray.rundir.directory import RunDirectory, differing_keys
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import heads
from icce_ray.stages import search as neighbors
from icce_ray.stages.base import Context, Size
from icce_ray.sweeps import space
from icce_ray.sweeps.results import _results, _write_best, add_accuracy, rank
from icce_ray.sweeps.space import Draws
from icce_ray.sweeps.store import View
from icce_ray.sweeps.trials import (
    CHAIN,
    FEWEST,
    NEAREST,
    RELEASE_AFTER,
    STAGES,
    SWEEPS,
    Sweep,
    Trial,
    groups,
    is_done,
    list_print,
    make_trials,
    step_of,
)


def counts(sweep: Sweep) -> dict[str, dict[str, int]]:
    """How many of each a sweep needs, and how many of those are there."""
    found = {}
    for name in CHAIN[1:]:
        each = [group[0] for group in groups(sweep.trials, name).values()]
        there = [t for t in each if is_done(t, name)]
        if name == "heads":
            there += [t for t in each if t not in there and stopped_at(sweep, t) is not None]
        found[name] = {"total": len(each), "there": len(there)}
    each = [group[0] for group in by_place(sweep.trials, neighbors.TOP).values()]
    there = [trial for trial in each if lists_done(trial, neighbors.TOP)]
    found["search"] = {"total": len(each), "there": len(there)}
    return found


NOUNS = {
    "embed": ("embedding", "embeddings"),
    "search": ("neighbor search", "neighbor searches"),
    "neighbors": ("selection", "selections"),
    "heads": ("head training", "head trainings"),
    "consensus": ("ensemble", "ensembles"),
}


def plan_lines(sweep: Sweep, draws: Draws) -> list[str]:
    """What will happen, for a person."""
    found = counts(sweep)
    parts = [f"{found[n]['total']} {NOUNS[n][found[n]['total'] != 1]}" for n in NOUNS]
    total = len(sweep.trials)
    lines = [f"sweep {sweep.name}: {total} trial{'s' * (total != 1)}: {', '.join(parts)}"]
    there = [
        f"{found[n]['there']} of {found[n]['total']} {NOUNS[n][found[n]['total'] != 1]}"
        for n in NOUNS
        if found[n]["there"]
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
    chosen, name = space.load(source, list(SCORES))
    draws = space.draw(chosen, config.model_dump(mode="json"), config.seed)
    directory = RunDirectory(config.run_dir)
    reporter = Reporter(RunDirectory(f"{directory.uri}/{SWEEPS}/{name}"), quiet)
    wide = config.heads.num_workers not in (None, 0)
    cluster = Cluster(config.ray, dashboard=wide)
    trials = make_trials(config, draws, directory)
    for group in groups(trials, "embed").values():
        pipeline.preflight(group[0].config)
    context = Context(config, directory, reporter, cluster)
    sweep = Sweep(name, chosen, config, directory, trials, context)
    if not overwrite:
        _check_same(sweep)
    for line in plan_lines(sweep, draws):
        reporter.say(line, log=not plan_only)
    if plan_only:
        return None
    with pipeline.exclusive(directory), pipeline.terminable():
        return _guarded(sweep, overwrite)


def _guarded(sweep: Sweep, overwrite: bool) -> dict[str, Any]:
    """Run the phases; whatever ends them is said in the log and in status.json."""
    reporter = sweep.context.reporter
    try:
        if overwrite:
            for folder in ("trials", "heads"):
                sweep.run.delete(f"{sweep.folder}/{folder}")
        return _run_phases(sweep)
    except (KeyboardInterrupt, SystemExit):
        reporter.say("stopped; the same command goes on from here")
        reporter.status("stopped")
        raise
    except IcceError as error:
        reporter.status("failed", error=str(error))
        reporter._log(f"error: {error}")
        raise
    finally:
        sweep.context.cluster.stop()
        reporter.flush()


def _run_phases(sweep: Sweep) -> dict[str, Any]:
    started = time.monotonic()
    reporter = sweep.context.reporter
    reporter.status("running")
    base = {"config": configs.settings(sweep.config), "objective": sweep.space.objective}
    sweep.run.write_json(base, sweep.folder, "sweep.json")
    made = {
        NOUNS[name][1]: found["total"] - found["there"] for name, found in counts(sweep).items()
    }
    for trial in sweep.trials:
        trial.reused = [name for name in CHAIN if is_done(trial, name)]
    for name, phase in (("prepare", prepare), ("heads", train_heads), ("ensembles", ensembles)):
        reporter.stage = name
        phase(sweep)
    reporter.stage = ""
    ranked = rank(sweep)
    if not ranked:
        raise StageError(_all_failed(sweep))
    add_accuracy(sweep)
    results = _results(sweep, ranked, made, time.monotonic() - started)
    results["best_config"] = _write_best(sweep, ranked[0])
    sweep.run.write_json(results, sweep.folder, "results.json")
    from icce_ray.report import sweep_page as sweep_report

    results["report"] = sweep_report.build(sweep.run, sweep.folder)
    reporter.status("done")
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


def prepare(sweep: Sweep) -> None:
    """Index, embeddings, neighbor lists and selections, each distinct one once."""
    for name in ("index", "embed"):
        for group in groups(sweep.alive(), name).values():
            _for_all(sweep, group, partial(_run_stage, sweep, group[0], name))
    for group in by_place(sweep.alive(), neighbors.TOP).values():
        _for_all(sweep, group, partial(_make_lists, sweep, group))
    for group in by_place(sweep.alive(), neighbors.NEAREST).values():
        _for_all(sweep, group, partial(_make_nearest, group[0]))
    todo = [
        group
        for group in groups(sweep.alive(), "neighbors").values()
        if not is_done(group[0], "neighbors")
    ]
    if not todo:
        return
    with sweep.context.reporter.bar("selections", len(todo)) as bar:
        for number, group in enumerate(todo, 1):
            quiet = Silent(sweep.run)
            _for_all(sweep, group, partial(_run_stage, sweep, group[0], "neighbors", quiet))
            bar.update(number)


def _for_all(sweep: Sweep, group: Sequence[Trial], work: Callable[[], None]) -> None:
    """Do what the trials of a group need; where all trials need it, its error ends the sweep."""
    try:
        work()
    except IcceError as error:
        if len(group) == len(sweep.trials):
            raise
        for trial in group:
            trial.fail(str(error))


def _run_stage(sweep: Sweep, trial: Trial, name: str, reporter: Reporter | None = None) -> None:
    step = step_of(trial, name)
    if step.state == "done":
        return
    chosen = reporter or sweep.context.reporter
    context = Context(trial.config, trial.view, chosen, sweep.context.cluster)
    pipeline.run_stage(context, step)


def by_place(trials: Sequence[Trial], folder: str) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.view.places[folder], []).append(trial)
    return found


def lists_done(trial: Trial, folder: str) -> bool:
    """Whether shared lists are there, and made from the embeddings that are there now."""
    kept, embedded = trial.view.manifest(folder), trial.view.manifest("embeddings")
    return kept is not None and embedded is not None and kept.inputs.get("embed") == embedded.id


def _make_lists(sweep: Sweep, group: Sequence[Trial]) -> None:
    trial = group[0]
    if lists_done(trial, neighbors.TOP):
        return
    most = int(trial.view.places[neighbors.TOP].rpartition("-")[2])
    print_ = list_print(trial.config, trial.prints)
    if _own_lists_serve(sweep.run, trial, most):
        neighbors.take_kept(trial.view, sweep.run, print_)
        return
    context = Context(trial.config, trial.view, sweep.context.reporter, sweep.context.cluster)
    neighbors.search_kept(context, print_, most)


def _own_lists_serve(run: RunDirectory, trial: Trial, most: int) -> bool:
    """Whether the run's own neighbors hold, best first, what a search would find."""
    done, embedded = run.manifest("neighbors"), trial.view.manifest("embeddings")
    if done is None or embedded is None or done.inputs.get("embed") != embedded.id:
        return False
    old, new = done.settings["neighbors"], trial.config.neighbors
    same = all(old.get(name) == getattr(new, name) for name in neighbors.SEARCHED)
    return same and min(old["max_neighbors"], done.rows - 1) >= min(most, done.rows - 1)


def _make_nearest(trial: Trial) -> None:
    if not lists_done(trial, neighbors.NEAREST):
        neighbors.write_nearest(trial.view, trial.prints["embed"], NEAREST)


@dataclass(frozen=True)
class HeadWork:
    """What a head trial is sent."""

    trials: Mapping[str, tuple[Config, View]]  # by fingerprint of the heads
    folder: str
    parts: int  # trials at once
    threads: int | None  # of torch, where the training is in the trial's own process


def train_heads(sweep: Sweep) -> None:
    """Train each distinct heads config that is not there yet, side by side."""
    missing = {
        print_: group
        for print_, group in groups(sweep.alive(), "heads").items()
        if not is_done(group[0], "heads")
    }
    todo = {p: group for p, group in missing.items() if stopped_at(sweep, group[0]) is None}
    if len(todo) == 1:
        (group,) = todo.values()
        _for_all(sweep, group, partial(_run_stage, sweep, group[0], "heads"))
    elif todo:
        _search_heads(sweep, {print_: group[0] for print_, group in todo.items()})
    for group in missing.values():
        _take_heads(sweep, group)


def _search_heads(sweep: Sweep, todo: Mapping[str, Trial]) -> None:
    for print_ in todo:  # a failure of last time is tried again
        if sweep.run.exists(sweep.folder, "heads", f"{print_}.json"):
            sweep.run.write_json({"state": "open"}, sweep.folder, "heads", f"{print_}.json")
    placement, parts = _place_heads(sweep, list(todo.values()))
    first = next(iter(todo.values())).config
    alone = not first.heads.num_workers
    work = HeadWork(
        {print_: (_alone(t.config), t.view) for print_, t in todo.items()},
        sweep.folder,
        parts,
        max(1, int(placement.cpus)) if alone else None,
    )
    tuning.search(
        sweep.context,
        f"{sweep.folder}/tune",
        partial(_train, work),
        list(todo),
        placement,
        title="heads",
        unit="trainings",
        early_stop=sweep.space.early_stop and len(todo) >= FEWEST,
        on_end=partial(_end_of_heads, sweep, todo),
    )


def _alone(config: Config) -> Config:
    """heads.num_workers=0 where the settings name none: the trial itself is the worker."""
    if config.heads.num_workers is not None:
        return config
    return config.model_copy(update={"heads": config.heads.model_copy(update={"num_workers": 0})})


def _place_heads(sweep: Sweep, trials: Sequence[Trial]) -> tuple[Placement, int]:
    """What each training holds, and how many go on at once: as many as cores or GPUs carry."""
    cluster, config = sweep.context.cluster, sweep.config.heads
    have, gpus = cluster.resources(), cluster.gpus_each(config.num_gpus)
    wanted = min(len(trials), sweep.space.concurrent or len(trials))
    workers = config.num_workers or 0
    if workers:
        carried = max(1, int(have.gpus // (workers * gpus))) if gpus else sweep.space.concurrent
        parts = min(wanted, carried or 1)
        return Placement(0, 0, parts), parts if not gpus else 1
    if gpus:
        return Placement(1, gpus, wanted), 1
    size = Size(_rows(trials[0]), None)
    memory = max(heads.STAGE.estimate(t.config, size, cluster).memory for t in trials)
    fit = max(1, int(have.memory // memory)) if have.memory and memory else wanted
    parts = max(1, min(wanted, max(1, have.cpus), fit))
    return Placement(cluster.cpus_each(parts, 0) if parts > 1 else _largest(have.each), 0, parts), 1


def _largest(each: Sequence[tuple[float, float]]) -> int:
    return max(1, *(int(cpus) for cpus, _ in each)) if each else 1


def _rows(trial: Trial) -> int | None:
    done = trial.view.manifest("embeddings")
    return done.rows if done else None


def _train(work: HeadWork, print_: str, report: Report) -> None:
    """In the trial's process: the normal heads stage. An error is written down, not raised."""
    import torch

    if work.threads:
        torch.set_num_threads(work.threads)
    config, view = work.trials[print_]
    steps = config.heads.steps or default_steps(config.head_clusters)

    def on_progress(step: int, value: float) -> None:
        report(min(tuning.NEARLY_DONE, tuning.DONE * step / steps), value)

    context = Context(
        config,
        view,
        Silent(view),
        Share(config.ray, work.parts),
        in_process=config.heads.num_workers == 0,
        on_progress=on_progress,
    )
    try:
        made = pipeline.make_steps(config, view, CHAIN)
        step = next(step for step in made if step.stage.name == "heads")
        if step.state != "done":
            pipeline.run_stage(context, step)
    except Exception as error:
        content = {"state": "failed", "error": _reason(error)}
        view.write_json(content, work.folder, "heads", f"{print_}.json")


def _reason(error: Exception) -> str:
    if isinstance(error, IcceError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()[-2000:]


def _end_of_heads(sweep: Sweep, todo: Mapping[str, Trial], ended: Ended) -> str:
    """Write down at once how a training ended, so that a killed sweep knows."""
    name = (sweep.folder, "heads", f"{ended.name}.json")
    if ended.error is not None:
        sweep.run.write_json({"state": "failed", "error": ended.error}, *name)
        return "failed"
    if todo[ended.name].view.manifest(heads.FOLDER) is not None:
        return "done"
    if _head_record(sweep, ended.name).get("state") == "failed":
        return "failed"
    # Not at once: a training whose driver still lives would start its workers again.
    view = todo[ended.name].view
    timer = threading.Timer(RELEASE_AFTER, training.release, (view, heads.FOLDER))
    timer.daemon = True
    timer.start()
    content = {"state": "stopped", "percent": ended.percent, "score": ended.score}
    sweep.run.write_json(content, *name)
    return "stopped early"


def _head_record(sweep: Sweep, print_: str) -> dict[str, Any]:
    if not sweep.run.exists(sweep.folder, "heads", f"{print_}.json"):
        return {}
    return sweep.run.read_json(sweep.folder, "heads", f"{print_}.json")


def stopped_at(sweep: Sweep, trial: Trial) -> float | None:
    """At which percent this sweep stopped the trial's heads early, if it did."""
    record = _head_record(sweep, trial.prints["heads"]) if sweep.space.early_stop else {}
    return record.get("percent") if record.get("state") == "stopped" else None


def _take_heads(sweep: Sweep, group: Sequence[Trial]) -> None:
    """Note for all trials of a group how their heads came out."""
    if is_done(group[0], "heads"):
        return
    record, percent = _head_record(sweep, group[0].prints["heads"]), stopped_at(sweep, group[0])
    for trial in group:
        if trial.state == "failed":
            continue
        if percent is not None:
            trial.state, trial.stopped_at = "stopped", percent
        else:
            trial.fail(record.get("error") or "the heads were not trained")


@dataclass(frozen=True)
class EnsembleWork:
    """What an ensemble trial is sent."""

    trials: Mapping[str, Sequence[Trial]]  # by fingerprint of the consensus
    folder: str


def ensembles(sweep: Sweep) -> None:
    """Consensus and scores of every trial whose heads are there."""
    found = groups(sweep.alive(), "consensus")
    todo = {p: group for p, group in found.items() if not all(_load(sweep, t) for t in group)}
    if todo:
        tuning.search(
            sweep.context,
            f"{sweep.folder}/tune",
            partial(_solve, EnsembleWork(todo, sweep.folder)),
            list(todo),
            _place_ensembles(sweep, [group[0] for group in todo.values()]),
            title="ensembles",
            unit="trials",
            early_stop=False,
            on_end=partial(_end_of_ensemble, sweep, todo),
        )
    for group in todo.values():
        for trial in group:
            if not _load(sweep, trial) and trial.state == "open":
                trial.fail(trial.error or "its process was lost")


def _place_ensembles(sweep: Sweep, trials: Sequence[Trial]) -> Placement:
    cluster, wanted = sweep.context.cluster, sweep.space.concurrent or len(trials)
    have, size = cluster.resources(), Size(_rows(trials[0]), None)
    stage = STAGES["consensus"]
    memory = max(stage.estimate(t.config, size, cluster).memory for t in trials)
    fit = max(1, int(have.memory // memory)) if have.memory and memory else wanted
    return Placement(1, 0, min(wanted, fit, len(trials)), reuse=True)


def _solve(work: EnsembleWork, print_: str, report: Report) -> None:
    """In the trial's process: consensus, scores, and a record for each trial that shares them."""
    import torch

    torch.set_num_threads(1)
    group = work.trials[print_]
    try:
        scores, seconds = _consensus(group[0])
        content: dict[str, Any] = {"state": "done", "scores": scores, "seconds": seconds}
    except Exception as error:
        content = {"state": "failed", "error": _reason(error)}
    for trial in group:
        record = {"id": trial.id, "settings": trial.settings, **content}
        record |= {"prints": dict(trial.prints), "reused": trial.reused}
        trial.view.write_json(record, work.folder, "trials", f"{trial.id}.json")


def _consensus(trial: Trial) -> tuple[dict[str, float], float]:
    """All scores of a trial, and the seconds that its consensus and they took."""
    started = time.monotonic()
    config, view = trial.config, trial.view
    step = step_of(trial, "consensus")
    if step.state != "done":
        context = Context(config, view, Silent(view), Share(config.ray, 1), in_process=True)
        pipeline.run_stage(context, step)
    table = view.read_table("consensus", columns=["cluster"])
    found = score(
        list(SCORES),
        clusters=table["cluster"].to_numpy(),
        num_clusters=config.num_classes,
        assignments=view.matrix("heads", "assignments"),
        ids=view.matrix(neighbors.NEAREST, "ids"),
        features=view.matrix("embeddings", "embedding"),
        seed=config.seed,
    )
    return found, round(time.monotonic() - started, 3)


def _end_of_ensemble(sweep: Sweep, todo: Mapping[str, Sequence[Trial]], ended: Ended) -> str:
    group = todo[ended.name]
    for trial in group:
        if ended.error is not None:
            trial.fail(ended.error)
    return "done" if ended.error is None and _load(sweep, group[0]) else "failed"


def _load(sweep: Sweep, trial: Trial) -> bool:
    """Take a trial's record where it is of the artifacts that are there now."""
    if not sweep.run.exists(sweep.folder, "trials", f"{trial.id}.json"):
        return False
    record = sweep.run.read_json(sweep.folder, "trials", f"{trial.id}.json")
    if record["prints"]["consensus"] != trial.prints["consensus"]:
        return False
    if record["state"] != "done":
        trial.error = record["error"]
        return False
    if set(record["scores"]) != set(SCORES) or not is_done(trial, "consensus"):
        return False
    trial.state, trial.scores, trial.reused = "done", record["scores"], record["reused"]
    trained = trial.view.manifest(heads.FOLDER)
    own = trained.seconds if trained is not None and "heads" not in trial.reused else 0.0
    trial.seconds, trial.error = round(record["seconds"] + own, 3), None
    return True
