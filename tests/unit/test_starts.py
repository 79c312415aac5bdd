"""jobs/benchmark.py starts and joined: what first steps earn, and two embeddings of one thing."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from icce_ray.core.unit_rows import unit_rows
from icce_ray.errors import DataError

CODES = np.arange(240) % 4


@pytest.fixture
def benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    import benchmarks.joined
    import benchmarks.starts

    return benchmarks


def blobs(noise: float, seed: int) -> np.ndarray:
    """Unit rows float16 [240, 16] around 4 directions."""
    generator = np.random.default_rng(seed)
    return unit_rows(np.eye(4, 16)[CODES] + noise * generator.normal(size=(240, 16)))


def cells(table: str) -> list[list[str]]:
    """Head and lines of a table."""
    lines = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_every_space_and_start_is_compared_with_the_truth(benchmarks: ModuleType) -> None:
    starts, said = benchmarks.starts, []
    x = blobs(0.05, 0)
    spaces = starts.by_space(x, CODES, [0, 1], said.append)
    assert [one["seed"] for one in spaces] == [0, 1] * 4
    for one in spaces:  # whitening by variance makes noise as large as what tells blobs apart
        assert one["neighbor"] < 90 if one["way"] == "whitened" else one["neighbor"] == 100
        assert one["ward"] > 90 and one["kmeans"] == 100
    begun = starts.by_start(x, CODES, [0], said.append)
    assert len(said) == len(spaces) + len(begun)
    by_way = {one["way"]: one for one in begun}
    assert {"Ward's, averaged 2 times", "Ward's (default)", "k-means", "the true classes"} <= set(
        by_way
    )
    assert all(by_way["the true classes"][key] == 100 for key in ("first", "heads", "consensus"))
    head, *lines = cells(starts.table(spaces))
    assert head == ["way", "neighbor", "kmeans", "ward"] and len(lines) == 4
    assert lines[0][1] == "100.0 ± 0.0"


def test_rows_without_a_label_are_not_counted(benchmarks: ModuleType) -> None:
    codes = np.where(np.arange(240) < 40, -1, CODES)
    x = blobs(0.05, 0)
    assert all(one["kmeans"] == 100 for one in benchmarks.starts.by_space(x, codes, [0], len))
    ways = [one["way"] for one in benchmarks.starts.by_start(x, codes, [0], len)]
    assert ways and "the true classes" not in ways


def test_whitened_components_have_equal_variance(benchmarks: ModuleType) -> None:
    x = blobs(0.2, 0)
    for name, made in benchmarks.starts.projections(x, 8):
        if name == "whitened":
            flat = (x.astype(np.float32) - made.center.numpy()) @ made.basis.numpy()
            assert np.allclose(np.cov(flat.T, bias=True), np.eye(8), atol=0.02)


def test_mean_ranks_agree_with_a_plain_count(benchmarks: ModuleType) -> None:
    generator = np.random.default_rng(0)
    first, second = (
        np.stack([generator.permutation(30)[:6] for _ in range(300)]).astype(np.int32)
        for _ in range(2)
    )
    ids, similarity = benchmarks.joined.by_rank(first, second)
    for row in range(0, 300, 7):
        lists = [first[row].tolist(), second[row].tolist()]
        rank = {
            one: sum(near.index(one) if one in near else 6 for near in lists)
            for one in {*lists[0], *lists[1]}
        }
        assert len(set(ids[row])) == 6
        assert [rank[one] for one in ids[row]] == sorted(rank.values())[:6]
        assert similarity[row] == pytest.approx([1 - rank[one] / 12 for one in ids[row]], abs=1e-3)


def test_embeddings_of_other_images_are_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    main = runpy.run_path(str(repository / "jobs" / "benchmark.py"))
    codes = {"runs/one": CODES, "runs/two": CODES[:200]}
    monkeypatch.setitem(
        main["_data"].__globals__, "_data", lambda source, *_: (None, codes[source])
    )
    with pytest.raises(DataError, match="runs/one and runs/two are not of the same images"):
        main["app"](["joined", *codes], standalone_mode=False)


def test_two_spaces_are_compared_by_themselves_and_together(benchmarks: ModuleType) -> None:
    found = benchmarks.joined.compare((blobs(0.05, 0), blobs(0.05, 1)), CODES, [0], len)
    assert len(found) == 7 and all(one["consensus"] == 100 for one in found)
    head, *lines = cells(benchmarks.joined.table(found))
    assert head == ["way", "consensus", "by seed"]
    assert lines[2] == ["both as one (default)", "100.0", "100.0"]
