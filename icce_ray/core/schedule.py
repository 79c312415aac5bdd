"""How the learning rate changes during a training, for heads and classifier alike."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the peak learning rate at a step: a linear rise, then a cosine to 0.

    Args:
        step: steps done before this one, from 0.
        total: steps of the whole training.
        warmup: share of the steps over which the rate rises; at least one step.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))) + 1) / 2
