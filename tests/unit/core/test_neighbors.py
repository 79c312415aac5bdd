"""Search against brute force in float64, selection against loops over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core import neighbors as core


def unit_rows(rows, features=6, seed=0, copies=0):
    """float16 rows, as stored; the last `copies` are copies of the first ones."""
    x = np.random.default_rng(seed).normal(size=(rows, features))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    if copies:
        x[-copies:] = x[:copies]
    return x.astype(np.float16)


def brute(matrix):
    """Similarities in float64, -inf to itself."""
    x = np.asarray(matrix, np.float64)
    scores = x @ x.T
    np.fill_diagonal(scores, -np.inf)
    return scores


def assert_top(matrix, ids, similarity, start=0):
    """The k best of each row, best first, no row twice, never itself; ties in any order."""
    scores = brute(matrix)[start : start + len(ids)]
    own = np.arange(start, start + len(ids))[:, None]
    assert (ids != own).all() and ids.min() >= 0
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    best = -np.sort(-scores, axis=1)[:, : ids.shape[1]]
    np.testing.assert_allclose(similarity, best, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, ids.astype(int), 1), best, atol=1e-5)


@pytest.fixture(params=["faiss", "torch"])
def small_chunks(request, monkeypatch):
    monkeypatch.setattr(core, "QUERY_CHUNK", 7)
    monkeypatch.setattr(core, "BASE_CHUNK", 10)
    if request.param == "torch":  # as where faiss is not installed
        monkeypatch.setattr(core, "_faiss_knn", lambda: None)


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("rows", [2, 7, 10, 11, 35, 61])
@pytest.mark.parametrize("k", [1, 5, 1000])
def test_search_is_brute_force_across_chunk_borders(rows, k):
    matrix = unit_rows(rows)
    ids, similarity = core.search(matrix, 0, rows, min(k, rows - 1))
    assert ids.dtype == np.int32 and similarity.dtype == np.float32
    assert_top(matrix, ids, similarity)


@pytest.mark.usefixtures("small_chunks")
def test_copies_of_a_row_are_its_neighbors_and_itself_is_not():
    matrix = unit_rows(50, copies=20)  # row i and row 30 + i, in different chunks
    ids, similarity = core.search(matrix, 0, 50, 4)
    assert_top(matrix, ids, similarity)
    assert (ids[:20, 0] == np.arange(30, 50)).all() and (ids[30:, 0] == np.arange(20)).all()
    same = np.repeat(unit_rows(1), 45, axis=0)
    assert_top(same, *core.search(same, 0, 45, 44))


@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.data())
def test_any_slice_of_queries_finds_the_same(rows, data):
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    k = data.draw(st.integers(1, rows - 1))
    matrix = unit_rows(rows, seed=rows)
    assert_top(matrix, *core.search(matrix, start, stop, k), start=start)


@pytest.mark.usefixtures("small_chunks")
def test_progress_counts_the_rows_of_the_slice():
    seen = []
    core.search(unit_rows(30), 5, 25, 3, on_rows=seen.append)
    assert seen == [7, 14, 20]


def test_a_read_only_map_is_searched(tmp_path):
    np.save(tmp_path / "m.npy", unit_rows(20))
    matrix = np.load(tmp_path / "m.npy", mmap_mode="r")
    assert_top(matrix, *core.search(matrix, 0, 20, 3))


@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_mask_hits_the_diagonal_of_the_whole_matrix_alone(first, base, rows, columns):
    scores = torch.zeros(rows, columns)
    core.mask_self(scores, first, base)
    for r in range(rows):
        for c in range(columns):
            assert (scores[r, c] == -torch.inf) == (first + r == base + c)


def test_merge_keeps_the_best_of_both():
    best, where = torch.tensor([[0.9, 0.5], [0.1, 0.0]]), torch.tensor([[3, 1], [4, 2]])
    values, ids = torch.tensor([[0.7], [0.8]]), torch.tensor([[9], [8]])
    merged = core.merge(best, where, values, ids, 2)
    assert merged[1].tolist() == [[3, 9], [8, 4]]
    torch.testing.assert_close(merged[0], torch.tensor([[0.9, 0.7], [0.8, 0.1]]))
    longer = core.merge(best, where, values, ids, 9)  # k beyond both: all of them
    assert longer[1].tolist() == [[3, 9, 1], [8, 4, 2]]


# --- approximate ---------------------------------------------------------------------------------


def build(matrix, tmp_path):
    faiss = pytest.importorskip("faiss")
    core.build_ivf(matrix, tmp_path / "index.faiss", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]
    return faiss.read_index(str(tmp_path / "index.faiss"))


@given(st.integers(1, 900), st.integers(1, 60), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_top_is_topk(width, k, seed):
    """Also where columns do not fill the groups, and where many are equal."""
    generator = torch.Generator().manual_seed(seed)
    k = min(k, width)
    scores = torch.randint(0, 3 if seed == 3 else 10**6, (5, width), generator=generator).float()
    values, columns = core.top(scores, k)
    assert torch.equal(values, scores.topk(k, dim=1).values)
    assert torch.equal(scores.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_ivf_that_visits_all_lists_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "QUERY_CHUNK", 100)
    monkeypatch.setattr(core, "BASE_CHUNK", 150)
    matrix = unit_rows(400, copies=60)
    index = build(matrix, tmp_path)
    assert index.nlist > 3
    assert_top(matrix, *core.search_ivf(index, matrix, 0, 400, 8, index.nlist))
    assert_top(matrix, *core.search_ivf(index, matrix, 130, 333, 8, index.nlist), start=130)


def test_ivf_with_few_lists_finds_most(tmp_path):
    matrix = unit_rows(2000)
    index = build(matrix, tmp_path)
    exact, _ = core.search(matrix, 0, 300, 10)
    recall = []
    for nprobe in (1, 4, 16):
        ids, _ = core.search_ivf(index, matrix, 0, 300, 10, nprobe)
        recall.append(np.mean([len({*a} & {*b}) / 10 for a, b in zip(ids, exact, strict=True)]))
    assert recall == sorted(recall) and recall[-1] > 0.95


def test_lists_too_short_for_k_are_made_up_for(tmp_path):
    matrix = unit_rows(300)
    index = build(matrix, tmp_path)
    assert_top(matrix, *core.search_ivf(index, matrix, 0, 300, 250, 1))


def test_a_row_alone_in_its_list_still_gets_neighbors(tmp_path):
    """An id of -1 would silently mean the last row."""
    matrix = np.repeat(np.eye(2, 6, dtype=np.float16), [199, 1], axis=0)
    index = build(matrix, tmp_path)
    ids, _ = core.search_ivf(index, matrix, 0, 200, 5, 1)
    assert ids.min() >= 0 and (ids != np.arange(200)[:, None]).all()


def test_ivf_of_few_rows(tmp_path):
    matrix = unit_rows(5)
    assert_top(matrix, *core.search_ivf(build(matrix, tmp_path), matrix, 0, 5, 4, 32))


def test_drop_self_takes_out_the_own_id_or_the_last():
    ids = np.array([[7, 1, 2], [3, 8, 4], [5, 6, 0]])  # queries 7, 8, 9
    scores = np.array([[1.0, 0.9, 0.8], [1.0, 1.0, 0.5], [0.3, 0.2, 0.1]])
    kept, found = core.drop_self(scores, ids, 7)
    assert found.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert kept.tolist() == [[0.9, 0.8], [1.0, 0.5], [0.3, 0.2]]


# --- selection -----------------------------------------------------------------------------------


def lists(rows=30, most=8, seed=0):
    """Top lists as they are stored: float16 similarities."""
    ids, similarity = core.search(unit_rows(rows, seed=seed), 0, rows, most)
    return ids, similarity.astype(np.float16)


def choose(ids, similarity, **options):
    options = {
        "rule": "auto", "k": 4, "threshold": None, "min_neighbors": 1, **options
    }  # fmt: skip
    return core.select(ids, similarity, **options)


def slow_select(ids, similarity, count_of, floor):
    """Each image's neighbors as a list, one image at a time."""
    return [row[: max(count_of(s), floor)].tolist() for row, s in zip(ids, similarity, strict=True)]


def as_lists(selection):
    return [
        row[:count].tolist() for row, count in zip(selection.ids, selection.counts, strict=True)
    ]


@pytest.mark.parametrize("floor", [1, 3, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_threshold_rule_is_the_loop(floor, seed):
    ids, similarity = lists(seed=seed)
    options = {"rule": "threshold", "threshold": 0.7, "min_neighbors": floor}
    found = choose(ids, similarity, **options)
    expected = slow_select(
        ids, similarity, lambda s: int((s >= np.float16(0.7)).sum()), min(floor, 8)
    )
    assert as_lists(found) == expected and found.threshold == 0.7
    assert len({len(row) for row in expected}) > 1 or floor > 1
    assert found.counts.dtype == np.int32 and found.counts.min() >= min(floor, 8)


@pytest.mark.parametrize("k", [1, 4, 8, 50])
def test_fixed_rule_is_the_loop(k):
    ids, similarity = lists()
    found = choose(ids, similarity, rule="fixed", k=k, min_neighbors=2)
    # k is meant as it is given: below min_neighbors, it is the minimum
    assert as_lists(found) == slow_select(ids, similarity, lambda s: k, min(k, 2))
    assert found.threshold is None


def test_auto_gives_half_of_the_images_more_than_k_and_half_less():
    ids, similarity = lists(rows=301, most=60)
    found = choose(ids, similarity, k=20)
    assert found.threshold == pytest.approx(float(np.median(similarity[:, 19])))
    more = (found.counts > 20).mean()
    less = (found.counts < 20).mean()
    assert 0.35 < more < 0.55 and 0.35 < less < 0.55
    loose = slow_select(ids, similarity, lambda s: int((s >= np.float16(found.threshold)).sum()), 1)
    assert as_lists(found) == loose


def test_auto_with_k_beyond_the_lists():
    ids, similarity = lists(most=8)
    assert choose(ids, similarity, k=50).threshold == choose(ids, similarity, k=8).threshold


@pytest.mark.parametrize(
    ("k", "images", "clusters", "most", "expected"),
    [
        (50, 1_281_167, 1000, 100, 50),
        (50, 1797, 10, 100, 17),  # a tenth of N / K
        (50, 600, 20, 100, 5),  # but not below 5
        (3, 600, 20, 100, 3),  # nor above what was asked for
        (50, 100_000, 10, 30, 30),
        (50, 4, 2, 3, 3),
        (50, 2, 2, 1, 1),
    ],
)
def test_reference_k(k, images, clusters, most, expected):
    assert core.reference_k(k, images, clusters, most) == expected


@pytest.mark.parametrize("most", [1, 8, 60])
def test_description_counts_every_image_once(most):
    ids, similarity = lists(rows=90, most=most)
    selection = choose(ids, similarity, k=max(1, most // 3), min_neighbors=1)
    told = core.describe(selection, 1)
    assert sum(told["histogram"]["counts"]) == 90
    assert len(told["histogram"]["edges"]) == len(told["histogram"]["counts"]) + 1
    assert told["mean"] == pytest.approx(selection.counts.mean())
    assert told["at_minimum"] == pytest.approx((selection.counts == 1).mean())
    assert told["at_maximum"] == pytest.approx((selection.counts == most).mean())
    assert told["quantiles"]["50"] == np.median(selection.counts)
