"""How a cluster's cores and GPUs are shared between decoding and the actors, and an actor's device.

B batch, S image side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.config.schema import EmbedConfig
from icce_ray.core import device
from icce_ray.distributed.cluster import Cluster, Resources
from icce_ray.distributed.stream import Actor, Columns, plan_pool


def test_cores_are_shared_so_that_both_sides_run() -> None:
    class Fake(Cluster):
        def __init__(self, cpus: int, gpus: int, nodes: int) -> None:
            super().__init__()
            self.have = (cpus, gpus, nodes)

        def resources(self) -> Any:
            cpus, gpus, nodes = self.have
            each = ((cpus / nodes, gpus / nodes),) * nodes if cpus else ()
            return Resources(cpus, gpus, nodes, 0.0, each)

    for cpus, gpus, nodes, actors in (
        *((1, 0, 1, 1), (2, 0, 1, 1), (4, 0, 1, 1), (64, 0, 1, 1), (2, 0, 1, 8), (64, 0, 4, 4)),
        *((16, 8, 1, None), (64, 4, 4, None), (0, 0, 1, 1)),
    ):
        settings = EmbedConfig(max_actors=actors)
        pool = plan_pool(Fake(cpus, gpus, nodes), settings, rows=10**6)
        assert pool.most == (actors or gpus)
        assert pool.cpus != pool.decode_cpus  # else Ray fuses both into one actor
        free = max(1, cpus) - pool.cpus * pool.most
        assert free >= pool.decode_cpus, "no room for decoding: deadlock"
        assert pool.threads >= 1
    few = plan_pool(Fake(16, 8, 1), EmbedConfig(batch_size=256), rows=300)
    assert few.most == 2  # no more actors than batches


# --- Apple's GPU ---------------------------------------------------------------------------------

APPLE = torch.device("cpu:0")  # another name of the CPU stands for it: no machine here has one


class Mean:
    """A model that computes the mean of each image, and notes where and of how many."""

    product = "means"

    def __init__(self, on_apple: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.on_apple, self.device = on_apple, torch.device("cpu")
        self.work: list[tuple[bool, int]] = []

    def load(self, device: torch.device) -> list[dict[str, Any]]:
        self.device = device
        return [{"name": str(device)}]

    def compute(self, pixels: Sequence[torch.Tensor]) -> Columns:
        images = pixels[0].float() / 255
        self.work.append((self.device == APPLE, len(images)))
        mean = images.mean((1, 2, 3))
        mean = self.on_apple(mean) if self.device == APPLE else mean
        return {"mean": mean.numpy(), "valid": np.ones(len(mean), bool)}


def missing(mean: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("The operator is not implemented for the MPS device")


def no_float64(mean: torch.Tensor) -> torch.Tensor:
    raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def small(mean: torch.Tensor) -> torch.Tensor:
    if len(mean) > 4:
        raise RuntimeError("MPS backend out of memory")
    return mean


def answer(monkeypatch: pytest.MonkeyPatch, model: Mean, gpu: bool = False) -> Columns:
    """What an actor gives for two batches of six images; the second."""
    monkeypatch.setattr(device, "apples_gpu", lambda: APPLE)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    batch = {"image_id": np.arange(6), "reason": np.full(6, "", object), "pixels0": images}
    actor = Actor(model, threads=1, gpu=gpu)
    actor(batch)
    found = actor(batch)
    np.testing.assert_allclose(found["mean"], images.mean((1, 2, 3)) / 255, atol=0.02)
    return found


def test_apples_gpu_computes_where_it_does_so_as_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mean(lambda mean: mean + 0.001)
    found = answer(monkeypatch, model)
    assert model.work == [(False, 4), (True, 4), (True, 6), (True, 6)]
    assert json.loads(found["note"][0])["backbones"] == [{"name": str(APPLE)}]


@pytest.mark.parametrize("wrong", [missing, no_float64, lambda mean: mean + 0.1])
def test_else_the_cpu_does(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    model = Mean(wrong)
    found = answer(monkeypatch, model)
    assert model.work == [(False, 4), (True, 4), (False, 6), (False, 6)]
    assert json.loads(found["note"][0])["backbones"] == [{"name": "cpu"}]


def test_a_batch_too_large_for_apples_gpu_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mean(small)
    answer(monkeypatch, model)
    assert model.work[-3:] == [(True, 6), (True, 3), (True, 3)]


def test_apples_gpu_is_not_asked_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mean(missing)
    answer(monkeypatch, model, gpu=True)
    assert model.work == [(False, 6), (False, 6)]
