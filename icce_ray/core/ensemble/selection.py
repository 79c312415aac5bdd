"""Which heads the ensemble keeps. Label-free.

To choose some members of an ensemble by their quality is cluster ensemble selection (Fern & Lin,
Statistical Analysis and Data Mining 1, 2008, 128-141): a subset can beat the whole. There the
quality of a member is its mean NMI with the others. Ours is what an image's cluster says about its
neighbors' clusters (TEMI's objective on hard labels), which knows more than the other members do.

Shapes: H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def likeliest_group(evidence: np.ndarray, groups: Sequence[float]) -> np.ndarray:
    """Numbers of the heads of the group whose better half has the highest mean evidence, ascending.

    Where no group has any evidence (a collapsed head has 0, a poor one less), the first one.

    Args:
        evidence: of each head, [H]: `labelfree.head_scores`.
        groups: what heads of one group share, [H], such as how far their clusters are balanced.
            Heads that aim at different sizes of clusters make a bad ensemble: not one is right.
    """
    members = {value: np.flatnonzero(np.array(groups) == value) for value in dict.fromkeys(groups)}

    def quality(heads: np.ndarray) -> float:
        return float(np.sort(evidence[heads])[-math.ceil(len(heads) / 2) :].mean())

    best = max(members.values(), key=quality)
    return best if quality(best) > 0 else next(iter(members.values()))


def most_informed(information: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the heads of highest information, ascending; ties go to the lower number.

    information: of each head, [H]: `labelfree.head_scores`.
    """
    return np.sort(np.argsort(-information, kind="stable")[:count])
