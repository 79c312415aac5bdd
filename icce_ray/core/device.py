"""Where arrays live: the device of this process, and matrices copied to a GPU.

Shapes: N rows, D features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

COPIED_ROWS = 8192  # at a time, so that the host holds no second copy of a memory map


def default_device() -> torch.device:
    """The GPU given to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def apples_gpu() -> torch.device | None:
    """Apple's GPU, where there is one. It knows no float64, so nothing is trained there."""
    return torch.device("mps") if torch.backends.mps.is_available() else None


def on_gpu(matrix: np.ndarray, device: torch.device | str) -> Tensor | None:
    """The whole matrix [N, D] on a GPU, where it takes less than half of what is free; else None.

    matrix: of any number type; may be memory-mapped.
    """
    device = torch.device(device)
    if device.type != "cuda" or matrix.nbytes > 0.5 * torch.cuda.mem_get_info(device)[0]:
        return None
    kind = torch.from_numpy(np.empty(0, matrix.dtype)).dtype
    out = torch.empty(matrix.shape, dtype=kind, device=device)
    for start in range(0, len(matrix), COPIED_ROWS):
        part = np.array(matrix[start : start + COPIED_ROWS])
        out[start : start + len(part)] = torch.from_numpy(part).to(device)
    return out
