"""TURTLE (Gadetsky, Jiang & Brbic, ICML 2024, arXiv 2406.07236), to compare with: the labels that
linear classifiers learn best.

Written after the paper's equations, with the settings of its public code, but for the number of
steps. A task encoder gives each image soft labels; from a random start, a linear classifier per
space learns them for a few steps; then the encoder is moved towards labels that it gets right.

Shapes: N images, D features of a space, K clusters, B images of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BATCH = 10_000
INNER_STEPS = 10
LR = 1e-3  # of the encoder and of the classifiers
GAMMA = 10.0  # weight of the labels' entropy, equation 12


def turtle(spaces: Sequence[np.ndarray], clusters: int, seed: int, steps: int) -> np.ndarray:
    """Clusters of N images: int64 [N].

    spaces: unit rows, [N, D] each. They are brought to a mean square of 1, as the features that its
    learning rates were made for.
    """
    torch.manual_seed(seed)
    x = [torch.from_numpy(np.asarray(one, np.float32)) * one.shape[1] ** 0.5 for one in spaces]
    encoder = nn.ModuleList(
        nn.utils.parametrizations.weight_norm(nn.Linear(one.shape[1], clusters)) for one in x
    )
    optimizer = torch.optim.Adam(encoder.parameters(), lr=LR)
    for _ in range(steps):
        rows = torch.randperm(len(x[0]))[:BATCH]
        batch = [one[rows] for one in x]
        each = _labels(encoder, batch)
        labels = each.mean(0)  # equation 9
        learned = _learn(batch, labels.detach(), clusters)
        wrong = sum(F.cross_entropy(logits, labels) for logits in learned)
        entropy = torch.special.entr(each.mean(1)).sum()
        optimizer.zero_grad()
        (wrong - GAMMA * entropy).backward()
        optimizer.step()
    with torch.no_grad():
        parts = zip(*(one.split(BATCH) for one in x), strict=True)
        found = [_labels(encoder, list(part)).mean(0).argmax(1) for part in parts]
    return torch.cat(found).numpy()


def _labels(encoder: nn.ModuleList, batch: list[torch.Tensor]) -> torch.Tensor:
    """Soft labels by each space: [spaces, B, K]."""
    return torch.stack([one(z).softmax(1) for one, z in zip(encoder, batch, strict=True)])


def _learn(batch: list[torch.Tensor], labels: torch.Tensor, clusters: int) -> list[torch.Tensor]:
    """Logits [B, K] of classifiers that have learned the labels [B, K] for a few steps, without a
    graph: the gradient is of first order, equation 13."""
    classifiers = nn.ModuleList(nn.Linear(z.shape[1], clusters) for z in batch)
    optimizer = torch.optim.Adam(classifiers.parameters(), lr=LR)
    for _ in range(INNER_STEPS):
        optimizer.zero_grad()
        for one, z in zip(classifiers, batch, strict=True):
            F.cross_entropy(one(z), labels).backward()
        optimizer.step()
    with torch.no_grad():
        return [one(z) for one, z in zip(classifiers, batch, strict=True)]
