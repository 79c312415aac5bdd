"""The closed form against the formulas of `losses`; its gradient is tested in test_trainer.py."""

from __future__ import annotations

import pytest
import torch

from icce_ray.core.heads import closed_form, losses
from icce_ray.core.heads.closed_form import Running, Target, Terms

HEADS, ROWS, CLUSTERS = 3, 40, 6


def draw(seed, scale=3.0, short=False):
    generator = torch.Generator().manual_seed(seed)
    if short:  # the layout that heads of few clusters give
        memory = torch.randn(HEADS, CLUSTERS, ROWS, generator=generator)
        return scale * memory.transpose(1, 2)
    return scale * torch.randn(HEADS, ROWS, CLUSTERS, generator=generator)


def even():
    return torch.full((HEADS, CLUSTERS), 1 / CLUSTERS)


TARGETS = {
    "balances": Target(torch.tensor([[0.5], [0.25], [0.0]]), None),
    "even": Target(torch.ones(HEADS, 1), None),
    "sizes": Target(torch.ones(HEADS, 1), torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.1])),
}


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("name", TARGETS)
def test_assignments_are_sinkhorns(name, iterations, short):
    logits, running = draw(0, short=short), Running(even(), even())
    t, _, _, shares = closed_form._assign(logits, iterations, TARGETS[name], running, False)
    expected = losses.sinkhorn(logits, iterations, prior=shares).exp()
    torch.testing.assert_close(t, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(t.sum(2), torch.ones(HEADS, ROWS))
    mean = 0.9 / CLUSTERS + 0.1 * expected.mean(1)
    torch.testing.assert_close(running.marginal, mean, atol=1e-6, rtol=1e-4)
    usage = 0.9 / CLUSTERS + 0.1 * logits.softmax(-1).mean(1)
    torch.testing.assert_close(running.usage, usage, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_confident_and_flat_logits_give_finite_numbers(scale):
    """Also clusters that no image has at all: exp(-900) is 0."""
    terms, running = Terms(0.6, 0.1, 3), Running(even(), even())
    loss, gradient, weights = closed_form.loss_and_gradient(
        draw(1, scale), draw(2, scale), terms, TARGETS["balances"], running, lambda a: a.mean(0)
    )
    assert loss.isfinite().all() and gradient.isfinite().all() and weights.isfinite().all()
    assert gradient.abs().max() <= 2


def test_a_gradient_without_its_loss_is_the_same():
    found = []
    for want_loss in (True, False):
        running = Running(even(), even())
        args = (Terms(0.6, 0.1, 3), TARGETS["balances"], running, None, want_loss)
        found.append(closed_form.loss_and_gradient(draw(1), draw(2), *args))
    assert found[1][0] is None and torch.equal(found[0][1], found[1][1])


def test_a_cpu_takes_the_plain_path():
    assert closed_form.fused(torch.device("cpu"), 10) is None
