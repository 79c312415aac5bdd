"""Embeddings on their leading principal components, whitened by the scatter between neighbors: what
heads see, and neighbors are searched in.

Shapes: N rows, B rows of a batch, D features, P components.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icce_ray.core.constants import COMPARED_ROWS, STATISTICS_ROWS
from icce_ray.core.sampling import sample_rows

PAIRED_ROWS = 5000  # of these, rows whose neighbors are looked for
PAIRED = 5  # neighbors of each
PROJECTED_ROWS = 8192  # rows projected at a time
LEAST = 1e-4  # of the largest deviation: below it a component is rounding
SHRINKAGE = 0.1  # of the mean variance between neighbors: few rows know little of small components
UNLIKE = 1e-3  # of the variance between all rows: copies of an image are neighbors without scatter


class Projection(nn.Module):
    """Centered embeddings on their leading principal components, whitened, unit rows.

    Dropping the trailing components removes noise and most of the cost. Those that are left are
    whitened by the scatter between neighbors, which are mostly of one class: directions in which
    neighbors differ count less, whether light and style, which lead, or noise, which trails. This
    is relevant component analysis (Shental et al. 2002) with neighbors in place of pairs that are
    known to be of one class.
    """

    center: Tensor
    basis: Tensor

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("basis", torch.eye(features)[:, :components].contiguous())

    def fit(self, sample: Tensor) -> Projection:
        """Center, components and scatter of a sample of embeddings, float [N, D]."""
        center = sample.double().mean(0)
        centered = sample.double() - center
        values, vectors = torch.linalg.eigh(centered.T @ centered / len(sample))
        basis = vectors.flip(1)[:, : self.basis.shape[1]]
        variance = values.flip(0)[: basis.shape[1]].clamp_min(0)
        variance = variance.clamp_min(float(variance[0].clamp_min(1e-24)) * LEAST**2)
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        basis = basis * largest.sign()  # eigenvectors have no sign of their own
        within = _neighbor_scatter(centered @ basis, variance)
        within += torch.diag(SHRINKAGE * within.trace() / len(variance) + UNLIKE * variance)
        self.center.copy_(center)
        self.basis.copy_(basis @ inverse_root(within))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, P]."""
        return F.normalize((x - self.center) @ self.basis, dim=-1)


def _neighbor_scatter(components: Tensor, variance: Tensor) -> Tensor:
    """Covariance within neighborhoods: half the mean outer product of the differences between rows
    and their nearest others. double [N, P] and [P] -> [P, P].

    Neighbors are looked for in half-whitened components, as neither raw ones, which the leading few
    rule, nor whitened ones, in which noise counts as much, find good ones.
    """
    rows = len(components)
    if rows < 2:
        return torch.diag(variance)
    seen = F.normalize(components * variance**-0.25, dim=-1).float()
    asked = torch.linspace(0, rows - 1, min(rows, PAIRED_ROWS)).round().long()
    scatter = torch.zeros_like(torch.diag(variance))
    for some in asked.split(COMPARED_ROWS):
        similarity = seen[some] @ seen.T
        similarity[torch.arange(len(some)), some] = -torch.inf
        near = similarity.topk(min(PAIRED, rows - 1), dim=1).indices
        differences = (components[some, None] - components[near]).flatten(0, 1)
        scatter += differences.T @ differences / near.shape[1]
    return scatter / (2 * len(asked))


def inverse_root(matrix: Tensor) -> Tensor:
    """Symmetric inverse square root of a positive definite matrix [P, P]."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.rsqrt()) @ vectors.T


def fit_projection(embeddings: np.ndarray, components: int | None, seed: int) -> Projection:
    """The projection that the settings ask for, from a sample of float16 embeddings [N, D].

    components: None leaves the embeddings as they are, but for their center.
    """
    rows, features = embeddings.shape
    chosen = sample_rows(rows, STATISTICS_ROWS, seed)
    sample = torch.from_numpy(np.asarray(embeddings[chosen], dtype=np.float32))
    projection = Projection(features, min(components or features, features))
    if components is None:
        projection.center.copy_(sample.mean(0))
        return projection
    return projection.fit(sample)


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
