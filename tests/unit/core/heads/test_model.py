"""Batched heads against one plain torch module per head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from icce_ray.core.heads.model import Heads

COUNT, ROWS, FEATURES, CLUSTERS = 4, 33, 12, 5


def make(hidden=(), batch_norm=True, numbers=range(COUNT), seed=0):
    return Heads(list(numbers), FEATURES, CLUSTERS, hidden, batch_norm, seed)


def unit_rows(rows=ROWS, features=FEATURES, seed=0):
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=-1)


class PlainHead(nn.Module):
    """Head `position` of a batch, as separate torch layers."""

    def __init__(self, heads, position, hidden, batch_norm):
        super().__init__()
        self.linear, self.norms = nn.ModuleList(), nn.ModuleList()
        self.gain = FEATURES**0.5 if hidden else 1.0
        for layer, norm in zip(heads.layers, heads.norms, strict=True):
            weight = layer.weight[position].detach()
            plain = nn.Linear(*weight.shape, bias=not batch_norm)
            plain.weight.data = weight.T.clone()
            if not batch_norm:
                plain.bias.data = layer.bias[position, 0].detach().clone()
            self.linear.append(plain)
            self.norms.append(self._norm(norm, position) if batch_norm else nn.Identity())
        self.prototypes = heads.last.weight[position].detach().T.clone()  # [K, O]
        self.bias = None if hidden else heads.last.bias[position, 0].detach().clone()

    def _norm(self, norm, position):
        plain = nn.BatchNorm1d(norm.scale.shape[-1])
        plain.weight.data = norm.scale[position, 0].detach().clone()
        plain.bias.data = norm.shift[position, 0].detach().clone()
        plain.running_mean.copy_(norm.mean[position, 0])
        plain.running_var.copy_(norm.var[position, 0])
        return plain

    def forward(self, x):
        x = x * self.gain
        for linear, norm in zip(self.linear, self.norms, strict=True):
            x = F.gelu(norm(linear(x)))
        if self.bias is not None:
            return F.linear(x, self.prototypes, self.bias)
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.prototypes, dim=-1))


def stir(heads):
    """Values that training could leave: no parameter or buffer keeps its first one."""
    generator = torch.Generator().manual_seed(9)
    for name, tensor in heads.state_dict().items():
        noise = torch.rand(tensor.shape, generator=generator)
        tensor.add_(noise if name.endswith(".var") else noise - 0.3)
    return heads


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hidden", [(), (16,), (16, 8)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_forward_is_that_of_separate_heads(hidden, batch_norm, training):
    heads = stir(make(hidden, batch_norm)).train(training)
    plain = [PlainHead(heads, n, hidden, batch_norm).train(training) for n in range(COUNT)]
    x = unit_rows()
    logits = heads(x)
    assert logits.shape == (COUNT, ROWS, CLUSTERS) and logits.dtype == torch.float32
    for found, head in zip(logits, plain, strict=True):
        torch.testing.assert_close(found, head(x), atol=2e-5, rtol=1e-4)
    if hidden:
        assert float(logits.detach().abs().max()) <= 1 + 1e-5  # cosines


@pytest.mark.parametrize("hidden", [(), (16, 8)])
def test_gradients_are_those_of_separate_heads(hidden):
    heads = stir(make(hidden))
    x, target = unit_rows(), torch.randint(CLUSTERS, (ROWS,))
    sum(F.cross_entropy(logits, target) for logits in heads(x)).backward()
    for position in range(COUNT):
        plain = PlainHead(heads, position, hidden, True)
        plain.prototypes.requires_grad_()
        F.cross_entropy(plain(x), target).backward()
        found = heads.last.weight.grad[position].T
        torch.testing.assert_close(found, plain.prototypes.grad, atol=1e-5, rtol=1e-3)
        for layer, linear in zip(heads.layers, plain.linear, strict=True):
            torch.testing.assert_close(
                layer.weight.grad[position].T, linear.weight.grad, atol=1e-5, rtol=1e-3
            )


def test_running_statistics_follow_the_batches():
    heads = make((16,))
    plain = [PlainHead(heads, n, (16,), True).train() for n in range(COUNT)]
    for seed in range(20):
        x = unit_rows(400, seed=seed)
        heads(x)
        for head in plain:
            head(x)
    for n, head in enumerate(plain):
        torch.testing.assert_close(heads.norms[0].mean[n, 0], head.norms[0].running_mean)
        torch.testing.assert_close(  # torch's is the unbiased variance
            heads.norms[0].var[n, 0], head.norms[0].running_var, rtol=5e-3, atol=1e-4
        )
    assert not heads.eval()(x).isnan().any()


def test_one_row_in_training_does_not_divide_by_its_own_deviation():
    heads = make((16,)).train()
    assert heads(unit_rows(1)).isfinite().all()
    assert (heads.norms[0].mean == 0).all()


@pytest.mark.parametrize("hidden", [(), (16, 8)])
def test_a_heads_first_weights_depend_on_its_number_alone(hidden):
    every = dict(make(hidden, numbers=range(6)).named_parameters())
    some = dict(make(hidden, numbers=[4, 1]).named_parameters())
    for name, parameter in some.items():
        assert torch.equal(parameter, every[name][[4, 1]]), name
    other = dict(make(hidden, numbers=[4, 1], seed=1).named_parameters())
    assert not torch.equal(other["last.weight"], some["last.weight"])
    firsts = every["last.weight"].flatten(1)
    assert len(firsts.unique(dim=0)) == 6
