"""Which heads are kept."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core.ensemble.agreement import align
from icce_ray.core.ensemble.selection import likeliest_group, most_informed


def test_the_most_informed_heads_are_kept_and_ties_go_to_the_lower_number():
    information = np.array([0.1, 0.9, 0.3, 0.9])
    assert most_informed(information, 3).tolist() == [1, 2, 3]
    assert most_informed(information, 1).tolist() == [1]
    assert most_informed(information, 4).tolist() == [0, 1, 2, 3]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.data())
def test_no_head_left_out_is_better_than_one_kept(values, data):
    count = data.draw(st.integers(1, len(values)))
    kept = most_informed(np.array(values), count).tolist()
    assert len(kept) == count and kept == sorted(kept)
    rest = set(range(len(values))) - set(kept)
    assert all(values[head] <= min(values[h] for h in kept) for head in rest)


def test_the_group_of_the_best_better_half_is_taken():
    evidence = np.array([0.5, 0.0, 0.5, 0.9, 0.4, 0.0])  # better halves: 0.5 and 0.45
    assert likeliest_group(evidence, [1, 2, 1, 2, 1, 2]).tolist() == [0, 2, 4]


def test_without_evidence_the_first_group_is_taken():
    assert likeliest_group(np.array([-0.2, 0.0, -0.1, 0.0]), [0.5, 0.0, 0.5, 0.0]).tolist() == [
        0,
        2,
    ]


def test_a_chosen_half_beats_all_heads_where_half_are_noise(solve, noisy_heads):
    truth, good = noisy_heads(900, 6, 5, error=0.45)
    noise = np.random.default_rng(3).integers(0, 5, (900, 6)).astype(np.int16)
    both = np.concatenate([good, noise], axis=1)
    kept = most_informed(np.r_[np.ones(6), np.zeros(6)], 6)
    every, half = solve(both, 5, "voting"), solve(both, 5, "voting", kept=kept)
    right = [(align(one.labels, truth, 5) == truth).mean() for one in (every, half)]
    assert right[1] > right[0] + 0.02
