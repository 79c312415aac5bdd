"""The probe: a small classifier on frozen features, trained on pseudo-labels.

Shapes: N rows, B batch, D features, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F

from icce_ray.config.schema import ClassifierConfig
from icce_ray.core.classifier.model import Classifier
from icce_ray.core.classifier.training import (
    Meter,
    OnStep,
    normalized_weights,
    parameter_groups,
    set_lr,
)
from icce_ray.core.collective import Alone, Collective
from icce_ray.core.constants import CALIBRATED_ROWS
from icce_ray.core.device import default_device, on_gpu
from icce_ray.core.optimizer import AdamW
from icce_ray.core.sampling import seed_of
from icce_ray.errors import DataError

STATISTICS_ROWS = 50_000  # rows that the input's mean and deviation are taken from
PREDICT_ROWS = 8192  # rows per forward pass of a probe
SMALL_EPOCH = 50  # with few rows, batches shrink until an epoch has this many steps
EAGER = 3  # steps before one is recorded: the first make what later ones share
RECORD_FROM = 100  # steps in all from which it pays to record one
TEMPERATURES = (math.log(0.05), math.log(50.0))  # between which calibration looks

Matrix = np.ndarray | Tensor
Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # row numbers [B] -> loss and hits


class _Rows:
    """Rows of a float16 matrix [N, D] as float32 batches on the device.

    The matrix is copied to a GPU that has room for it; elsewhere only the rows asked for are read.
    """

    def __init__(self, features: Matrix, device: torch.device) -> None:
        self.device = device
        copied = on_gpu(features, device) if isinstance(features, np.ndarray) else features
        self.source = features if copied is None else copied
        self.shape = tuple(features.shape)
        # Where rows are looked up: beside the rows themselves, so that a GPU waits for nothing.
        held = isinstance(self.source, Tensor)
        self.home = self.source.device if held else torch.device("cpu")

    def take(self, rows: Tensor) -> Tensor:
        """Rows by their numbers at home, float32 [B, D] on the device."""
        if isinstance(self.source, Tensor):
            return self.source[rows].to(self.device).float()
        picked = torch.from_numpy(self.source[rows.numpy()])
        return picked.to(self.device).float()


@torch.no_grad()
def _standardize(model: Classifier, rows: _Rows) -> None:
    """Set shift and scale from evenly spaced rows. Coordinates that hardly vary are not blown up:
    their deviation counts as at least a hundredth of the root mean square of all of them."""
    total = rows.shape[0]
    index = torch.linspace(0, total - 1, min(total, STATISTICS_ROWS), dtype=torch.float64).long()
    mean = torch.zeros(rows.shape[1], dtype=torch.float64)
    square = torch.zeros_like(mean)
    for part in index.split(1024):  # float32 sums of few rows, added up in float64
        x = rows.take(part.to(rows.home))
        mean += x.sum(0).double().cpu() / len(index)
        square += x.square().sum(0).double().cpu() / len(index)
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    floor = 0.01 * deviation.square().mean().sqrt()
    model.shift.copy_(mean)
    model.scale.copy_(1 / deviation.clamp_min(floor if floor > 0 else 1.0))


def probe_settings(chosen: ClassifierConfig) -> ClassifierConfig:
    """The settings of the probe. Those of fine-tuning (few epochs, small batches) are not meant
    for the probe it starts from, which has the default ones."""
    if chosen.kind != "finetune":
        return chosen
    return ClassifierConfig(confidence_weights=chosen.confidence_weights)


def probe_batch(rows: int, wanted: int) -> int:
    """Rows per step: as wanted, but fewer for small data, which would get too few steps."""
    return min(wanted, math.ceil(rows / SMALL_EPOCH))


def probe_steps(rows: int, settings: ClassifierConfig) -> int:
    """Steps that train_probe takes in all."""
    return settings.epochs * math.ceil(rows / probe_batch(rows, settings.batch_size))


def train_probe(
    features: Matrix,
    labels: np.ndarray,
    weights: np.ndarray,
    settings: ClassifierConfig,
    num_clusters: int,
    seed: int,
    collective: Collective | None = None,
    on_step: OnStep | None = None,
    device: torch.device | None = None,
) -> tuple[Classifier, list[dict[str, float]]]:
    """Fit a probe to pseudo-labels by weighted cross-entropy (AdamW, warm-up, cosine).

    Args:
        features: unit rows, float16 or float32 [N, D]; may be memory-mapped.
        labels: pseudo-label of each row, integers in 0..K-1 [N]; clusters may have no row.
        weights: confidence of each label, >= 0 [N]; only their ratios matter.
        settings: kind (finetune: a linear probe, to start from), epochs, batch_size, lr.
        seed: of the initial weights and of the order of the rows.
        collective: workers that share every batch. All pass the same data and seed, and get the
            same classifier as a single worker would, up to the order of float sums.
        on_step: called every few steps, and at each epoch's end.
        device: default: the GPU of this process, else the CPU.

    Returns:
        The classifier, and per epoch its mean loss and the share of rows it agrees with.

    Raises:
        DataError: labels or weights do not fit.
        StageError: a loss that is not finite, naming the step.
    """
    device = device or default_device()
    _check_labels(features, labels, weights, num_clusters)
    rows = _Rows(features, device)
    kind: Literal["linear", "mlp"] = "mlp" if settings.kind == "mlp" else "linear"
    model = Classifier(kind, rows.shape[1], num_clusters, seed=seed)
    _standardize(model, rows)
    trainer = _ProbeTrainer(model.to(device), rows, labels, weights, settings, seed)
    trainer.group = collective or Alone()
    history = [trainer.epoch(number, on_step) for number in range(settings.epochs)]
    return model.eval(), history


def _check_labels(
    features: Matrix, labels: np.ndarray, weights: np.ndarray, num_clusters: int
) -> None:
    if len(features) == 0:
        raise DataError("there are no rows to train the classifier on")
    if not len(features) == len(labels) == len(weights):
        raise DataError(
            f"{len(features)} embeddings, {len(labels)} pseudo-labels and {len(weights)} weights: "
            "their numbers must be equal"
        )
    if labels.min() < 0 or labels.max() >= num_clusters:
        raise DataError(
            f"pseudo-labels must lie in 0..{num_clusters - 1}; found {labels.min()}..{labels.max()}"
        )
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.max() <= 0:
        raise DataError("the pseudo-labels' weights must be finite, >= 0, and not all 0")


class _ProbeTrainer:
    """Epochs over the rows of a matrix."""

    group: Collective = Alone()

    def __init__(
        self,
        model: Classifier,
        rows: _Rows,
        labels: np.ndarray,
        weights: np.ndarray,
        settings: ClassifierConfig,
        seed: int,
    ) -> None:
        self.model, self.rows, self.seed = model, rows, seed
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(rows.home)
        self.weights = torch.from_numpy(normalized_weights(weights)).to(rows.home)
        self.batch = probe_batch(rows.shape[0], settings.batch_size)
        self.steps = math.ceil(rows.shape[0] / self.batch)  # per epoch
        self.total = self.steps * settings.epochs
        self.optimizer = AdamW(parameter_groups([(model, settings.lr)]))
        self.recorded: _Recorded | None = None

    def epoch(self, number: int, on_step: OnStep | None) -> dict[str, float]:
        """One pass over all rows. Returns epoch (from 1), loss and agreement."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "probe rows", number))
        order = torch.randperm(self.rows.shape[0], generator=generator).to(self.rows.home)
        meter = Meter(number * self.steps, self.total, on_step)
        for batch in order.split(self.batch):
            if meter.done == EAGER and self._may_record():
                self._record(batch)
            set_lr(self.optimizer, meter.done, self.total)
            recorded = self.recorded
            step = recorded if recorded and recorded.takes(batch) else self._step
            meter.add(*step(batch), rows=len(batch))
        return {"epoch": number + 1, **meter.summary()}

    def _may_record(self) -> bool:
        """Whether steps are many and alike, and all of them happens on one GPU."""
        one_gpu = self.group.world == 1 and torch.device(self.rows.home).type == "cuda"
        return one_gpu and self.total >= RECORD_FROM and self.steps > EAGER

    def _record(self, batch: Tensor) -> None:
        for group in self.optimizer.param_groups:  # what is recorded reads it from here
            group["lr"] = torch.zeros((), device=self.rows.home)
        self.recorded = _Recorded(self._step, batch)

    def _step(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """One update on this worker's slice of a batch. Returns the whole batch's loss and hits."""
        mine = batch[self.group.rank :: self.group.world]
        labels = self.labels[mine].to(self.rows.device)
        logits = self.model(self.rows.take(mine))
        each = F.cross_entropy(logits, labels, reduction="none")
        weighted = each * self.weights[mine].to(self.rows.device)
        loss = weighted.sum() * (self.group.world / len(batch))  # the mean over workers is exact
        self.optimizer.zero_grad()
        loss.backward()
        hits = (logits.argmax(1) == labels).sum().float() * self.group.world
        loss = loss.detach()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.group.all_reduce_mean_([*grads, loss, hits])
        self.optimizer.step()
        return loss, hits


class _Recorded:
    """A training step as a CUDA graph, which is replayed for each batch.

    A GPU does the step in a sixth of the time that the host takes to ask for it kernel by kernel.
    Numbers stay the same. `batch`: of which length all later ones are, on the GPU.
    """

    def __init__(self, step: Step, batch: Tensor) -> None:
        self.batch, self.graph = batch.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # only records
            self.results = step(self.batch)

    def takes(self, batch: Tensor) -> bool:
        """Whether a batch is as long as the one recorded: the last of an epoch may be shorter."""
        return len(batch) == len(self.batch)

    def __call__(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        self.batch.copy_(batch)
        self.graph.replay()
        loss, hits = self.results  # the next replay overwrites them
        return loss.clone(), hits.clone()


@torch.no_grad()
def calibrate(classifier: Classifier, features: Matrix, confidence: np.ndarray) -> float:
    """Divide the logits by the temperature at which probabilities are as sure as the consensus.

    A probe of pseudo-labels is as good as certain of nearly every one, right or wrong. Temperature
    scaling (Guo et al., ICML 2017) changes no prediction; for want of labels, the most probable
    cluster counts as right as often as the consensus is confident. Returns the temperature.

    Args:
        features: unit rows [N, D] that it was trained on.
        confidence: of the consensus, [N], 0..1.
    """
    rows = np.linspace(0, len(features) - 1, min(len(features), CALIBRATED_ROWS)).astype(np.int64)
    x = torch.as_tensor(features[rows]).to(classifier.out.weight.device).float()
    logits = classifier(x).cpu()
    wanted = float(np.mean(confidence[rows], dtype=np.float64))

    def excess(log_temperature: float) -> float:
        scaled = logits * math.exp(-log_temperature)
        return float(scaled.softmax(1).amax(1).mean()) - wanted

    low, high = TEMPERATURES
    if excess(low) <= 0:  # one cluster, or confidence in all
        return 1.0
    reached = excess(high) < 0  # not with a confidence of 1 / K or less
    temperature = math.exp(brentq(excess, low, high, xtol=1e-3) if reached else high)
    for parameter in (classifier.out.weight, classifier.out.bias):
        parameter.div_(temperature)
    return temperature


@torch.inference_mode()
def predict(
    classifier: Classifier, features: Matrix, device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Most probable cluster int32 [N] and its probability float32 [N]."""
    device = device or default_device()
    model = classifier.to(device).eval()
    clusters = np.empty(len(features), np.int32)
    confidence = np.empty(len(features), np.float32)
    for start in range(0, len(features), PREDICT_ROWS):
        part = features[start : start + PREDICT_ROWS]
        x = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        value, index = model(x.to(device).float()).softmax(1).max(1)
        rows = slice(start, start + len(value))
        clusters[rows], confidence[rows] = index.cpu().numpy(), value.cpu().numpy()
    return clusters, confidence
