"""Ground truth of the listed images: from the index, or from a file of one label per image.

Only evaluation and the report read it. Codes are integers from 0, -1 where an image has no label.
Shapes: N images.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import LABEL_MODES, Config, DataConfig
from icce_ray.data import embeddings
from icce_ray.data.formats import suffix_of
from icce_ray.data.listing import check_exists, evenly
from icce_ray.errors import DataError, one_line, printable
from icce_ray.rundir import storage
from icce_ray.rundir.directory import RunDirectory

INDEX = "index"  # the folder of the listed images


def preflight(data: DataConfig) -> None:
    """See that a file of labels can be read, and fits given embeddings. Raises DataError."""
    if data.labels in LABEL_MODES:
        return
    check_exists("data.labels", data.labels)
    count = len(read_labels(data.labels))
    if data.embeddings:
        full = embeddings.open_vectors(data.embeddings, data.image_column).total
        kept = len(evenly(full, data.limit))
        _check_length(data.labels, count, (kept, full))


def load_labels(config: Config, run: RunDirectory) -> tuple[np.ndarray, list[str]] | None:
    """Ground truth by image_id, for `evaluate` and `report` only.

    Returns:
        Codes int64 [N] (-1: no label) in the order of image_id, and the names of the classes; or
        None where there are no labels.

    Raises:
        DataError: a labels file that cannot be read, or of another length than the images.
    """
    mode = config.data.labels
    if mode == "none":
        return None
    if mode == "auto":
        column = run.read_table(INDEX, columns=["label"])["label"]
        values: Any = column.to_numpy()
    else:
        values = _chosen(read_labels(mode), mode, run)
    codes, names = encode(values)
    return (codes, names) if names else None


def labels_of(mode: str, table: pa.Table) -> np.ndarray | None:
    """Ground truth of listed images, in their order: codes int64 [N], -1 where there is no label.

    mode: data.labels. Returns None where there are none; raises DataError as `load_labels`.
    """
    if mode == "none":
        return None
    values = table["label"].to_numpy() if mode == "auto" else read_labels(mode)
    _check_length(mode, len(values), [table.num_rows])
    codes, names = encode(values)
    return codes if names else None


def _chosen(values: np.ndarray, uri: str, run: RunDirectory) -> np.ndarray:
    """The labels of the images that data.limit kept."""
    done = run.manifest(INDEX)
    images = done.rows if done else run.read_table(INDEX, columns=["image_id"]).num_rows
    found = int(done.results.get("found", images)) if done else images
    _check_length(uri, len(values), (images, found))
    return values if len(values) == images else values[evenly(found, images)]


def _check_length(uri: str, labels: int, images: Sequence[int]) -> None:
    if labels not in images:
        raise DataError(
            f"data.labels={uri} has {labels:,} labels, but there are {images[0]:,} images: it must "
            "have one label per image, in the order of the index"
        )


def read_labels(uri: str) -> np.ndarray:
    """A .npy file, or text with one label a line. Returns [N] of integers or of objects.

    Raises:
        DataError: it cannot be read, or its lines have several columns.
    """
    try:
        data = storage.read(uri)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data.labels={uri} cannot be read: {one_line(error)}") from None
    try:
        if suffix_of(uri) == "npy":
            return _numbers(np.load(io.BytesIO(data), allow_pickle=False), uri)
        lines = [line.strip() for line in _text(data).splitlines()]
    except DataError:
        raise
    except Exception as error:  # numpy raises almost anything for a damaged header
        raise DataError(f"data.labels={uri} is neither .npy nor text: {one_line(error)}") from None
    _refuse_columns(lines, uri)
    return np.array(lines, dtype=object)


def _text(data: bytes) -> str:
    """Text without the byte-order mark that Windows puts before it."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def _numbers(values: np.ndarray, uri: str) -> np.ndarray:
    """Labels of a .npy file; whole numbers as integers, NaN as -1."""
    if values.ndim != 1:
        raise DataError(f"data.labels={uri} must have one label per image, not {values.shape}")
    if values.dtype.kind == "f":
        whole = np.where(np.isnan(values), -1, values)
        if np.isfinite(whole).all() and np.array_equal(whole, np.rint(whole)):
            return whole.astype(np.int64)
    if values.dtype.kind not in "iuUSb":
        raise DataError(f"data.labels={uri} must hold integers or text, not {values.dtype}")
    return values


def _refuse_columns(lines: Sequence[str], uri: str) -> None:
    """Refuse `number,label` and the like, where each line would be a class of its own.

    A column differs in each line, another does not. Labels with commas in them repeat.
    """
    known = [line for line in lines if line]
    if len(set(known)) < len(known):
        return
    for sign in (",", "\t", ";", " "):
        rows = [line.split(sign) for line in known]
        if len({len(row) for row in rows}) != 1:
            continue
        distinct = [len(set(column)) for column in zip(*rows, strict=True)]
        if max(distinct) == len(known) > min(distinct):
            likely = distinct.index(min(distinct)) + 1
            raise DataError(
                f"data.labels={uri} has {len(distinct)} columns ({printable(known[0])!r}), so that "
                f"every image would be a class of its own. Give one label a line: column {likely} "
                "seems to hold them"
            )


def encode(values: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Labels as codes int64 [N] and their names, sorted (as numbers where all are integers).

    None, empty text, negative integers, and NaN among numbers mean: no label, code -1.
    """
    if values.dtype.kind in "iub":
        texts = values.astype(np.int64)
        known = texts >= 0
    else:
        texts = np.array([_as_text(value) for value in values], dtype=str)
        known = (texts != "") & ~_is_nan(texts)
        texts, known = _as_integers(texts, known)
    codes = np.full(len(values), -1, np.int64)
    names, codes[known] = np.unique(texts[known], return_inverse=True)
    return codes, [str(name) for name in names]


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _is_nan(texts: np.ndarray) -> np.ndarray:
    """Where text [N] is NaN, in columns of numbers; a class of words may have that name."""
    distinct = set(texts.tolist()) - {""}  # np.unique would sort a million of them
    absent = [text for text in distinct if text.lower() == "nan"]
    numbers = bool(absent) and all(map(_is_number, distinct))
    return np.isin(texts, absent) if numbers else np.zeros(len(texts), bool)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _as_integers(texts: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers, where all known texts are such (as written by str), so that 10 comes after 9."""
    distinct = np.unique(texts[known])
    if not all(t.removeprefix("-").isdecimal() and str(int(t)) == t for t in distinct):
        return texts, known
    numbers = np.full(len(texts), -1, np.int64)
    numbers[known] = texts[known].astype(np.int64)
    return numbers, numbers >= 0
