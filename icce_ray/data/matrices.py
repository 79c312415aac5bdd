"""Files that hold one matrix: .npy, .npz, and PyTorch's .pt. Nothing in them is unpickled.

.npy is read in blocks of rows; of .npz and .pt, and of .npy that is stored by columns on an object
store, the whole matrix is in memory meanwhile.
Shapes: N rows, D features.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.lib import format as npy

from icce_ray.data.formats import suffix_of
from icce_ray.errors import DataError, one_line, printable
from icce_ray.rundir.storage import Storage

Head = tuple[tuple[int, ...], np.dtype, bool]  # shape, type, whether it is stored by columns


def head(file: str) -> tuple[int, int]:
    """N and D. Raises DataError: damaged, or not one matrix of numbers."""
    if suffix_of(file) == "npz":
        name, heads = _npz_heads(file)
        rows, width = heads[name][0]
    elif suffix_of(file) == "npy":
        (rows, width), *_ = Storage(file).load(lambda stream: _npy_head(stream, file))
    else:
        rows, width = _torch(file).shape
    return rows, width


def blocks(file: str, rows: int) -> Iterator[np.ndarray]:
    """Consecutive blocks of at most `rows` rows, [., D], in the file's type of numbers."""
    if suffix_of(file) == "npy":
        yield from _npy_blocks(file, rows)
        return
    matrix = _npz(file) if suffix_of(file) == "npz" else _torch(file)
    for first in range(0, len(matrix), rows):
        yield matrix[first : first + rows]


def _check(shape: tuple[int, ...], dtype: Any, file: str) -> None:
    if len(shape) != 2 or np.dtype(dtype).kind not in "fiu":
        raise DataError(
            f"{printable(file)} must hold N x D numbers, one row per image; "
            f"it is {dtype} of shape {shape}"
        )


def _only(shapes: Mapping[str, tuple[int, ...]], file: str) -> str:
    """The name of the only matrix among arrays."""
    found = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(found) == 1:
        return found[0]
    arrays = ", ".join(f"{printable(name)} {list(shape)}" for name, shape in shapes.items())
    raise DataError(
        f"{printable(file)} must hold one N x D array, one row per image; it holds "
        f"{arrays or 'no arrays'}. Save the one to use in a file of its own"
    )


# --- .npy ----------------------------------------------------------------------------------------


def _read_head(stream: Any, file: str) -> Head:
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except OSError:  # of the storage, which may come back
        raise
    except Exception as error:  # numpy raises almost anything for a damaged header
        raise DataError(f"{printable(file)} is not a .npy file: {one_line(error)}") from None
    return shape, dtype, fortran


def _npy_head(stream: Any, file: str) -> tuple[tuple[int, int], np.dtype, bool, int]:
    """Shape, type, whether it is stored by columns, and the position of the data."""
    shape, dtype, fortran = _read_head(stream, file)
    _check(shape, dtype, file)
    start = stream.tell()
    if stream.size() - start < shape[0] * shape[1] * dtype.itemsize:
        raise DataError(
            f"{printable(file)} is truncated: its header says {shape[0]} x {shape[1]} {dtype}"
        )
    return (shape[0], shape[1]), dtype, fortran, start


def _npy_blocks(file: str, rows: int) -> Iterator[np.ndarray]:
    source = Storage(file)
    shape, dtype, fortran, start = source.load(lambda stream: _npy_head(stream, file))
    total, width = shape
    if fortran:
        matrix = _by_columns(source, shape, dtype, start)
        for first in range(0, total, rows):
            yield matrix[first : first + rows]
        return
    step = width * dtype.itemsize
    for first in range(0, total, rows):
        count = min(rows, total - first)
        data = source.read_at(count * step, start + first * step)
        yield np.frombuffer(data, dtype).reshape(count, width)


def _by_columns(source: Storage, shape: tuple[int, int], dtype: np.dtype, start: int) -> np.ndarray:
    if source.is_local:
        return np.memmap(source.root, dtype, "r", start, shape, order="F")
    data = source.read_at(shape[0] * shape[1] * dtype.itemsize, start)
    return np.frombuffer(data, dtype).reshape(shape, order="F")


# --- .npz ----------------------------------------------------------------------------------------


def _npz_heads(file: str) -> tuple[str, dict[str, Head]]:
    """The member that is the matrix, and what the heads of all members say."""

    def read(stream: Any) -> dict[str, Head]:
        found = {}
        with zipfile.ZipFile(stream) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    found[name] = _read_head(member, f"{file}, {name}")
        return found

    try:
        heads = Storage(file).load(read)
    except (OSError, DataError):
        raise
    except Exception as error:  # zipfile raises almost anything for a damaged archive
        raise DataError(f"{printable(file)} is not a .npz file: {one_line(error)}") from None
    name = _only({name: shape for name, (shape, *_) in heads.items()}, file)
    shape, dtype, _ = heads[name]
    _check(shape, dtype, file)
    return name, heads


def _npz(file: str) -> np.ndarray:
    name, _ = _npz_heads(file)

    def read(stream: Any) -> np.ndarray:
        with zipfile.ZipFile(stream) as archive:
            return np.load(io.BytesIO(archive.read(name)), allow_pickle=False)

    try:
        return Storage(file).load(read)
    except OSError:
        raise
    except Exception as error:  # as above, and zlib's own
        raise DataError(f"{printable(file)}: its array is damaged: {one_line(error)}") from None


# --- .pt -----------------------------------------------------------------------------------------


def _torch(file: str) -> np.ndarray:
    import torch

    source = Storage(file)
    try:
        if source.is_local:  # pages that are not needed are not read
            found = torch.load(
                source.root, map_location="cpu", weights_only=True, mmap=_is_zip(source)
            )
        else:
            data = io.BytesIO(source.read())
            found = torch.load(data, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling of damaged files raises almost anything
        raise DataError(
            f"{printable(file)} is not a tensor that torch reads with weights_only: "
            f"{one_line(error, 150)}. Save the tensor alone: torch.save(embeddings, FILE)"
        ) from None
    given = found if isinstance(found, Mapping) else {"": found}
    tensors = {str(name): one for name, one in given.items() if isinstance(one, torch.Tensor)}
    tensor = tensors[_only({name: tuple(one.shape) for name, one in tensors.items()}, file)]
    if tensor.is_sparse or tensor.is_quantized:
        raise DataError(f"{printable(file)} must hold N x D numbers, not a {tensor.layout} tensor")
    matrix = tensor.detach()
    if matrix.dtype == torch.bfloat16:  # which numpy does not know
        matrix = matrix.float()
    found_array: np.ndarray = matrix.numpy()
    _check(found_array.shape, found_array.dtype, file)
    return found_array


def _is_zip(source: Storage) -> bool:
    """Whether a file is of the kind that torch can map, not of one before version 1.6."""
    return source.read_at(2, 0) == b"PK"
