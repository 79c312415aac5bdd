"""The heads' loss and its gradient to the student's logits, in closed form.

Everything after the logits is elementwise or a sum, so no graph has to be recorded. `losses` states
the same formulas one by one; tests hold that both agree. For a pair (x, y) of a head, with student
p = softmax(z / T), teacher t (Sinkhorn-Knopp of softmax(l / T)), marginal m, prior pi and weight w:

    loss            w (-(PMI(x, y) + PMI(y, x)) + c (CE(x, y) + CE(y, x))) / 2
    d loss / d z_x  w / (2 T) ((beta + c) p_x - beta q_xy - c t_y)
    q_xy            softmax over the clusters of beta (log p_x + log t_y) + log(pi / m)

and the same with x and y exchanged. Sinkhorn-Knopp runs in the linear domain: t_bk = r_b p_bk s_k,
so each normalization is a product of a matrix and a vector.

Shapes: H heads, B pairs, K clusters. Logits are [H, 2B, K], images x first; memory may be laid out
as [H, K, 2B] (see `model.SHORT`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from icce_ray.core.heads.losses import TINY, log_softmax, softmax

MARGINAL_MOMENTUM = 0.9  # TEMI: running mean of the teacher's predictions
LEAST = 1e-30  # keeps the share of a cluster that no image has from dividing by 0


@dataclass
class Running:
    """What is carried from step to step: means over the batches so far, float32 [H, K] each."""

    marginal: Tensor  # of the teacher's assignments after Sinkhorn-Knopp
    usage: Tensor  # of its predictions before

    def follow(self, name: str, mean: Tensor) -> None:
        """Move a running mean towards that of a batch, [H, K]."""
        getattr(self, name).lerp_(mean, 1 - MARGINAL_MOMENTUM)


@dataclass(frozen=True)
class Target:
    """Sizes that Sinkhorn-Knopp gives the clusters: see HeadsConfig.prior and balance."""

    balance: Tensor  # [H, 1]
    sizes: Tensor | None  # [K], decreasing, sum 1; None: from the usage and the balance

    def shares(self, running: Running) -> Tensor:
        """Target share of each cluster, [H, K]."""
        if self.sizes is None:
            return F.normalize(running.usage ** (1 - self.balance), p=1, dim=1)
        rank = running.usage.argsort(1, descending=True).argsort(1)  # the largest gets the largest
        return self.sizes[rank]


@dataclass(frozen=True)
class Terms:
    """Weights of the loss."""

    beta: float
    cross_entropy: float
    iterations: int  # of Sinkhorn-Knopp


def loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    terms: Terms,
    target: Target,
    running: Running,
    weigh: Callable[[Tensor], Tensor] | None,
    want_loss: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Loss, and its gradient to the student's logits before the pairs are weighted.

    Args:
        student, teacher: logits divided by the temperature, [H, 2B, K]. The teacher's are
            overwritten.
        running: updated by the batch.
        weigh: agreements of the own heads on each pair, [H, B] -> weights of the pairs, [B].
            None: all weigh 1.
        want_loss: the gradient does not need the loss; to skip it saves passes over the logits.

    Returns:
        Mean loss of each head, [H], or None. 2B times the gradient of the mean loss to `student`,
        [H, 2B, K], each row still to be multiplied by its pair's weight. These weights, [B], or
        None.
    """
    pairs = student.shape[1] // 2
    x, y = slice(None, pairs), slice(pairs, None)
    t, log_s, constant, shares = _assign(teacher, terms.iterations, target, running, want_loss)
    weights = None if weigh is None else weigh((t[:, x] * t[:, y]).sum(2))
    beta, c = terms.beta, terms.cross_entropy
    scale = shares.clamp_min(TINY).log() - running.marginal.clamp_min(TINY).log()
    offset = log_s.mul(beta).add_(scale).unsqueeze(1)  # of each cluster, [H, 1, K]
    mixed = teacher  # its memory: beta (z_x + l_y) + offset, and the same with x and y exchanged
    first = student[:, x] + teacher[:, y]
    mixed[:, y] = student[:, y] + teacher[:, x]
    mixed[:, x] = first
    mixed.mul_(beta).add_(offset)
    loss = _loss(student, mixed, t, constant, weights, terms) if constant is not None else None
    gradient = softmax(student).mul_(beta + c)
    if c:
        gradient[:, x].sub_(t[:, y], alpha=c)
        gradient[:, y].sub_(t[:, x], alpha=c)
    gradient.sub_(softmax(mixed), alpha=beta)
    return loss, gradient, weights


Objective = Callable[..., tuple[Tensor | None, Tensor, Tensor | None]]


def fused(device: torch.device, clusters: int) -> Objective | None:
    """`loss_and_gradient` as GPU kernels, where the device and Triton have them, else None."""
    if device.type != "cuda":
        return None
    try:
        from icce_ray.core.heads import kernels
    except ImportError:  # torch without Triton: the plain path does the same
        return None
    return kernels.loss_and_gradient if clusters <= kernels.MOST_CLUSTERS else None


def _assign(
    logits: Tensor, iterations: int, target: Target, running: Running, want_loss: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The teacher's assignments t [H, 2B, K]; log s [H, K]; the constant of each row in
    log t = logits + log s + constant, [H, 2B], where the loss is wanted; target shares [H, K]."""
    rows = logits.shape[1]
    t = softmax(logits)
    r = t.new_ones(t.shape[:2])
    minus_lse = t.amax(2).log_().sub_(logits.amax(2)) if want_loss else None
    running.follow("usage", _columns(r, t) / rows)
    shares = target.shares(running)
    s = torch.ones_like(shares)
    for _ in range(iterations):
        s = shares / _columns(r, t).clamp_min_(LEAST)
        r = torch.bmm(t, s.unsqueeze(2)).squeeze(2).reciprocal_()
    running.follow("marginal", s * _columns(r, t) / rows)
    t.mul_(s.unsqueeze(1)).mul_(r.unsqueeze(2))
    constant = None if minus_lse is None else minus_lse + r.log()
    return t, s.log(), constant, shares


def _columns(r: Tensor, t: Tensor) -> Tensor:
    """sum over the rows of r_b t_bk. [H, 2B] and [H, 2B, K] -> [H, K]."""
    return torch.bmm(r.unsqueeze(1), t).squeeze(1)


def _loss(
    student: Tensor,
    mixed: Tensor,
    t: Tensor,
    constant: Tensor,
    weights: Tensor | None,
    terms: Terms,
) -> Tensor:
    """Mean loss of each head, [H]. Arguments as in `loss_and_gradient`."""
    pairs = student.shape[1] // 2
    log_p = log_softmax(student)
    minus_lse = log_p.amax(2) - student.amax(2)
    each = -mixed.logsumexp(2) - terms.beta * (minus_lse + constant.roll(pairs, 1))
    if terms.cross_entropy:
        each -= terms.cross_entropy * (t.roll(pairs, 1) * log_p).sum(2)
    each = (each[:, :pairs] + each[:, pairs:]) / 2
    return (each if weights is None else each * weights).mean(1)
