"""The cluster ensemble against plain references, known answers and invariances."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.metrics import normalized_mutual_info_score

from icce_ray.core.ensemble import agreement, dawid_skene, graph
from icce_ray.core.ensemble import base as base_
from icce_ray.core.ensemble import consensus as core
from icce_ray.core.ensemble.agreement import align, match, pairwise_nmi
from icce_ray.core.ensemble.consensus import METHODS, consensus
from icce_ray.errors import ConfigError, DataError


def solve(assignments, clusters, method, **options):
    options = {"max_rows": 100_000, "iterations": 30, "seed": 0, **options}
    return consensus(assignments, clusters, method, **options)


def accuracy(labels, truth, clusters):
    return float((align(labels, truth, clusters) == truth).mean())


def same_partition(a, b):
    return len(np.unique(np.stack([a, b]), axis=1).T) == len(np.unique(a)) == len(np.unique(b))


def noisy_heads(rows, heads, clusters, error=0.25, seed=0):
    """Classes [N] of equal size, and heads [N, H] that err independently, with random names."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(rows) % clusters)
    columns = []
    for _ in range(heads):
        wrong = rng.random(rows) < error
        labels = np.where(wrong, rng.integers(0, clusters, rows), truth)
        columns.append(rng.permutation(clusters)[labels])
    return truth, np.stack(columns, axis=1).astype(np.int16)


def merging_heads(rows, heads, clusters, seed=0, error=0.1):
    """As above, but each head also merges a pair of classes and splits a third one by chance."""
    truth, assignments = noisy_heads(rows, heads, clusters, error=error, seed=seed)
    rng = np.random.default_rng(seed + 1)
    for column in assignments.T:
        kept, merged, split = rng.choice(clusters, 3, replace=False)
        column[column == merged] = kept
        column[(column == split) & (rng.random(rows) < 0.5)] = merged
    return truth, assignments


def renamed(assignments, clusters, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(clusters)[column] for column in assignments.T], axis=1)


# --- matching and NMI ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda k: st.tuples(
            st.just(k),
            st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1),
        )
    )
)
def test_match_is_the_best_of_all_permutations(case):
    clusters, pairs = case
    labels, reference = np.array(pairs).T
    found = match(labels, reference, clusters)
    assert sorted(found) == list(range(clusters))
    best = max(
        (np.array(p)[labels] == reference).sum() for p in itertools.permutations(range(clusters))
    )
    assert (align(labels, reference, clusters) == reference).sum() == best


@pytest.mark.parametrize("clusters", [5, 1500])  # dense and sparse counting
def test_pairwise_nmi_equals_scikit_learn(clusters):
    rng = np.random.default_rng(0)
    base = rng.integers(0, clusters, 400)
    heads = [np.where(rng.random(400) < p, rng.integers(0, clusters, 400), base) for p in (0, 0.4)]
    assignments = np.stack([*heads, rng.integers(0, clusters, 400)], axis=1)
    found = pairwise_nmi(assignments)
    for i, j in itertools.product(range(3), repeat=2):
        expected = normalized_mutual_info_score(assignments[:, i], assignments[:, j])
        assert found[i, j] == pytest.approx(expected, abs=1e-9)


def test_nmi_of_heads_with_a_single_cluster():
    flat = np.zeros((6, 2), int)
    assert pairwise_nmi(flat).tolist() == [[1, 1], [1, 1]]
    flat[:, 1] = np.arange(6) % 2
    assert pairwise_nmi(flat)[0, 1] == 0


def test_head_agreement():
    _, assignments = noisy_heads(500, 4, 5, error=0.0)
    assert agreement.head_agreement(assignments) == pytest.approx(1)
    assert agreement.head_agreement(assignments[:, :1]) == 1.0
    noise = np.random.default_rng(0).integers(0, 5, (2000, 3))
    assert agreement.head_agreement(noise, 5, max_rows=1000) < 0.05


# --- known answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_renamed_copies_of_one_clustering_give_it_back(method):
    truth, assignments = noisy_heads(600, 6, 5, error=0.0)
    found = solve(assignments, 5, method)
    assert same_partition(found.labels, truth)
    assert found.confidence.min() > 0.99
    assert found.info["head_accuracy"] == [1.0] * 6
    assert found.info["empty_clusters"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_beats_heads_that_err_merge_and_split(method):
    truth, assignments = merging_heads(1500, 12, 6)
    single = [accuracy(column, truth, 6) for column in assignments.T]
    found = solve(assignments, 6, method)
    # a vote cannot bring back a class that the first heads merged
    floor = max(single) + 0.1 if method == "voting" else 0.97
    assert accuracy(found.labels, truth, 6) > floor


@pytest.mark.parametrize("method", METHODS)
def test_wrong_images_are_less_sure(method):
    truth, assignments = noisy_heads(1500, 6, 5, error=0.45)
    found = solve(assignments, 5, method)
    right = align(found.labels, truth, 5) == truth
    assert 0.8 < right.mean() < 0.99
    assert found.confidence[right].mean() > found.confidence[~right].mean() + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_one_head_of_pure_noise_does_little_harm(method):
    truth, assignments = noisy_heads(1500, 8, 5, error=0.2)
    assignments[:, 0] = np.random.default_rng(9).integers(0, 5, 1500)
    found = solve(assignments, 5, method)
    assert accuracy(found.labels, truth, 5) > 0.97
    trust = found.info["head_accuracy"]
    assert trust[0] < 0.35
    assert min(trust[1:]) > 0.7


@pytest.mark.parametrize("method", ["voting", "mcla", "dawid-skene", "cspa"])
def test_finds_clusters_of_unequal_size(method):
    rng = np.random.default_rng(2)
    truth = rng.choice(4, 1500, p=[0.55, 0.25, 0.15, 0.05])
    columns = [np.where(rng.random(1500) < 0.15, rng.integers(0, 4, 1500), truth) for _ in range(9)]
    found = solve(np.stack(columns, axis=1), 4, method)
    floor = 0.5 if method == "cspa" else 0.97  # METIS wants equal parts: documented
    assert accuracy(found.labels, truth, 4) > floor
    assert (np.diff(np.bincount(found.labels)) <= 0).all()


def test_random_cycles_visit_every_image_of_a_cluster_once():
    labels = np.array([0, 1, 0, 2, 1, 0, 0, 3, 1])
    start, end = graph._random_cycles(labels, np.random.default_rng(0))
    assert (labels[start] == labels[end]).all()
    expected = np.flatnonzero(np.isin(labels, [0, 1]))  # clusters of one image have no edge
    assert sorted(start) == sorted(end) == expected.tolist()
    follows = dict(zip(start.tolist(), end.tolist(), strict=True))
    place, seen = follows[0], 1
    while place != 0:
        place, seen = follows[place], seen + 1
    assert seen == 4


# --- plain references ----------------------------------------------------------------------------


def plain_dawid_skene(assignments, start, clusters, steps, each=None):
    """EM written out, with the smoothing of the module. each: clusters per head."""
    each = each or clusters
    rows, heads = assignments.shape
    posterior = np.eye(clusters)[start]
    history = []
    for _ in range(steps):
        size = posterior.sum(axis=0)
        prior = (size + 1) / (rows + clusters)
        confusion = np.full((heads, each, clusters), dawid_skene.SMOOTHING / each)
        for n, h in itertools.product(range(rows), range(heads)):
            confusion[h, assignments[n, h]] += posterior[n]
        confusion /= size + dawid_skene.SMOOTHING
        likelihood = np.tile(prior, (rows, 1))
        for n, h in itertools.product(range(rows), range(heads)):
            likelihood[n] *= confusion[h, assignments[n, h]]
        history.append(np.log(likelihood.sum(axis=1)).mean())
        posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
    return posterior, confusion, prior, history


@pytest.mark.parametrize("clusters", [3, 7])
def test_dawid_skene_equals_plain_em(clusters):
    _, assignments = noisy_heads(400, 5, clusters, error=0.35, seed=4)
    found = solve(assignments, clusters, "dawid-skene", iterations=6)
    used = found.info["path"].removeprefix("EM from ")
    steps = len(found.info["log_likelihood"])
    ensemble = make_ensemble(assignments, clusters)
    start = core._SOLVERS[used](ensemble).labels
    posterior, confusion, prior, history = plain_dawid_skene(
        ensemble.heads.T, start, clusters, steps
    )
    assert found.info["log_likelihood"] == pytest.approx(history, abs=2e-3)
    assert same_partition(found.labels, posterior.argmax(axis=1))
    # confidence: the likelihood averaged over the heads
    logs = np.log([[confusion[h, c] for h, c in enumerate(row)] for row in ensemble.heads.T])
    single = prior * np.exp(logs.mean(axis=1))
    single /= single.sum(axis=1, keepdims=True)
    expected = single[np.arange(400), posterior.argmax(axis=1)]
    assert np.abs(found.confidence - expected).max() < 0.02


def make_ensemble(assignments, clusters, each=None):
    used, weights = core._check_weights(None, assignments.shape[1])
    heads = core._canonical_heads(assignments, used, each or clusters)
    return base_.Ensemble(heads, clusters, each or clusters, weights, 100_000, 30, 0)


def test_dawid_skene_log_likelihood_rises():
    _, assignments = merging_heads(1000, 6, 8, seed=3, error=0.4)
    history = solve(assignments, 8, "dawid-skene").info["log_likelihood"]
    assert len(history) > 2
    assert (np.diff(history) > -1e-3).all()
    assert history[-1] > history[0]


def plain_voting(assignments, clusters):
    """Every alignment by trying all permutations; votes counted image by image."""
    rows, heads = assignments.shape
    nmi = [
        sum(
            normalized_mutual_info_score(assignments[:, i], assignments[:, j]) for j in range(heads)
        )
        for i in range(heads)
    ]
    votes = np.zeros((rows, clusters))
    for step, head in enumerate(np.argsort(-np.array(nmi), kind="stable")):
        options = [
            np.array(p)[assignments[:, head]] for p in itertools.permutations(range(clusters))
        ]
        named = max(options, key=lambda x: votes[np.arange(rows), x].sum()) if step else options[0]
        votes[np.arange(rows), named] += 1
    return votes


@pytest.mark.parametrize("seed", range(5))
def test_voting_equals_brute_force(seed):
    _, assignments = noisy_heads(300, 5, 4, error=0.3, seed=seed)
    votes = plain_voting(make_ensemble(assignments, 4).heads.T, 4)
    clear = (votes == votes.max(axis=1, keepdims=True)).sum(axis=1) == 1
    found = solve(assignments, 4, "voting").labels
    assert clear.mean() > 0.8
    assert same_partition(found[clear], votes.argmax(axis=1)[clear])


@pytest.mark.parametrize("method", ["voting", "mcla", "hbgf"])
def test_confidence_is_the_share_of_agreeing_heads(method):
    _, assignments = noisy_heads(400, 7, 4, error=0.3)
    found = solve(assignments, 4, method)
    same = [align(column, found.labels, 4) == found.labels for column in assignments.T]
    assert found.confidence == pytest.approx(np.mean(same, axis=0), abs=1e-6)


# --- invariances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_names_of_a_heads_clusters_do_not_matter(method):
    _, assignments = merging_heads(500, 7, 6)
    first = solve(assignments, 6, method)
    again = solve(renamed(assignments, 6, seed=5), 6, method)
    assert np.array_equal(first.labels, again.labels)
    assert np.array_equal(first.confidence, again.confidence)


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_result_whatever_the_memory_layout(method):
    _, assignments = noisy_heads(900, 5, 5)
    first = solve(assignments, 5, method, max_rows=400, seed=3)
    again = solve(np.asfortranarray(assignments.astype(np.int64)), 5, method, max_rows=400, seed=3)
    assert np.array_equal(first.labels, again.labels)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_clusters_is_canonical(method):
    _, assignments = noisy_heads(300, 4, 5)
    labels = solve(assignments, 5, method).labels
    sizes = np.bincount(labels, minlength=5)
    first = [int(np.flatnonzero(labels == c)[0]) for c in range(5)]
    assert list(range(5)) == sorted(range(5), key=lambda c: (-sizes[c], first[c]))


# --- heads of more clusters than the result ------------------------------------------------------


def splitting_heads(rows, heads, clusters, parts, error=0.2, seed=0):
    """Classes [N], and heads [N, H] that each cut every class into parts, in their own way."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(rows) % clusters)
    columns = []
    for _ in range(heads):
        labels = truth * parts + rng.integers(0, parts, rows)
        wrong = rng.random(rows) < error
        labels = np.where(wrong, rng.integers(0, clusters * parts, rows), labels)
        columns.append(rng.permutation(clusters * parts)[labels])
    return truth, np.stack(columns, axis=1).astype(np.int16)


@pytest.mark.parametrize("method", core.OVER_CLUSTERED)
@pytest.mark.parametrize("max_rows", [100_000, 500])
def test_clusters_of_over_clustered_heads_are_merged(method, max_rows):
    truth, assignments = splitting_heads(1200, 10, 5, 3)
    found = solve(assignments, 5, method, head_clusters=15, max_rows=max_rows)
    assert np.unique(found.labels).tolist() == list(range(5))
    assert accuracy(found.labels, truth, 5) > 0.95
    assert 0.3 < found.confidence.mean() < 0.95
    assert np.mean(found.info["head_accuracy"]) == pytest.approx(0.8 + 0.2 / 5, abs=0.04)
    again = solve(renamed(assignments, 15, seed=5), 5, method, head_clusters=15, max_rows=max_rows)
    assert np.array_equal(found.labels, again.labels)


def test_over_clustered_dawid_skene_equals_plain_em():
    _, assignments = splitting_heads(300, 4, 3, 2, error=0.4)
    found = solve(assignments, 3, "dawid-skene", head_clusters=6, iterations=5)
    ensemble = make_ensemble(assignments, 3, 6)
    start = core._SOLVERS[found.info["path"].removeprefix("EM from ")](ensemble).labels
    steps = len(found.info["log_likelihood"])
    posterior, _, _, history = plain_dawid_skene(ensemble.heads.T, start, 3, steps, each=6)
    assert found.info["log_likelihood"] == pytest.approx(history, abs=2e-3)
    assert same_partition(found.labels, posterior.argmax(axis=1))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_over_clustered_input_gives_labels_in_range(data):
    clusters = data.draw(st.integers(1, 5))
    each = data.draw(st.integers(clusters, 9))
    rows = data.draw(st.integers(clusters, 24))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    method = data.draw(st.sampled_from(core.OVER_CLUSTERED))
    assignments = rng.integers(0, data.draw(st.integers(1, each)), (rows, 3))
    found = solve(assignments, clusters, method, head_clusters=each, max_rows=20)
    assert ((found.labels >= 0) & (found.labels < clusters)).all()
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()


def test_heads_of_other_clusters_are_refused_where_nothing_can_merge_them():
    _, assignments = splitting_heads(60, 3, 3, 2)
    with pytest.raises(ConfigError, match=r"voting.*cspa"):
        solve(assignments, 3, "voting", head_clusters=6)
    with pytest.raises(ConfigError, match="single head"):
        solve(assignments, 3, "mcla", head_clusters=6, weights=np.array([0, 1, 0]))
    with pytest.raises(ConfigError, match=r"raise heads\.clusters"):
        solve(assignments, 3, "mcla", head_clusters=2)
    with pytest.raises(DataError, match=r"heads of 4 clusters"):
        solve(assignments, 3, "mcla", head_clusters=4)


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_single_head_is_its_own_consensus(method):
    _, assignments = noisy_heads(50, 1, 4)
    assignments[assignments == 3] = 0  # an empty cluster stays empty: nothing tells how to split
    found = solve(assignments, 4, method)
    assert same_partition(found.labels, assignments[:, 0])
    assert (found.confidence == 1).all()
    assert found.info["empty_clusters"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_use_few_clusters_still_give_k(method):
    rng = np.random.default_rng(1)
    assignments = rng.integers(0, 3, (400, 5))  # 3 of 8 clusters in use, but 243 label vectors
    found = solve(assignments, 8, method)
    assert sorted(np.unique(found.labels)) == list(range(8))
    assert found.info["empty_clusters"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_too_few_distinct_label_vectors_leave_clusters_empty(method):
    assignments = np.repeat([[0, 0, 1], [1, 0, 0]], 30, axis=0)
    found = solve(assignments, 9, method)
    assert found.labels.min() == 0
    assert found.labels.max() < 9
    assert found.info["empty_clusters"] == 9 - len(np.unique(found.labels))
    if method not in ("hgpa", "hbgf"):  # METIS may part images that no head can tell apart
        assert len(np.unique(found.labels)) == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_as_many_clusters_as_images(method, rows):
    rng = np.random.default_rng(rows)
    assignments = rng.integers(0, rows, (rows, 3))
    found = solve(assignments, rows, method)
    assert found.labels.shape == (rows,)
    assert 0 <= found.labels.min() <= found.labels.max() < rows


@pytest.mark.parametrize("method", METHODS)
def test_a_collapsed_head_is_harmless(method):
    truth, assignments = noisy_heads(600, 6, 4, error=0.1)
    assignments[:, 2] = 0
    assert accuracy(solve(assignments, 4, method).labels, truth, 4) > 0.97


@pytest.mark.parametrize("method", METHODS)
def test_all_heads_collapsed(method):
    found = solve(np.zeros((40, 3), np.int16), 4, method)
    assert found.labels.shape == (40,)
    assert found.info["empty_clusters"] <= 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_input_gives_labels_and_confidence_in_range(data):
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


@pytest.mark.parametrize("method", ["hgpa", "hbgf", "dawid-skene"])
def test_fitted_on_a_sample_and_applied_to_all(method):
    truth, assignments = noisy_heads(4000, 8, 5, error=0.2)
    found = solve(assignments, 5, method, max_rows=800)
    assert found.info["fitted_rows"] == 800
    assert accuracy(found.labels, truth, 5) > 0.97


def test_images_whose_clusters_the_sample_never_saw():
    """Such an image (the second) has no score at all; it gets the most probable class."""
    model = dawid_skene._Model(
        sparse.csr_array((np.array([1.0, 2.0]), ([0, 2], [1, 1])), shape=(6, 3)),
        base=np.log([0.2, 0.3, 0.5]),
        prior=np.log([0.2, 0.3, 0.5]),
        heads=2.0,
    )
    labels, confidence = dawid_skene._apply(np.array([[0, 1, 2], [1, 2, 2]]), model)
    assert labels.tolist() == [1, 2, 1]
    assert confidence == pytest.approx([1, 0.5, 1])


@pytest.mark.parametrize("method", METHODS)
def test_weights_rule_heads_in_and_out(method):
    _, assignments = noisy_heads(500, 6, 4, error=0.1)
    noise = np.random.default_rng(3).integers(0, 4, (500, 8)).astype(np.int16)
    both = np.concatenate([assignments, noise], axis=1)
    weights = np.r_[np.full(6, 0.5), np.zeros(8)]
    found = solve(both, 4, method, weights=weights)
    assert np.array_equal(found.labels, solve(assignments, 4, method).labels)
    assert found.info["heads"] == 6
    assert found.info["head_accuracy"][6:] == [None] * 8


@pytest.mark.parametrize("method", METHODS)
def test_a_heavy_head_prevails(method):
    rng = np.random.default_rng(0)
    assignments = rng.integers(0, 2, (400, 3))
    found = solve(assignments, 2, method, weights=np.array([50.0, 1, 1]))
    balanced = accuracy(found.labels, assignments[:, 0], 2)
    assert balanced > 0.9


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
        ({"weights": np.ones(3)}, DataError, "2 finite numbers"),
        ({"weights": np.array([1, np.nan])}, DataError, "finite"),
        ({"weights": np.zeros(2)}, DataError, "all head weights are 0"),
    ],
)
def test_bad_input_is_named(change, error, words):
    options = {"assignments": np.zeros((9, 2), int), "method": "voting", **change}
    with pytest.raises(error, match=words):
        solve(options.pop("assignments"), 4, options.pop("method"), **options)


def test_cspa_refuses_many_images_and_names_alternatives():
    assignments = np.zeros((graph.CSPA_ROWS + 1, 2), np.int16)
    with pytest.raises(ConfigError, match=r"10,000.*mcla"):
        solve(assignments, 4, "cspa")


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["voting", "mcla", "hbgf", "dawid-skene"])
def test_memory_stays_far_below_a_dense_array(method, tmp_path):
    rows, heads, clusters = 20_000, 10, 400
    truth, assignments = noisy_heads(rows, heads, clusters, error=0.4)
    np.save(tmp_path / "assignments.npy", assignments)
    mapped = np.load(tmp_path / "assignments.npy", mmap_mode="r")
    tracemalloc.start()
    found = solve(mapped, clusters, method, max_rows=5_000, iterations=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * rows * heads * clusters * 4
    assert accuracy(found.labels, truth, clusters) > 0.85
