"""How a cluster's cores and GPUs are shared between decoding and the actors."""

from __future__ import annotations

from typing import Any

from icce_ray.config.schema import EmbedConfig
from icce_ray.distributed.cluster import Cluster, Resources
from icce_ray.distributed.stream import plan_pool


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
