"""What a stage works with: settings, files, the user's terminal, a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that the table of the stages imports none of it
    from icce_ray.config.schema import Config
    from icce_ray.distributed.cluster import Cluster
    from icce_ray.rundir.directory import RunDirectory
    from icce_ray.rundir.progress import Reporter


@dataclass
class Context:
    """What a stage works with."""

    config: Config
    run: RunDirectory
    reporter: Reporter
    cluster: Cluster  # starts Ray at first use
    resumed: bool = False  # earlier partial work of the same fingerprint is in the folder
    in_process: bool = False  # do what is one Ray task's work right here (inside a sweep's trial)
    on_progress: Callable[[int, float], None] | None = None  # called with (step, label-free score)
