"""A run whose clusters a person has edited: what was made anew lies in one folder, beside the rest.

    RUN/curated/  consensus/ classifier/ answer/ evaluation/ report/   as those of the run
                  edits.yaml, log, status.json; _manifest.json is written last

Who reads what was found asks `current` for the run. The stages of the chain never do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
    """What the clusters of a run are called. A person's name counts before a suggested one."""

    names: Sequence[str | None]  # [K], a person's; empty where nothing was curated
    dropped: int | None = None  # the cluster of the images that were dropped
    words: Sequence[Sequence[tuple[str, float | None]]] = ()  # [K], suggested, best first; or empty

    def given(self, cluster: int) -> str | None:
        """What a person calls a cluster; None where nobody does."""
        return self.names[cluster] if 0 <= cluster < len(self.names) else None

    def suggested(self, cluster: int) -> Sequence[tuple[str, float | None]]:
        """Words for a cluster and their scores, best first; none for what was dropped."""
        known = 0 <= cluster < len(self.words) and cluster != self.dropped
        return self.words[cluster] if known else ()

    def of(self, cluster: int) -> str | None:
        """A person's name of a cluster, else the best word, else None. A word that several clusters
        would be called is followed by the cluster's number."""
        if name := self.given(cluster):
            return name
        best = self._best(cluster)
        return f"{best} {cluster}" if best and self._uses[best] > 1 else best

    def all(self, count: int) -> list[str | None]:
        """The names of the clusters from 0 to `count` - 1."""
        return [self.of(cluster) for cluster in range(count)]

    def _best(self, cluster: int) -> str | None:
        return next((text for text, _ in self.suggested(cluster)), None)

    @cached_property
    def _uses(self) -> Counter[str | None]:
        count = max(len(self.names), len(self.words))
        return Counter(self.given(k) or self._best(k) for k in range(count))


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
    done, answer = run.manifest("consensus"), run.manifest("answer")
    results = done.results if done else {}
    same = done and answer and answer.inputs.get("consensus") == done.id
    suggested = answer.results.get("words", ()) if answer and same else ()
    return Naming(results.get("names", ()), results.get("dropped"), suggested)


def config_of(config: Config, run: RunDirectory) -> Config:
    """The run's settings with the number of clusters that there are now."""
    names = naming(run).names
    if not names:
        return config
    heads = config.heads.model_copy(update={"clusters": None, "prior": None})
    return config.model_copy(update={"num_classes": len(names), "heads": heads})
