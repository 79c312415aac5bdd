"""Groups of images that show the same: copies, also of another size or compression.

The search only proposes pairs. Its similarities are of whitened components, which enlarge what is
small, such as the traces of a compression. So pairs are measured between the embeddings.

Near is what is far below usual: at most 0.4 of the typical distance to the 10th neighbor, so that
the scale of a backbone's distances cancels out. Where images vary in d directions, one that is no
copy lies within a share r of that distance with a chance of 10 r^d; of few directions, r is so
small that this is a thousandth. d is estimated from the distances themselves (Levina & Bickel,
NeurIPS 2004). Measured: none of 1,797 digits is near another (d 7), and 14 of 20,000 images of
Fashion-MNIST are (d 10), each of which is the same picture, if brighter or darker. A new scale, a
compression at high quality or a slight crop move most images by less; a compression at low quality
moves most by more.

Shapes: N images, D features, M neighbors, C neighbors compared, E pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from icce_ray.core.sampling import sample_rows, seed_of

NEAR = 0.4  # of the typical distance, at most
CHANCE = 1e-3  # that an image without a copy has another as near
TYPICAL = 10  # the neighbor whose distance, its median over images, is typical
COMPARED = 5  # neighbors of each image; larger groups join through each other's lists
ROUNDING = 1e-3  # distance that half precision alone may put between equal rows
SAMPLE = 20_000  # images whose typical distance is measured
BLOCK = 1 << 23  # numbers gathered at once


@dataclass(frozen=True)
class Duplicates:
    """Which images show the same."""

    first: np.ndarray  # int64 [N]: the first row of each row's group; itself where it is alone
    threshold: float  # distance of unit rows up to which two are duplicates

    @property
    def later(self) -> np.ndarray:
        """Rows that repeat an earlier one: bool [N]."""
        return self.first != np.arange(len(self.first))


def find(embeddings: np.ndarray, ids: np.ndarray, seed: int) -> Duplicates:
    """Groups of duplicates: rows that are equal, or near, directly or by way of others.

    Args:
        embeddings: float16 [N, D], unit rows; may be memory-mapped.
        ids: row numbers of the nearest neighbors, best first, int [N, M].
        seed: draws the rows that the threshold is taken from.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = len(embeddings)
    threshold = typical_threshold(embeddings, ids, seed)
    pairs = np.concatenate([equal_pairs(embeddings), near_pairs(embeddings, ids, threshold)])
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(rows, rows))
    _, group = connected_components(graph, directed=False)
    _, start = np.unique(group, return_index=True)
    return Duplicates(start[group].astype(np.int64), threshold)


def typical_threshold(embeddings: np.ndarray, ids: np.ndarray, seed: int) -> float:
    """The distance up to which two rows are duplicates. Arguments as of `find`."""
    chosen = sample_rows(len(ids), SAMPLE, seed_of(seed, "duplicates"))
    most = min(TYPICAL, ids.shape[1])
    parts = np.array_split(chosen, 1 + len(chosen) * most * embeddings.shape[1] // BLOCK)
    apart = [_distances(embeddings, part, np.asarray(ids[part, :most])) for part in parts]
    distance = np.sort(np.concatenate(apart), axis=1).clip(ROUNDING)
    # The mean logarithm is 1 / d; its median over images is not moved by those with copies.
    logarithms = np.log(distance[:, -1:] / distance[:, : max(1, most - 1)])
    share = min(NEAR, (CHANCE / most) ** float(np.median(logarithms.mean(1))))
    return max(ROUNDING, share * float(np.median(distance[:, -1])))


def near_pairs(embeddings: np.ndarray, ids: np.ndarray, threshold: float) -> np.ndarray:
    """Rows and those of their C nearest neighbors within the threshold: int64 [E, 2]."""
    compared = min(COMPARED, ids.shape[1])
    step = max(1, BLOCK // (compared * embeddings.shape[1]))
    found = [np.empty((0, 2), np.int64)]
    for start in range(0, len(ids), step):
        part = np.arange(start, min(start + step, len(ids)))
        near = np.asarray(ids[part, :compared])
        row, column = np.nonzero(_distances(embeddings, part, near) <= threshold)
        found.append(np.stack([part[row], near[row, column]], 1))
    return np.concatenate(found)


def equal_pairs(embeddings: np.ndarray) -> np.ndarray:
    """Rows equal to an earlier one, with the first such one: int64 [E, 2].

    A list of neighbors is too short for the copies of a picture that is there a thousand times.
    """
    seen: dict[bytes, int] = {}
    found = []
    for row, values in enumerate(embeddings):
        key = hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()
        if (first := seen.setdefault(key, row)) != row:
            found.append((row, first))
    return np.array(found, np.int64).reshape(-1, 2)


def _distances(embeddings: np.ndarray, rows: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Between rows [B] and others [B, C]: float32 [B, C]."""
    own = np.asarray(embeddings[rows], np.float32)
    others = np.asarray(embeddings[near.reshape(-1)], np.float32)
    return np.linalg.norm(others.reshape(*near.shape, own.shape[1]) - own[:, None], axis=2)
