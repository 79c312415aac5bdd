"""Ground truth: from the index, or from files of one label per image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icce_ray.config.loading import load
from icce_ray.config.schema import DataConfig
from icce_ray.data.labels import load_labels, preflight
from icce_ray.data.listing import list_images
from icce_ray.errors import DataError
from icce_ray.rundir.directory import Manifest, RunDirectory


def labels_of(tmp_path: Path, file: Path, count: int = 4, **data: Any) -> tuple[list[int], list]:
    """Codes and names for an index of `count` images, with the labels of a file."""
    (tmp_path / "images").mkdir(exist_ok=True)
    for number in range(count):
        (tmp_path / "images" / f"{number}.png").touch()
    tree = {"num_classes": 2, "data": {"path": str(tmp_path / "images"), "labels": str(file)}}
    tree["data"] |= data  # type: ignore[operator]
    config, run = load(tree), RunDirectory(str(tmp_path / "run"))
    listed = list_images(config.data)
    run.write_table(listed.table, "index", "part-00000.parquet")
    results = {"found": listed.found}
    run.finish("index", Manifest("index", "f", {}, {}, listed.table.num_rows, 1.0, results))
    labels = load_labels(config, run)
    assert labels is not None and labels[0].dtype == np.int64
    return labels[0].tolist(), labels[1]


@pytest.mark.parametrize(
    ("values", "codes", "names"),
    [
        (np.array([10, 9, 10, -1]), [1, 0, 1, -1], ["9", "10"]),
        (np.array([1.0, 0.0, 1.0, 2.0]), [1, 0, 1, 2], ["0", "1", "2"]),
        (np.array(["b", "a", "", "b"]), [1, 0, -1, 1], ["a", "b"]),
        (np.array([1.0, np.nan, 1.0, 2.0]), [0, -1, 0, 1], ["1", "2"]),
        (np.array([b"caf\xe9", b"a", b"", b"a"]), [1, 0, -1, 0], ["a", "caf\ufffd"]),
        (np.array([True, False, True, True]), [1, 0, 1, 1], ["0", "1"]),
        ("dog\ncat \n\ndog\n", [1, 0, -1, 1], ["cat", "dog"]),
        ("10\n9\n-1\n10\n", [1, 0, -1, 1], ["9", "10"]),
        ("007\n7\n07\n7", [0, 2, 1, 2], ["007", "07", "7"]),
        ("\ufeffcat\r\ndog\r\ncat\r\n\r\n", [0, 1, 0, -1], ["cat", "dog"]),
        ("0.5\nnan\n2\nNaN", [0, -1, 1, -1], ["0.5", "2"]),
        ("10\nnan\n9\n9", [1, -1, 0, 0], ["9", "10"]),
        ("nan\nroti\nnan\nroti", [0, 1, 0, 1], ["nan", "roti"]),
        ("tench, Tinca\na, b\na, c\na, b", [2, 0, 1, 0], ["a, b", "a, c", "tench, Tinca"]),
    ],
)
def test_label_files(tmp_path: Path, values: Any, codes: list[int], names: list[str]) -> None:
    file = tmp_path / ("labels.txt" if isinstance(values, str) else "labels.npy")
    if isinstance(values, str):
        file.write_text(values)
    else:
        np.save(file, values)
    assert labels_of(tmp_path, file) == (codes, names)


def test_label_file_of_all_images_with_a_limit(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.arange(8))
    assert labels_of(tmp_path, tmp_path / "labels.npy", 8, limit=3)[1] == ["0", "2", "5"]


def test_label_file_errors(tmp_path: Path) -> None:
    file = tmp_path / "labels.npy"
    np.save(file, np.arange(5))
    with pytest.raises(DataError, match="5 labels, but there are 4 images"):
        labels_of(tmp_path, file)
    for values in (np.zeros((4, 2)), np.array([0.5, 1, 2, 3]), np.array([1, None], object)):
        np.save(file, values, allow_pickle=True)
        with pytest.raises(DataError, match=r"data\.labels"):
            labels_of(tmp_path, file)


def test_a_label_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.txt")
    with pytest.raises(DataError, match=r"data\.labels=.* cannot be read: .*a pipe"):
        labels_of(tmp_path, tmp_path / "labels.txt")


def test_text_of_two_bytes_a_character(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\ncat\ndog\n", encoding="utf-16")
    assert labels_of(tmp_path, tmp_path / "labels.txt") == ([0, 1, 0, 1], ["cat", "dog"])


@pytest.mark.parametrize(
    ("lines", "column"),
    [
        (["0,cat", "1,dog", "2,cat", "3,dog"], 2),
        (["cat;0", "dog;1", "cat;2", "dog;3"], 1),
        (["a b/1.png\tcat\t9", "1.png\tdog\t9", "2.png\tcat\t9", "3.png\tdog\t9"], 3),
        (["a/1.png 3", "a/2.png 3", "a/3.png 4", "a/4.png 4"], 2),
    ],
)
def test_lines_of_several_columns_are_refused(
    tmp_path: Path, lines: list[str], column: int
) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"columns \('.*one label a line: column {column} seems"):
        labels_of(tmp_path, file)
    tree = {"path": str(tmp_path), "labels": str(file)}
    with pytest.raises(DataError, match="one label a line"):
        preflight(DataConfig(**tree))


def test_distinct_names_of_two_words_are_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("red fox\ngrey wolf\nbrown bear\nsea lion")
    assert labels_of(tmp_path, tmp_path / "labels.txt")[0] == [2, 1, 0, 3]
