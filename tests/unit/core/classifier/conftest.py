"""Small data and a small backbone for classifiers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.config.schema import BackboneConfig, ClassifierConfig
from icce_ray.core import backbone
from icce_ray.core.classifier import model as C
from icce_ray.core.classifier import probe as probe_


def _blobs(
    rows: int, clusters: int, features: int = 32, spread: float = 0.05, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around random directions, float16 [N, D], and the blob of each."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(clusters, features))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    labels = np.arange(rows) % clusters
    x = centers[labels] + spread * rng.normal(size=(rows, features))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16), labels


def _fit(
    x: Any, y: np.ndarray, clusters: int, seed: int = 0, **options: Any
) -> tuple[C.Classifier, list[dict[str, float]]]:
    weights = options.pop("weights", np.ones(len(y), np.float32))
    collective = options.pop("collective", None)
    settings = ClassifierConfig(**options)
    return probe_.train_probe(x, y, weights, settings, clusters, seed, collective=collective)


TINY = BackboneConfig(name="test_efficientnet", pretrained=False, image_size=32)


def _pictures(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of three colors, uint8 [B, 3, S, S], and the color of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    colors = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[labels]
    noise = torch.randint(-50, 50, (rows, 3, 32, 32), generator=generator)
    return (colors[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture
def warm() -> tuple[C.FineTuned, torch.Tensor, torch.Tensor]:
    """A model whose head is the probe trained on its own frozen features."""
    torch.manual_seed(0)
    network = backbone.load(TINY)
    images, labels = _pictures(96)
    with torch.inference_mode():
        features = backbone.normalize(network(images))
    head, _ = _fit(features.half().numpy(), labels.numpy(), 3)
    return C.FineTuned(network, head).eval(), images, labels


@pytest.fixture(scope="session")
def blobs() -> Any:
    """blobs(N, K, ...) -> unit rows and the blob of each."""
    return _blobs


@pytest.fixture(scope="session")
def fit() -> Any:
    """fit(x, y, K, ...) -> a trained probe and its history."""
    return _fit


@pytest.fixture
def tiny() -> BackboneConfig:
    """The backbone of `warm`."""
    return TINY
