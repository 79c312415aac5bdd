"""How long commands take that compute nothing: each is a process of its own, from start to end.

Imports nothing of icce_ray, so that it measures whichever version PYTHONPATH names.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

BASE = "import"  # what any command of this package has to import
UNFINISHED = ("to do", "half done")  # as `icce-ray status` says it


def commands(run_dir: str, config: Sequence[str]) -> dict[str, list[str]]:
    """Arguments of Python by name. config: a config's name, and the overrides of its run."""
    own = ["-m", "icce_ray.cli"]
    return {
        BASE: ["-c", "import pyarrow.parquet, pydantic"],
        "--help": [*own, "--help"],
        "status": [*own, "status", run_dir],
        "run --plan": [*own, "run", *config, "--plan"],
        "run (all skipped)": [*own, "run", *config],
    }


def measure(run_dir: str, config: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """Seconds of each command (median of `repeats`), and how often they hold those of BASE.

    The commands cycle, so that whatever else the machine does meets all of them.

    Raises RuntimeError: the run is not finished, or a command failed.
    """
    todo = commands(run_dir, config)
    said = _run("status", todo["status"])[1]
    if any(text in said for text in UNFINISHED):
        raise RuntimeError(f"{run_dir} is not finished: icce-ray run {' '.join(config)}")
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(repeats):
        for name, arguments in todo.items():
            seconds[name].append(_run(name, arguments)[0])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {"seconds": round(value, 3), "ratio": round(value / medians[BASE], 2)}
        for name, value in medians.items()
    }


def _run(name: str, arguments: Sequence[str]) -> tuple[float, str]:
    started = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[-300:]}")
    return time.monotonic() - started, done.stdout


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """A line per command."""
    lines = [f"{'command':<20}{'seconds':>9}{'ratio':>8}"]
    lines += [f"{n:<20}{m['seconds']:>9.2f}{m['ratio']:>8.2f}" for n, m in measured.items()]
    return "\n".join(lines)
