"""The probe as the workers of a group train it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from icce_ray.core.collective import Alone
from icce_ray.distributed import probe


def test_only_the_first_worker_of_a_group_predicts(make_run, monkeypatch):
    made = make_run(60, 3, images=False, overrides=["classifier.epochs=2"])
    task = probe.task_of(made.config)
    rows = []
    predict = probe.probe_.predict
    monkeypatch.setattr(
        probe.probe_, "predict", lambda *given: rows.append(given) or predict(*given)
    )
    cpu = torch.device("cpu")

    def fit(rank):
        group = SimpleNamespace(rank=rank, world=1, all_reduce_mean_=Alone().all_reduce_mean_)
        return probe._fit(made.run, task, lambda *step: None, group, cpu)

    first, second = fit(0), fit(1)
    assert len(rows) == 1
    assert "clusters" in first and "clusters" not in second
    assert second["history"].shape == (2, 3)
    agreement = np.mean(first["clusters"].numpy() == made.clusters)
    assert agreement > 0.5
