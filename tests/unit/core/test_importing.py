"""Large imports are whole or not there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from icce_ray.core.importing import whole

STOPPED_HALFWAY = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.2)
open("times", "a").write("x")
done = True
"""


def test_an_interrupt_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stopped_halfway.py").write_text(STOPPED_HALFWAY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            whole("stopped_halfway")
    finally:
        signal.signal(signal.SIGINT, before)
    assert whole("stopped_halfway").done
    assert Path("times").read_text() == "x"


def test_what_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        whole("damaged_module")
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        whole("not_there")
