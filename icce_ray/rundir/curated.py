"""A run whose clusters a person has edited: what was made anew lies in one folder, beside the rest.

    RUN/curated/  consensus/ classifier/ answer/ evaluation/ report/   as those of the run
                  edits.yaml, log, status.json; _manifest.json is written last

Who reads what was found asks `current` for the run. The stages of the chain never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icce_ray.rundir.directory import RunDirectory

if TYPE_CHECKING:
    from icce_ray.config.schema import Config

FOLDER = "curated"
EDITS = "edits.yaml"
PARTS = ("consensus", "classifier", "answer", "evaluation", "report")
DROPPED = "like images that were dropped"  # why a new image has no cluster


@dataclass(frozen=True)
class Naming:
    """What the clusters of a run are called."""

    names: Sequence[str | None]  # [K]; empty where nothing was curated
    dropped: int | None = None  # the cluster of the images that were dropped

    def of(self, cluster: int) -> str | None:
        """The name of a cluster; None where it has none."""
        return self.names[cluster] if 0 <= cluster < len(self.names) else None


def view(run: RunDirectory) -> RunDirectory:
    """The run with its curated parts in place of its own."""
    return RunDirectory(run.uri, {name: f"{FOLDER}/{name}" for name in PARTS})


def is_curated(run: RunDirectory) -> bool:
    """Whether there are curated clusters, of the consensus that the run has now."""
    done, of = run.manifest(FOLDER), run.manifest("consensus")
    return done is not None and of is not None and done.inputs.get("consensus") == of.id


def current(run: RunDirectory) -> RunDirectory:
    """The run as it counts: with its curated parts, where there are any."""
    return view(run) if is_curated(run) else run


def naming(run: RunDirectory) -> Naming:
    """What the clusters of `run` are called. It is as `current` gives it, or a view."""
    done = run.manifest("consensus")
    results = done.results if done else {}
    return Naming(results.get("names", ()), results.get("dropped"))


def config_of(config: Config, run: RunDirectory) -> Config:
    """The run's settings with the number of clusters that there are now."""
    names = naming(run).names
    if not names:
        return config
    heads = config.heads.model_copy(update={"clusters": None, "prior": None})
    return config.model_copy(update={"num_classes": len(names), "heads": heads})
