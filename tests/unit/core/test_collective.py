"""How many bytes the workers of the heads' training exchange per step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from icce_ray.config.schema import HeadsConfig
from icce_ray.core.collective import Counted
from icce_ray.core.heads.trainer import Data, HeadTrainer

ROWS, FEATURES, CLUSTERS, HEADS, PAIRS, WORLD = 64, 12, 5, 7, 24, 3
FLOAT = 4  # bytes


class Twins:
    """A group whose other workers hold the same as this one."""

    rank, world = 0, WORLD

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.clone() for _ in range(self.world)]

    def all_reduce_sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(self.world)

    def all_reduce_mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        return None


def trainer(group: Counted, **more: object) -> HeadTrainer:
    rng = np.random.default_rng(0)
    data = Data(
        torch.from_numpy(rng.normal(size=(ROWS, FEATURES))).half(),
        torch.from_numpy(rng.integers(0, ROWS, (ROWS, 4))).int(),
        torch.full((ROWS,), 4),
        torch.device("cpu"),
    )
    settings = HeadsConfig(count=HEADS, batch_size=PAIRS, start="random", **more)
    return HeadTrainer(data, settings, CLUSTERS, 0, 10, group)


def sent_per_step(**more: object) -> dict[str, float]:
    group = Counted(Twins())
    one = trainer(group, **more)
    one.step()
    first = dict(group.bytes)
    one.step()
    assert group.bytes == {kind: 2 * count for kind, count in first.items()}
    return first


def test_only_agreements_are_exchanged() -> None:
    """A x B floats over all workers, and nothing that grows with the model."""
    most = math.ceil(HEADS / WORLD)  # heads of the largest worker
    expected = (WORLD - 1) * most * PAIRS * FLOAT
    assert sent_per_step() == {"all_gather": expected, "all_reduce": 0}
    assert sent_per_step(hidden=(32,))["all_gather"] == expected
    assert sent_per_step(instance_weights=False) == {"all_gather": 0, "all_reduce": 0}


def test_a_single_worker_sends_nothing() -> None:
    from icce_ray.core.collective import Alone

    group = Counted(Alone())
    trainer(group).step()
    assert group.bytes == {"all_gather": 0, "all_reduce": 0}


def test_operations_are_those_of_the_inner_group() -> None:
    group, tensor = Counted(Twins()), torch.ones(2)
    group.all_reduce_sum_([tensor])
    assert tensor.tolist() == [3, 3] and len(group.all_gather(tensor)) == 3
    assert (group.rank, group.world) == (0, 3)
    assert group.bytes == {"all_gather": 16, "all_reduce": pytest.approx(4 / 3 * 8)}
