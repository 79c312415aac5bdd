"""Embeddings that were given, in files that do not fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.config.schema import DataConfig
from icce_ray.data import embeddings
from icce_ray.errors import DataError


def write(path: Path, rows: int, width: int, **columns: list[str | None]) -> Path:
    vectors = [[float(i + 1)] * width for i in range(rows)]
    pq.write_table(pa.table({"embedding": vectors, **columns}), path)
    return path


def test_a_folder_without_parquet_files(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    with pytest.raises(DataError, match=r"data\.embeddings=.* is a folder without Parquet files"):
        embeddings.open_vectors(str(tmp_path))


def test_files_of_another_ending(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(DataError, match=r"x\.csv: embeddings come as \.npy, .* or Parquet"):
        embeddings.open_vectors(str(tmp_path / "x.csv"))


def test_files_of_different_width(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 2, 3)
    write(tmp_path / "b.parquet", 2, 4)
    with pytest.raises(DataError, match=r"files differ in width: \[3, 4\]"):
        embeddings.open_vectors(str(tmp_path))


def test_rows_without_uri(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 3, 2, uri=["a", None, "c"])
    with pytest.raises(DataError, match=r"1 rows have no uri"):
        embeddings.list_rows(DataConfig(embeddings=str(path)))


LISTS = {"clip": [[1.0, 2.0]] * 2, "dino": [[3.0, 4.0]] * 2, "size": [5, 6], "tags": [["a"]] * 2}


@pytest.mark.parametrize(
    ("columns", "asked", "value"),
    [
        (("size", "dino", "tags"), "image", 3.0),  # the only lists of numbers
        (("clip", "dino"), "dino", 3.0),
        (("clip", "embedding"), "image", 7.0),
    ],
)
def test_the_column_may_have_any_name(
    tmp_path: Path, columns: tuple[str, ...], asked: str, value: float
) -> None:
    known = {**LISTS, "embedding": [[7.0, 8.0]] * 2}
    pq.write_table(pa.table({name: known[name] for name in columns}), tmp_path / "x.parquet")
    (block,) = embeddings.open_vectors(str(tmp_path / "x.parquet"), asked).blocks(10)
    assert block[:, 0].tolist() == [value] * 2


def test_of_several_columns_one_has_to_be_named(tmp_path: Path) -> None:
    pq.write_table(pa.table(LISTS), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"data\.image_column=NAME chooses among clip, dino$"):
        embeddings.open_vectors(str(tmp_path / "x.parquet"))


def test_a_file_that_miscounts_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"embedding": [[1.0, 2.0]] * 3, "label": [0, 1, 0]}), path)
    data = path.read_bytes()
    at = data.rindex(b"\x16\x06\x19\x1c\x19")  # of the footer: 3 rows, in a list of one group
    path.write_bytes(data[:at] + b"\x16\x04" + data[at + 2 :])
    with pytest.raises(DataError, match=r"x\.parquet cannot be read: column label has 3 rows"):
        embeddings.list_rows(DataConfig(embeddings=str(path)))
