"""What probes and fine-tuning share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from icce_ray.config.schema import ClassifierConfig
from icce_ray.core.classifier import training
from icce_ray.core.optimizer import AdamW
from icce_ray.errors import DataError


def test_pseudo_labels_weigh_each_image_by_its_confidence() -> None:
    clusters, confidence = np.array([2, 0, 1], np.int32), np.array([0.9, 0.3, 0.6], np.float32)
    labels, weights = training.pseudo_labels(clusters, confidence, ClassifierConfig())
    assert labels.tolist() == [2, 0, 1] and labels.dtype == np.int64
    assert weights == pytest.approx([1.5, 0.5, 1.0]) and weights.dtype == np.float32
    same = ClassifierConfig(confidence_weights=False)
    assert training.pseudo_labels(clusters, confidence, same)[1].tolist() == [1, 1, 1]


def test_no_confidence_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="confidence_weights=false"):
        training.pseudo_labels(np.array([0, 1]), np.zeros(2), ClassifierConfig())


def test_biases_are_not_decayed_and_each_module_has_its_rate() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 2)
    second.bias.requires_grad_(False)
    optimizer = AdamW(training.parameter_groups([(first, 0.1), (second, 0.01)]))
    shown = [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    decay = training.WEIGHT_DECAY
    assert shown == [(0.1, decay, 1), (0.1, 0.0, 1), (0.01, decay, 1), (0.01, 0.0, 0)]
    training.set_lr(optimizer, 0, 100)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.02, 0.02, 0.002, 0.002])


def test_the_mean_loss_is_over_rows_not_steps() -> None:
    meter = training.Meter(0, 2, None)
    meter.add(torch.tensor(1.0), torch.tensor(3.0), rows=3)
    meter.add(torch.tensor(5.0), torch.tensor(0.0), rows=1)
    assert meter.summary() == {"loss": 2.0, "agreement": 0.75}
