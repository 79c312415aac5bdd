"""What measurements share: the labeled run they look at, the tables and files they leave."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; all but the first column to the right."""
    rule = ["---", *("--:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation, for a table."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def open_labeled(run_dir: str) -> tuple[Any, Any, Any]:
    """A run, its config, and the truth of its embeddings. Raises DataError: there is none."""
    from icce_ray import config as configs
    from icce_ray.errors import DataError
    from icce_ray.rundir.directory import RunDirectory
    from icce_ray.stages import evaluate

    run = RunDirectory(run_dir)
    config = configs.load(run.path("config.yaml"))
    known = evaluate.truth(config, run, run.matrix("embeddings", "image_id"))
    if known is None:
        raise DataError(f"{run_dir} has no ground truth to compare with")
    return run, config, known


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": pages,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def publish(out: Path, table: str, content: Mapping[str, Any]) -> None:
    """Print a table; write it to OUT.md, and everything measured to OUT.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(table + "\n")
    out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"{table}\n\nwritten to {out.with_suffix('.md')} and {out.with_suffix('.json')}")
