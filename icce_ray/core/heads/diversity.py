"""What makes heads differ on purpose: settings of their own, and shares of the data.

An ensemble is no better than its best member unless members err differently (Kuncheva & Whitaker,
Machine Learning 51, 2003). Everything here follows from a head's number and the run's seed, so that
heads stay what they are however workers share them.

Shapes: H heads (of this worker), P components, B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Setting = float | tuple[float, ...]  # one for all heads, or several that they take in turn


def in_turn(value: Setting, numbers: Sequence[int], slower_than: Setting = 0.0) -> list[float]:
    """The value of each of the heads with these numbers: [H].

    slower_than: a setting whose values change from head to head; this one then changes when all of
    those have been had, so that each of them is met by every value.
    """
    values = value if isinstance(value, tuple) else (value,)
    turn = len(slower_than) if isinstance(slower_than, tuple) else 1
    return [values[number // turn % len(values)] for number in numbers]


def feature_mask(share: float, components: int, seeds: Sequence[int]) -> Tensor:
    """1 where a head sees a component, else 0: float32 [H, P]. Random subspaces (Ho, PAMI 1998).

    Args:
        share: of the components that each head sees, in (0, 1]; at least one.
        seeds: of each head.
    """
    mask = torch.zeros(len(seeds), components)
    seen = max(1, math.ceil(share * components))
    for row, seed in zip(mask, seeds, strict=True):
        row[torch.from_numpy(np.random.default_rng(seed).permutation(components)[:seen])] = 1
    return mask


def in_bag(images: Tensor, share: float, seeds: Tensor) -> Tensor:
    """Whether each head is trained on each image: bool [H, B]. Bagging without replacement (Breiman
    1996), by a hash of image and head, so that nothing is stored.

    Args:
        images: row numbers, int64 [B].
        share: of the images that a head is trained on, in (0, 1].
        seeds: of each head, int64 [H].
    """
    mixed = images.unsqueeze(0) * 0x9E3779B1 + seeds.unsqueeze(1) * 0x85EBCA77
    for _ in range(2):  # xor-shift and multiply, in 31 bits
        mixed = mixed & 0x7FFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D
    return (mixed >> 8 & 0xFFFFFF) < share * 2**24
