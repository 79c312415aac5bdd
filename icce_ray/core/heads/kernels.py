"""`closed_form.loss_and_gradient` as Triton kernels, for logits in half precision on a GPU.

A step is bound by memory traffic, not by arithmetic. So nothing of the size of the logits is
written but the gradient, over the student's logits. Each pass loads a tile of rows, keeps it in
registers, and recomputes the exponentials: a few passes over the teacher's logits for Sinkhorn-
Knopp, one for the agreement of pairs, one over both for the gradient. Sums over the batch are
written per block and then added in a fixed order, so that a seed repeats to the last bit.

Shapes: H heads, B pairs, K clusters; logits are contiguous [H, 2B, K], images x first. Inside,
logarithms and exponentials are to the base 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton import language as tl

from icce_ray.core.heads.closed_form import LEAST, Running, Target, Terms
from icce_ray.core.heads.losses import TINY

MOST_CLUSTERS = 8192  # a row must fit into registers
TILE = 4096  # elements of a tile: rows x clusters, at least one row
BLOCK_ROWS = 64  # rows whose column sums one program adds up
WARP = 1024  # elements of a tile per warp; the gradient has four tiles at a time: a fourth of it


def loss_and_gradient(
    student: Tensor,
    teacher: Tensor,
    terms: Terms,
    target: Target,
    running: Running,
    weigh: Callable[[Tensor], Tensor] | None,
    want_loss: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """As `closed_form.loss_and_gradient`. The gradient overwrites `student`; the teacher's logits
    are left as they are."""
    heads, rows, clusters = student.shape
    pairs = rows // 2
    ones = torch.ones(heads, clusters, device=student.device)
    sums = _column_sums(teacher, ones)
    running.follow("usage", sums / rows)
    shares = target.shares(running)
    s = ones
    for iteration in range(terms.iterations):
        if iteration:
            sums = _column_sums(teacher, s)
        s = shares / sums.clamp_min(LEAST)
    log_s = s.log2()
    agreement, constant, mean = _agreements(teacher, log_s)
    running.follow("marginal", mean / rows)
    weights = None if weigh is None else weigh(agreement)
    scale = shares.clamp_min(TINY).log2() - running.marginal.clamp_min(TINY).log2()
    offset = terms.beta * log_s + scale
    each = student.new_empty((heads, pairs) if want_loss else (1, 1), dtype=torch.float32)
    block, tile = _tile(clusters, TILE // 4)
    _gradient_kernel[(triton.cdiv(pairs, tile), heads)](
        *(student, teacher, log_s, offset, constant, each),
        *(pairs, clusters, terms.beta, terms.cross_entropy),
        WANT_LOSS=want_loss,
        TILE=tile,
        BLOCK=block,
        num_warps=_warps(tile * block, WARP // 4),
    )
    loss = None
    if want_loss:
        loss = (each if weights is None else each * weights).mean(1)
    return loss, student, weights


def _tile(clusters: int, elements: int) -> tuple[int, int]:
    """Width of a padded row, and rows of a tile of about so many elements."""
    block = max(16, triton.next_power_of_2(clusters))
    return block, max(1, min(64, BLOCK_ROWS, elements // block))


def _warps(elements: int, each: int = WARP) -> int:
    return max(1, min(8, elements // each))


def _column_sums(logits: Tensor, s: Tensor) -> Tensor:
    """sum_b r_b e_bk with r_b = 1 / sum_k e_bk s_k, e = exp(logits): [H, K]."""
    heads, rows, clusters = logits.shape
    block, tile = _tile(clusters, TILE)
    count = triton.cdiv(rows, BLOCK_ROWS)
    sums = torch.empty(count, heads, clusters, device=logits.device)
    _columns_kernel[(count, heads)](
        *(logits, s, sums, rows, clusters, heads),
        ROWS=BLOCK_ROWS,
        TILE=tile,
        BLOCK=block,
        num_warps=_warps(tile * block),
    )
    return sums.sum(0)


def _agreements(logits: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum_k t_xk t_yk [H, B]; the constant of each row in log2 t, [H, 2B]; column sums of t."""
    heads, rows, clusters = logits.shape
    pairs = rows // 2
    block, tile = _tile(clusters, TILE // 2)
    count = triton.cdiv(pairs, BLOCK_ROWS)
    device = logits.device
    agreement = torch.empty(heads, pairs, device=device)
    constant = torch.empty(heads, rows, device=device)
    sums = torch.empty(count, heads, clusters, device=device)
    _agreement_kernel[(count, heads)](
        *(logits, log_s, agreement, constant, sums, pairs, clusters, heads),
        ROWS=BLOCK_ROWS,
        TILE=tile,
        BLOCK=block,
        num_warps=_warps(tile * block),
    )
    return agreement, constant, sums.sum(0)


@triton.jit
def _load(pointer, head, row, columns, rows, clusters, row_mask, column_mask):
    """A tile of logits times log2(e), float32; -inf in the padding."""
    place = (head * rows + row).to(tl.int64)[:, None] * clusters + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    values = tl.load(pointer + place, mask=mask, other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.where(column_mask[None, :], values, float("-inf"))


@triton.jit
def _columns_kernel(
    logits,
    s,
    sums,
    rows,
    clusters,
    heads,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    column_mask = columns < clusters
    scale = tl.load(s + head * clusters + columns, mask=column_mask, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, ROWS, TILE):
        row = part * ROWS + start + tl.arange(0, TILE)
        row_mask = row < rows
        u = _load(logits, head, row, columns, rows, clusters, row_mask, column_mask)
        e = tl.exp2(u - tl.max(u, 1)[:, None])
        r = 1.0 / tl.sum(e * scale[None, :], 1)
        total += tl.sum(tl.where(row_mask[:, None], e * r[:, None], 0.0), 0)
    place = (part * heads + head) * clusters + columns
    tl.store(sums + place, total, mask=column_mask)


@triton.jit
def _agreement_kernel(
    logits,
    log_s,
    agreement,
    constant,
    sums,
    pairs,
    clusters,
    heads,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    column_mask = columns < clusters
    shift = tl.load(log_s + head * clusters + columns, mask=column_mask, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, ROWS, TILE):
        row = part * ROWS + start + tl.arange(0, TILE)
        row_mask = row < pairs
        x = _load(logits, head, row, columns, 2 * pairs, clusters, row_mask, column_mask)
        y = _load(logits, head, row + pairs, columns, 2 * pairs, clusters, row_mask, column_mask)
        x += shift[None, :]
        y += shift[None, :]
        top_x, top_y = tl.max(x, 1), tl.max(y, 1)
        x = tl.exp2(x - top_x[:, None])
        y = tl.exp2(y - top_y[:, None])
        sum_x, sum_y = tl.sum(x, 1), tl.sum(y, 1)
        x /= sum_x[:, None]
        y /= sum_y[:, None]
        total += tl.sum(tl.where(row_mask[:, None], x + y, 0.0), 0)
        tl.store(agreement + head * pairs + row, tl.sum(x * y, 1), mask=row_mask)
        place = head * 2 * pairs + row
        tl.store(constant + place, -top_x - tl.log2(sum_x), mask=row_mask)
        tl.store(constant + place + pairs, -top_y - tl.log2(sum_y), mask=row_mask)
    place = (part * heads + head) * clusters + columns
    tl.store(sums + place, total, mask=column_mask)


@triton.jit
def _log_probability(z):
    """log2 of the softmax of a tile in base 2."""
    top = tl.max(z, 1)
    return z - (top + tl.log2(tl.sum(tl.exp2(z - top[:, None]), 1)))[:, None]


@triton.jit
def _gradient_kernel(
    student,
    teacher,
    log_s,
    offset,
    constant,
    each,
    pairs,
    clusters,
    beta,
    weight,
    WANT_LOSS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    column_mask = columns < clusters
    row = part * TILE + tl.arange(0, TILE)
    mask = row < pairs
    rows = 2 * pairs
    shift = tl.load(log_s + head * clusters + columns, mask=column_mask, other=0.0)[None, :]
    bias = tl.load(offset + head * clusters + columns, mask=column_mask, other=0.0)[None, :]
    constant_x = tl.load(constant + head * rows + row, mask=mask, other=0.0)
    constant_y = tl.load(constant + head * rows + pairs + row, mask=mask, other=0.0)
    log_p_x = _log_probability(
        _load(student, head, row, columns, rows, clusters, mask, column_mask)
    )
    log_p_y = _log_probability(
        _load(student, head, row + pairs, columns, rows, clusters, mask, column_mask)
    )
    l_x = _load(teacher, head, row, columns, rows, clusters, mask, column_mask)
    l_y = _load(teacher, head, row + pairs, columns, rows, clusters, mask, column_mask)
    mixed_xy = beta * (log_p_x + l_y) + bias
    mixed_yx = beta * (log_p_y + l_x) + bias
    top_xy, top_yx = tl.max(mixed_xy, 1), tl.max(mixed_yx, 1)
    q_xy = tl.exp2(mixed_xy - top_xy[:, None])
    q_yx = tl.exp2(mixed_yx - top_yx[:, None])
    sum_xy, sum_yx = tl.sum(q_xy, 1), tl.sum(q_yx, 1)
    q_xy /= sum_xy[:, None]
    q_yx /= sum_yx[:, None]
    t_x = tl.exp2(l_x + shift + constant_x[:, None])
    t_y = tl.exp2(l_y + shift + constant_y[:, None])
    if WANT_LOSS:
        pmi = top_xy + tl.log2(sum_xy) + beta * constant_y
        pmi += top_yx + tl.log2(sum_yx) + beta * constant_x
        inside = column_mask[None, :]
        entropy = tl.sum(tl.where(inside, t_y * log_p_x, 0.0), 1)
        entropy += tl.sum(tl.where(inside, t_x * log_p_y, 0.0), 1)
        value = -0.6931471805599453 * (pmi + weight * entropy) / 2
        tl.store(each + head * pairs + row, value, mask=mask)
    gradient_x = (beta + weight) * tl.exp2(log_p_x) - beta * q_xy - weight * t_y
    gradient_y = (beta + weight) * tl.exp2(log_p_y) - beta * q_yx - weight * t_x
    place = (head * rows + row).to(tl.int64)[:, None] * clusters + columns[None, :]
    both = mask[:, None] & column_mask[None, :]
    kind = student.dtype.element_ty
    tl.store(student + place, gradient_x.to(kind), mask=both)
    far = place + pairs.to(tl.int64) * clusters
    tl.store(student + far, gradient_y.to(kind), mask=both)
