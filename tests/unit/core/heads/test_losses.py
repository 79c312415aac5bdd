"""The losses against their formulas, written with plain loops, and Sinkhorn's own properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.core.heads import losses

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 5))


def draw_logits(shape, seed, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- pointwise mutual information ----------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from([0.3, 0.6, 1.0]))
def test_pmi_is_temis_formula(shape, seed, beta):
    heads, pairs, clusters = shape
    s, t = (draw_logits(shape, seed + i).softmax(-1) for i in (0, 1))
    m = draw_logits((heads, clusters), seed + 2).softmax(-1)
    found = losses.pmi(s.log(), t.log(), m, beta)
    for h in range(heads):
        for b in range(pairs):
            joint = (
                (float(s[h, b, c]) * float(t[h, b, c])) ** beta / float(m[h, c])
                for c in range(clusters)
            )
            assert float(found[h, b]) == pytest.approx(math.log(sum(joint)), abs=1e-4)


def test_pmi_of_a_sure_pair_is_the_surprise_of_its_cluster():
    sure = torch.tensor([[[40.0, 0, 0, 0]]]).log_softmax(-1)
    for share in (0.1, 0.7):
        rest = (1 - share) / 3
        marginal = torch.tensor([[share, rest, rest, rest]])
        assert float(losses.pmi(sure, sure, marginal, 1.0)) == pytest.approx(-math.log(share))


def test_with_a_prior_pmi_is_best_where_clusters_are_used_in_its_proportion():
    prior = torch.tensor([[0.6, 0.3, 0.1]])
    sure = (torch.eye(3) * 40).log_softmax(-1).unsqueeze(0)  # one pair in each cluster

    def mean_of(marginal):
        return float((marginal * losses.pmi(sure, sure, marginal, 0.6, prior)).sum())

    assert mean_of(prior) == pytest.approx(0, abs=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.rand(1, 3, generator=generator).softmax(-1)
        divergence = float((other * (other / prior).log()).sum())
        assert mean_of(other) == pytest.approx(-divergence, abs=1e-5)


def test_pmi_and_its_gradient_stay_finite_at_the_ends():
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0]]]).log_softmax(-1)
    value = losses.pmi(logits.log_softmax(-1), teacher, torch.tensor([[1.0, 0.0, 0.0]]), 0.6)
    value.sum().backward()
    assert value.isfinite().all() and logits.grad.isfinite().all()


# --- the other terms -----------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(SHAPES, st.integers(0, 999))
def test_cross_entropy_and_agreement_are_their_sums(shape, seed):
    s, t = (draw_logits(shape, seed + i).softmax(-1) for i in (0, 1))
    entropy, agreement = losses.cross_entropy(s.log(), t), losses.pair_agreement(s, t)
    for h in range(shape[0]):
        for b in range(shape[1]):
            pairs = [(float(s[h, b, c]), float(t[h, b, c])) for c in range(shape[2])]
            expected = -sum(q * math.log(p) for p, q in pairs)
            assert float(entropy[h, b]) == pytest.approx(expected, rel=1e-4)
            assert float(agreement[h, b]) == pytest.approx(sum(p * q for p, q in pairs), rel=1e-4)


def test_cross_entropy_is_least_where_the_student_agrees():
    teacher = draw_logits((1, 20, 4), 0).softmax(-1)
    own = losses.cross_entropy(teacher.log(), teacher)
    other = losses.cross_entropy(draw_logits((1, 20, 4), 1).log_softmax(-1), teacher)
    assert (own < other).all()


# --- Sinkhorn-Knopp ------------------------------------------------------------------------------


def slow_sinkhorn(logits, iterations, prior):
    """The textbook's, from rows that sum to 1: scale columns to their share, then rows to 1.

    One head, float64.
    """
    q = logits.double().softmax(-1)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) * prior.double() * len(q)
        q = q / q.sum(1, keepdim=True)
    return q


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(0, 999), st.integers(1, 5), st.booleans())
def test_sinkhorn_is_the_textbooks(shape, seed, iterations, per_head):
    heads, _, clusters = shape
    logits = draw_logits(shape, seed)
    prior = draw_logits((heads, clusters), seed + 1, 1.0).softmax(-1)
    prior = prior if per_head else prior[0]
    found = losses.sinkhorn(logits, iterations, prior=prior).exp()
    for h in range(heads):
        expected = slow_sinkhorn(logits[h], iterations, prior[h] if per_head else prior)
        torch.testing.assert_close(found[h].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("iterations", [1, 3, 200])
def test_rows_are_probabilities_after_any_number_of_iterations(iterations):
    rows = losses.sinkhorn(draw_logits((2, 30, 5), 0), iterations).exp()
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 30))


def test_columns_converge_to_equal_shares_or_to_the_prior():
    logits = draw_logits((3, 120, 6), 1)
    even = losses.sinkhorn(logits, 300).exp()
    torch.testing.assert_close(even.sum(1), torch.full((3, 6), 20.0), atol=0.02, rtol=0)
    prior = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.05, 0.05])
    uneven = losses.sinkhorn(logits, 300, prior=prior).exp()
    torch.testing.assert_close(uneven.sum(1), (120 * prior).expand(3, 6), atol=0.02, rtol=0)
    same = losses.sinkhorn(logits, 5, prior=torch.full((6,), 1 / 6)).exp()
    torch.testing.assert_close(same, losses.sinkhorn(logits, 5).exp())


def test_each_iteration_brings_the_columns_nearer():
    logits = draw_logits((1, 200, 8), 2)
    off = [
        float((losses.sinkhorn(logits, i).exp().sum(1) - 25).abs().max()) for i in (1, 3, 10, 30)
    ]
    assert off == sorted(off, reverse=True) and off[0] > 2 * off[-1]


def test_constants_of_rows_and_columns_fall_out():
    logits, row = draw_logits((2, 40, 4), 3), draw_logits((2, 40, 1), 4)
    few = losses.sinkhorn(logits, 2).exp()  # a row's own scale is gone from the start
    torch.testing.assert_close(losses.sinkhorn(logits + row, 2).exp(), few, atol=1e-5, rtol=0)
    column = draw_logits((2, 1, 4), 5)  # a column's falls out in the limit
    limit = losses.sinkhorn(logits, 400).exp()
    torch.testing.assert_close(
        losses.sinkhorn(logits + column, 400).exp(), limit, atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("scale", [1e4, 1e8, 1e30])
def test_extreme_logits_stay_finite(scale):
    signs = draw_logits((1, 16, 3), 6).sign()
    logs = losses.sinkhorn(scale * signs, 3)
    assert logs.isfinite().all()
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(1, 16))


def test_it_takes_half_precision_and_gives_no_gradient():
    logits = draw_logits((1, 8, 3), 7).bfloat16().requires_grad_()
    logs = losses.sinkhorn(logits, 3)
    assert logs.dtype == torch.float32 and not logs.requires_grad
