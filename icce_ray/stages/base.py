"""The stages of the chain. Each file reads artifacts, calls `core`, writes artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from icce_ray.config.schema import Config
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.context import Context


@dataclass(frozen=True)
class Outcome:
    """What a stage tells its manifest."""

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
    where: str = "driver"  # what does the work, for the plan's table


@dataclass(frozen=True)
class Stage:
    """One link of the chain."""

    name: str
    folder: str
    needs: tuple[str, ...]  # names of the stages whose artifacts it reads
    settings: Callable[[Config], dict[str, Any]]  # the slice of the config its result depends on
    run: Callable[[Context], Outcome]
    estimate: Callable[[Config, Size, Cluster], Need]


__all__ = ["Context", "Need", "Outcome", "Size", "Stage"]
