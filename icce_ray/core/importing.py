"""Imports that take seconds."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from typing import Any


def whole(name: str) -> Any:
    """Import a large module so that an interrupt cannot leave half of it behind.

    Neither torch nor Ray can be imported again after that, and a notebook whose cell was stopped
    lives on. Interrupts reach the main thread only: another one imports, and is not cut short.
    """
    if name not in sys.modules:
        thread = threading.Thread(target=_import, args=(name,), name=f"import of {name}")
        thread.start()
        thread.join()
    return importlib.import_module(name)


def _import(name: str) -> None:
    with contextlib.suppress(Exception):  # which the import in the caller raises again
        importlib.import_module(name)
