"""Settings that heads take in turn, and parts of the data that they see."""

from __future__ import annotations

import itertools

import torch

from icce_ray.core.heads.diversity import feature_mask, in_bag, in_turn


def test_heads_take_values_in_turn():
    assert in_turn((1.0, 2.0), range(5)) == [1, 2, 1, 2, 1]
    assert in_turn((1.0, 2.0, 3.0), [7, 2]) == [2, 3]
    assert in_turn(0.5, range(3)) == [0.5] * 3


def test_every_balance_meets_every_value_of_a_slower_setting():
    """Else three temperatures beside three balances would be one temperature for each balance."""
    balances, temperatures = (0.5, 0.25, 0.0), (0.05, 0.1, 0.2)
    numbers = range(9)
    fast, slow = in_turn(balances, numbers), in_turn(temperatures, numbers, slower_than=balances)
    assert sorted(zip(fast, slow, strict=True)) == sorted(itertools.product(balances, temperatures))
    assert in_turn(temperatures, numbers, slower_than=1.0) == in_turn(temperatures, numbers)


def test_a_mask_shows_each_head_a_part_of_its_own():
    mask = feature_mask(0.3, 11, [5, 6, 5])
    assert mask.sum(1).tolist() == [4, 4, 4]  # rounded up
    assert torch.equal(mask[0], mask[2]) and not torch.equal(mask[0], mask[1])


def test_bags_hold_their_share_and_differ_between_heads():
    used = in_bag(torch.arange(20_000), 0.3, torch.tensor([1, 2]))
    assert ((used.float().mean(1) - 0.3).abs() < 0.02).all()
    both = (used[0] & used[1]).float().mean()
    assert abs(float(both) - 0.09) < 0.02
    assert in_bag(torch.arange(50), 1.0, torch.tensor([3])).all()
