"""Label-free scores against slow, plain references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, mutual_info_score
from sklearn.metrics import normalized_mutual_info_score as sklearn_nmi

from icce_ray.core.evaluation import labelfree as scores
from icce_ray.core.evaluation.labelfree import SCORES, discriminant, score
from icce_ray.errors import ConfigError, DataError


def blobs(rows=900, clusters=6, error=0.0, heads=5, width=12, seed=0):
    """Images around centers, their true neighbors, and clusterings that err at a given rate."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, clusters, rows)
    x = 3 * rng.normal(size=(clusters, width))[truth] + rng.normal(size=(rows, width))
    gaps = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(gaps, np.inf)

    def noisy():
        wrong = rng.random(rows) < error
        return np.where(wrong, rng.integers(0, clusters, rows), truth)

    return {
        "clusters": noisy().astype(np.int32),
        "assignments": np.stack([noisy() for _ in range(heads)], axis=1).astype(np.int16),
        "ids": np.argsort(gaps, axis=1)[:, :15].astype(np.int32),
        "features": x.astype(np.float16),
    }


@pytest.fixture(scope="module")
def good():
    return blobs(error=0.1)


def all_scores(arrays, seed=0, names=SCORES):
    return score(names, seed=seed, **arrays)


small = st.tuples(st.integers(4, 40), st.integers(2, 6), st.integers(0, 10_000))


# --- known answers and plain references ----------------------------------------------------------


def test_perfect_clusters_score_about_one_and_worse_ones_less(good):
    perfect, worse = all_scores(blobs()), all_scores(blobs(error=0.5))
    for name in SCORES:
        assert perfect[name] > (0.8 if name in scores.ACROSS_CLUSTERS else 0.9)  # 1 - 1 / 6
        assert perfect[name] > all_scores(good)[name] > worse[name]
        assert worse[name] > 0.02 or name == "neighbor_evidence"


@pytest.mark.parametrize("clusters", [2, 6, 120])
def test_random_labels_score_about_zero(clusters):
    arrays = blobs(rows=1000)
    rng = np.random.default_rng(1)
    draws = []
    for seed in range(8):
        arrays["clusters"] = rng.integers(0, clusters, 1000)
        arrays["assignments"] = rng.integers(0, clusters, (1000, 6))
        found = all_scores(arrays, seed)
        assert found.pop("neighbor_evidence") < -0.9  # naming clusters costs, and earns nothing
        draws.append(list(found.values()))
    assert np.abs(np.mean(draws, axis=0)).max() < 0.05


def test_one_giant_cluster_scores_lowest():
    arrays = blobs(error=0.3)
    flat = {key: np.zeros_like(arrays[key]) for key in ("clusters", "assignments")}
    collapsed, usual = all_scores({**arrays, **flat}), all_scores(arrays)
    assert set(collapsed.values()) == {0.0}
    assert all(usual[name] > 0 for name in SCORES if name != "neighbor_evidence")
    nearly = flat["clusters"].copy()
    nearly[:3] = 1
    for name in ("neighbor_consistency", "neighbor_information", "generalization"):
        assert all_scores({**arrays, "clusters": nearly}, names=[name])[name] < usual[name]


@settings(max_examples=25, deadline=None)
@given(small)
def test_neighbor_consistency_equals_its_definition(case):
    rows, clusters, seed = case
    rng = np.random.default_rng(seed)
    labels, ids = rng.integers(0, clusters, rows), rng.integers(0, rows, (rows, 12))
    same = [labels[i] == labels[j] for i in range(rows) for j in ids[i][:10]]
    chance = sum(np.mean(labels == k) ** 2 for k in range(clusters))
    expected = (np.mean(same) - chance) / (1 - chance) if chance < 1 else 0
    given_ = {"clusters": labels, "assignments": labels[:, None], "ids": ids}
    names = ["neighbor_consistency", "neighbor_modularity"]
    found = score(names, features=np.ones((rows, 2)), seed=0, **given_)
    assert found["neighbor_consistency"] == pytest.approx(expected)
    assert found["neighbor_modularity"] == pytest.approx(np.mean(same) - chance)


@settings(max_examples=25, deadline=None)
@given(small)
def test_neighbor_information_equals_its_definition(case):
    """Of the consensus and of each head: I(c; c') over log K, above that of shuffled lists; and
    evidence: a times that, less the entropy over log K."""
    rows, clusters, seed = case
    rng = np.random.default_rng(seed)
    labels, ids = rng.integers(0, clusters, rows), rng.integers(0, rows, (rows, 12))
    repeated = np.repeat(labels, 10)
    shuffled = np.random.default_rng(3).permutation(ids[:, :10])
    value, chance = (
        mutual_info_score(repeated, labels[near].ravel()) / np.log(clusters)
        for near in (ids[:, :10], shuffled)
    )
    expected = (value - chance) / (1 - chance) if chance < 1 else 0
    heads = np.stack([labels, np.zeros(rows, int)], axis=1)
    information, evidence = scores.head_scores(heads, ids, clusters, 3)
    assert information == pytest.approx([expected, 0], abs=1e-9)
    shares = np.bincount(labels) / rows
    cost = -sum(p * np.log(p) for p in shares if p) / np.log(clusters)
    weighed = (scores.EVIDENCE * expected - cost) / (scores.EVIDENCE - 1)
    assert evidence == pytest.approx([weighed, 0], abs=1e-9)
    given_ = {"clusters": labels, "assignments": heads, "ids": ids, "num_clusters": clusters}
    names = ["neighbor_information", "neighbor_evidence"]
    one = score(names, features=np.ones((rows, 2)), seed=3, **given_)
    assert one["neighbor_information"] == pytest.approx(expected, abs=1e-9)
    assert one["neighbor_evidence"] == pytest.approx(weighed, abs=1e-9)


def chained(sizes, noise=0.05):
    """Classes in a row, and neighbors: nearby images of one's class, or, rarely, any image."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(sizes)
    truth, count = np.repeat(np.arange(len(sizes)), sizes), int(ends[-1])
    near = np.arange(count)[:, None] + rng.integers(-200, 201, (count, 10))
    near = near.clip((ends - sizes)[truth][:, None], ends[truth][:, None] - 1)
    return truth, np.where(
        rng.random((count, 10)) < noise, rng.integers(0, count, near.shape), near
    )


def test_evidence_tells_classes_of_unequal_sizes_from_equal_cuts():
    """Information prefers four clusters of equal size, most of them cut from one class."""
    truth, ids = chained(np.array([2600, 900, 380, 120]))
    cuts = np.arange(len(truth)) * 4 // len(truth)
    information, evidence = scores.head_scores(np.stack([truth, cuts], axis=1), ids, 4, 0)
    assert information[0] < information[1]
    assert evidence[0] > evidence[1]


def test_evidence_tells_classes_of_equal_size_from_merged_ones():
    truth, ids = chained(np.array([1000] * 4))
    merged = np.maximum(truth, 1) - 1
    _, evidence = scores.head_scores(np.stack([truth, merged], axis=1), ids, 4, 0)
    assert evidence[0] > evidence[1]


def test_neighbor_modularity_is_highest_at_the_number_of_clusters_there_are():
    """Six, merged into fewer, or split at random into more."""
    arrays = blobs(rows=1200)
    truth = arrays["clusters"]
    half = np.random.default_rng(1).integers(0, 2, len(truth))
    tried = [np.minimum(truth, most) for most in (2, 3, 4, 5)]
    tried += [np.where((truth < more) & (half == 1), 6 + truth, truth) for more in (1, 3, 6)]
    values = [
        score(["neighbor_modularity"], seed=0, **{**arrays, "clusters": one})["neighbor_modularity"]
        for one in tried
    ]
    assert int(np.argmax(values)) == 3


def test_neighbor_information_asks_for_many_clusters_in_use():
    """Merged into fewer ones they are more consistent, and tell less."""
    arrays = blobs(error=0.2)
    merged = {**arrays, "clusters": np.where(arrays["clusters"] < 4, 0, arrays["clusters"])}
    options = {"names": ["neighbor_consistency", "neighbor_information"], "seed": 0}
    fine, coarse = (score(num_clusters=6, **options, **one) for one in (arrays, merged))
    assert coarse["neighbor_information"] < fine["neighbor_information"]


@settings(max_examples=25, deadline=None)
@given(small)
def test_nmi_equals_scikit_learn(case):
    rows, clusters, seed = case
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, clusters, rows), 7 * rng.integers(0, clusters, rows)
    expected = sklearn_nmi(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else 0
    assert scores.nmi(a, b) == pytest.approx(expected, abs=1e-9)
    assert scores.nmi(1000 * a, b) == pytest.approx(expected, abs=1e-9)  # sparse counting


def test_agreements_are_mean_nmi_above_that_of_shuffled_labels(good):
    heads, labels = good["assignments"], good["clusters"]
    rng = np.random.default_rng(3)
    pairs = list(itertools.combinations(range(5), 2))
    raw = np.mean([sklearn_nmi(heads[:, i], heads[:, j]) for i, j in pairs])
    chance = np.mean([sklearn_nmi(heads[:, i], rng.permutation(heads[:, j])) for i, j in pairs])
    found = all_scores(good)
    assert found["head_agreement"] == pytest.approx((raw - chance) / (1 - chance), abs=5e-3)
    raw = np.mean([sklearn_nmi(head, labels) for head in heads.T])
    assert found["consensus_agreement"] == pytest.approx((raw - chance) / (1 - chance), abs=5e-3)


def test_over_clustered_noise_is_no_agreement():
    """Heads of many clusters share mutual information by chance alone."""
    heads = np.random.default_rng(0).integers(0, 150, (800, 4))
    arrays = {**blobs(rows=800), "assignments": heads}
    assert sklearn_nmi(heads[:, 0], heads[:, 1]) > 0.4
    assert abs(all_scores(arrays)["head_agreement"]) < 0.02


def test_a_single_head_has_nothing_to_agree_with(good):
    alone = {**good, "assignments": good["assignments"][:, :1]}
    found = all_scores(alone)
    assert found["head_agreement"] == found["consensus_agreement"] == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 6))
def test_discriminant_equals_its_formula(seed, clusters, width):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(clusters), rng.integers(0, clusters, 50)])
    x = (rng.normal(size=(len(labels), width)) + labels[:, None]).astype(np.float32)
    x -= x.mean(0)
    means = np.stack([x[labels == k].mean(0) for k in range(clusters)]).astype(np.float64)
    within = sum(np.outer(r - means[k], r - means[k]) for r, k in zip(x, labels, strict=True))
    within = within / len(x)
    g = width / (width + len(x))
    inverse = np.linalg.inv((1 - g) * within + g * np.trace(within) / width * np.eye(width))
    prior = np.log(np.bincount(labels) / len(labels))
    expected = [
        [prior[k] + means[k] @ inverse @ r - means[k] @ inverse @ means[k] / 2 for r in x]
        for k in range(clusters)
    ]
    weight, bias = discriminant(torch.from_numpy(x), labels)
    found = torch.from_numpy(x) @ weight + bias
    assert np.allclose(found.T.numpy(), expected, atol=2e-3, rtol=2e-3)


@settings(max_examples=25, deadline=None)
@given(small)
def test_kappa_equals_scikit_learn(case):
    rows, clusters, seed = case
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, clusters, rows), rng.integers(0, clusters, rows)
    if len({*a, *b}) > 1:
        assert scores._kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))


def test_the_probe_tells_what_is_in_the_features_from_what_is_not(good):
    """Half of the images in clusters that features show, half at random."""
    rng = np.random.default_rng(0)
    labels = good["clusters"].copy()
    wrong = rng.random(len(labels)) < 0.5
    labels[wrong] = rng.integers(0, 6, wrong.sum())
    found = all_scores({**good, "clusters": labels}, names=["generalization"])
    assert 0.35 < found["generalization"] < 0.55


# --- invariances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_names_of_clusters_do_not_matter(good, seed):
    rng = np.random.default_rng(seed)
    renamed = {
        **good,
        "clusters": rng.permutation(9)[good["clusters"]],
        "assignments": np.stack([rng.permutation(8)[h] for h in good["assignments"].T], axis=1),
    }
    before, after = (all_scores({**one, "num_clusters": 9}, seed) for one in (good, renamed))
    for name in SCORES:
        assert after[name] == pytest.approx(before[name], abs=1e-6)


def test_samples_are_bounded_and_drawn_by_the_seed(good, monkeypatch, tmp_path):
    np.save(tmp_path / "features.npy", good["features"])
    mapped = {**good, "features": np.load(tmp_path / "features.npy", mmap_mode="r")}
    for name in ("LABEL_ROWS", "NEIGHBOR_ROWS", "PROBE_ROWS", "PROBE_ROWS_MOST"):
        monkeypatch.setattr(scores, name, 300)
    first, again, other = (all_scores(mapped, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    for name, value in all_scores(good).items():
        assert value == pytest.approx(first[name], abs=0.1)


def test_only_what_is_asked_for_is_worked_out(good, monkeypatch):
    monkeypatch.setattr(scores, "discriminant", None)  # would fail if it were called
    assert list(all_scores(good, names=["head_agreement"])) == ["head_agreement"]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_small_input_gives_finite_scores(data):
    rows = data.draw(st.integers(2, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    used, heads = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    found = score(
        SCORES,
        clusters=rng.integers(0, used, rows),
        assignments=rng.integers(0, used, (rows, heads)),
        ids=rng.integers(0, rows, (rows, data.draw(st.integers(1, 14)))),
        features=rng.normal(size=(rows, data.draw(st.integers(1, 5)))).astype(np.float16),
        seed=0,
    )
    assert all(np.isfinite(value) and value <= 1 + 1e-6 for value in found.values())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"names": ["beauty"]}, ConfigError, "beauty.*head_agreement"),
        ({"clusters": np.zeros(5, int)}, DataError, "there are 5 clusters"),
        ({"clusters": np.zeros(900)}, DataError, "integers"),
        ({"clusters": np.full(900, -1)}, DataError, "codes from 0"),
        ({"num_clusters": 5}, DataError, "codes from 0 to 4; found 0 to 5"),
        ({"clusters": np.zeros((900, 1), int)}, DataError, r"\[N\]"),
        ({"assignments": np.zeros((900, 0), int)}, DataError, "assignments are"),
        ({"assignments": np.zeros((900, 2))}, DataError, "assignments must be integers"),
        ({"assignments": np.full((900, 2), -1)}, DataError, "codes from 0"),
        ({"ids": np.full((900, 2), 900)}, DataError, "row numbers 0..899"),
        ({"ids": np.full((900, 2), -1)}, DataError, "row numbers"),
        ({"features": np.zeros((899, 4))}, DataError, "features are"),
    ],
)
def test_bad_input_is_named(good, change, error, words):
    with pytest.raises(error, match=words):
        score(**{"names": SCORES, **good, "seed": 0, **change})


# --- one number each ---------------------------------------------------------------------------


def test_neighbor_share_equals_a_loop(monkeypatch):
    monkeypatch.setattr(scores, "CHUNK", 7)
    rng = np.random.default_rng(1)
    clusters = rng.integers(0, 3, 50)
    ids = rng.integers(0, 50, (50, 6)).astype(np.int32)
    counts = rng.integers(0, 7, 50)
    shares = [
        np.mean([clusters[j] == clusters[i] for j in ids[i, : counts[i]]])
        for i in range(50)
        if counts[i]
    ]
    found = scores.neighbor_share(clusters, ids, counts)
    assert found == pytest.approx(float(np.mean(shares)))


def test_neighbor_share_ignores_padding_beyond_the_count():
    ids = np.array([[1, -1], [0, -1]], dtype=np.int32)
    assert scores.neighbor_share(np.array([4, 4]), ids, np.array([1, 1])) == 1.0


def test_spread_of_sizes():
    found = scores.spread_of_sizes(np.array([0, 0, 0, 2]), 4)
    assert found["sizes"].tolist() == [3, 0, 1, 0]
    assert (found["empty"], found["largest"], found["smallest"], found["ratio"]) == (2, 3, 1, 3.0)
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    assert found["entropy"] == pytest.approx(expected)
    assert scores.spread_of_sizes(np.arange(8) % 4, 4)["entropy"] == pytest.approx(1.0)
