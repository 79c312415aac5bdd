"""Trials of a sweep: what each of them is made of, and where that lies.

Trials share artifacts by their fingerprints (see store.py): those of one group, by the fingerprint
of a stage, have the same artifact of that stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from icce_ray import pipeline
from icce_ray.config.schema import Config
from icce_ray.rundir.directory import RunDirectory, Snapshot
from icce_ray.stages import heads, search
from icce_ray.stages.base import Context, Stage
from icce_ray.sweeps import space, store
from icce_ray.sweeps.space import Draws, Space
from icce_ray.sweeps.store import Records

SWEEPS = "sweeps"  # folder of a run, with one folder for each sweep
CHAIN = pipeline.NAMES[: pipeline.NAMES.index("consensus") + 1]  # stages that a trial is made of
STAGES: dict[str, Stage] = {stage.name: stage for stage in pipeline.STAGES}
OF_THE_RUN = ("index", "embed", "search")  # made in the run itself, where `icce-ray run` finds them


@dataclass
class Trial:
    """One clustering to make."""

    id: str
    settings: dict[str, Any]
    config: Config
    view: RunDirectory  # the run, with the places of this trial's artifacts
    fingerprints: Mapping[str, str]  # by stage name
    judge: str = ""  # fingerprint of the search whose neighbors its scores look at
    reused: list[str] = field(default_factory=list)  # stages that were there before
    state: str = "open"  # then done, stopped, failed
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    stopped_at: float | None = None  # percent of the steps
    accuracy: dict[str, float] | None = None
    error: str | None = None

    @property
    def scores_of(self) -> dict[str, str]:
        """Fingerprints of all that the scores depend on."""
        return {"consensus": self.fingerprints["consensus"], "judge": self.judge}

    def fail(self, reason: str) -> None:
        """Note that the trial has no result, and why."""
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
    snapshot: Snapshot = field(default_factory=Snapshot)  # what is there, looked at once

    @property
    def folder(self) -> str:
        """Where the sweep's own files lie, relative to the run."""
        return f"{SWEEPS}/{self.name}"

    @property
    def records(self) -> Records:
        """How its trainings and trials ended."""
        return Records(self.run, self.folder)

    def alive(self) -> list[Trial]:
        """Trials that neither ended nor failed."""
        return [trial for trial in self.trials if trial.state == "open"]

    def steps(self, trial: Trial) -> dict[str, pipeline.Step]:
        """What there is to do for a trial, by stage name."""
        steps = pipeline.make_steps(trial.config, trial.view, CHAIN, self.snapshot)
        return {step.stage.name: step for step in steps}

    def is_done(self, trial: Trial, stage: str) -> bool:
        """Whether a trial's artifact of a stage is there, made from what is there now."""
        return self.steps(trial)[stage].state == "done"

    def look_again(self, trial: Trial, stage: str) -> None:
        """Note that a stage's artifact may have been made since it was looked at."""
        self.snapshot.forget(trial.view, STAGES[stage].folder)


def make_trials(
    config: Config, draws: Draws, run: RunDirectory, snapshot: Snapshot | None = None
) -> list[Trial]:
    """Trials with the places of their artifacts. Starts nothing, writes nothing.

    All trials of one embedding are judged by the same lists of neighbors, so that their scores
    compare: those that the first of them is made from.
    """
    base, snapshot = pipeline.fingerprints(config), snapshot or Snapshot()
    made: list[Trial] = []
    first: dict[str, Trial] = {}  # by fingerprint of the embeddings
    for settings, one in zip(draws.settings, draws.configs, strict=True):
        keys = pipeline.fingerprints(one)
        own = _own_stages(run, one, keys, base, snapshot)
        places = {
            STAGES[name].folder: store.stored(STAGES[name].folder, keys[name])
            for name in CHAIN
            if name not in own
        }
        view = RunDirectory(run.uri, places)
        trial = Trial(space.trial_id(settings), settings, one, view, keys)
        judge = first.setdefault(keys["embed"], trial)
        view.places[heads.JUDGE] = judge.view.place(search.FOLDER)
        trial.judge = judge.fingerprints["search"]
        made.append(trial)
    return made


def _own_stages(
    run: RunDirectory,
    config: Config,
    keys: Mapping[str, str],
    base: Mapping[str, str],
    snapshot: Snapshot,
) -> set[str]:
    """Stages whose artifacts the trial takes from the run itself: those that are there, and those
    OF_THE_RUN that may be made there, as nothing would be lost."""
    own = set()
    for step in pipeline.make_steps(config, run, CHAIN, snapshot):
        name, there = step.stage.name, snapshot.look(run, step.stage.folder)
        shared = name in OF_THE_RUN and keys[name] == base[name]
        if step.state == "done" or (shared and store.may_be_own(there, keys[name])):
            own.add(name)
    return own


def groups(trials: Sequence[Trial], stage: str) -> dict[str, list[Trial]]:
    """Trials by the fingerprint of a stage: those of one group share its artifact."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.fingerprints[stage], []).append(trial)
    return groups
