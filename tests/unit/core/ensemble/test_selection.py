"""Which heads are kept, and how much they count."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score as nmi

from icce_ray.core.ensemble.agreement import align
from icce_ray.core.ensemble.consensus import consensus
from icce_ray.core.ensemble.selection import KEEP_BY, head_weights
from icce_ray.errors import ConfigError, DataError


def heads_of(errors, rows=600, clusters=5, seed=0):
    """Classes [N], and one head per error rate [N, H], under random names."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, clusters, rows)
    columns = []
    for error in errors:
        wrong = rng.random(rows) < error
        labels = np.where(wrong, rng.integers(0, clusters, rows), truth)
        columns.append(rng.permutation(clusters)[labels])
    return truth, np.stack(columns, axis=1)


def kept(*arguments, **options):
    return np.flatnonzero(head_weights(*arguments, **options)).tolist()


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 7), st.integers(0, 10_000), st.integers(1, 6))
def test_agreement_keeps_the_heads_of_highest_mean_nmi(heads, seed, keep):
    rng = np.random.default_rng(seed)
    _, assignments = heads_of(rng.uniform(0.1, 0.9, heads), rows=80, clusters=3, seed=seed)
    mean = [
        np.mean([nmi(assignments[:, i], assignments[:, j]) for j in range(heads) if j != i])
        for i in range(heads)
    ]
    count = min(keep, heads)
    found = kept(assignments, keep=count)
    assert len(found) == count
    worst_kept = min(mean[head] for head in found)
    assert all(mean[head] <= worst_kept + 1e-9 for head in set(range(heads)) - set(found))


def test_agreement_leaves_noise_out():
    _, assignments = heads_of([0.2, 1.0, 0.2, 0.2, 1.0, 0.2])
    assert kept(assignments, keep=4) == [0, 2, 3, 5]


def test_loss_keeps_the_lowest():
    _, assignments = heads_of([0.2] * 4)
    losses = np.array([-1.0, -3.0, -2.0, 0.5])
    assert kept(assignments, keep=2, keep_by="loss", losses=losses) == [1, 2]
    assert kept(assignments, keep=1, keep_by="loss", losses=losses) == [1]


def test_information_keeps_the_highest():
    _, assignments = heads_of([0.2] * 4)
    given_ = {"keep_by": "information", "information": np.array([0.1, 0.9, 0.3, 0.9])}
    assert kept(assignments, keep=3, **given_) == [1, 2, 3]
    assert kept(assignments, keep=1, **given_) == [1]  # a tie goes to the lower number


@pytest.mark.parametrize("count", [2, 3])
def test_diversity_takes_one_head_of_each_kind(count):
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, (800, 3))  # three unrelated clusterings, three copies of each
    assignments = np.stack([kinds[:, h % 3] for h in range(9)], axis=1)
    found = kept(assignments, keep=count, keep_by="diversity")
    assert len({head % 3 for head in found}) == count


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10_000), st.integers(1, 7))
def test_diversity_equals_plain_farthest_first(heads, seed, keep):
    rng = np.random.default_rng(seed)
    _, assignments = heads_of(rng.uniform(0.1, 0.9, heads), rows=60, clusters=3, seed=seed)
    like = {
        (i, j): nmi(assignments[:, i], assignments[:, j])
        for i, j in itertools.product(range(heads), repeat=2)
    }
    means = [sum(like[i, j] for j in range(heads) if j != i) for i in range(heads)]
    chosen = [int(np.argmax(np.round(means, 9)))]
    keep = min(keep, heads)
    while len(chosen) < keep:
        rest = [i for i in range(heads) if i not in chosen]
        chosen.append(min(rest, key=lambda i: (round(max(like[i, j] for j in chosen), 9), i)))
    assert kept(assignments, keep=keep, keep_by="diversity") == sorted(chosen)


@pytest.mark.parametrize("keep_by", ["agreement", "diversity"])
def test_collapsed_heads_are_kept_last(keep_by):
    _, assignments = heads_of([0.3] * 6)
    assignments[:, [0, 3]] = 2
    assert kept(assignments, keep=4, keep_by=keep_by) == [1, 2, 4, 5]


def test_weights_rise_with_agreement_and_fall_with_loss():
    _, assignments = heads_of([0.1, 0.1, 0.4, 0.8])
    by_agreement = head_weights(assignments, weights="agreement")
    assert by_agreement[:2].min() > by_agreement[2] > by_agreement[3] > 0
    losses = np.array([-3.0, -2.0, -1.0, 100.0])
    by_loss = head_weights(assignments, weights="loss", losses=losses)
    assert (np.diff(by_loss) < 0).all()
    assert (by_loss > 0).all()
    assert np.allclose(by_loss, head_weights(assignments, weights="loss", losses=7 * losses + 3))
    same = head_weights(assignments, weights="loss", losses=np.ones(4))
    assert same.tolist() == [1, 1, 1, 1]
    for values in (by_agreement, by_loss):
        assert values.mean() == pytest.approx(1)


def test_names_of_clusters_do_not_matter():
    _, assignments = heads_of([0.2, 0.4, 0.5, 0.3])
    rng = np.random.default_rng(1)
    renamed = np.stack([rng.permutation(5)[column] for column in assignments.T], axis=1)
    for options in ({"keep": 2, "keep_by": "diversity"}, {"weights": "agreement"}):
        assert np.allclose(head_weights(assignments, **options), head_weights(renamed, **options))


def test_defaults_need_nothing_and_change_nothing():
    assert head_weights(np.zeros((5, 3), int)).tolist() == [1, 1, 1]
    assert head_weights(np.zeros((5, 1), int), keep=1, weights="agreement").tolist() == [1]


def test_a_chosen_half_beats_all_heads_where_half_are_noise():
    truth, assignments = heads_of([0.45] * 6 + [1.0] * 6, rows=900)
    options = {"max_rows": 1000, "iterations": 20, "seed": 0}
    every = consensus(assignments, 5, "voting", **options).labels
    half = consensus(
        assignments, 5, "voting", weights=head_weights(assignments, keep=6), **options
    ).labels
    right = [(align(labels, truth, 5) == truth).mean() for labels in (every, half)]
    assert right[1] > right[0] + 0.02


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keep": 0}, ConfigError, "0 of 3 heads"),
        ({"keep": 4}, ConfigError, "4 of 3 heads"),
        ({"keep_by": "luck"}, ConfigError, ", ".join(KEEP_BY)),
        ({"weights": "luck"}, ConfigError, "equal, agreement, loss"),
        ({"weights": "loss"}, DataError, "not known"),
        ({"keep": 2, "keep_by": "loss", "losses": np.ones(2)}, DataError, "3 finite"),
        ({"keep": 2, "keep_by": "information"}, DataError, "information are not known"),
        ({"weights": "loss", "losses": np.array([1, np.nan, 2])}, DataError, "3 finite"),
    ],
)
def test_bad_choices_are_named(options, error, words):
    with pytest.raises(error, match=words):
        head_weights(np.arange(12).reshape(4, 3) % 2, **options)
