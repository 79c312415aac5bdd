"""Seeds and random rows."""

from __future__ import annotations

import numpy as np
import torch

from icce_ray.core.sampling import sample_rows, seed_of

SEED = 2956871065109747407


def test_seeds_of_different_purposes_numbers_and_runs_differ() -> None:
    seeds = [
        seed_of(seed, purpose, number)
        for seed in (0, 1, 2**31 - 1)
        for purpose in ("head", "pairs", "")
        for number in (0, 1, 1_000_003)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_version() -> None:
    """Finished runs can be repeated only while this number stays."""
    assert seed_of(0, "head", 3) == SEED
    torch.Generator().manual_seed(SEED)
    np.random.default_rng(SEED)


def test_rows_are_sorted_distinct_and_repeatable() -> None:
    rows = sample_rows(1000, 50, 7)
    assert len(set(rows.tolist())) == 50 and (np.diff(rows) > 0).all()
    assert (rows == sample_rows(1000, 50, 7)).all()
    assert (sample_rows(1000, 50, 8) != rows).any()
    assert sample_rows(5, 50, 0).tolist() == [0, 1, 2, 3, 4]
