"""Schedules against their formulas."""

from __future__ import annotations

import math

import pytest

from icce_ray.core.schedule import cosine_rise, warmup_cosine


def test_the_rate_rises_linearly_and_falls_by_a_cosine():
    rates = [warmup_cosine(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * i / 90)) / 2 for i in range(90)])


@pytest.mark.parametrize("warmup", [0.0, 1.0])
@pytest.mark.parametrize("total", [1, 2])
def test_shortest_trainings_have_a_rate(total, warmup):
    assert all(0 < warmup_cosine(step, total, warmup) <= 1 for step in range(total))


def test_momentum_rises_to_one():
    values = [cosine_rise(0.5, step, 100) for step in range(101)]
    assert values[0] == 0.5 and values == sorted(values)
    assert values[50] == pytest.approx(0.75) and values[100] == 1
