"""The stages of the chain. Each file reads artifacts, calls `core`, writes artifacts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from icce_ray.distributed.context import Context

if TYPE_CHECKING:  # so that the table of the stages imports none of it
    from icce_ray.config.schema import Config
    from icce_ray.distributed.cluster import Cluster


@dataclass(frozen=True)
class Outcome:
    """What a stage reports for its manifest."""

    rows: int
    results: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """What is known of the data when a plan is made; None where it is not known yet."""

    images: int | None = None  # N
    features: int | None = None  # D


@dataclass(frozen=True)
class Need:
    """A stage's predicted use."""

    memory: float = 0.0  # bytes, in the largest process
    disk: float = 0.0  # bytes, in the run directory
    cache: float = 0.0  # bytes, in a node's cache, which lies in the directory of a local run
    where: str = "driver"  # what does the work, for the plan's table


@dataclass(frozen=True)
class Stage:
    """One link of the chain. The work is done by the function `run` of the file of its name."""

    name: str
    folder: str
    needs: tuple[str, ...]  # names of the stages whose artifacts it reads
    settings: Callable[[Config], dict[str, Any]]  # the slice of the config its result depends on
    estimate: Callable[[Config, Size, Cluster], Need]
    is_view: bool = False  # shows what other stages keep, so that it is rebuilt without being asked

    def run(self, context: Context) -> Outcome:
        """Do the work. Its file is imported now: it may need torch, and seconds."""
        module = importlib.import_module(f"icce_ray.stages.{self.name}")
        outcome: Outcome = module.run(context)
        return outcome


__all__ = ["Context", "Need", "Outcome", "Size", "Stage"]
