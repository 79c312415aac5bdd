"""Fine-tuning: the backbone is trained with the classifier, from images.

Shapes: B batch, S image side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from icce_ray.config.schema import ClassifierConfig
from icce_ray.core.classifier.model import FineTuned
from icce_ray.core.classifier.training import Meter, OnStep, parameter_groups, set_lr
from icce_ray.core.collective import Alone, Collective
from icce_ray.core.sampling import seed_of

CLIP = 1.0  # largest norm of the gradient
CROP = (0.6, 1.0)  # share of the image's area that a random crop keeps


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, resized back, and a random mirror image of each. uint8 [B, 3, S, S] -> same.

    Both are one affine map per image, applied to the whole batch on its device.
    """
    count, device = len(images), images.device
    u = torch.rand(4, count, generator=generator, device=generator.device).to(device)
    side = (CROP[0] + (CROP[1] - CROP[0]) * u[0]).sqrt()
    mirror = torch.where(u[1] < 0.5, -1.0, 1.0)
    offset = (2 * u[2:] - 1) * (1 - side)  # keeps the crop inside the image
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = offset.T
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return out.round().clamp(0, 255).to(torch.uint8)


def finetune_optimizer(model: FineTuned, settings: ClassifierConfig) -> AdamW:
    """AdamW with backbone_lr for the backbone and lr for the head."""
    return AdamW(
        parameter_groups([(model.backbone, settings.backbone_lr), (model.head, settings.lr)])
    )


def finetune_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    bfloat16: bool = True,
) -> tuple[Tensor, Tensor]:
    """One update. Returns the weighted mean cross-entropy and the number of rows that agree.

    Args:
        model: a FineTuned, or one wrapped for data-parallel training.
        batch: image uint8 [B, 3, S, S], label int64 [B], weight float32 [B] (mean 1 over all rows).
    """
    images, labels, weights = batch["image"], batch["label"], batch["weight"]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(augment(images, generator)).float()
    each = F.cross_entropy(logits, labels, reduction="none")
    loss = (each * weights).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach(), (logits.argmax(1) == labels).sum().float()


@dataclass(frozen=True)
class Position:
    """Where an epoch stands in the whole training."""

    epoch: int  # from 0
    steps: int  # per epoch
    epochs: int


def finetune_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Tensor]],
    position: Position,
    seed: int,
    bfloat16: bool = True,
    collective: Collective | None = None,
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """One pass over this worker's batches. Returns loss and agreement over all workers.

    The model stays in evaluation mode: batch normalization keeps its pretrained statistics (small
    batches would spoil them, and workers would differ), and dropout is off.

    Raises:
        StageError: a loss that is not finite, naming the step.
    """
    group = collective or Alone()
    # Each worker augments its own images: a stream for each epoch and rank.
    stream = position.epoch * group.world + group.rank
    generator = torch.Generator().manual_seed(seed_of(seed, "augmentation", stream))
    model.eval()
    meter = Meter(position.epoch * position.steps, position.steps * position.epochs, on_step)
    for batch in batches:
        set_lr(optimizer, meter.done, meter.total)
        loss, hits = finetune_step(model, optimizer, batch, generator, bfloat16)
        meter.add(loss, hits, rows=len(batch["label"]))
    meter.flush()
    values = [meter.loss_sum, meter.hits, meter.rows]
    sums = torch.tensor(values, dtype=torch.float64, device=_device_of(model))
    group.all_reduce_sum_([sums])
    loss_sum, all_hits, all_rows = sums.tolist()
    return {
        "epoch": position.epoch + 1,
        "loss": loss_sum / max(1.0, all_rows),
        "agreement": all_hits / max(1.0, all_rows),
    }


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
