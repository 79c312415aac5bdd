"""Embeddings on their leading principal components: what heads see, and neighbors are searched in.

Shapes: N rows, B rows of a batch, D features, P components.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icce_ray.core.sampling import sample_rows

STATISTICS_ROWS = 20_000  # rows that center and components are taken from
PROJECTED_ROWS = 8192  # rows projected at a time
WHITENED = 0.5  # exponent by which components are divided by their deviation: 1 makes all equal
LEAST = 1e-4  # of the largest deviation: below it a component is rounding


class Projection(nn.Module):
    """Centered embeddings on their leading principal components, unit rows.

    Dropping the trailing components removes noise and most of the cost. Those that are left are
    half whitened: the leading ones are what all images have in common, such as light or style, and
    what tells many classes apart is in the smaller ones.
    """

    center: Tensor
    basis: Tensor

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("basis", torch.eye(features)[:, :components].contiguous())

    def fit(self, sample: Tensor) -> Projection:
        """Center and components of a sample of embeddings, float [N, D]."""
        center = sample.double().mean(0)
        centered = sample.double() - center
        values, vectors = torch.linalg.eigh(centered.T @ centered)
        basis = vectors.flip(1)[:, : self.basis.shape[1]]
        deviation = values.flip(0)[: basis.shape[1]].clamp_min(0).sqrt()
        largest_deviation = deviation[0].clamp_min(1e-12)
        scale = (deviation / largest_deviation).clamp_min(LEAST) ** -WHITENED
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        self.center.copy_(center)
        self.basis.copy_(basis * largest.sign() * scale)  # eigenvectors have no sign of their own
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, P]."""
        return F.normalize((x - self.center) @ self.basis, dim=-1)


def fit_projection(embeddings: np.ndarray, components: int | None, seed: int) -> Projection:
    """The projection that the settings ask for, from a sample of float16 embeddings [N, D]."""
    rows, features = embeddings.shape
    chosen = sample_rows(rows, STATISTICS_ROWS, seed)
    sample = torch.from_numpy(np.asarray(embeddings[chosen], dtype=np.float32))
    if components is None or components >= features:
        projection = Projection(features, features)
        projection.center.copy_(sample.mean(0))
        return projection
    return Projection(features, components).fit(sample)


@torch.no_grad()
def projected(
    embeddings: np.ndarray, projection: Projection, device: torch.device
) -> Iterator[Tensor]:
    """Consecutive rows projected, float16 [., P] on the device; N x D embeddings are only read."""
    projection = projection.to(device)
    for start in range(0, len(embeddings), PROJECTED_ROWS):
        part = np.asarray(embeddings[start : start + PROJECTED_ROWS], dtype=np.float32)
        yield projection(torch.from_numpy(part).to(device)).half()


def project(embeddings: np.ndarray, projection: Projection, device: torch.device) -> Tensor:
    """All rows projected: float16 [N, P] on the device, without a copy of the embeddings."""
    width = projection.basis.shape[1]
    out = torch.empty(len(embeddings), width, dtype=torch.float16, device=device)
    start = 0
    for part in projected(embeddings, projection, device):
        out[start : start + len(part)] = part
        start += len(part)
    return out
