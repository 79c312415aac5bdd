"""Our AdamW is torch's, and imports less."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from icce_ray.core.heads.optimizer import AdamW

OPTIONS = [{}, {"weight_decay": 0.3}, {"betas": (0.5, 0.9), "eps": 1e-3}]


def steps(optimizer_type, count, options, state=None):
    """Parameters and optimizer after some steps on a bowl; one parameter never has a gradient."""
    generator = torch.Generator().manual_seed(0)
    first, second, unused = (torch.randn(4, 3, generator=generator) for _ in range(3))
    parameters = [torch.nn.Parameter(p) for p in (first, second, unused)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = optimizer_type(groups, lr=0.1, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for number in range(count):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        optimizer.zero_grad(set_to_none=True)
        ((parameters[0] - 1) ** 2 + parameters[1] ** 4).sum().backward()
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_and_state_are_torchs(options):
    ours, optimizer = steps(AdamW, 5, options)
    theirs, other = steps(torch.optim.AdamW, 5, options)
    assert all(map(torch.equal, ours, theirs))
    mine, expected = (one.state_dict()["state"] for one in (optimizer, other))
    assert mine.keys() == expected.keys() == {0, 1}
    for number, slots in expected.items():
        assert all(torch.equal(mine[number][key], value) for key, value in slots.items())


def test_a_state_goes_on_in_either():
    _, optimizer = steps(AdamW, 3, {})
    state = optimizer.state_dict()
    ours, theirs = (
        steps(kind, 2, {}, copy.deepcopy(state))[0] for kind in (AdamW, torch.optim.AdamW)
    )
    assert all(map(torch.equal, ours, theirs))


def test_the_compiler_is_not_imported():
    """In a process of its own: others here have it already."""
    code = """
import sys, torch
from icce_ray.core.heads.optimizer import AdamW
p = torch.nn.Parameter(torch.zeros(3))
optimizer = AdamW([p])
optimizer.zero_grad(set_to_none=True)
(p - 1).square().sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
assert p.abs().min() > 0
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
