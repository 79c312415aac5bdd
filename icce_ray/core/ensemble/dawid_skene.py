"""Dawid & Skene's confusion model: each head is a witness with an error rate of its own per class.

The heads' clusters are taken as noisy answers about one hidden class per image. EM fits the shares
of the classes and a confusion matrix [K, L] per head: it also learns how far to trust each head.
Reference: Dawid & Skene, Applied Statistics 28 (1979) 20-28.
Shapes: N images, H heads, L clusters per head, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import sparse

from icce_ray.core.ensemble.base import Draft, Ensemble, fill_empty
from icce_ray.core.ensemble.graph import hbgf, mcla
from icce_ray.core.ensemble.scoring import one_hot_codes, row_argmax, row_reduce, scored_parts
from icce_ray.core.ensemble.voting import voting

ITERATIONS = 30  # EM steps at most
CONVERGED = 1e-4  # EM stops when the log-likelihood per image rises by less
SMOOTHING = 1.0  # images that a class is given in advance, spread over the clusters
POSTERIOR_FLOOR = 1e-5  # smaller posteriors are taken as 0


@dataclass(frozen=True)
class _Model:
    """log p(class) + sum over heads of log p(head's cluster | class), split into two parts.

    With n the expected number of images per (cluster, class) and a = SMOOTHING / L,
    log p(cluster | class) = log(1 + n / a) + log(a / (n_class + SMOOTHING)): the first term is
    zero, so not stored, wherever a cluster never meets a class; the second goes into `base`.
    """

    table: sparse.csr_array  # float64 [H*L, K]
    base: np.ndarray  # float64 [K]; -inf for a class without images
    prior: np.ndarray  # log p(class), float64 [K]
    heads: int  # H


def dawid_skene(ensemble: Ensemble) -> Draft:
    """EM with a confusion matrix [K, L] per head (Dawid & Skene 1979).

    EM finds a local optimum, so it is started from MCLA and from the aligned vote (L > K: from
    HBGF), and the fit of the higher likelihood is kept. Confusions are smoothed by a Dirichlet
    prior of SMOOTHING images per class. Fitted on at most max_rows images, applied to all.
    """
    few = ensemble.take(ensemble.sample())
    over = few.head_clusters > few.num_clusters
    starts = {"mcla": mcla, "hbgf": hbgf} if over else {"mcla": mcla, "voting": voting}
    gpu = ensemble.device if ensemble.device and ensemble.device.type == "cuda" else None
    fit, apply = (_fit, _apply) if gpu is None else _on_gpu(gpu)
    fits = [(*fit(few, start(few).labels), name) for name, start in starts.items()]
    model, history, name = max(fits, key=lambda fit: fit[1][-1])
    labels, confidence = apply(ensemble.heads, model)
    info = {"path": f"EM from {name}", "log_likelihood": history, "fitted_rows": few.rows}
    return Draft(labels, confidence, info)


def _on_gpu(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`_fit` and `_apply` on a GPU."""
    from icce_ray.core.ensemble import dense

    em = dense.EM(ITERATIONS, CONVERGED, SMOOTHING, POSTERIOR_FLOOR)
    return partial(dense.fit, em=em, device=device), partial(dense.apply, device=device)


def _fit(ensemble: Ensemble, start: np.ndarray) -> tuple[_Model, list[float]]:
    """EM from these labels [N]. Returns the model and the log-likelihood per image of each step."""
    clusters = ensemble.num_clusters
    fill_empty(start, ensemble.heads, clusters)
    codes_t = one_hot_codes(ensemble.heads, ensemble.head_clusters).T.tocsr()
    posterior = _one_hot(start, clusters)
    history: list[float] = []
    for _ in range(ITERATIONS):
        model = _maximize(codes_t, posterior, ensemble)
        posterior, likelihood = _expect(ensemble.heads, model)
        history.append(likelihood)
        if len(history) > 1 and history[-1] - history[-2] < CONVERGED:
            break
    return model, history


def _one_hot(labels: np.ndarray, clusters: int) -> sparse.csr_array:
    starts = np.arange(len(labels) + 1)
    return sparse.csr_array((np.ones(len(labels)), labels, starts), shape=(len(labels), clusters))


def _maximize(codes_t: sparse.csr_array, posterior: sparse.csr_array, ensemble: Ensemble) -> _Model:
    """M-step: confusions and class shares from posteriors [N, K]. codes_t: X transposed."""
    clusters, rows = ensemble.num_clusters, ensemble.rows
    each = SMOOTHING / ensemble.head_clusters
    table = sparse.csr_array(codes_t @ posterior)
    table.data[table.data < 1e-2 * each] = 0
    table.eliminate_zeros()
    table.data = np.log1p(table.data / each)
    size = np.asarray(posterior.sum(axis=0)).ravel()
    prior = np.log((size + 1) / (rows + clusters))
    count = len(ensemble.heads)
    base = np.where(size > 0, prior + count * np.log(each / (size + SMOOTHING)), -np.inf)
    return _Model(table, base, prior, count)


def _expect(heads: np.ndarray, model: _Model) -> tuple[sparse.csr_array, float]:
    """E-step: posteriors [N, K], and the mean log-likelihood per image."""

    def expect(_: slice, scores: sparse.csr_array) -> tuple[sparse.csr_array, float]:
        total = _normalize(scores, model.base)
        scores.data[scores.data < POSTERIOR_FLOOR] = 0
        scores.eliminate_zeros()
        return scores, total

    parts, totals = zip(*scored_parts(heads, model.table, expect), strict=True)
    return sparse.csr_array(sparse.vstack(parts)), sum(totals) / heads.shape[1]


def _apply(heads: np.ndarray, model: _Model) -> tuple[np.ndarray, np.ndarray]:
    """Most probable class of all images, int64 [N], and how sure that is, float64 [N].

    Heads see the same features and err together, so the posterior is close to 1 nearly everywhere
    and orders images badly. For the confidence the log-likelihood is averaged over the heads
    instead of summed: all of them together count as one witness.
    """
    labels = np.empty(heads.shape[1], np.int64)
    confidence = np.empty(heads.shape[1])
    unseen = np.exp(model.base - np.logaddexp.reduce(model.base))  # where nothing is known
    averaged = model.prior + (model.base - model.prior) / model.heads

    def apply(part: slice, scores: sparse.csr_array) -> None:
        blank = np.diff(scores.indptr) == 0
        single = scores / model.heads
        _normalize(single, averaged)
        _normalize(scores, model.base)
        best = row_argmax(scores)
        chosen = scores.indices == np.repeat(best, np.diff(scores.indptr))
        sure = row_reduce(np.add, single, np.where(chosen, single.data, 0))
        labels[part] = np.where(blank, unseen.argmax(), best)
        confidence[part] = np.where(blank, unseen.max(), sure)

    for _ in scored_parts(heads, model.table, apply):
        pass
    return labels, confidence


def _normalize(scores: sparse.csr_array, base: np.ndarray) -> float:
    """Log-scores to posteriors, in place. Returns the sum of the log-likelihoods.

    Classes that none of the image's clusters ever met are not stored, and count as impossible. A
    row without any (all its clusters unseen in the sample) stays empty.
    """
    lengths = np.diff(scores.indptr)
    scores.data += base[scores.indices]
    top = row_reduce(np.maximum, scores)
    scores.data = np.exp(scores.data - np.repeat(top, lengths))
    total = row_reduce(np.add, scores)
    scores.data /= np.repeat(total, lengths)
    return float((top + np.log(total))[lengths > 0].sum())
