"""H clustering heads as batched tensors.

Shapes: H heads, B rows, D features, K clusters, O outputs of a layer. All heads run in one batched
matrix product per layer; no Python loop over heads. Each head's initial weights come from
(seed, head number) only, so that heads keep their identity however workers share them.
Architecture of a head: TEMI (arXiv 2303.17896), with ICCE's batch normalization.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icce_ray.core.sampling import seed_of

BN_MOMENTUM = 0.1
BN_EPSILON = 1e-5
SHORT = 64  # outputs below which the rows are the last axis in memory
LINEAR_START = 0.1  # of torch's usual deviation


class BatchedLinear(nn.Module):
    """One linear layer per head: [H, B, I] -> [H, B, O], or [B, I] -> [H, B, O]."""

    def __init__(self, heads: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        # Few outputs are laid out as [H, O, I] in memory: see `forward`.
        self.short = outputs < SHORT
        memory = (heads, outputs, inputs) if self.short else (heads, inputs, outputs)
        weight = torch.empty(memory)
        self.weight = nn.Parameter(weight.transpose(1, 2) if self.short else weight)
        self.bias = nn.Parameter(torch.zeros(heads, 1, outputs)) if bias else None

    def reset(self, generators: Sequence[torch.Generator]) -> None:
        """Kaiming-uniform, as torch.nn.Linear, head by head."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        for weight, generator in zip(self.weight.data, generators, strict=True):
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.logits(with_ones(x))
        out = torch.bmm(x, self.weight.to(x.dtype))
        return out if self.bias is None else out + self.bias

    def logits(self, x: Tensor) -> Tensor:
        """Outputs [H, B, O] for inputs that all heads share, [B, I'], as `with_ones` gives them.

        With the bias as a further input, the product is all there is: to add it afterwards would
        cost a pass over the outputs, which are by far the largest array of a training step.
        """
        count, _, outputs = self.weight.shape
        columns = self._columns(x)
        if not self.short:
            return torch.bmm(x.expand(count, *x.shape), columns.transpose(1, 2))
        # One plain product over all heads' columns: with few outputs per head a batched one is up
        # to a hundred times slower on CPUs. The result is [H, O, B] in memory: over a last axis
        # shorter than their vector units, softmax and sums are several times slower. What is done
        # element by element, or reduced, keeps that layout.
        flat = columns.reshape(count * outputs, x.shape[1])
        return (flat @ x.T).view(count, outputs, len(x)).transpose(1, 2)

    def _columns(self, x: Tensor) -> Tensor:
        """Weights and biases for inputs [B, I'], in their type: [H, O, I'] (short: in memory)."""
        count, inputs, outputs = self.weight.shape
        weight = self.weight.to(x.dtype)
        further = weight.new_zeros(count, x.shape[1] - inputs, outputs)
        if self.bias is not None:
            further[:, :1] = self.bias
        if self.short:
            return torch.cat([weight.transpose(1, 2), further.transpose(1, 2)], 2)
        return torch.cat([weight, further], 1).transpose(1, 2)

    @torch.no_grad()
    def set_gradients(self, x: Tensor, gradient: Tensor, row_weights: Tensor) -> None:
        """Gradients of weight and bias, from the inputs [B, I'] and the gradient [H, B, O] of what
        `logits` gave, in its layout, and weights of the rows, [B]."""
        count, inputs, outputs = self.weight.shape
        weighted = x * row_weights.to(x.dtype).unsqueeze(1)
        if self.short:
            flat = gradient.transpose(1, 2).reshape(count * outputs, len(x))
            found = (flat @ weighted).view(count, outputs, x.shape[1]).transpose(1, 2)
        else:
            found = _product(weighted.T.expand(count, x.shape[1], len(x)), gradient)
        # Copies in the parameters' own layout, which a fused optimizer asks for.
        self.weight.grad = torch.empty_like(self.weight).copy_(found[:, :inputs])
        if self.bias is not None:
            self.bias.grad = torch.empty_like(self.bias).copy_(found[:, inputs : inputs + 1])


def with_ones(x: Tensor) -> Tensor:
    """Inputs [B, I] and a column of ones, for the bias. In half precision with further columns of
    zeros, since GPUs multiply matrices faster whose widths are multiples of 8."""
    rows, inputs = x.shape
    further = 1 if x.dtype == torch.float32 else 8 - inputs % 8
    out = x.new_zeros(rows, inputs + further)
    out[:, :inputs] = x
    out[:, inputs] = 1
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product in float32, also of half-precision factors."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32)


class BatchedNorm(nn.Module):
    """Batch normalization of each head's activations over its own batch: [H, B, O]."""

    mean: Tensor
    var: Tensor

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads, 1, width))
        self.shift = nn.Parameter(torch.zeros(heads, 1, width))
        self.register_buffer("mean", torch.zeros(heads, 1, width))
        self.register_buffer("var", torch.ones(heads, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[1] > 1:
            var, mean = torch.var_mean(x.float(), dim=1, keepdim=True, correction=0)
            with torch.no_grad():
                self.mean.lerp_(mean, BN_MOMENTUM)
                self.var.lerp_(var, BN_MOMENTUM)
        else:
            mean, var = self.mean, self.var
        gain = self.scale * torch.rsqrt(var + BN_EPSILON)
        return x * gain + (self.shift - mean * gain)


class Heads(nn.Module):
    """The heads numbered `numbers`, of the H that a run trains.

    Per head: (Linear, BatchNorm, GELU) for each hidden width, then L2-normalization and a linear
    layer of unit-norm prototypes without bias, so that logits are cosines (TEMI); with no hidden
    layer, one plain linear layer with a bias, started near zero.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        features: int,
        clusters: int,
        hidden: Sequence[int],
        batch_norm: bool,
        seed: int,
    ) -> None:
        super().__init__()
        count = len(numbers)
        widths = [features, *hidden]
        self.layers = nn.ModuleList(
            BatchedLinear(count, i, o, bias=not batch_norm) for i, o in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            BatchedNorm(count, w) if batch_norm else nn.Identity() for w in hidden
        )
        self.cosine = bool(hidden)
        self.gain = math.sqrt(features) if hidden else 1.0  # hidden layers want unit variance
        self.last = BatchedLinear(count, widths[-1], clusters, bias=not self.cosine)
        self._reset(numbers, seed)

    def _reset(self, numbers: Sequence[int], seed: int) -> None:
        seeds = [seed_of(seed, "head weights", number) for number in numbers]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        for layer in [*self.layers, self.last]:
            layer.reset(generators)
        if not self.cosine:
            # From near-uniform predictions the leading directions of the neighbor graph grow
            # first; from confident random ones heads stay where they start.
            self.last.weight.data.mul_(LINEAR_START)

    def forward(self, x: Tensor) -> Tensor:
        """Projected embeddings [B, P] -> logits [H, B, K], float32, before the temperature."""
        x = x * self.gain
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.gelu(norm(layer(x)))
        if not self.cosine:
            return self.last(x).float()
        x = F.normalize(x, dim=-1)
        prototypes = F.normalize(self.last.weight, dim=1)
        return torch.bmm(x, prototypes.to(x.dtype)).float()
