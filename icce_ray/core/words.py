"""Names of clusters in words: which of many words are nearest, by a model of images and texts.

Shapes: N images, K clusters, V words, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from icce_ray.errors import ConfigError, one_line

NOUNS = Path(__file__).with_name("nouns.txt")
PROMPT = "a photo of a {}."
BEST = 3  # words per cluster
LEAST = 10  # times the mean score that the best word must have, or half of all
HUB = 10  # clusters over which a word's nearness is averaged
LONGEST = 200  # characters of a line of a vocabulary
ROWS = 1 << 16  # read at a time


class Word(NamedTuple):
    """A suggested name of a cluster."""

    text: str
    score: float | None  # 0..1; None where nothing gives one


def vocabulary(path: str | None) -> list[str]:
    """The words of a text file, one a line, without blank lines, comments (#) and repeats.

    path: None for the nouns of the package.

    Raises ConfigError: a file that cannot be read, is not such text, or names nothing.
    """
    file = NOUNS if path is None else Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"answer.vocabulary={path} cannot be read: {reason}") from None
    words = list(dict.fromkeys(t for line in lines if (t := line.strip()) and t[0] != "#"))
    if len(words) < 2:
        raise ConfigError(f"answer.vocabulary={path} names fewer than 2 words, one a line")
    if long := next((word for word in words if len(word) > LONGEST), None):
        raise ConfigError(
            f"answer.vocabulary={path} is no list of words: a line begins {long[:40]!r}"
        )
    return words


def means(features: np.ndarray, clusters: np.ndarray, confidence: np.ndarray, count: int) -> Tensor:
    """The mean direction of each cluster's images of at least its mean confidence.

    features: [N, D], read in blocks. clusters: int [N]. confidence: float [N]. count: K.

    Returns float32 [K, D], unit rows; zero for an empty cluster.
    """
    sizes = np.maximum(np.bincount(clusters, minlength=count), 1)
    usual = np.bincount(clusters, confidence, count) / sizes
    sums = torch.zeros(count, features.shape[1])
    for start in range(0, len(clusters), ROWS):
        part = slice(start, start + ROWS)
        kept = np.flatnonzero(confidence[part] >= usual[clusters[part]] - 1e-6)
        rows = torch.from_numpy(np.asarray(features[part])[kept].astype(np.float32))
        sums.index_add_(0, torch.from_numpy(clusters[part][kept].astype(np.int64)), rows)
    return torch.nn.functional.normalize(sums, dim=1)


def suggest(centers: Tensor, texts: Tensor, scale: float, words: Sequence[str]) -> list[list[Word]]:
    """The best words of each cluster, best first; none for an empty cluster, nor where even the
    best word is hardly better than any.

    From the cosine of cluster and word, half the word's mean cosine with its HUB nearest clusters
    is subtracted, as in CSLS (Conneau et al. 2018): else a few words would be near to all. The
    score is the softmax of `scale` times that, over the vocabulary.

    centers: unit or zero rows [K, D]. texts: unit rows [V, D].
    """
    there = centers.norm(dim=1) > 0.5
    cosine = centers @ texts.T
    nearest = cosine[there].topk(min(HUB, int(there.sum())), dim=0).values.mean(0)
    shares = (scale * (cosine - nearest / 2)).softmax(1)
    best = shares.topk(min(BEST, len(words)), dim=1)
    clear = there & (best.values[:, 0] >= min(0.5, LEAST / len(words)))
    return [
        [Word(words[v], round(s, 4)) for v, s in zip(places, scores, strict=True)] if filled else []
        for filled, places, scores in zip(
            clear.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
