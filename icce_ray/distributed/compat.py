"""Keeps known noise of native code off the terminal, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# Every actor pool of Ray Data makes Ray's C++ core print the first with severity "E"; it concerns
# restarts after the loss of the driver's own objects, which no restart survives anyway. The second
# says that Ray does its work after a lost node, of which we tell by ourselves.
NOISE = (
    "has constructor arguments in the object store and max_restarts > 0",
    ":info_message: Attempting to recover",
)


_FILTER = """
import sys
noise = sys.argv[1:]
for line in sys.stdin.buffer:
    if not any(text.encode() in line for text in noise):
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
"""


_installed = False


def filter_native_stderr() -> None:
    """Send what native code writes to file descriptor 2 through a filter, once per process.

    Python's own `sys.stderr` keeps the terminal. The filter is a process of its own, so that the
    last words of a crashing driver still come through.
    """
    global _installed  # noqa: PLW0603
    if _installed:
        return
    _installed = True
    with contextlib.suppress(OSError, ValueError):
        terminal = os.dup(2)
        filtering = subprocess.Popen(
            [sys.executable, "-S", "-c", _FILTER, *NOISE],
            stdin=subprocess.PIPE,
            stdout=terminal,
            start_new_session=True,  # Ctrl-C is for the driver
        )
        assert filtering.stdin is not None
        sys.stderr.flush()
        os.dup2(filtering.stdin.fileno(), 2)
        filtering.stdin.close()
        sys.stderr = os.fdopen(terminal, "w", buffering=1, errors="backslashreplace")
        # Waited for by nobody: it ends when the last holder of the pipe does.
        filtering.returncode = 0


def hush_raylets() -> None:
    """Keep what Ray tells drivers of dying nodes and workers off the terminal.

    Of a lost node Ray prints thirty lines of a raylet's log to stdout, whatever `log_to_driver`
    says; `cluster.NodeWatch` says it in one. The text goes to the logger `icce_ray.ray`.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):  # not part of Ray's interface
        worker.print_to_stdstream = _to_logger


def _to_logger(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
    logging.getLogger("icce_ray.ray").debug("\n".join(data.get("lines", ())))
