"""The heads' step as autograd records it from the formulas: the baseline of `benchmark.py speed`.

Shapes as in core/heads/trainer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icce_ray.core.heads import losses
from icce_ray.core.heads.trainer import HeadTrainer


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
