"""Hyperparameter sweeps without labels: many clusterings, ranked by a label-free score.

    from icce_ray import config, sweep
    sweep.run(config.load("fashion-mnist"), "ensemble")

What trials share is made once (see store.py), in four phases: index, embeddings, neighbor lists and
selections in the driver; head trainings with Ray Tune; ensembles and their scores with Ray Tune;
the ranking. Every result is written as soon as it is there, in

    RUN/sweeps/NAME/  results.json  best.yaml  log  status.json  report/index.html
                      trials/ID.json    heads/FINGERPRINT.json    best-ID/ (a run of its own)
    RUN/store/        artifacts by fingerprint

so the same command goes on after a crash, and one with more trials extends the sweep. Ground truth
is looked at once the ranking is final, to be shown beside it.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from icce_ray import config as configs
from icce_ray import pipeline, space, store
from icce_ray.artifacts import RunDirectory, differing_keys, fingerprint
from icce_ray.cluster import Cluster
from icce_ray.config import Config
from icce_ray.core import metrics
from icce_ray.core.head_trainer import default_steps
from icce_ray.core.scores import ACROSS_CLUSTERS, SCORES, score
from icce_ray.errors import ArtifactError, IcceError, StageError
from icce_ray.progress import Reporter, duration
from icce_ray.space import Draws, Space
from icce_ray.stages import Context, Size, Stage, evaluate, heads, neighbors, training, tuning
from icce_ray.stages.tuning import Ended, Placement, Report, Share, Silent
from icce_ray.store import View

SWEEPS = "sweeps"
CHAIN = pipeline.NAMES[: pipeline.NAMES.index("consensus") + 1]  # what a trial is made of
STAGES: dict[str, Stage] = {stage.name: stage for stage in pipeline.STAGES}
NEAREST = 10  # neighbors that trials are judged by
FEWEST = 4  # head trainings from which early stopping compares them: of two, it would stop one
TABLE_ROWS = 15
RELEASE_AFTER = 5.0  # seconds until a stopped training's own process is gone


@dataclass
class Trial:
    """One clustering to make."""

    id: str
    settings: dict[str, Any]
    config: Config
    view: View
    prints: Mapping[str, str]  # stage name -> fingerprint
    reused: list[str] = field(default_factory=list)  # stages that were there before
    state: str = "open"  # then done, stopped, failed
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stopped_at: float | None = None
    accuracy: dict[str, float] | None = None
    error: str | None = None

    def fail(self, reason: str) -> None:
        self.state, self.error = "failed", reason


@dataclass
class Sweep:
    """What all phases work with."""

    name: str
    space: Space
    config: Config  # without the trials' settings
    run: RunDirectory
    trials: list[Trial]
    context: Context  # the sweep's own reporter and cluster

    @property
    def folder(self) -> str:
        return f"{SWEEPS}/{self.name}"

    def alive(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "open"]


# --- trials --------------------------------------------------------------------------------------


def make_trials(config: Config, draws: Draws, run: RunDirectory) -> list[Trial]:
    """Trials with the places of their artifacts. Starts nothing, writes nothing."""
    base = pipeline.fingerprints(config)
    prints = [pipeline.fingerprints(one) for one in draws.configs]
    lists = _list_places(run, draws.configs, prints)
    found = []
    pairs = zip(draws.settings, draws.configs, prints, lists, strict=True)
    for settings, one, print_, places in pairs:
        own = _own_stages(run, one, print_, base)
        places |= {
            STAGES[name].folder: store.stored(STAGES[name].folder, print_[name])
            for name in CHAIN
            if name not in own
        }
        view = View(run.uri, places)
        found.append(Trial(space.trial_id(settings), settings, one, view, print_))
    return found


def _own_stages(
    run: RunDirectory, config: Config, prints: Mapping[str, str], base: Mapping[str, str]
) -> set[str]:
    """Stages whose artifacts the trial takes from the run itself.

    Listing and embedding are made there as well, where nothing would be lost: `icce-ray run` of the
    same config then finds them.
    """
    own = set()
    for step in pipeline.make_steps(config, run, CHAIN):
        name, folder = step.stage.name, step.stage.folder
        shared = name in ("index", "embed") and prints[name] == base[name]
        if step.state == "done" or (shared and store.may_be_own(run, folder, prints[name])):
            own.add(name)
    return own


def _list_places(
    run: RunDirectory, settings: Sequence[Config], prints: Sequence[Mapping[str, str]]
) -> list[dict[str, str]]:
    """Where each trial finds the neighbor lists that it shares with others.

    Lists that differ in length alone are searched once, at the largest length of the sweep; longer
    ones of an earlier sweep serve as well.
    """
    keys = [_list_print(one, print_) for one, print_ in zip(settings, prints, strict=True)]
    most: dict[str, int] = {}
    for one, key in zip(settings, keys, strict=True):
        most[key] = max(most.get(key, NEAREST), one.neighbors.max_neighbors)
    places: dict[str, str] = {}
    for key, wanted in most.items():
        width = min((w for w in _widths(run, key) if w >= wanted), default=wanted)
        places[key] = store.stored("top", f"{key}-{width}")
    first: dict[str, str] = {}  # all trials of one embedding are judged by the first one's search
    for key, print_ in zip(keys, prints, strict=True):
        first.setdefault(print_["embed"], key)
    return [
        {
            neighbors.TOP: places[key],
            neighbors.NEAREST: store.stored(neighbors.NEAREST, first[print_["embed"]]),
        }
        for key, print_ in zip(keys, prints, strict=True)
    ]


def _list_print(config: Config, prints: Mapping[str, str]) -> str:
    search = {name: getattr(config.neighbors, name) for name in neighbors.SEARCHED}
    return fingerprint("top", search, {"embed": prints["embed"]})


def _widths(run: RunDirectory, key: str) -> list[int]:
    """Lengths of the finished lists of that key in the store."""
    found = [name for name in run.folders(store.STORE) if name.startswith(f"top-{key}-")]
    done = [name for name in found if run.manifest(f"{store.STORE}/{name}") is not None]
    return [int(name.rpartition("-")[2]) for name in done]


def groups(trials: Sequence[Trial], stage: str) -> dict[str, list[Trial]]:
    """Trials by the fingerprint of a stage: those of one group share its artifact."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.prints[stage], []).append(trial)
    return found


def _is_done(trial: Trial, stage: str) -> bool:
    return _step(trial, stage).state == "done"


def _step(trial: Trial, stage: str) -> pipeline.Step:
    steps = pipeline.make_steps(trial.config, trial.view, CHAIN)
    return next(step for step in steps if step.stage.name == stage)


# --- the plan ------------------------------------------------------------------------------------


def counts(sweep: Sweep) -> dict[str, dict[str, int]]:
    """How many of each a sweep needs, and how many of those are there."""
    found = {}
    for name in CHAIN[1:]:
        each = [group[0] for group in groups(sweep.trials, name).values()]
        there = [t for t in each if _is_done(t, name)]
        if name == "heads":
            there += [t for t in each if t not in there and _stopped(sweep, t) is not None]
        found[name] = {"total": len(each), "there": len(there)}
    each = [group[0] for group in _by_place(sweep.trials, neighbors.TOP).values()]
    there = [trial for trial in each if _lists_done(trial, neighbors.TOP)]
    found["search"] = {"total": len(each), "there": len(there)}
    return found


_NOUNS = {
    "embed": ("embedding", "embeddings"),
    "search": ("neighbor search", "neighbor searches"),
    "neighbors": ("selection", "selections"),
    "heads": ("head training", "head trainings"),
    "consensus": ("ensemble", "ensembles"),
}


def plan_lines(sweep: Sweep, draws: Draws) -> list[str]:
    """What will happen, for a person."""
    found = counts(sweep)
    parts = [f"{found[n]['total']} {_NOUNS[n][found[n]['total'] != 1]}" for n in _NOUNS]
    total = len(sweep.trials)
    lines = [f"sweep {sweep.name}: {total} trial{'s' * (total != 1)}: {', '.join(parts)}"]
    there = [
        f"{found[n]['there']} of {found[n]['total']} {_NOUNS[n][found[n]['total'] != 1]}"
        for n in _NOUNS
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


# --- running -------------------------------------------------------------------------------------


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
        _NOUNS[name][1]: found["total"] - found["there"] for name, found in counts(sweep).items()
    }
    for trial in sweep.trials:
        trial.reused = [name for name in CHAIN if _is_done(trial, name)]
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
    from icce_ray.stages import sweep_report

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


# --- phase 1: what trials share, in the driver ---------------------------------------------------


def prepare(sweep: Sweep) -> None:
    """Index, embeddings, neighbor lists and selections, each distinct one once."""
    for name in ("index", "embed"):
        for group in groups(sweep.alive(), name).values():
            _for_all(sweep, group, partial(_run_stage, sweep, group[0], name))
    for group in _by_place(sweep.alive(), neighbors.TOP).values():
        _for_all(sweep, group, partial(_make_lists, sweep, group))
    for group in _by_place(sweep.alive(), neighbors.NEAREST).values():
        _for_all(sweep, group, partial(_make_nearest, group[0]))
    todo = [
        group
        for group in groups(sweep.alive(), "neighbors").values()
        if not _is_done(group[0], "neighbors")
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
    step = _step(trial, name)
    if step.state == "done":
        return
    chosen = reporter or sweep.context.reporter
    context = Context(trial.config, trial.view, chosen, sweep.context.cluster)
    pipeline.run_stage(context, step)


def _by_place(trials: Sequence[Trial], folder: str) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.view.places[folder], []).append(trial)
    return found


def _lists_done(trial: Trial, folder: str) -> bool:
    """Whether shared lists are there, and made from the embeddings that are there now."""
    kept, embedded = trial.view.manifest(folder), trial.view.manifest("embeddings")
    return kept is not None and embedded is not None and kept.inputs.get("embed") == embedded.id


def _make_lists(sweep: Sweep, group: Sequence[Trial]) -> None:
    trial = group[0]
    if _lists_done(trial, neighbors.TOP):
        return
    most = int(trial.view.places[neighbors.TOP].rpartition("-")[2])
    print_ = _list_print(trial.config, trial.prints)
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
    return (
        same
        and not old["mutual"]
        and min(old["max_neighbors"], done.rows - 1) >= min(most, done.rows - 1)
    )


def _make_nearest(trial: Trial) -> None:
    if not _lists_done(trial, neighbors.NEAREST):
        neighbors.write_nearest(trial.view, trial.prints["embed"], NEAREST)


# --- phase 2: heads ------------------------------------------------------------------------------


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
        if not _is_done(group[0], "heads")
    }
    todo = {p: group for p, group in missing.items() if _stopped(sweep, group[0]) is None}
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


def _stopped(sweep: Sweep, trial: Trial) -> float | None:
    """At which percent this sweep stopped the trial's heads early, if it did."""
    record = _head_record(sweep, trial.prints["heads"]) if sweep.space.early_stop else {}
    return record.get("percent") if record.get("state") == "stopped" else None


def _take_heads(sweep: Sweep, group: Sequence[Trial]) -> None:
    """Note for all trials of a group how their heads came out."""
    if _is_done(group[0], "heads"):
        return
    record, percent = _head_record(sweep, group[0].prints["heads"]), _stopped(sweep, group[0])
    for trial in group:
        if trial.state == "failed":
            continue
        if percent is not None:
            trial.state, trial.stopped_at = "stopped", percent
        else:
            trial.fail(record.get("error") or "the heads were not trained")


# --- phase 3: ensembles and scores ---------------------------------------------------------------


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
    step = _step(trial, "consensus")
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
    if set(record["scores"]) != set(SCORES) or not _is_done(trial, "consensus"):
        return False
    trial.state, trial.scores, trial.reused = "done", record["scores"], record["reused"]
    trained = trial.view.manifest(heads.FOLDER)
    own = trained.seconds if trained is not None and "heads" not in trial.reused else 0.0
    trial.seconds, trial.error = round(record["seconds"] + own, 3), None
    return True


# --- phase 4: ranking and results ----------------------------------------------------------------


def rank(sweep: Sweep) -> list[Trial]:
    """Finished trials, best first. Looks at label-free scores alone; ties keep the drawn order."""
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
        found = metrics.scores(known.codes[known.known], clusters[known.known])
        merged = evaluate.merged_heads(view, view.matrix("heads", "assignments"))
        single = evaluate.heads_alone(merged[known.known], known.codes[known.known])
        accuracy = {name: float(found[name]) for name in ("acc", "nmi", "ari")}
        accuracy |= {name: single[name] for name in ("acc_mean", "acc_best")}
        for trial in group:
            trial.accuracy = accuracy


def _results(
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
        "direction": "max",
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


def _write_best(sweep: Sweep, best: Trial) -> str:
    """Write best.yaml, whose run already has the trial's artifacts. Returns its path."""
    name = f"{sweep.folder}/best-{best.id}"
    target = RunDirectory(f"{sweep.run.uri}/{name}")
    store.place_copies(best.view, [STAGES[stage].folder for stage in CHAIN], target)
    config = best.config.model_copy(update={"run_dir": target.uri})
    value = best.scores[sweep.space.objective]
    lines = [
        f"# The best of {len(sweep.trials)} trials of the sweep {sweep.name}: "
        f"{sweep.space.objective} {value:.4f}, a label-free score.",
        *(f"#   {key}: {configs._scalar(given)}" for key, given in best.settings.items()),
        "# What the sweep made is in run_dir: `icce-ray run` of this file goes on from there.",
    ]
    text = "\n".join(lines) + "\n\n" + configs.to_yaml(config)
    sweep.run.write_bytes(text.encode(), sweep.folder, "best.yaml")
    return sweep.run.address(sweep.folder, "best.yaml")


# --- for the terminal ----------------------------------------------------------------------------


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
