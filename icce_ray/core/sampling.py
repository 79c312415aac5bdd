"""Random numbers and random rows: every purpose of a run has a stream of its own.

`seed + 1` or `seed * constant + number` would give two purposes the same stream (head n's start
and step n's pairs did share one). numpy's SeedSequence mixes all parts into independent seeds.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(seed: int, purpose: str, number: int = 0) -> int:
    """The seed of one purpose within a run: a 63-bit integer, for torch and numpy generators.

    The same arguments give the same seed on every machine and in every process.

    Args:
        seed: the run's seed, >= 0.
        purpose: a short constant name, such as "head" or "pairs".
        number: of the head, step or epoch, >= 0.
    """
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    state = np.random.SeedSequence([seed, name, number]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def sample_rows(rows: int, most: int, seed: int) -> np.ndarray:
    """Sorted numbers of at most `most` of `rows` rows, drawn at random: int64 [min(rows, most)]."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
