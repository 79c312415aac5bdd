"""Windows and macOS: what they lack is imported nowhere, or only where it is there.

Neither system was tried: these tests take away on Linux what is missing elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from icce_ray.rundir import lock

# Modules of Linux alone, or of POSIX systems; Triton has no wheels but for Linux.
HIDDEN = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "triton")
# Imported by nothing but closed_form.fused, on a GPU, where Triton is there.
KERNELS = "icce_ray.core.heads.kernels"

CODE = f"""
import builtins, importlib, pkgutil, sys
real = builtins.__import__
def guarded(name, globals=None, *rest, **more):
    ours = (globals or {{}}).get("__name__", "").startswith("icce_ray")
    if ours and name.split(".")[0] in {HIDDEN!r}:
        raise ImportError("hidden: " + name)
    return real(name, globals, *rest, **more)
builtins.__import__ = guarded
import icce_ray
names = [m.name for m in pkgutil.walk_packages(icce_ray.__path__, "icce_ray.")]
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
assert len(names) > 60
assert sys.modules["icce_ray.rundir.lock"].fcntl is None
"""


def test_every_module_imports_without_what_other_systems_lack() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{KERNELS} hidden: triton"]


def test_a_process_is_never_signalled_where_that_would_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Windows os.kill(pid, 0) is no question."""
    asked = []
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(os, "kill", lambda *arguments: asked.append(arguments))
    assert not lock.is_gone({**lock.this_process(), "born": "another"})
    assert not asked
