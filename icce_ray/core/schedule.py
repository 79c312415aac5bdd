"""Schedules over the steps of a training, as factors of a setting."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the peak learning rate: a linear rise, then a cosine to 0.

    Args:
        step: from 0 to total - 1.
        total: steps of the training.
        warmup: share of the steps over which the rate rises; at least one step does.
    """
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, total - rise)
    return (math.cos(math.pi * min(1.0, done)) + 1) / 2


def cosine_rise(first: float, step: int, total: int) -> float:
    """A value that rises from `first` at step 0 to 1 at the last step by a half cosine."""
    done = step / max(1, total)
    return 1 - (1 - first) * (math.cos(math.pi * done) + 1) / 2
