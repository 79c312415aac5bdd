"""TODO"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from icce_ray.core.optimizer import AdamW
from icce_ray.errors import ArtifactError, StageError

WARMUP = 0.05  # share of the steps over which the learning rate rises


CHECK_EVERY = 50  # steps at most between looks at the loss: each look waits for the device


CHECK_SECONDS = 2.0  # ... and seconds at most


OnStep = Callable[[int, int, float], None]  # (steps done, steps in all, loss of the last one)


def lr_factor(step: int, total: int, warmup: float = WARMUP) -> float:
    """Linear warm-up, then a cosine to 0; `step` counts from 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))) + 1) / 2


def _set_lr(optimizer: torch.optim.Optimizer | AdamW, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _groups(named: Iterable[tuple[str, nn.Parameter]], peak: float) -> list[dict[str, Any]]:
    """Parameter groups of one peak learning rate; biases and gains are not decayed."""
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": matrices, "lr": peak, "peak": peak},
        {"params": vectors, "lr": peak, "peak": peak, "weight_decay": 0.0},
    ]


class _Meter:
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
        self.flush()
        rows = max(1.0, self.rows)
        return {"loss": self.loss_sum / rows, "agreement": self.hits / rows}


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimizer's moments as named tensors on the CPU, ready for safetensors."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in slots.items()}
    return _plain_tensors(tensors)


def unpack_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a packed state back. Raises ArtifactError where it does not fit."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in below(tensors, "optimizer.").items():
        number, key = name.split(".")
        state.setdefault(int(number), {})[key] = value
    _load_weights(model, below(tensors, "model."))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses views and tensors that share memory."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"the classifier's weights do not fit its description: {reason}"
        ) from None
