"""The learning rate over a training."""

from __future__ import annotations

import pytest

from icce_ray.core.schedule import warmup_cosine


def test_it_rises_linearly_and_falls_by_a_cosine() -> None:
    factors = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert warmup_cosine(100, 100, 0.1) == pytest.approx(0.0)


def test_the_shortest_trainings_have_a_rate() -> None:
    assert warmup_cosine(0, 1, 0.05) == 1.0
    assert warmup_cosine(7, 1, 0.05) == pytest.approx(0.0)
