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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from icce_ray import pipeline
from icce_ray.config.schema import Config
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages import heads, search
from icce_ray.stages.base import Context, Stage
from icce_ray.sweeps import space, store
from icce_ray.sweeps.space import Draws, Space

SWEEPS = "sweeps"


CHAIN = pipeline.NAMES[: pipeline.NAMES.index("consensus") + 1]  # what a trial is made of


STAGES: dict[str, Stage] = {stage.name: stage for stage in pipeline.STAGES}


FEWEST = 4  # head trainings from which early stopping compares them: of two, it would stop one


RELEASE_AFTER = 5.0  # seconds until a stopped training's own process is gone


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
    stopped_at: float | None = None
    accuracy: dict[str, float] | None = None
    error: str | None = None

    @property
    def scores_of(self) -> dict[str, str]:
        """Fingerprints of all that the scores depend on."""
        return {"consensus": self.fingerprints["consensus"], "judge": self.judge}

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


def make_trials(config: Config, draws: Draws, run: RunDirectory) -> list[Trial]:
    """Trials with the places of their artifacts. Starts nothing, writes nothing.

    All trials of one embedding are judged by the same lists of neighbors, so that their scores
    compare: those that the first of them is made from.
    """
    base = pipeline.fingerprints(config)
    made: list[Trial] = []
    first: dict[str, Trial] = {}
    for settings, one in zip(draws.settings, draws.configs, strict=True):
        keys = pipeline.fingerprints(one)
        own = _own_stages(run, one, keys, base)
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
    run: RunDirectory, config: Config, keys: Mapping[str, str], base: Mapping[str, str]
) -> set[str]:
    """Stages whose artifacts the trial takes from the run itself.

    Index, embeddings and search are made there as well, where nothing would be lost: `icce-ray run`
    of the same config then finds them.
    """
    own = set()
    for step in pipeline.make_steps(config, run, CHAIN):
        name, folder = step.stage.name, step.stage.folder
        shared = name in ("index", "embed", "search") and keys[name] == base[name]
        if step.state == "done" or (shared and store.may_be_own(run, folder, keys[name])):
            own.add(name)
    return own


def groups(trials: Sequence[Trial], stage: str) -> dict[str, list[Trial]]:
    """Trials by the fingerprint of a stage: those of one group share its artifact."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.fingerprints[stage], []).append(trial)
    return found


def is_done(trial: Trial, stage: str) -> bool:
    return step_of(trial, stage).state == "done"


def step_of(trial: Trial, stage: str) -> pipeline.Step:
    steps = pipeline.make_steps(trial.config, trial.view, CHAIN)
    return next(step for step in steps if step.stage.name == stage)
