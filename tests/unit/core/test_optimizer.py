"""AdamW takes torch's steps, and imports less."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from icce_ray.core.optimizer import AdamW


def steps(optimizer_type, count, options):
    """Parameters and optimizer after some steps on a bowl; one parameter never has a gradient."""
    generator = torch.Generator().manual_seed(0)
    first, second, unused = (torch.randn(4, 3, generator=generator) for _ in range(3))
    parameters = [torch.nn.Parameter(p) for p in (first, second, unused)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    optimizer = optimizer_type(groups, lr=0.1, **options)
    for number in range(count):
        optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        optimizer.zero_grad()
        ((parameters[0] - 1) ** 2 + parameters[1] ** 4).sum().backward()
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}], ids=str)
def test_steps_and_state_are_torchs(options):
    ours, optimizer = steps(AdamW, 5, options)
    theirs, other = steps(torch.optim.AdamW, 5, options)
    assert all(map(torch.equal, ours, theirs))
    assert set(optimizer.state) == {ours[0], ours[1]}
    for mine, their in zip(ours[:2], theirs[:2], strict=True):
        for key, value in other.state[their].items():
            assert torch.equal(optimizer.state[mine][key], value)


def test_parameters_without_groups():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([parameter], lr=0.5)
    parameter.square().sum().backward()
    optimizer.step()
    assert parameter.max() < 1


def test_the_compiler_is_not_imported_and_torch_stays_as_it_is():
    """In a process of its own: others here have it already."""
    code = """
import sys, torch
before = dict(vars(torch.optim.Optimizer))
from icce_ray.core.optimizer import AdamW
p = torch.nn.Parameter(torch.zeros(3))
optimizer = AdamW([p])
optimizer.zero_grad()
(p - 1).square().sum().backward()
optimizer.step()
assert p.abs().min() > 0
assert before == dict(vars(torch.optim.Optimizer))
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
