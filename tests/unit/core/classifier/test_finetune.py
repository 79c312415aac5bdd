"""Fine-tuning a tiny backbone. S image side."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from icce_ray.config.schema import ClassifierConfig
from icce_ray.core import backbone
from icce_ray.core.classifier import finetune as finetune_
from icce_ray.core.classifier import model as C
from icce_ray.core.classifier import training
from icce_ray.errors import ArtifactError, StageError


def batches(images: torch.Tensor, labels: torch.Tensor, rows: int = 16) -> list[dict[str, Any]]:
    ones = torch.ones(len(labels))
    parts = zip(images.split(rows), labels.split(rows), ones.split(rows), strict=True)
    return [{"image": i, "label": y, "weight": w} for i, y, w in parts]


def test_fine_tuning_starts_at_the_probe_and_improves(warm: Any) -> None:
    model, images, labels = warm
    with torch.inference_mode():
        before = model(images)
        start = F.cross_entropy(before, labels)
        probe = model.head(backbone.normalize(model.backbone(images)))
    torch.testing.assert_close(before, probe)
    settings = ClassifierConfig(kind="finetune", backbone_lr=1e-3, lr=1e-2)
    optimizer = finetune_.finetune_optimizer(model, settings)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}
    seen: list[int] = []
    for epoch in range(3):
        result = finetune_.finetune_epoch(
            model,
            optimizer,
            batches(images, labels),
            finetune_.Position(epoch, 6, 3),
            seed=0,
            bfloat16=False,
            on_step=lambda done, total, loss: seen.append(done),
        )
    assert result["epoch"] == 3 and result["agreement"] > 0.95 and seen[-1] == 18
    with torch.inference_mode():
        assert F.cross_entropy(model(images), labels) < start
    assert frozen and all(torch.equal(v, model.state_dict()[k]) for k, v in frozen.items())


def test_both_learning_rates_are_used_and_decay(warm: Any) -> None:
    model, images, labels = warm
    optimizer = finetune_.finetune_optimizer(model, ClassifierConfig(backbone_lr=1e-5, lr=1e-2))
    assert sorted({group["peak"] for group in optimizer.param_groups}) == [1e-5, 1e-2]
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(model.parameters()))
    finetune_.finetune_epoch(
        model, optimizer, batches(images, labels), finetune_.Position(0, 6, 1), 0, False
    )
    assert all(group["lr"] < 0.2 * group["peak"] for group in optimizer.param_groups)


def test_weights_count_in_fine_tuning(warm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WEIGHT_DECAY", 0.0)
    model, images, labels = warm
    batch = {"image": images, "label": labels, "weight": torch.zeros(len(labels))}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = finetune_.finetune_optimizer(model, ClassifierConfig())
    loss, hits = finetune_.finetune_step(model, optimizer, batch, torch.Generator(), bfloat16=False)
    assert loss == 0 and hits > 80
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_a_diverging_fine_tuning_stops(warm: Any) -> None:
    model, images, labels = warm
    optimizer = finetune_.finetune_optimizer(model, ClassifierConfig())
    with torch.no_grad():
        model.head.out.bias.fill_(torch.nan)
    with pytest.raises(StageError, match="not finite at step 6 of 12"):
        finetune_.finetune_epoch(
            model, optimizer, batches(images, labels), finetune_.Position(1, 6, 2), 0
        )


def test_state_resumes_exactly(tiny: Any, warm: Any) -> None:
    from safetensors.torch import load, save

    model, images, labels = warm
    settings = ClassifierConfig(backbone_lr=1e-3)
    optimizer = finetune_.finetune_optimizer(model, settings)
    position = finetune_.Position(0, 6, 2), finetune_.Position(1, 6, 2)
    finetune_.finetune_epoch(model, optimizer, batches(images, labels), position[0], 0, False)
    packed = load(save(training.pack_state(model, optimizer)))
    finetune_.finetune_epoch(model, optimizer, batches(images, labels), position[1], 0, False)
    other = C.FineTuned(backbone.load(tiny), C.Classifier("linear", model.head.features, 3))
    resumed = finetune_.finetune_optimizer(other, settings)
    training.unpack_state(packed, other, resumed)
    finetune_.finetune_epoch(other, resumed, batches(images, labels), position[1], 0, False)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], atol=1e-5, rtol=1e-4)
    with pytest.raises(ArtifactError, match="do not fit"):
        training.unpack_state({"model.x": torch.zeros(1)}, other, resumed)


def test_augmentation_crops_and_mirrors() -> None:
    ramp = torch.arange(32).mul(8).expand(3, 32, 32).to(torch.uint8)  # grows from left to right
    out = finetune_.augment(ramp.expand(256, 3, 32, 32), torch.Generator().manual_seed(0))
    assert out.shape == (256, 3, 32, 32) and out.dtype == torch.uint8
    row = out[:, 0, 16].float()
    mirrored = row[:, 0] > row[:, -1]
    assert 90 < mirrored.sum() < 166
    kept = (row[:, 0] - row[:, -1]).abs() / (31 * 8)  # side of the crop
    assert kept.min() > math.sqrt(finetune_.CROP[0]) - 0.04 and kept.max() <= 1
    assert kept.std() > 0.02
    again = finetune_.augment(ramp.expand(256, 3, 32, 32), torch.Generator().manual_seed(0))
    assert torch.equal(out, again)
