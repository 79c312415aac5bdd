"""Results that come in any order become files, or arrays, by image number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from icce_ray.distributed.shards import Arrays, Quarantine, Shards
from icce_ray.errors import StageError
from icce_ray.rundir.directory import RunDirectory


def table(columns: dict[str, np.ndarray]) -> pa.Table:
    schema = pa.schema([("image_id", pa.int64()), ("embedding", pa.list_(pa.float16()))])
    return pa.table({name: list(columns[name]) for name in schema.names}, schema=schema)


def test_shards_accept_any_order_and_repetitions(tmp_path: Path) -> None:
    run, rng = RunDirectory(str(tmp_path)), np.random.default_rng(0)
    values = rng.normal(size=(50, 3)).astype(np.float16)
    shards = Shards(run, "s", 50, 8, table, lambda *_: {})
    order = rng.permutation(50)
    bad = np.isin(np.arange(50), [0, 8, 9, 10, 11, 12, 13, 14, 15, 49])  # a whole shard among them
    for part in [*np.array_split(order, 7), order[:20]]:
        shards.add({"image_id": part, "embedding": values[part]}, ~bad[part])
    shards.check()
    assert shards.rows == 40
    written = run.read_table("s")
    assert written["image_id"].to_pylist() == np.flatnonzero(~bad).tolist()
    assert len(run.list("s")) == 7


@pytest.mark.parametrize(
    ("total", "fraction", "bad", "stops"),
    [
        (3, 0.01, 1, False),
        (3, 0.01, 2, True),
        (99, 0.01, 1, False),
        (3, 0.0, 1, True),
        (200, 0.01, 2, False),
        (200, 0.01, 3, True),
        (300, 0.0, 0, False),
    ],
)
def test_one_bad_image_does_not_stop_a_small_run(
    total: int, fraction: float, bad: int, stops: bool
) -> None:
    quarantine = Quarantine(total, fraction, "here")
    quarantine.add(np.arange(bad), np.array(["damaged"] * bad))
    assert quarantine.too_many is stops


def test_names_in_the_reason_why_a_run_stops_are_printable() -> None:
    quarantine = Quarantine(1, 0.0, "here")
    quarantine.add(np.array([0]), np.array(["damaged"]))
    reason = str(quarantine.error(pa.chunked_array([["a\x1b[1m\nb.png"]])))
    assert r"a\x1b[1m\nb.png: damaged" in reason


def test_arrays_hold_the_last_word_on_each_image() -> None:
    arrays = Arrays(4)
    ids, good = np.array([2, 0]), np.array([True, False])
    assert arrays.add({"image_id": ids, "cluster": np.array([5, 9])}, good) == 2
    with pytest.raises(StageError, match=r"2 of 4 images never came back.*first is number 1"):
        arrays.check()
    everything = np.arange(4)
    assert arrays.add({"image_id": everything, "cluster": everything * 10}, everything != 0) == 2
    arrays.check()
    assert arrays.columns["cluster"].tolist() == [0, 10, 20, 30]
    assert arrays.kept.tolist() == [False, True, True, True]
