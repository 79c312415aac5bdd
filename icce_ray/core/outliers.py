"""How far an image lies from the others: of the images of a run, and of new ones.

Both scores are percentiles, so that one threshold means the same for every backbone. Measured: a
classifier of digits was 0.87 sure of the median one of 60 images of clothes; all had a novelty of
1, and none of 60 digits one above 0.98.
Shapes: N images, M neighbors, B new images, D features, R reference images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icce_ray.core import neighbors
from icce_ray.core.constants import REFERENCES
from icce_ray.core.sampling import sample_rows, seed_of

NEAREST = 10  # neighbors whose mean distance counts; a copy alone makes no image usual
CHUNK = 65_536  # images looked at at once


def outlier_scores(similarity: np.ndarray) -> np.ndarray:
    """The share of the other images that lie nearer to their neighbors: float32 [N], 0..1.

    similarity: to the nearest neighbors, best first, [N, M]; may be memory-mapped.
    """
    rows = len(similarity)
    distance = np.empty(rows, np.float32)
    for start in range(0, rows, CHUNK):
        part = np.asarray(similarity[start : start + CHUNK, :NEAREST], np.float32)
        distance[start : start + CHUNK] = 1 - part.mean(1)
    nearer = np.searchsorted(np.sort(distance), distance)
    return (nearer / max(1, rows - 1)).astype(np.float32)


# --- new images ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """Images of a run that new ones are compared with."""

    rows: Tensor  # float32 [R, D], unit rows
    distances: Tensor  # float32 [R], ascending: of each to its nearest among the others

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a file: rows in half precision, as embeddings are."""
        return {"rows": self.rows.half().cpu().contiguous(), "distances": self.distances.cpu()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Reference:
        """The inverse of `tensors`. Raises KeyError where one is missing."""
        return cls(tensors["rows"].to(device).float(), tensors["distances"].to(device))


def make_reference(embeddings: np.ndarray, seed: int, device: torch.device) -> Reference:
    """A sample of a run's embeddings, float16 [N, D], N at least 2. Components are of no use here:
    what is new about an image may lie outside of those of the run."""
    chosen = sample_rows(len(embeddings), REFERENCES, seed_of(seed, "novelty"))
    rows = np.ascontiguousarray(embeddings[chosen])
    most = min(NEAREST, len(rows) - 1)
    _, similarity = neighbors.search(rows, 0, len(rows), most, device)
    distances = torch.from_numpy(1 - similarity.mean(1)).sort().values
    return Reference(torch.from_numpy(rows).float(), distances)


def novelty(reference: Reference, features: Tensor) -> Tensor:
    """The share of the run's images that lie nearer to the others than a new one: float32 [B].

    features: unit rows [B, D] on the reference's device.
    """
    similarity = features.float() @ reference.rows.T
    most = min(NEAREST, len(reference.rows) - 1)
    distance = 1 - similarity.topk(most, dim=1).values.mean(1)
    nearer = torch.searchsorted(reference.distances, distance.contiguous())
    return nearer.float() / len(reference.distances)
