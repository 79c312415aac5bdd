"""Which heads the ensemble keeps, and how much each counts. Label-free.

Choosing some members of an ensemble by quality or by diversity is cluster ensemble selection
(Fern & Lin, Statistical Analysis and Data Mining 1, 2008, 128-141): there a member's quality is its
mean NMI with the others, and a subset can beat the whole. Ours by default is what its clusters tell
of their neighbors' (TEMI's objective on hard labels), which knows more than the other members do.

Shapes: N images, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from icce_ray.config.schema import Config
from icce_ray.core.ensemble.agreement import pairwise_nmi
from icce_ray.core.ensemble.base import Consensus
from icce_ray.core.ensemble.consensus import consensus
from icce_ray.core.evaluation import labelfree as scores
from icce_ray.errors import ConfigError, DataError

KEEP_BY = ("information", "agreement", "loss", "diversity")


WEIGHTS = ("equal", "agreement", "loss")


def choose(
    assignments: np.ndarray, ids: np.ndarray, config: Config, losses: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """How much each head counts, float64 [H], by the settings; 0 = out. Where heads were balanced
    in several ways, also the `balance` whose heads are merged and the `head_evidence` it was
    chosen by, as JSON values.

    Args:
        assignments: integers >= 0, [N, H]; may be memory-mapped.
        ids: row numbers of the nearest neighbors, best first, int [N, M].
        losses: final loss of each head [H], where heads are kept or weighed by it.

    Raises:
        DataError: ids or losses that do not fit.
    """
    wanted, count = config.consensus, assignments.shape[1]
    groups = [config.heads.balance_of(head) for head in range(count)]
    several = len(set(groups)) > 1
    fitting, information, told = np.arange(count), None, {}
    if several or (config.kept_heads(count) < count and wanted.keep_by == "information"):
        clusters = config.head_clusters
        information, evidence = scores.heads_alone(assignments, ids, clusters, config.seed)
        if several:
            fitting = likeliest(evidence, groups)
            told = {"balance": groups[fitting[0]], "head_evidence": evidence.tolist()}
    weights = np.zeros(count)
    weights[fitting] = head_weights(
        assignments[:, fitting],
        keep=config.kept_heads(len(fitting)),
        keep_by=wanted.keep_by,
        weights=wanted.weights,
        losses=None if losses is None else losses[fitting],
        information=None if information is None else information[fitting],
        max_rows=wanted.max_rows,
        seed=config.seed,
    )
    return weights, told


def merge(assignments: np.ndarray, weights: np.ndarray, config: Config) -> Consensus:
    """The consensus of heads that count so much, by the settings. Arguments as of `choose`."""
    wanted = config.consensus
    return consensus(
        assignments,
        config.num_classes,
        wanted.method,
        head_clusters=config.head_clusters,
        weights=weights,
        max_rows=wanted.max_rows,
        iterations=wanted.iterations,
        seed=config.seed,
    )


def likeliest(evidence: np.ndarray, groups: Sequence[float]) -> np.ndarray:
    """Numbers of the heads of the group whose better half has the highest mean evidence, ascending;
    where none has any (a collapsed head has 0, a poor one less), those of the first group.

    Args:
        evidence: of each head, [H]: `scores.heads_alone`.
        groups: what heads of one group share, [H], such as how far their clusters are balanced.
            Heads that aim at different sizes of clusters make a bad ensemble: not one is right.
    """
    members = {value: np.flatnonzero(np.array(groups) == value) for value in dict.fromkeys(groups)}

    def quality(heads: np.ndarray) -> float:
        return float(np.sort(evidence[heads])[-math.ceil(len(heads) / 2) :].mean())

    best = max(members.values(), key=quality)
    return best if quality(best) > 0 else next(iter(members.values()))


def head_weights(
    assignments: np.ndarray,
    *,
    keep: int | None = None,
    keep_by: str = "agreement",
    weights: str = "equal",
    losses: np.ndarray | None = None,
    information: np.ndarray | None = None,
    max_rows: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """How much each head counts in the ensemble: float64 [H], mean 1 over the kept ones, 0 = out.

    Args:
        assignments: integers >= 0, [N, H]; may be memory-mapped.
        keep: how many heads to keep, 1 to H. Default: all.
        keep_by: information: highest `information`. agreement: highest mean NMI with the other
            heads. loss: lowest final loss.
            diversity: the most agreeing head, then again and again the one whose NMI with the
            nearest kept one is lowest.
        weights: equal; agreement: mean NMI with the other heads; loss: exp(-z), z being the loss in
            standard deviations from the mean of the kept heads.
        losses: final loss of each head [H], for keep_by=loss and weights=loss.
        information: what each head's clusters tell of their neighbors' [H], for
            keep_by=information: `scores.heads_alone`.
        max_rows: images that the NMI is taken on, at most (a random subset).
        seed: of that subset.

    A head that puts all images into one cluster agrees with none and is kept last.

    Raises:
        ConfigError: keep, keep_by or weights that do not exist.
        DataError: no losses or information where they are needed, or not H finite numbers.
    """
    heads = assignments.shape[1]
    keep = heads if keep is None else keep
    _check_choices(keep, heads, keep_by, weights)
    picks = keep < heads
    likeness = np.eye(heads)
    if weights == "agreement" or (picks and keep_by in ("agreement", "diversity")):
        likeness = _likeness(assignments, max_rows, seed)
    values = np.zeros(heads)
    if weights == "loss" or (picks and keep_by == "loss"):
        values = _checked(losses, heads, "final losses")
    kept = np.arange(heads)
    if picks and keep_by == "information":
        kept = best_cluster(_checked(information, heads, "neighbor information"), keep)
    elif picks:
        kept = _choose(likeness, values, keep, keep_by)
    out = np.zeros(heads)
    out[kept] = _weigh(_quality(likeness)[kept], values[kept], weights)
    return out


def _check_choices(keep: int, heads: int, keep_by: str, weights: str) -> None:
    if not 1 <= keep <= heads:
        raise ConfigError(
            f"{keep} of {heads} heads cannot be kept: consensus.keep is a share of them"
        )
    if keep_by not in KEEP_BY:
        raise ConfigError(f"unknown consensus.keep_by={keep_by!r}; choose {', '.join(KEEP_BY)}")
    if weights not in WEIGHTS:
        raise ConfigError(f"unknown consensus.weights={weights!r}; choose {', '.join(WEIGHTS)}")


def _checked(given: np.ndarray | None, heads: int, what: str) -> np.ndarray:
    if given is None:
        raise DataError(
            f"the heads' {what} are not known; use consensus.keep_by=agreement and "
            "consensus.weights=equal"
        )
    values = np.asarray(given, np.float64)
    if values.shape != (heads,) or not np.isfinite(values).all():
        raise DataError(f"the heads' {what} must be {heads} finite numbers")
    return values


def best_cluster(quality: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the heads of highest quality, ascending; ties go to the lower number."""
    return np.sort(np.argsort(-quality, kind="stable")[:count])


def _likeness(assignments: np.ndarray, max_rows: int | None, seed: int) -> np.ndarray:
    """Pairwise NMI [H, H]; 0 between heads that are both constant, which tell each other nothing.

    NMI takes the mean entropy as its base, so a constant head has 0 with any other already.
    """
    result = pairwise_nmi(assignments, max_rows=max_rows, seed=seed)
    flat = np.flatnonzero([(column == column[0]).all() for column in assignments.T])
    result[np.ix_(flat, flat)] = 0
    np.fill_diagonal(result, 1)
    return result


def _quality(likeness: np.ndarray) -> np.ndarray:
    """Mean NMI of each head with the others, [H]; 1 for a single head."""
    others = len(likeness) - 1
    return (likeness.sum(axis=1) - 1) / others if others else np.ones(1)


def _choose(likeness: np.ndarray, losses: np.ndarray, count: int, keep_by: str) -> np.ndarray:
    """Numbers of the kept heads, ascending; ties go to the lower number."""
    if keep_by == "diversity":
        return np.sort(_spread(likeness, count))
    return best_cluster(-losses if keep_by == "loss" else _quality(likeness), count)


def _spread(likeness: np.ndarray, count: int) -> np.ndarray:
    """Farthest-first traversal (Gonzalez 1985) by 1 - NMI, from the head of greatest mean NMI."""
    quality = _quality(likeness)
    chosen = [int(np.argmax(quality))]
    nearest = likeness[chosen[0]].copy()  # of each head, its NMI with the most similar kept one
    nearest[quality == 0] = 0.999  # far from all, but for having nothing to say
    for _ in range(count - 1):
        nearest[chosen] = np.inf
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, likeness[chosen[-1]])
    return np.array(chosen)


def _weigh(quality: np.ndarray, losses: np.ndarray, weights: str) -> np.ndarray:
    """Positive weights of mean 1 for the kept heads."""
    values = np.ones(len(quality))
    if weights == "agreement":
        values = np.maximum(quality, 1e-6)
    elif weights == "loss" and losses.std() > 0:
        values = np.exp(-(losses - losses.mean()) / losses.std())
    return values / values.mean()
