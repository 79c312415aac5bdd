"""TODO"""

from __future__ import annotations

import os
from pathlib import Path


def environment_cache() -> Path:
    """Node-local cache: ICCE_RAY_CACHE, else XDG_CACHE_HOME/icce_ray, else ~/.cache/icce_ray."""
    if root := os.environ.get("ICCE_RAY_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "icce_ray"
