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
    with pytest.raises(DataError, match=r"x\.csv: embeddings come as \.npy or Parquet"):
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
