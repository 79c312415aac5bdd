"""A curated classifier on new images: those like the dropped ones have no cluster."""

from __future__ import annotations

import numpy as np
import torch

from icce_ray.core.classifier import model
from icce_ray.core.outliers import make_reference
from icce_ray.distributed.inference import Predictor


class Features:
    """Stands in for an Embedder: its pixels are features."""

    def embed(self, pixels):
        return pixels[0]


def test_the_cluster_of_the_dropped_images_is_none():
    x = torch.eye(3)
    one = model.Classifier("linear", 3, 3)
    one.out.weight.data.copy_(10 * x)
    predictor = Predictor(None, Features(), finetuned=False)
    predictor.classifier = one.eval()
    rows = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float16)
    predictor.reference = make_reference(rows, 0, torch.device("cpu"))
    assert predictor.compute([x])["cluster"].tolist() == [0, 1, 2]
    predictor.dropped = 2
    found = predictor.compute([x])
    assert found["cluster"].tolist() == [0, 1, -1] and found["valid"].all()
    assert found["cluster"].dtype == np.int32
