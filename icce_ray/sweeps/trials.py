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
from icce_ray.rundir.directory import RunDirectory, fingerprint
from icce_ray.stages import search as neighbors
from icce_ray.stages.base import Context, Stage
from icce_ray.sweeps import space, store
from icce_ray.sweeps.space import Draws, Space
from icce_ray.sweeps.store import View

SWEEPS = "sweeps"


CHAIN = pipeline.NAMES[: pipeline.NAMES.index("consensus") + 1]  # what a trial is made of


STAGES: dict[str, Stage] = {stage.name: stage for stage in pipeline.STAGES}


NEAREST = 10  # neighbors that trials are judged by


FEWEST = 4  # head trainings from which early stopping compares them: of two, it would stop one


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
    keys = [list_print(one, print_) for one, print_ in zip(settings, prints, strict=True)]
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


def list_print(config: Config, prints: Mapping[str, str]) -> str:
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


def is_done(trial: Trial, stage: str) -> bool:
    return step_of(trial, stage).state == "done"


def step_of(trial: Trial, stage: str) -> pipeline.Step:
    steps = pipeline.make_steps(trial.config, trial.view, CHAIN)
    return next(step for step in steps if step.stage.name == stage)
