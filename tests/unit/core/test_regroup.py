"""New clusters from old ones: merged, split, dropped, corrected."""

from __future__ import annotations

import numpy as np
import pytest

from icce_ray.config.loading import check
from icce_ray.config.schema import MethodConfig
from icce_ray.core.regroup import Plan, regroup
from icce_ray.errors import DataError

SETTINGS = check(MethodConfig, {"num_classes": 4})


def blobs(sizes, seed=0, width=24):
    """Unit rows around one center for each size, float16 [N, D], and the center of each, [N]."""
    rng = np.random.default_rng(seed)
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = rng.normal(size=(len(sizes), width))[group] + rng.normal(0, 0.35, (len(group), width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), group


def neighbors(x, most=12):
    similarity = x.astype(np.float32) @ x.T.astype(np.float32)
    np.fill_diagonal(similarity, -2)
    return np.argsort(-similarity, axis=1)[:, :most].astype(np.int32)


@pytest.fixture(scope="module")
def data():
    """Blobs 0 to 4; the clustering has 2 and 3 in one."""
    x, group = blobs((60, 50, 40, 30, 20))
    clusters = np.array([0, 1, 2, 2, 3])[group].astype(np.int32)
    return x, group, clusters, neighbors(x)


def run(data, plan, sure=0.9):
    x, _, clusters, ids = data
    return regroup(clusters, np.full(len(x), sure, np.float32), x, ids, plan, SETTINGS)


def test_a_split_finds_what_lies_in_a_cluster(data):
    plan = Plan({2: 2}, [["0"], ["1"], ["2a"], ["2b"], ["3"]], [None, None, "big", "small", None])
    found = run(data, plan)
    _, group, *_ = data
    assert np.bincount(found.clusters).tolist() == [60, 50, 40, 30, 20]
    assert np.array_equal(found.clusters, group)
    assert found.names == [None, None, "big", "small", None]
    assert found.pieces == [["0"], ["1"], ["2a"], ["2b"], ["3"]] and found.dropped is None
    assert np.array_equal(run(data, plan).clusters, found.clusters)


def test_merging_and_dropping_number_by_size_with_the_dropped_last(data):
    plan = Plan({}, [["3", "2"], ["1"]], ["both", None], ["0"])
    found = run(data, plan)
    _, _, clusters, _ = data
    assert found.dropped == 2 and found.names == ["both", None, None]
    assert np.array_equal(found.clusters, np.array([2, 1, 0, 0])[clusters])
    assert np.allclose(found.confidence, 0.9)


def test_a_corrected_image_is_sure_and_counts_for_the_order(data):
    _, _, clusters, _ = data
    rows = np.flatnonzero(clusters == 0)[:30].tolist()
    plan = Plan({}, [["0"], ["1"], ["2"], ["3"]], [None] * 4, (), dict.fromkeys(rows, "1"))
    found = run(data, plan)
    assert found.pieces == [["1"], ["2"], ["0"], ["3"]]
    assert set(found.clusters[rows]) == {0} and set(found.confidence[rows]) == {1.0}


def test_images_between_the_parts_are_less_sure():
    x, _ = blobs((200,))
    clusters, ids = np.r_[np.zeros(200, np.int32), np.int32(1)], neighbors(np.r_[x, -x[:1]])
    sure = np.full(201, 0.8, np.float32)
    plan = Plan({0: 2}, [["0a"], ["0b"], ["1"]], [None] * 3)
    found = regroup(clusters, sure, np.r_[x, -x[:1]], ids, plan, SETTINGS)
    inside = found.confidence[:200]
    assert inside.min() < 0.79 and inside.max() <= 0.8 + 1e-6
    assert found.confidence[200] == np.float32(0.8)


def test_copies_cannot_be_split(data):
    x, _, clusters, ids = data
    x = x.copy()
    x[clusters == 3] = x[clusters == 3][0]
    plan = Plan({3: 3}, [["0"], ["1"], ["2"], ["3a", "3b", "3c"]], [None] * 4)
    with pytest.raises(DataError, match=r"split\.3: its 20 images cannot be split into 3"):
        run((x, None, clusters, ids), plan)


def test_a_cluster_that_lost_all_its_images_is_refused(data):
    rows = np.flatnonzero(data[2] == 3).tolist()
    plan = Plan({}, [["0"], ["1"], ["2"], ["3"]], [None] * 4, (), dict.fromkeys(rows, "0"))
    with pytest.raises(DataError, match="cluster 3 has no image left"):
        run(data, plan)
