"""The EM of `dawid_skene` with dense arrays, for a GPU: the same steps, in float32.

Where heads are poor, an image has hundreds of possible classes, and sparse arrays on a CPU take
minutes for 1,000 classes. A GPU scores all classes of all images in milliseconds.
Shapes: N images, n images of a chunk, H heads, L clusters per head, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from icce_ray.core.ensemble.base import Ensemble, fill_empty

CHUNK = 32_768  # images scored at once


@dataclass(frozen=True)
class EM:
    """When EM stops, and how it smooths: see the constants of `dawid_skene`."""

    iterations: int
    converged: float
    smoothing: float
    floor: float


@dataclass(frozen=True)
class DenseModel:
    """As `dawid_skene._Model`."""

    table: Tensor  # float32 [H*L, K]
    base: Tensor  # float32 [K]
    prior: Tensor  # float32 [K]
    heads: int


def fit(
    ensemble: Ensemble, start: np.ndarray, em: EM, device: torch.device
) -> tuple[DenseModel, list[float]]:
    """EM from these labels [N]. Returns the model and the log-likelihood per image of each step."""
    fill_empty(start, ensemble.heads, ensemble.num_clusters)
    codes = _codes(ensemble.heads, ensemble.head_clusters, device)
    labels = torch.from_numpy(start.astype(np.int64)).to(device)
    model = _maximize(codes, _one_hot(labels, ensemble.num_clusters), ensemble, em)
    history: list[float] = []
    while True:
        likelihood = [0.0]
        following = _maximize(codes, _expect(codes, model, em, likelihood), ensemble, em)
        history.append(likelihood[0] / ensemble.rows)
        rises = len(history) < 2 or history[-1] - history[-2] >= em.converged
        if not rises or len(history) == em.iterations:
            return model, history
        model = following


def apply(
    heads: np.ndarray, model: DenseModel, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """As `dawid_skene._apply`: most probable class int64 [N], and how sure that is, float64 [N]."""
    codes = _codes(heads, len(model.table) // model.heads, device)
    labels, confidence = [], []
    unseen = model.base.softmax(0)  # where nothing is known
    averaged = model.prior + (model.base - model.prior) / model.heads
    for part in codes.split(CHUNK):
        scores, seen = _scores(part, model)
        alone = torch.where(seen, scores / model.heads + averaged, -torch.inf).softmax(1)
        best = torch.where(seen, scores + model.base, -torch.inf).argmax(1)
        sure = alone.gather(1, best.unsqueeze(1)).squeeze(1)
        blank = ~seen.any(1)
        labels.append(torch.where(blank, unseen.argmax(), best))
        confidence.append(torch.where(blank, unseen.max(), sure))
    return torch.cat(labels).cpu().numpy(), torch.cat(confidence).double().cpu().numpy()


def _codes(heads: np.ndarray, clusters: int, device: torch.device) -> Tensor:
    """Rows of the table that each image scores by, int32 [N, H]."""
    offsets = np.arange(len(heads), dtype=np.int32)[:, None] * clusters
    return torch.from_numpy(np.ascontiguousarray((heads + offsets).T)).to(device)


def _one_hot(labels: Tensor, clusters: int) -> Iterator[Tensor]:
    for part in labels.split(CHUNK):
        yield F.one_hot(part, clusters).float()


def _scores(codes: Tensor, model: DenseModel) -> tuple[Tensor, Tensor]:
    """Sums over the heads [n, K], and which classes one of the image's clusters has ever met."""
    scores = F.embedding_bag(codes, model.table, mode="sum")
    return scores, scores > 0


def _expect(codes: Tensor, model: DenseModel, em: EM, likelihood: list[float]) -> Iterator[Tensor]:
    """E-step: posteriors [n, K] of consecutive chunks. Adds up the log-likelihood."""
    for part in codes.split(CHUNK):
        scores, seen = _scores(part, model)
        scores = torch.where(seen, scores + model.base, -torch.inf)
        some = seen.any(1)
        likelihood[0] += float(scores[some].logsumexp(1).double().sum())
        posterior = torch.where(some.unsqueeze(1), scores.softmax(1), 0.0)
        yield torch.where(posterior < em.floor, 0.0, posterior)


def _maximize(
    codes: Tensor, posteriors: Iterator[Tensor], ensemble: Ensemble, em: EM
) -> DenseModel:
    """M-step: confusions and class shares. Sums are products with one-hot codes, since a GPU adds
    by index in an order of its own: a seed would not repeat."""
    heads, each = len(ensemble.heads), ensemble.head_clusters
    clusters = ensemble.num_clusters
    counts = torch.zeros(heads, each, clusters, device=codes.device)
    size = torch.zeros(clusters, dtype=torch.float64, device=codes.device)
    for part, posterior in zip(codes.split(CHUNK), posteriors, strict=True):
        for head in range(heads):
            hot = F.one_hot(part[:, head].long() - head * each, each).float()
            counts[head].addmm_(hot.T, posterior)
        size += posterior.double().sum(0)
    smooth = em.smoothing / each
    counts[counts < 1e-2 * smooth] = 0
    prior = ((size + 1) / (ensemble.rows + clusters)).log()
    base = prior + heads * (smooth / (size + em.smoothing)).log()
    base = torch.where(size > 0, base, -torch.inf)
    table = (counts / smooth).log1p().view(heads * each, clusters)
    return DenseModel(table, base.float(), prior.float(), heads)
