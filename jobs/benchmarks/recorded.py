"""The plain ways that `benchmark.py speed` compares with: formulas as autograd records them, a loop
over the heads, and topk over all similarities.

Shapes as in core/heads/trainer.py and core/neighbors.py.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icce_ray.config.schema import HeadsConfig
from icce_ray.core.constants import BASE_CHUNK, QUERY_CHUNK
from icce_ray.core.heads import losses
from icce_ray.core.heads.trainer import Data, HeadTrainer
from icce_ray.core.neighbors import mask_self, merge


class RecordedTrainer(HeadTrainer):
    """Trains as HeadTrainer does, in float32 and without the closed form of the gradient."""

    def _backward(self, images: Tensor, want_loss: bool = True) -> Tensor:
        s = self.settings
        rows = self.data.rows(images)
        student = losses.log_softmax(self._logits(self.student, rows) / s.temperature)
        with torch.no_grad():
            teacher = self._logits(self.teacher, rows) / s.temperature
            self.running.follow("usage", losses.log_softmax(teacher).exp().mean(1))
            shares = self.target.shares(self.running)
            log_t = losses.sinkhorn(teacher, s.sinkhorn_iterations, prior=shares)
            self.running.follow("marginal", log_t.exp().mean(1))
        (p_x, p_y), (t_x, t_y) = student.chunk(2, 1), log_t.chunk(2, 1)
        m = self.running.marginal
        value = losses.pmi(p_x, t_y, m, s.beta, shares) + losses.pmi(p_y, t_x, m, s.beta, shares)
        each = -value / 2
        e_x, e_y = t_x.exp(), t_y.exp()
        if s.cross_entropy:
            entropy = losses.cross_entropy(p_x, e_y) + losses.cross_entropy(p_y, e_x)
            each = each + s.cross_entropy / 2 * entropy
        if s.instance_weights:
            each = each * self._pair_weights(losses.pair_agreement(e_x, e_y))
        loss = each.mean(1)
        self.optimizer.zero_grad()
        loss.sum().backward()
        return loss.detach()

    def _logits(self, heads: torch.nn.Module, rows: Tensor) -> Tensor:
        """[H, 2B, K], through one product for all linear heads."""
        if not self.linear:
            return heads(rows)
        weight, bias = heads.last.weight, heads.last.bias
        count, inputs, outputs = weight.shape
        if heads.last.short:
            return heads.last(rows)
        columns = weight.permute(1, 0, 2).reshape(inputs, count * outputs)
        out = (rows @ columns).view(len(rows), count, outputs).permute(1, 0, 2).contiguous()
        return out + bias


class LoopedTrainer:
    """TEMI's recipe as its paper states it: a module for each head, one after the other, the loss
    of each by eq. 5 to 8, recorded by autograd, in float32."""

    def __init__(self, data: Data, settings: HeadsConfig, clusters: int) -> None:
        self.data, self.settings = data, settings
        widths = [data.features.shape[1], *settings.hidden]
        make = lambda: _head(widths, clusters)  # noqa: E731
        self.student = nn.ModuleList(make() for _ in range(settings.count_of(clusters))).to(
            data.device
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=settings.lr)
        self.marginals = [torch.full((1, clusters), 1 / clusters, device=data.device)] * len(
            self.student
        )

    def step(self, want_loss: bool = False) -> None:
        """One update of all heads."""
        s, size = self.settings, self.settings.batch_size
        assert size is not None
        rows = torch.randint(len(self.data), (size,), device=self.data.device)
        column = torch.randint(self.data.ids.shape[1], (size,), device=self.data.device)
        images = torch.cat([rows, self.data.ids[rows, column].long()])
        x = self.data.rows(images) * self.data.features.shape[1] ** 0.5
        with torch.no_grad():
            teacher = [(one(x) / s.temperature).log_softmax(1)[None] for one in self.teacher]
            pairs = [one.exp().chunk(2, 1) for one in teacher]
            weights = torch.stack([losses.pair_agreement(*pair) for pair in pairs]).mean(0)
        total = x.new_zeros(())
        for number, head in enumerate(self.student):
            student = (head(x) / s.temperature).log_softmax(1)[None]
            mean = teacher[number].exp().mean(1)
            self.marginals[number] = self.marginals[number].lerp(mean, 0.1)
            (p_x, p_y), (t_x, t_y) = student.chunk(2, 1), teacher[number].chunk(2, 1)
            marginal = self.marginals[number]
            value = losses.pmi(p_x, t_y, marginal, s.beta) + losses.pmi(p_y, t_x, marginal, s.beta)
            total = total - (weights * value).mean() / 2
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        with torch.no_grad():
            both = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for old, new in both:
                old.lerp_(new, 1 - s.teacher_momentum)


class _Prototypes(nn.Linear):
    """Cosines with unit prototypes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


def _head(widths: Sequence[int], clusters: int) -> nn.Module:
    hidden = [part for i, o in itertools.pairwise(widths) for part in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*hidden, _Prototypes(widths[-1], clusters, bias=False))


def plain_search(
    matrix: np.ndarray, queries: int, k: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Top k of the first rows in float32, by topk over blocks: ids and similarity [Q, k]."""
    base = torch.from_numpy(matrix).to(device)
    found = []
    for first in range(0, queries, QUERY_CHUNK):
        rows = base[first : min(first + QUERY_CHUNK, queries)].float()
        best = rows.new_empty(len(rows), 0)
        where = torch.empty(len(rows), 0, dtype=torch.int32, device=device)
        for start in range(0, len(base), BASE_CHUNK):
            scores = rows @ base[start : start + BASE_CHUNK].float().T
            mask_self(scores, first, start)
            values, columns = scores.topk(min(k, scores.shape[1]), dim=1)
            best, where = merge(best, where, values, (columns + start).int(), k)
        found.append((where.cpu().numpy(), best.cpu().numpy()))
    ids, similarity = zip(*found, strict=True)
    return np.concatenate(ids), np.concatenate(similarity)
