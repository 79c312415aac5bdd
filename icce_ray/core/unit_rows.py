"""Embeddings that a user gives, made ready: unit rows in half precision, bad rows named.

Shapes: N rows, B rows of a block, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from icce_ray.errors import DataError, one_line

BLOCK_ROWS = 8192  # rows normalized at a time
SHOWN = 5  # numbers of bad rows that an error lists


class UnitRows:
    """Normalizes blocks of rows, and remembers those that cannot be normalized."""

    def __init__(self) -> None:
        self.bad = 0
        self.first: list[int] = []

    def normalize(self, block: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Rows of unit length, float16 [B, D]; bad ones are noted and left as they come out.

        block: float32 [B, D]; numbers: of these rows in the whole, int [B].
        """
        largest = np.abs(block).max(axis=1, keepdims=True)  # NaN and infinity carry over
        usable = np.isfinite(largest[:, 0]) & (largest[:, 0] > 0)
        self.bad += int((~usable).sum())
        self.first += numbers[~usable][: SHOWN - len(self.first)].tolist()
        with np.errstate(invalid="ignore", divide="ignore"):
            scaled = block / np.where(usable[:, None], largest, 1)  # squares cannot overflow
            return (scaled / np.linalg.norm(scaled, axis=1, keepdims=True)).astype(np.float16)

    def check(self, what: str) -> None:
        """Raise DataError where there were bad rows. what: names the embeddings."""
        if self.bad:
            rows = ", ".join(str(row) for row in self.first)
            raise DataError(
                f"{what}: {self.bad:,} rows are zero or hold values that are not finite; the first "
                f"are rows {rows} (from 0). Remove them, with their labels."
            )


def unit_rows(embeddings: Any, *, features: int | None = None) -> np.ndarray:
    """A matrix in memory as unit rows, float16 [N, D]; the same as a run makes of a file.

    Args:
        embeddings: numbers [N, D]: a numpy array of any number type (also memory-mapped), a torch
            tensor on any device, or what numpy makes an array of. It is read in blocks.
        features: D that is expected. Default: any.

    Raises:
        DataError: what is no matrix of real numbers, is empty, has another D, or has rows that are
            zero or not finite.
    """
    matrix = _as_matrix(embeddings)
    rows, width = matrix.shape
    if not rows or not width:
        raise DataError(f"embeddings are empty: their shape is {(rows, width)}; give N x D numbers")
    if features is not None and width != features:
        raise DataError(
            f"embeddings have {width} features, but the classifier takes {features}; embed new "
            "images with the same backbone"
        )
    out, unit = np.empty((rows, width), np.float16), UnitRows()
    for start in range(0, rows, BLOCK_ROWS):
        part = slice(start, min(start + BLOCK_ROWS, rows))
        out[part] = unit.normalize(_block(matrix, part), np.arange(part.start, part.stop))
    unit.check("embeddings")
    return out


def _as_matrix(embeddings: Any) -> Any:
    """A numpy array or torch tensor of two dimensions and real numbers."""
    import torch

    matrix: Any
    if isinstance(embeddings, torch.Tensor):
        matrix = embeddings.detach()
        real = not matrix.is_complex() and matrix.dtype != torch.bool
    else:
        try:
            matrix = np.asarray(embeddings)
        except ValueError as error:
            raise DataError(f"embeddings are no matrix: {one_line(error)}") from None
        real = matrix.dtype.kind in "fiu"
    if not real:
        raise DataError(
            f"embeddings must be real numbers, not {matrix.dtype}; "
            "convert them, as by embeddings.astype('float32')"
        )
    if matrix.ndim != 2:
        raise DataError(
            f"embeddings must be a matrix [images, features], not of shape {tuple(matrix.shape)}; "
            "give one row per image"
        )
    return matrix


def _block(matrix: Any, part: slice) -> np.ndarray:
    """Some rows as float32, copied from the device where need be. [B, D]"""
    block = matrix[part]
    if not isinstance(block, np.ndarray):
        return block.float().cpu().numpy()
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is named
        return block.astype(np.float32)
