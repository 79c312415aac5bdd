"""All consensus functions: known answers, invariances and edges."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core.ensemble import consensus as core
from icce_ray.core.ensemble import dawid_skene
from icce_ray.core.ensemble.agreement import align
from icce_ray.core.ensemble.consensus import METHODS
from icce_ray.errors import ConfigError, DataError

# --- known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_renamed_copies_of_one_clustering_give_it_back(solve, same_partition, noisy_heads, method):
    truth, assignments = noisy_heads(600, 6, 5, error=0.0)
    found = solve(assignments, 5, method)
    assert same_partition(found.labels, truth)
    assert found.confidence.min() > 0.99
    assert found.info["head_accuracy"] == [1.0] * 6
    assert found.info["empty_clusters"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_beats_heads_that_err_merge_and_split(solve, accuracy, merging_heads, method):
    truth, assignments = merging_heads(1500, 12, 6)
    single = [accuracy(column, truth, 6) for column in assignments.T]
    found = solve(assignments, 6, method)
    # a vote cannot bring back a class that the first heads merged
    floor = max(single) + 0.1 if method == "voting" else 0.97
    assert accuracy(found.labels, truth, 6) > floor


@pytest.mark.parametrize("method", METHODS)
def test_wrong_images_are_less_sure(solve, noisy_heads, method):
    truth, assignments = noisy_heads(1500, 6, 5, error=0.45)
    found = solve(assignments, 5, method)
    right = align(found.labels, truth, 5) == truth
    assert 0.8 < right.mean() < 0.99
    assert found.confidence[right].mean() > found.confidence[~right].mean() + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_one_head_of_pure_noise_does_little_harm(solve, accuracy, noisy_heads, method):
    truth, assignments = noisy_heads(1500, 8, 5, error=0.2)
    assignments[:, 0] = np.random.default_rng(9).integers(0, 5, 1500)
    found = solve(assignments, 5, method)
    assert accuracy(found.labels, truth, 5) > 0.97
    trust = found.info["head_accuracy"]
    assert trust[0] < 0.35
    assert min(trust[1:]) > 0.7


@pytest.mark.parametrize("method", ["voting", "mcla", "dawid-skene", "cspa"])
def test_finds_clusters_of_unequal_size(solve, accuracy, method):
    rng = np.random.default_rng(2)
    truth = rng.choice(4, 1500, p=[0.55, 0.25, 0.15, 0.05])
    columns = [np.where(rng.random(1500) < 0.15, rng.integers(0, 4, 1500), truth) for _ in range(9)]
    found = solve(np.stack(columns, axis=1), 4, method)
    floor = 0.5 if method == "cspa" else 0.97  # METIS wants equal parts: documented
    assert accuracy(found.labels, truth, 4) > floor
    assert (np.diff(np.bincount(found.labels)) <= 0).all()


@pytest.mark.parametrize("method", ["voting", "mcla", "hbgf"])
def test_confidence_is_the_share_of_agreeing_heads(solve, noisy_heads, method):
    _, assignments = noisy_heads(400, 7, 4, error=0.3)
    found = solve(assignments, 4, method)
    same = [align(column, found.labels, 4) == found.labels for column in assignments.T]
    assert found.confidence == pytest.approx(np.mean(same, axis=0), abs=1e-6)


# --- invariances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_names_of_a_heads_clusters_do_not_matter(solve, merging_heads, renamed, method):
    _, assignments = merging_heads(500, 7, 6)
    first = solve(assignments, 6, method)
    again = solve(renamed(assignments, 6, seed=5), 6, method)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.confidence, again.confidence)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_result_whatever_the_memory_layout(solve, noisy_heads, method):
    _, assignments = noisy_heads(900, 5, 5)
    first = solve(assignments, 5, method, max_rows=400, seed=3)
    again = solve(np.asfortranarray(assignments.astype(np.int64)), 5, method, max_rows=400, seed=3)
    assert np.array_equal(first.labels, again.labels)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_clusters_is_canonical(solve, noisy_heads, method):
    _, assignments = noisy_heads(300, 4, 5)
    labels = solve(assignments, 5, method).labels
    sizes = np.bincount(labels, minlength=5)
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(5)]
    assert list(range(5)) == sorted(range(5), key=lambda c: (-sizes[c], first[c]))


@pytest.mark.parametrize("method", core.OVER_CLUSTERED)
@pytest.mark.parametrize("max_rows", [100_000, 500])
def test_clusters_of_over_clustered_heads_are_merged(
    solve, accuracy, renamed, splitting_heads, method, max_rows
):
    truth, assignments = splitting_heads(1200, 10, 5, 3)
    found = solve(assignments, 5, method, head_clusters=15, max_rows=max_rows)
    assert np.unique(found.labels).tolist() == list(range(5))
    assert accuracy(found.labels, truth, 5) > 0.95
    assert 0.3 < found.confidence.mean() < 0.95
    assert np.mean(found.info["head_accuracy"]) == pytest.approx(0.8 + 0.2 / 5, abs=0.04)
    again = solve(renamed(assignments, 15, seed=5), 5, method, head_clusters=15, max_rows=max_rows)
    assert np.array_equal(found.labels, again.labels)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_over_clustered_input_gives_labels_in_range(solve, data):
    clusters = data.draw(st.integers(1, 5))
    each = data.draw(st.integers(clusters, 9))
    rows = data.draw(st.integers(clusters, 24))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    method = data.draw(st.sampled_from(core.OVER_CLUSTERED))
    assignments = rng.integers(0, data.draw(st.integers(1, each)), (rows, 3))
    found = solve(assignments, clusters, method, head_clusters=each, max_rows=20)
    assert ((found.labels >= 0) & (found.labels < clusters)).all()
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()


def test_heads_of_other_clusters_are_refused_where_nothing_can_merge_them(solve, splitting_heads):
    _, assignments = splitting_heads(60, 3, 3, 2)
    with pytest.raises(ConfigError, match=r"voting.*cspa"):
        solve(assignments, 3, "voting", head_clusters=6)
    with pytest.raises(ConfigError, match="single head"):
        solve(assignments, 3, "mcla", head_clusters=6, kept=[1])
    with pytest.raises(ConfigError, match=r"raise heads\.clusters"):
        solve(assignments, 3, "mcla", head_clusters=2)
    with pytest.raises(DataError, match=r"heads of 4 clusters"):
        solve(assignments, 3, "mcla", head_clusters=4)


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_single_head_is_its_own_consensus(solve, same_partition, noisy_heads, method):
    _, assignments = noisy_heads(50, 1, 4)
    assignments[assignments == 3] = 0  # an empty cluster stays empty: nothing tells how to split
    found = solve(assignments, 4, method)
    assert same_partition(found.labels, assignments[:, 0])
    assert (found.confidence == 1).all()
    assert found.info["empty_clusters"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_use_few_clusters_still_give_k(solve, method):
    rng = np.random.default_rng(1)
    assignments = rng.integers(0, 3, (400, 5))  # 3 of 8 clusters in use, but 243 label vectors
    found = solve(assignments, 8, method)
    assert sorted(np.unique(found.labels)) == list(range(8))
    assert found.info["empty_clusters"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_too_few_distinct_label_vectors_leave_clusters_empty(solve, method):
    assignments = np.repeat([[0, 0, 1], [1, 0, 0]], 30, axis=0)
    found = solve(assignments, 9, method)
    assert found.labels.min() == 0
    assert found.labels.max() < 9
    assert found.info["empty_clusters"] == 9 - len(np.unique(found.labels))
    if method != "hbgf":  # METIS may part images that no head can tell apart
        assert len(np.unique(found.labels)) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_as_many_clusters_as_images(solve, method, rows):
    rng = np.random.default_rng(rows)
    assignments = rng.integers(0, rows, (rows, 3))
    found = solve(assignments, rows, method)
    assert found.labels.shape == (rows,)
    assert 0 <= found.labels.min() <= found.labels.max() < rows


@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_head_is_harmless(solve, accuracy, noisy_heads, method):
    truth, assignments = noisy_heads(600, 6, 4, error=0.1)
    assignments[:, 2] = 0
    assert accuracy(solve(assignments, 4, method).labels, truth, 4) > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_all_heads_collapsed(solve, method):
    found = solve(np.zeros((40, 3), np.int16), 4, method)
    assert found.labels.shape == (40,)
    assert found.info["empty_clusters"] <= 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_input_gives_labels_and_confidence_in_range(solve, data):
    clusters = data.draw(st.integers(1, 5))
    rows = data.draw(st.integers(clusters, 24))
    heads = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 1000))
    method = data.draw(st.sampled_from(METHODS))
    rng = np.random.default_rng(seed)
    used = data.draw(st.integers(1, clusters))
    assignments = rng.integers(0, used, (rows, heads))
    found = solve(assignments, clusters, method, max_rows=data.draw(st.integers(1, 30)))
    assert found.labels.dtype == np.int32
    assert found.confidence.dtype == np.float32
    assert ((found.labels >= 0) & (found.labels < clusters)).all()
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()
    if heads > 1 and len(np.unique(found.labels)) < clusters:  # no head splits any cluster
        vectors = np.unique(np.column_stack([found.labels, assignments]), axis=0)
        assert len(vectors) == len(np.unique(found.labels))
    json.dumps(found.info)


@pytest.mark.parametrize("method", ["hbgf", "dawid-skene"])
def test_fitted_on_a_sample_and_applied_to_all(solve, accuracy, noisy_heads, method):
    truth, assignments = noisy_heads(4000, 8, 5, error=0.2)
    found = solve(assignments, 5, method, max_rows=800)
    assert found.info["fitted_rows"] == 800
    assert accuracy(found.labels, truth, 5) > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_are_not_kept_have_no_say(solve, noisy_heads, method):
    _, assignments = noisy_heads(500, 6, 4, error=0.1)
    noise = np.random.default_rng(3).integers(0, 4, (500, 8)).astype(np.int16)
    both = np.concatenate([assignments, noise], axis=1)
    found = solve(both, 4, method, kept=range(6))
    assert np.array_equal(found.labels, solve(assignments, 4, method).labels)
    assert found.info["heads"] == 6
    assert found.info["head_accuracy"][6:] == [None] * 8


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"assignments": np.full((9, 2), 4)}, DataError, "assigns cluster 4"),
        ({"assignments": np.full((9, 2), -1)}, DataError, "negative"),
        ({"assignments": np.zeros((9, 2))}, DataError, "integers"),
        ({"assignments": np.zeros(9, int)}, DataError, "matrix"),
        ({"assignments": np.zeros((0, 2), int)}, DataError, "no head assignments"),
        ({"assignments": np.zeros((2, 2), int)}, ConfigError, "exceeds the number of images"),
        ({"method": "mode"}, ConfigError, "dawid-skene"),
        ({"max_rows": 0}, ConfigError, "max_rows"),
        ({"kept": []}, DataError, r"one or more of 0\.\.1"),
        ({"kept": [0, 2]}, DataError, r"found \[0, 2\]"),
        ({"kept": [-1]}, DataError, r"found \[-1\]"),
    ],
)
def test_bad_input_is_named(solve, change, error, words):
    options = {"assignments": np.zeros((9, 2), int), "method": "voting", **change}
    with pytest.raises(error, match=words):
        solve(options.pop("assignments"), 4, options.pop("method"), **options)


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["voting", "mcla", "hbgf", "dawid-skene"])
def test_memory_stays_far_below_a_dense_array(
    solve, accuracy, noisy_heads, method, tmp_path, monkeypatch
):
    monkeypatch.setattr(dawid_skene, "ITERATIONS", 3)
    rows, heads, clusters = 20_000, 10, 400
    truth, assignments = noisy_heads(rows, heads, clusters, error=0.4)
    np.save(tmp_path / "assignments.npy", assignments)
    mapped = np.load(tmp_path / "assignments.npy", mmap_mode="r")
    tracemalloc.start()
    found = solve(mapped, clusters, method, max_rows=5_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * rows * heads * clusters * 4
    assert accuracy(found.labels, truth, clusters) > 0.85
