"""The phases of a sweep: what its trials need, made once each, side by side where that pays.

`prepare` works in the driver, stage by stage. `train_heads` and `make_ensembles` hand pieces of
work to Ray Tune, in processes of their own. What a piece makes lies in the run directory, and how
it ended in the sweep's records, so that a killed sweep resumes from there.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from icce_ray import pipeline
from icce_ray.config.schema import Config
from icce_ray.core import method
from icce_ray.core.evaluation.labelfree import SCORES, score
from icce_ray.distributed import train as training
from icce_ray.distributed import tune as tuning
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.tune import Ended, Placement, Report
from icce_ray.errors import IcceError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import heads
from icce_ray.stages.base import Context, Size
from icce_ray.sweeps.store import HEADS, TRIALS, Records
from icce_ray.sweeps.trials import CHAIN, STAGES, Sweep, Trial, groups

FEWEST = 4  # head trainings from which early stopping compares them: of two, it would stop one
RELEASE_AFTER = 5.0  # seconds until a stopped training's own process is gone


# --- index, embeddings, searches, selections -----------------------------------------------------


def prepare(sweep: Sweep) -> None:
    """Index, embeddings, searches and selections, each distinct one once."""
    for name in ("index", "embed", "search"):
        for group in groups(sweep.alive(), name).values():
            _for_all(sweep, group, partial(_run_stage, sweep, group[0], name))
    selections = groups(sweep.alive(), "select").values()
    todo = [group for group in selections if not sweep.is_done(group[0], "select")]
    if not todo:
        return
    with sweep.context.reporter.bar("selections", len(todo)) as bar:
        for number, group in enumerate(todo, 1):
            quiet = Reporter(sweep.run, quiet=True, silent=True)
            _for_all(sweep, group, partial(_run_stage, sweep, group[0], "select", quiet))
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
    step = sweep.steps(trial)[name]
    if not step.todo:
        return
    chosen = reporter or sweep.context.reporter
    context = Context(trial.config, trial.view, chosen, sweep.context.cluster)
    try:
        pipeline.run_stage(context, step)
    finally:
        sweep.look_again(trial, name)


# --- heads ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadWork:
    """What a head trial is sent."""

    trials: Mapping[str, tuple[Config, RunDirectory]]  # by fingerprint of the heads
    records: Records
    parts: int  # trainings at once, which share the cluster
    threads: int | None  # of torch, where the training is in the trial's own process


def train_heads(sweep: Sweep) -> None:
    """Train each distinct heads config that is not there yet, side by side."""
    missing = {
        key: group
        for key, group in groups(sweep.alive(), "heads").items()
        if not sweep.is_done(group[0], "heads")
    }
    todo = {key: group for key, group in missing.items() if stopped_at(sweep, group[0]) is None}
    if len(todo) == 1:
        (group,) = todo.values()
        _for_all(sweep, group, partial(_run_stage, sweep, group[0], "heads"))
    elif todo:
        _train_side_by_side(sweep, {key: group[0] for key, group in todo.items()})
    for group in missing.values():
        sweep.look_again(group[0], "heads")
        _take_heads(sweep, group)


def _train_side_by_side(sweep: Sweep, todo: Mapping[str, Trial]) -> None:
    """Train with Ray Tune. todo: one trial for each fingerprint of the heads."""
    for key in todo:  # a failure of last time is tried again
        if sweep.records.read(HEADS, key):
            sweep.records.write(HEADS, key, state="open")
    placement, parts = _place_heads(sweep, list(todo.values()))
    first = next(iter(todo.values())).config
    own = not first.heads.num_workers  # each training is done by the trial's own process
    work = HeadWork(
        {key: (_without_workers(t.config), t.view) for key, t in todo.items()},
        sweep.records,
        parts,
        max(1, int(placement.cpus)) if own else None,
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


def _without_workers(config: Config) -> Config:
    """heads.num_workers=0 where the settings name none: the trial itself is the worker."""
    if config.heads.num_workers is not None:
        return config
    return config.model_copy(update={"heads": config.heads.model_copy(update={"num_workers": 0})})


def _place_heads(sweep: Sweep, trials: Sequence[Trial]) -> tuple[Placement, int]:
    """What each training holds, and how many run at once: as many as cores or GPUs carry."""
    cluster, config = sweep.context.cluster, sweep.config.heads
    have, gpus = cluster.resources(), cluster.gpus_each()
    wanted = min(len(trials), sweep.space.concurrent or len(trials))
    workers = config.num_workers or 0
    if workers:
        carried = max(1, int(have.gpus // (workers * gpus))) if gpus else sweep.space.concurrent
        parts = min(wanted, carried or 1)
        return Placement(0, 0, parts), parts if not gpus else 1
    if gpus:
        return Placement(1, gpus, wanted), 1
    size = Size(_rows(trials[0]), None)
    memory = max(STAGES["heads"].estimate(t.config, size, cluster).memory for t in trials)
    fit = max(1, int(have.memory // memory)) if have.memory and memory else wanted
    parts = max(1, min(wanted, max(1, have.cpus), fit))
    return Placement(cluster.cpus_each(parts, 0) if parts > 1 else _largest(have.each), 0, parts), 1


def _largest(each: Sequence[tuple[float, float]]) -> int:
    return max(1, *(int(cpus) for cpus, _ in each)) if each else 1


def _rows(trial: Trial) -> int | None:
    done = trial.view.manifest("embeddings")
    return done.rows if done else None


def _train(work: HeadWork, key: str, report: Report) -> None:
    """In the trial's process: the normal heads stage. An error is written down, not raised."""
    import torch

    if work.threads:
        torch.set_num_threads(work.threads)
    config, view = work.trials[key]
    steps = method.head_steps(config)

    def on_progress(step: int, value: float) -> None:
        report(min(tuning.NEARLY_DONE, tuning.DONE * step / steps), value)

    context = Context(
        config,
        view,
        Reporter(view, quiet=True, silent=True),
        Cluster(config.ray, parts=work.parts),
        in_process=config.heads.num_workers == 0,
        on_progress=on_progress,
    )
    try:
        step = pipeline.make_steps(config, view, CHAIN)[CHAIN.index("heads")]
        if step.todo:
            pipeline.run_stage(context, step)
    except Exception as error:
        work.records.write(HEADS, key, state="failed", error=_reason(error))


def _reason(error: Exception) -> str:
    """Our own errors say what to do; of others the end of the traceback is kept."""
    if isinstance(error, IcceError):
        return str(error)
    return "".join(traceback.format_exception(error)).strip()[-2000:]


def _end_of_heads(sweep: Sweep, todo: Mapping[str, Trial], ended: Ended) -> str:
    """Write down at once how a training ended, so that a killed sweep knows."""
    records, view = sweep.records, todo[ended.name].view
    if ended.error is not None:
        records.write(HEADS, ended.name, state="failed", error=ended.error)
        return "failed"
    if view.manifest(heads.FOLDER) is not None:
        return "done"
    if records.read(HEADS, ended.name).get("state") == "failed":
        return "failed"
    # Not at once: a training whose driver still lives would start its workers again.
    timer = threading.Timer(RELEASE_AFTER, training.release, (view, heads.FOLDER))
    timer.daemon = True
    timer.start()
    records.write(HEADS, ended.name, state="stopped", percent=ended.percent, score=ended.score)
    return "stopped early"


def stopped_at(sweep: Sweep, trial: Trial) -> float | None:
    """At which percent this sweep stopped the trial's heads early, if it did."""
    if not sweep.space.early_stop:
        return None
    record = sweep.records.read(HEADS, trial.fingerprints["heads"])
    return record.get("percent") if record.get("state") == "stopped" else None


def _take_heads(sweep: Sweep, group: Sequence[Trial]) -> None:
    """Note for all trials of a group how their heads came out."""
    if sweep.is_done(group[0], "heads"):
        return
    record = sweep.records.read(HEADS, group[0].fingerprints["heads"])
    percent = stopped_at(sweep, group[0])
    for trial in group:
        if trial.state == "failed":
            continue
        if percent is not None:
            trial.state, trial.stopped_at = "stopped", percent
        else:
            trial.fail(record.get("error") or "the heads were not trained")


# --- ensembles -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnsembleWork:
    """What an ensemble trial is sent."""

    trials: Mapping[str, Sequence[Trial]]  # by fingerprint of the consensus
    records: Records


def make_ensembles(sweep: Sweep) -> None:
    """Consensus and scores of every trial whose heads are there."""
    todo = {
        key: group
        for key, group in groups(sweep.alive(), "consensus").items()
        if not all(take_record(sweep, trial) for trial in group)
    }
    if todo:
        tuning.search(
            sweep.context,
            f"{sweep.folder}/tune",
            partial(_solve, EnsembleWork(todo, sweep.records)),
            list(todo),
            _place_ensembles(sweep, [group[0] for group in todo.values()]),
            title="ensembles",
            unit="trials",
            early_stop=False,
            on_end=partial(_end_of_ensemble, sweep, todo),
        )
    for group in todo.values():
        for trial in group:
            if not take_record(sweep, trial) and trial.state == "open":
                trial.fail(trial.error or "its process was lost")


def _place_ensembles(sweep: Sweep, trials: Sequence[Trial]) -> Placement:
    cluster, wanted = sweep.context.cluster, sweep.space.concurrent or len(trials)
    have, size = cluster.resources(), Size(_rows(trials[0]), None)
    stage = STAGES["consensus"]
    memory = max(stage.estimate(t.config, size, cluster).memory for t in trials)
    fit = max(1, int(have.memory // memory)) if have.memory and memory else wanted
    return Placement(1, 0, min(wanted, fit, len(trials)), reuse=True)


def _solve(work: EnsembleWork, key: str, report: Report) -> None:
    """In the trial's process: consensus, scores, and a record for each trial that shares them."""
    import torch

    torch.set_num_threads(1)
    group = work.trials[key]
    try:
        scores, seconds = _consensus(group[0])
        content: dict[str, Any] = {"state": "done", "scores": scores, "seconds": seconds}
    except Exception as error:
        content = {"state": "failed", "error": _reason(error)}
    for trial in group:
        made = {"settings": trial.settings, "reused": trial.reused, "scores_of": trial.scores_of}
        work.records.write(TRIALS, trial.id, id=trial.id, **made, **content)


def _consensus(trial: Trial) -> tuple[dict[str, float], float]:
    """All scores of a trial, and the seconds that its consensus and they took."""
    started = time.monotonic()
    config, view = trial.config, trial.view
    step = pipeline.make_steps(config, view, CHAIN)[CHAIN.index("consensus")]
    if step.todo:
        context = Context(
            config,
            view,
            Reporter(view, quiet=True, silent=True),
            Cluster(config.ray, parts=1),
            in_process=True,
        )
        pipeline.run_stage(context, step)
    table = view.read_table("consensus", columns=["cluster"])
    scores = score(
        list(SCORES),
        clusters=table["cluster"].to_numpy(),
        num_clusters=config.num_classes,
        assignments=view.matrix("heads", "assignments"),
        ids=view.matrix(heads.JUDGE, "ids"),
        features=view.matrix("embeddings", "embedding"),
        seed=config.seed,
    )
    return scores, round(time.monotonic() - started, 3)


def _end_of_ensemble(sweep: Sweep, todo: Mapping[str, Sequence[Trial]], ended: Ended) -> str:
    group = todo[ended.name]
    sweep.look_again(group[0], "consensus")
    for trial in group:
        if ended.error is not None:
            trial.fail(ended.error)
    return "done" if ended.error is None and take_record(sweep, group[0]) else "failed"


def take_record(sweep: Sweep, trial: Trial) -> bool:
    """Take a trial's record where it is of the artifacts that are there now."""
    record = sweep.records.read(TRIALS, trial.id)
    if record.get("scores_of") != trial.scores_of:
        return False
    if record["state"] != "done":
        trial.error = record["error"]
        return False
    if set(record["scores"]) != set(SCORES) or not sweep.is_done(trial, "consensus"):
        return False
    trial.state, trial.scores, trial.reused = "done", record["scores"], record["reused"]
    trained = sweep.snapshot.look(trial.view, heads.FOLDER).manifest
    own = trained.seconds if trained is not None and "heads" not in trial.reused else 0.0
    trial.seconds, trial.error = round(record["seconds"] + own, 3), None
    return True
