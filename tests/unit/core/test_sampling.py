"""No two random streams share a seed."""

from __future__ import annotations

from icce_ray.core.sampling import seed_of


def test_streams_of_all_seeds_purposes_and_numbers_differ():
    purposes = ("pairs", "head weights", "k-means start", "epoch")
    seeds = {seed_of(s, p, n) for s in range(5) for p in purposes for n in range(500)}
    assert len(seeds) == 5 * len(purposes) * 500
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_stream_is_always_the_same():
    assert seed_of(0, "pairs", 1) == 318626540446218277
