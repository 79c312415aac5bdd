"""TEMI's weighted pointwise mutual information, ICCE's cross-entropy term, Sinkhorn-Knopp.

Shapes: H heads, B pairs, K clusters. Student probabilities s and teacher probabilities t of an
image x and its neighbor y are all [H, B, K].
Sources: TEMI = Adaloglou et al., BMVC 2023 (arXiv 2303.17896); ICCE = arXiv 2511.16213;
Sinkhorn-Knopp for clustering = Caron et al., SwAV (arXiv 2006.09882), Asano et al. 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8  # keeps logarithms finite


def log_softmax(logits: Tensor) -> Tensor:
    """Over the clusters: [H, B, K] -> [H, B, K], in the layout in memory that `logits` have."""
    if logits.stride(-1) == 1:
        return logits.log_softmax(-1)
    return logits.transpose(1, 2).log_softmax(1).transpose(1, 2)


def softmax(logits: Tensor) -> Tensor:
    """As `log_softmax`, probabilities."""
    if logits.stride(-1) == 1:
        return logits.softmax(-1)
    return logits.transpose(1, 2).softmax(1).transpose(1, 2)


def pmi(
    log_student: Tensor,
    log_teacher: Tensor,
    marginal: Tensor,
    beta: float,
    prior: Tensor | None = None,
) -> Tensor:
    """Pointwise mutual information of each pair (TEMI, eq. 5).

    log sum_c p(c) (s(c|x) t(c|y))^beta / m(c), for log-probabilities of the student of x and of
    the teacher of y, [H, B, K] each, the running marginal m [H, K], and p, the prior [H, K].

    p is ours; without it (p = 1) it is TEMI's. A sure pair in cluster c earns log p(c) / m(c): on
    average, over pairs, minus the divergence of m from p, which is least where clusters are used in
    proportion to p, as without p it is where they are used equally. Returns [H, B].
    """
    scale = marginal.clamp_min(TINY).log()
    if prior is not None:
        scale = scale - prior.clamp_min(TINY).log()
    return torch.logsumexp(beta * (log_student + log_teacher) - scale.unsqueeze(1), dim=-1)


def pair_agreement(teacher_x: Tensor, teacher_y: Tensor) -> Tensor:
    """Probability that both images of a pair fall into one cluster, per head: [H, B].

    Its mean over heads is TEMI's instance weight w(x, y) (eq. 7).
    """
    return (teacher_x * teacher_y).sum(-1)


def cross_entropy(student_log: Tensor, teacher: Tensor) -> Tensor:
    """-sum_c t(c|y) log s(c|x): the student of x predicts the teacher's view of y. [H, B].

    `student_log` are log-probabilities. The ICCE abstract names the term; pairing it across
    neighbors, as TEMI's own term is, is our choice.
    """
    return -(teacher * student_log).sum(-1)


@torch.no_grad()
def sinkhorn(
    logits: Tensor,
    iterations: int,
    *,
    prior: Tensor | None = None,
) -> Tensor:
    """Log-assignments: rows sum to 1, clusters are used in proportion to `prior`.

    Args:
        logits: [H, B, K], already divided by the temperature.
        iterations: column-then-row normalizations; columns are exact only in the limit. 0: a
            softmax.
        prior: [K] or [H, K] shares of the clusters; uniform by default.

    Returns: logarithms of the assignments, [H, B, K].
    """
    if prior is not None:
        log_prior = prior.clamp_min(TINY).log()
        target = log_prior if log_prior.dim() == 1 else log_prior.unsqueeze(1)
    # A row's own scale would be divided out in the end; without it, few iterations get nearer.
    scores = log_softmax(logits.float())
    for _ in range(iterations):
        scores = scores - scores.logsumexp(1, keepdim=True)
        if prior is not None:
            scores = scores + target
        scores = scores - scores.logsumexp(-1, keepdim=True)
    return scores
