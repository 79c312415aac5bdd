"""The plain ways that `benchmark.py speed` compares with: formulas as autograd records them, and
topk over all similarities.

Shapes as in core/heads/trainer.py and core/neighbors.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from icce_ray.core.constants import BASE_CHUNK, QUERY_CHUNK
from icce_ray.core.heads import losses
from icce_ray.core.heads.trainer import HeadTrainer
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
