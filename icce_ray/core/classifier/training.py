"""What probes and fine-tuning share: optimizer, learning rate, sums over an epoch, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icce_ray.config.schema import ClassifierConfig
from icce_ray.core.classifier.model import load_weights
from icce_ray.core.optimizer import AdamW
from icce_ray.core.schedule import warmup_cosine
from icce_ray.core.tensors import below, plain
from icce_ray.errors import DataError, StageError

WARMUP = 0.05  # share of the steps over which the learning rate rises
WEIGHT_DECAY = 1e-4  # of AdamW
CHECK_EVERY = 50  # steps at most between looks at the loss: each look waits for the device
CHECK_SECONDS = 2.0  # ... and seconds at most

OnStep = Callable[[int, int, float], None]  # (steps done, steps in all, mean loss of the epoch)


def pseudo_labels(
    clusters: np.ndarray, confidence: np.ndarray, settings: ClassifierConfig
) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier is trained on: labels int64 [N] and their weights float32 [N], of mean 1.

    clusters, confidence: of the consensus, [N].

    Raises:
        DataError: no image has any confidence.
    """
    labels = np.asarray(clusters).astype(np.int64)
    weights = np.ones(len(labels), np.float32)
    if settings.confidence_weights:
        weights = np.asarray(confidence)
        if not weights.max(initial=0) > 0:
            raise DataError(
                "the consensus gives every image the confidence 0; set "
                "classifier.confidence_weights=false, or look at the heads in the report"
            )
    return labels, normalized_weights(weights)


def normalized_weights(weights: np.ndarray) -> np.ndarray:
    """Weights of mean 1, float32 [N], so that the learning rate means the same for all runs."""
    return (weights / weights.mean(dtype=np.float64)).astype(np.float32)


def parameter_groups(parts: Iterable[tuple[nn.Module, float]]) -> list[dict[str, Any]]:
    """Groups for AdamW of modules, each with its peak learning rate; biases and gains are not
    decayed."""
    groups: list[dict[str, Any]] = []
    for module, peak in parts:
        trained = [p for p in module.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups.append({"params": matrices, "lr": peak, "peak": peak, "weight_decay": WEIGHT_DECAY})
        groups.append({"params": vectors, "lr": peak, "peak": peak, "weight_decay": 0.0})
    return groups


def set_lr(optimizer: torch.optim.Optimizer | AdamW, step: int, total: int) -> None:
    """The learning rate of a step, from 0: a linear rise, then a cosine to 0. Where it is a tensor,
    it is changed in place."""
    for group in optimizer.param_groups:
        lr = group["peak"] * warmup_cosine(step, total, WARMUP)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


class Meter:
    """Sums over an epoch. Reads losses back from the device only now and then."""

    def __init__(self, done: int, total: int, on_step: OnStep | None) -> None:
        self.done, self.total, self.on_step = done, total, on_step
        self.loss_sum = self.hits = self.rows = 0.0
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []
        self._looked = time.monotonic()

    def add(self, loss: Tensor, hits: Tensor, rows: int) -> None:
        """loss: mean over the `rows` rows of a step; hits: how many of them agree."""
        self._losses.append(loss.detach() * rows)
        self._hits.append(hits)
        self.rows += rows
        self.done += 1
        waited = time.monotonic() - self._looked
        if len(self._losses) >= CHECK_EVERY or waited > CHECK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Raises StageError that names the first step whose loss is not finite."""
        if not self._losses:
            return
        self._looked = time.monotonic()
        losses = torch.stack(self._losses).double().cpu()
        bad = (~torch.isfinite(losses)).nonzero().flatten()
        if len(bad):
            step = self.done - len(losses) + int(bad[0])
            raise StageError(
                f"the classifier's loss is not finite at step {step} of {self.total}. Lower "
                "classifier.lr (and backbone_lr), and check that the embeddings are finite."
            )
        self.loss_sum += float(losses.sum())
        self.hits += float(torch.stack(self._hits).sum())
        self._losses, self._hits = [], []
        if self.on_step:
            self.on_step(self.done, self.total, self.loss_sum / max(1.0, self.rows))

    def summary(self) -> dict[str, float]:
        """Mean loss, and share of rows that agree."""
        self.flush()
        rows = max(1.0, self.rows)
        return {"loss": self.loss_sum / rows, "agreement": self.hits / rows}


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimizer's moments as named tensors on the CPU, ready for safetensors."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in slots.items()}
    return plain(tensors)


def unpack_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a packed state back. Raises ArtifactError where it does not fit."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in below(tensors, "optimizer.").items():
        number, key = name.split(".")
        state.setdefault(int(number), {})[key] = value
    load_weights(model, below(tensors, "model."))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
