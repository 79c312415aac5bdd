"""The method, ICCE, on one matrix of embeddings: search, select, train heads, merge, classify.

Each step is one function here, which composes what the modules beside it do. `cluster` runs all of
them in memory; the stages of a run call the same functions, and read and write files around them.
Papers: ICCE (arXiv 2511.16213), which builds on TEMI (arXiv 2303.17896).

Shapes: N images, D features, M neighbors, H heads, L clusters per head, K clusters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from icce_ray.config.loading import check, parse_range
from icce_ray.config.schema import MethodConfig
from icce_ray.core import constants, neighbors, projection
from icce_ray.core import num_classes as classes
from icce_ray.core.classifier import probe
from icce_ray.core.classifier.model import Classifier
from icce_ray.core.classifier.training import OnStep, pseudo_labels
from icce_ray.core.collective import Collective
from icce_ray.core.constants import CONFIDENCE_NEIGHBORS, FITTED_ROWS
from icce_ray.core.device import default_device
from icce_ray.core.ensemble import agreement, selection
from icce_ray.core.ensemble.base import Consensus
from icce_ray.core.ensemble.confidence import supported
from icce_ray.core.ensemble.consensus import consensus
from icce_ray.core.evaluation import labelfree
from icce_ray.core.heads.trainer import Data, HeadTrainer
from icce_ray.core.unit_rows import unit_rows
from icce_ray.errors import ConfigError, DataError

SEARCH_SEED = 0  # of the search: settings of another seed find the same neighbors
Progress = Callable[[str, int, int], None]  # (part of the method, done, total)

# --- search: who is near -------------------------------------------------------------------------


def search_projection(embeddings: np.ndarray, pca: int | None) -> projection.Projection | None:
    """The principal components that neighbors are searched in; None: all features, as they are.
    embeddings: float16 [N, D], unit rows."""
    if pca is None:
        return None
    return projection.fit_projection(embeddings, pca, SEARCH_SEED)


def search(
    embeddings: np.ndarray,
    settings: MethodConfig,
    device: torch.device,
    on_rows: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The M nearest neighbors of each image by cosine, best first.

    embeddings: float16 [N, D], unit rows. on_rows: called with the number of images done since the
    last call. Returns ids int32 [N, M], similarity float16 [N, M].
    """
    chosen, rows = settings.neighbors, len(embeddings)
    most = min(chosen.max_neighbors, rows - 1)
    components = search_projection(embeddings, chosen.pca)
    matrix = np.asarray(embeddings)
    if components is not None:
        matrix = projection.project(embeddings, components, device).cpu().numpy()
    gpus = int(device.type == "cuda")
    seconds = constants.exact_seconds(rows, matrix.shape[1], os.cpu_count() or 1, gpus)
    if constants.is_approximate(chosen.search, seconds):
        index = neighbors.make_ivf(matrix, SEARCH_SEED)
        ids, similarity = neighbors.search_ivf(index, matrix, 0, rows, most, chosen.nprobe)
    else:
        ids, similarity = neighbors.search(matrix, 0, rows, most, device, on_rows)
    return ids, similarity.astype(np.float16)


# --- select: how many of them count --------------------------------------------------------------


def select(ids: np.ndarray, similarity: np.ndarray, settings: MethodConfig) -> neighbors.Selection:
    """Dense regions keep many neighbors, outliers few. ids: int32 [N, M], best first; similarity:
    float16 [N, M]."""
    (rows, most), chosen = ids.shape, settings.neighbors
    return neighbors.select(
        ids,
        similarity,
        rule=chosen.rule,
        k=neighbors.reference_k(chosen.k, rows, settings.num_classes, most),
        threshold=chosen.threshold,
        min_neighbors=chosen.min_neighbors,
    )


# --- heads: H clusterings ------------------------------------------------------------------------


def head_data(
    embeddings: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    settings: MethodConfig,
    device: torch.device,
) -> tuple[Data, projection.Projection]:
    """What heads are trained on, and the projection of the embeddings that they see.

    embeddings: float16 [N, D]; ids: int32 [N, M]; counts: int32 [N].
    """
    seen = projection.fit_projection(embeddings, settings.heads.pca, settings.seed)
    return Data.of(embeddings, ids, counts, seen, device), seen


def head_steps(settings: MethodConfig) -> int:
    """Steps of the heads' training."""
    return settings.heads.steps_of(settings.head_clusters)


def head_trainer(
    data: Data, settings: MethodConfig, collective: Collective | None = None
) -> HeadTrainer:
    """The trainer of all heads, or of this worker's. It has not started yet."""
    clusters, steps = settings.head_clusters, head_steps(settings)
    return HeadTrainer(data, settings.heads, clusters, settings.seed, steps, collective)


def train_heads(
    embeddings: np.ndarray,
    ids: np.ndarray,
    counts: np.ndarray,
    settings: MethodConfig,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Train all heads on pairs of neighbors: the cluster that each gives each image, int [N, H].

    Arguments as of `head_data`. on_step: called with the steps done and those in all.
    """
    data, _ = head_data(embeddings, ids, counts, settings, device)
    trainer = head_trainer(data, settings)
    trainer.start()
    for step in range(trainer.steps):
        trainer.step()
        if on_step:
            on_step(step + 1, trainer.steps)
    return trainer.assign()


# --- merge: one clustering -----------------------------------------------------------------------


def choose_heads(
    assignments: np.ndarray, ids: np.ndarray, settings: MethodConfig
) -> tuple[np.ndarray, dict[str, Any]]:
    """Numbers of the heads that are merged, ascending.

    Heads of several balances aim at different sizes of clusters: those of the balance that fits the
    neighbors best (evidence) stay; of them, those that say most about neighbors (information).

    Args:
        assignments: int [N, H] in 0..L-1; may be memory-mapped.
        ids: row numbers of the nearest neighbors, best first, int [N, M].

    Returns the numbers and, of several balances, the `balance` that was chosen and the
    `head_evidence` [H] it was chosen by, as JSON values.

    Raises:
        DataError: ids that are not row numbers.
    """
    count = assignments.shape[1]
    fitting = np.arange(count)
    why: dict[str, Any] = {}
    clusters = settings.head_clusters
    balances = [settings.heads.balance_of(head, clusters) for head in range(count)]
    several = len(set(balances)) > 1
    if not several and settings.kept_heads(count) >= count:
        return fitting, why  # nothing to choose
    information, evidence = labelfree.head_scores(assignments, ids, clusters, settings.seed)
    if several:
        fitting = selection.likeliest_group(evidence, balances)
        why = {"balance": balances[fitting[0]], "head_evidence": evidence.tolist()}
    best = selection.most_informed(information[fitting], settings.kept_heads(len(fitting)))
    return fitting[best], why


def merge(
    assignments: np.ndarray,
    ids: np.ndarray,
    settings: MethodConfig,
    device: torch.device | None = None,
) -> Consensus:
    """The consensus of the heads that fit best, and how sure each image is of its cluster.

    Arguments as of `choose_heads`. info: that of `consensus`, and `kept` (numbers of the merged
    heads), `head_agreement` (their mean NMI), `balance` and `head_evidence` of `choose_heads`.
    """
    kept, why = choose_heads(assignments, ids, settings)
    merged = consensus(
        assignments,
        settings.num_classes,
        settings.consensus.method,
        head_clusters=settings.head_clusters,
        kept=kept,
        seed=settings.seed,
        device=device,
    )
    rows, most = ids.shape
    near = neighbors.reference_k(CONFIDENCE_NEIGHBORS, rows, settings.num_classes, most)
    confidence = supported(merged.confidence, merged.labels, ids, near)
    heads = assignments[:, kept]
    alike = agreement.mean_nmi(heads, settings.head_clusters, max_rows=FITTED_ROWS)
    info = {**merged.info, "kept": kept.tolist(), "head_agreement": alike, **why}
    return replace(merged, confidence=confidence, info=info)


# --- classify: new images ------------------------------------------------------------------------


def train_classifier(
    embeddings: np.ndarray,
    labels: np.ndarray,
    confidence: np.ndarray,
    settings: MethodConfig,
    device: torch.device,
    collective: Collective | None = None,
    on_step: OnStep | None = None,
) -> tuple[Classifier, list[dict[str, float]]]:
    """A probe that learns the consensus, each image weighted by its confidence, and whose
    probabilities are as sure as the consensus. (With classifier.kind=finetune: the probe that
    fine-tuning starts from.)

    Args:
        embeddings: float16 [N, D], unit rows.
        labels, confidence: of the consensus, [N].

    Returns the classifier, and per epoch loss and agreement with the consensus.

    Raises:
        DataError: no image has any confidence.
        StageError: a loss that is not finite.
    """
    chosen = probe.probe_settings(settings.classifier)
    targets, weights = pseudo_labels(labels, confidence, chosen)
    model, history = probe.train_probe(
        embeddings,
        targets,
        weights,
        chosen,
        settings.num_classes,
        settings.seed,
        collective=collective,
        on_step=on_step,
        device=device,
    )
    if settings.classifier.kind != "finetune":
        probe.calibrate(model, embeddings, confidence)
    return model, history


def predict(
    classifier: Classifier, embeddings: Any, device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster int32 [N] and its probability float32 [N] of new embeddings, as `unit_rows` takes.

    Raises:
        DataError: embeddings that cannot be used, or have another number of features.
    """
    rows = unit_rows(embeddings, features=classifier.features)
    return probe.predict(classifier, rows, device)


# --- all of it -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Clustering:
    """What `cluster` found."""

    labels: np.ndarray  # int32 [N], 0..K-1, by decreasing cluster size
    confidence: np.ndarray  # float32 [N], 0..1
    assignments: np.ndarray = field(repr=False)  # int [N, H]: the cluster that each head gave
    neighbors: neighbors.Selection = field(repr=False)  # ids, similarity, counts
    classifier: Classifier = field(repr=False)
    info: Mapping[str, Any] = field(repr=False)  # how heads were merged: see `merge`
    settings: MethodConfig = field(repr=False)  # with all defaults
    embeddings: np.ndarray = field(repr=False)  # float16 [N, D], unit rows
    device: torch.device = field(repr=False)

    def predict(self, embeddings: Any) -> tuple[np.ndarray, np.ndarray]:
        """Labels int32 [B] and confidence float32 [B] of new embeddings [B, D].

        Raises:
            DataError: embeddings that cannot be used, or have another number of features.
        """
        return predict(self.classifier, embeddings, self.device)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Label-free scores by name, as sweeps rank by (`labelfree.SCORES`); measured when first
        asked for."""
        return labelfree.score(
            labelfree.SCORES,
            clusters=self.labels,
            num_clusters=self.settings.num_classes,
            assignments=self.assignments,
            ids=self.neighbors.ids,
            features=self.embeddings,
            seed=self.settings.seed,
        )


def cluster(
    embeddings: Any,
    num_classes: int | str,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Clustering:
    """Group the rows of a matrix into classes, without any label.

    Args:
        embeddings: [N, D], as `unit_rows` takes. Rows are normalized.
        num_classes: K; or "auto" or a range such as "50-200": see core/num_classes.py.
        device: that heads and classifier are trained on. Default: a GPU if there is one.
        progress: called now and then with the part of the method, and what of it is done.
        settings: `seed`, and the groups `neighbors`, `heads`, `consensus` and `classifier` by the
            names of the YAML: `heads={"count": 8}`.

    Raises:
        ConfigError: a setting that is unknown or wrong.
        DataError: embeddings that cannot be used.
        StageError: a loss that is not finite.
    """
    between = parse_range(num_classes)
    tree = {"num_classes": between[0] if between else num_classes, **settings}
    config = check(MethodConfig, tree)
    if config.classifier.kind == "finetune":
        raise ConfigError("classifier.kind=finetune needs images; embeddings take linear or mlp")
    chosen = default_device() if device is None else torch.device(device)
    x = unit_rows(embeddings)
    say = _Parts(progress)
    if between:
        found = classes.estimate(x, between, config, say.steps("classes"))
        config = check(MethodConfig, {**tree, "num_classes": found.best})
    if len(x) < config.num_classes:
        raise DataError(
            f"{len(x)} embeddings cannot make num_classes={config.num_classes} clusters; give more "
            "rows, or lower num_classes"
        )
    ids, similarity = search(x, config, chosen, say.rows("search", len(x)))
    near = select(ids, similarity, config)
    assignments = train_heads(x, ids, near.counts, config, chosen, say.steps("heads"))
    merged = merge(assignments, ids, config, chosen)
    model, _ = train_classifier(
        x, merged.labels, merged.confidence, config, chosen, on_step=say.steps("classifier")
    )
    return Clustering(
        merged.labels,
        merged.confidence,
        assignments,
        near,
        model,
        merged.info,
        config,
        x,
        chosen,
    )


class _Parts:
    """Turns the callbacks of each part into the one that the caller gave."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress or (lambda part, done, total: None)

    def rows(self, part: str, total: int) -> Callable[[int], None]:
        """For a part that says how many rows it did since the last call."""
        done = 0

        def add(rows: int) -> None:
            nonlocal done
            done += rows
            self.progress(part, done, total)

        return add

    def steps(self, part: str) -> Callable[..., None]:
        """For a part that says its step and the steps in all."""
        return lambda done, total, *_: self.progress(part, done, total)
