"""Keeps known noise of native code off the terminal, and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

# Every actor pool of Ray Data makes Ray's C++ core print this with severity "E"; it concerns
# restarts after the loss of the driver's own objects, which no restart survives anyway.
NOISE = ("has constructor arguments in the object store and max_restarts > 0",)

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
