"""The method in memory: what it finds, and that it is what the stages of a run compose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import icce_ray
from icce_ray.config.schema import MethodConfig
from icce_ray.core import method
from icce_ray.core.evaluation.labelfree import SCORES
from icce_ray.core.evaluation.truth import accuracy
from icce_ray.errors import ConfigError, DataError

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"heads": {"count": 6, "steps": 60}, "classifier": {"epochs": 5}}


def blobs(rows: int = 300, clusters: int = 4, width: int = 24, seed: int = 0) -> Any:
    """Rows around random directions, float32 [N, D], of any length, and the blob of each."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).normal(size=(clusters, width))
    labels = rng.permutation(np.arange(rows) % clusters)
    x = centers[labels] + 0.4 * rng.normal(size=(rows, width))
    return (x * rng.uniform(1, 9, (rows, 1))).astype(np.float32), labels


@pytest.fixture(scope="module")
def found() -> method.Clustering:
    return icce_ray.cluster(blobs()[0], 4, seed=1, **SMALL)


def test_clear_blobs_are_found(found: method.Clustering) -> None:
    assert accuracy(blobs()[1], found.labels) > 0.97
    assert found.labels.dtype == np.int32 and found.labels.shape == (300,)
    assert found.confidence.dtype == np.float32
    assert 0.5 < found.confidence.mean() <= 1
    assert found.assignments.shape == (300, 6)
    assert (np.diff(np.bincount(found.labels)) <= 0).all()


def test_neighbors_are_in_order_and_never_oneself(found: method.Clustering) -> None:
    near = found.neighbors
    assert near.ids.shape == near.similarity.shape == (300, 100)
    assert (near.ids != np.arange(300)[:, None]).all()
    assert (np.diff(near.similarity.astype(np.float32), axis=1) <= 0).all()
    assert near.counts.min() >= 5


def test_scores_are_measured_when_asked_for(found: method.Clustering) -> None:
    assert set(found.scores) == set(SCORES)
    assert found.scores["neighbor_information"] > 0.9
    assert found.scores is found.scores


def test_new_embeddings_are_labeled(found: method.Clustering) -> None:
    new, truth = blobs(80, seed=5)
    labels, confidence = found.predict(torch.from_numpy(new))
    assert labels.dtype == np.int32 and confidence.dtype == np.float32
    assert accuracy(truth, labels) > 0.97
    assert ((confidence > 0.25) & (confidence <= 1)).all()
    with pytest.raises(DataError, match="have 23 features, but the classifier takes 24"):
        found.predict(new[:, 1:])
    with pytest.raises(DataError, match="rows 0 "):
        found.predict(np.zeros((1, 24)))


def test_the_same_seed_gives_the_same_labels_whatever_holds_the_rows(
    found: method.Clustering, tmp_path: Path
) -> None:
    x, _ = blobs()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    again = icce_ray.cluster(mapped, 4, seed=1, **SMALL)
    assert (again.labels == found.labels).all()
    assert (again.confidence == found.confidence).all()
    before = x.copy()
    other = icce_ray.cluster(torch.from_numpy(x), 4, seed=2, **SMALL)
    assert (other.assignments != found.assignments).any()
    assert (x == before).all()


def test_nothing_of_the_process_is_changed() -> None:
    x, _ = blobs(60)
    state = np.random.get_state()[1].copy(), torch.get_rng_state(), torch.get_num_threads()
    icce_ray.cluster(x, 4, heads={"count": 2, "steps": 5}, classifier={"epochs": 1})
    assert (np.random.get_state()[1] == state[0]).all()
    assert torch.equal(torch.get_rng_state(), state[1])
    assert torch.get_num_threads() == state[2]


def test_progress_goes_from_part_to_part() -> None:
    seen: list[tuple[str, int, int]] = []
    icce_ray.cluster(
        blobs(120)[0],
        4,
        **SMALL,
        progress=lambda part, done, total: seen.append((part, done, total)),
    )
    parts = list(dict.fromkeys(part for part, *_ in seen))
    assert parts == ["search", "heads", "classifier"]
    for part in parts:
        done = [(done, total) for name, done, total in seen if name == part]
        assert done == sorted(done) and done[-1][0] == done[-1][1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": {"cuont": 8}}, r"heads.cuont: unknown setting. Did you mean heads.count\?"),
        ({"heads": {"count": 0}}, "heads.count: .*greater than or equal to 1"),
        ({"data": {"path": "x"}}, "data: unknown setting"),
        ({"neighbors": 3}, "neighbors: this is a group of settings"),
        ({"neighbors": {"mutual": True}}, "neighbors.mutual: this setting was removed"),
        ({"consensus": {"method": "mode"}}, "consensus.method: .*'voting'"),
        ({"classifier": {"kind": "finetune"}}, "finetune needs images"),
        ({"num_classes": 1}, "num_classes: .*greater than or equal to 2"),
        ({"num_classes": "many"}, "num_classes=many: give a number"),
    ],
)
def test_wrong_settings_are_those_of_the_yaml(settings: dict[str, Any], words: str) -> None:
    given = {"num_classes": 4, **settings}
    with pytest.raises(ConfigError, match=words):
        icce_ray.cluster(blobs(60)[0], **given)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        icce_ray.cluster(None, 4, heads={"lr": -1}, neighbors={"kk": 1})
    assert "heads.lr" in str(caught.value) and "neighbors.kk" in str(caught.value)


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (3, 4)])
def test_fewer_rows_than_classes_are_an_error(rows: int, classes: int) -> None:
    with pytest.raises(DataError, match=f"{rows} embeddings cannot make num_classes={classes}"):
        icce_ray.cluster(np.ones((rows, 4)), classes)


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_the_fewest_rows_that_make_sense(rows: int) -> None:
    found = icce_ray.cluster(np.eye(rows, 6), 2, heads={"steps": 5}, classifier={"epochs": 1})
    assert set(found.labels) <= {0, 1}


def test_over_clustered_heads_and_other_ensembles() -> None:
    x, truth = blobs()
    over = icce_ray.cluster(x, 4, **{**SMALL, "heads": {**SMALL["heads"], "clusters": 8}})
    assert accuracy(truth, over.labels) > 0.9
    voted = icce_ray.cluster(x, 4, **SMALL, consensus={"method": "voting", "keep": 0.5})
    assert len(voted.info["kept"]) == 1


def test_without_components_neighbors_are_searched_in_all_features() -> None:
    x = method.unit_rows(blobs()[0])
    assert method.search_projection(x, None) is None
    settings = MethodConfig(num_classes=4, neighbors={"pca": None, "max_neighbors": 5})
    ids, similarity = method.search(x, settings, CPU)
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    np.fill_diagonal(exact, -1)
    assert (ids[:, 0] == exact.argmax(1)).all() and similarity.dtype == np.float16


def test_an_approximate_search_can_be_asked_for() -> None:
    pytest.importorskip("faiss")
    x = method.unit_rows(blobs()[0])
    exact = method.search(x, MethodConfig(num_classes=4), CPU)[0]
    wanted = MethodConfig(num_classes=4, neighbors={"search": "ivf", "max_neighbors": 10})
    ids, _ = method.search(x, wanted, CPU)
    assert (
        np.mean([len(set(a) & set(b)) / 10 for a, b in zip(ids, exact[:, :10], strict=True)]) > 0.9
    )


# --- which heads are merged ----------------------------------------------------------------------


def heads_of_errors(errors: list[float], rows: int = 400, clusters: int = 4) -> Any:
    """Heads [N, H] that err at these rates, and neighbors [N, 10] of the same class."""
    rng = np.random.default_rng(0)
    truth = np.sort(np.arange(rows) % clusters)
    each = rows // clusters
    ids = (truth * each)[:, None] + (np.arange(rows)[:, None] + np.arange(1, 11)) % each
    columns = [
        np.where(rng.random(rows) < error, rng.integers(0, clusters, rows), truth)
        for error in errors
    ]
    return np.stack(columns, axis=1).astype(np.int16), ids.astype(np.int32)


def test_few_classes_have_heads_of_three_balances_and_many_have_free_sizes() -> None:
    """What heads begin with decides: Ward's clusters, of more than 15 classes, have own sizes."""
    heads = MethodConfig(num_classes=10).heads
    assert (heads.count_of(15), heads.balances_of(15)) == (24, (0.5, 0.25, 0.0))
    assert (heads.count_of(16), heads.balances_of(16)) == (8, (0.0,))
    few = MethodConfig(num_classes=10, heads={"start": "ward"})
    assert (few.head_count, few.heads.balances_of(10)) == (8, (0.0,))
    over = MethodConfig(num_classes=10, heads={"clusters": 30})
    assert over.head_count == 8
    deep = MethodConfig(num_classes=30, heads={"hidden": (64,)})
    assert (deep.head_count, deep.heads.balances_of(30)) == (24, (0.5, 0.25, 0.0))
    given = MethodConfig(num_classes=30, heads={"count": 5, "balance": (0.5, 0.0)})
    assert given.head_count == 5
    assert [given.heads.balance_of(head, 30) for head in range(5)] == [0.5, 0, 0.5, 0, 0.5]


def test_many_classes_of_unequal_size_are_found() -> None:
    rng = np.random.default_rng(0)
    sizes = np.round(90 * 15.0 ** (-np.arange(16) / 15)).astype(int)
    labels = np.repeat(np.arange(16), sizes)
    x = np.eye(16, 32)[labels] + 0.13 * rng.normal(size=(len(labels), 32))
    free = icce_ray.cluster(x, 16, heads={"steps": 60}, classifier={"epochs": 2})
    assert accuracy(labels, free.labels) > 0.99
    heads = {"steps": 60, "balance": 1.0}
    even = icce_ray.cluster(x, 16, heads=heads, classifier={"epochs": 2})
    assert accuracy(labels, even.labels) < 0.98


def test_of_one_balance_the_heads_that_say_most_are_merged() -> None:
    assignments, ids = heads_of_errors([0.6, 0.1, 0.5, 0.2])
    settings = MethodConfig(
        num_classes=4, heads={"count": 4, "balance": 0.5}, consensus={"keep": 0.5}
    )
    kept, why = method.choose_heads(assignments, ids, settings)
    assert kept.tolist() == [1, 3] and why == {}


def test_heads_of_the_other_balances_are_not_merged() -> None:
    assignments, ids = heads_of_errors([0.7, 0.02, 0.7, 0.05, 0.7, 0.1])
    settings = MethodConfig(num_classes=4, heads={"count": 6, "balance": (0.5, 0.0)})
    kept, why = method.choose_heads(assignments, ids, settings)
    assert kept.tolist() == [1, 3, 5] and why["balance"] == 0.0
    assert len(why["head_evidence"]) == 6
    merged = method.merge(assignments, ids, settings)
    assert merged.info["kept"] == [1, 3, 5] and merged.info["heads"] == 3
    assert merged.info["head_accuracy"][0] is None


def test_where_all_heads_are_kept_no_neighbor_is_looked_at() -> None:
    assignments, _ = heads_of_errors([0.2, 0.2])
    settings = MethodConfig(num_classes=4, heads={"count": 2, "balance": 0.5})
    kept, why = method.choose_heads(assignments, np.full((400, 3), -1), settings)
    assert kept.tolist() == [0, 1] and why == {}
