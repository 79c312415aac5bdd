"""What the plan says of each stage, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest

from icce_ray import config
from icce_ray.distributed.cluster import Cluster
from icce_ray.stages.base import Need, Size
from icce_ray.stages.table import NAMES, PROCESS, stage

MILLION = Size(1_000_000, 1024)


def need(name: str, size: Size, classes: int = 100, **groups: Any) -> Need:
    tree = {"num_classes": classes, "run_dir": "run", "ray": {"num_gpus": 0}}
    return stage(name).estimate(
        config.load({**tree, "data": {"embeddings": "x.npy"}, **groups}), size, Cluster()
    )


@pytest.mark.parametrize("name", NAMES)
def test_more_images_need_more_memory_and_none_that_of_a_process(name: str) -> None:
    sizes = [Size(images, 1024) for images in (10, 1000, 100_000, 10_000_000)]
    memory = [need(name, size).memory for size in sizes]
    assert memory == sorted(memory)
    assert PROCESS <= memory[0] < 1.3 * PROCESS
    assert need(name, Size(None, None)).memory >= PROCESS


def test_memory_that_does_not_grow_with_the_images() -> None:
    """Given embeddings go through shard by shard, and a probe reads mapped rows."""
    ten = Size(10_000_000, 1024)
    assert need("embed", ten).memory == need("embed", MILLION).memory
    of_each = (need("classify", ten).memory - need("classify", MILLION).memory) / 9e6
    assert of_each < 2 * 1024, "it does not hold the embeddings"


def test_heads_on_more_workers_need_less_memory_each() -> None:
    one, four = (
        need("heads", MILLION, 1000, heads={"num_workers": n, "count": 24}).memory for n in (1, 4)
    )
    assert four < one / 2


def test_many_clusters_need_a_larger_tree() -> None:
    """Its distances grow with the square of the clusters, not with the images."""
    small, large = (need("heads", MILLION, k, heads={"count": 1}).memory for k in (1000, 20_000))
    assert large - small > 8 * (3 * 20_000) ** 2


def test_only_the_heads_that_are_merged_count() -> None:
    few, every = (need("consensus", MILLION, consensus={"keep": k}).memory for k in (0.25, 1.0))
    assert few < every


def test_embedding_images_needs_memory_for_a_batch() -> None:
    images = {"data": {"path": "x"}}
    whole, half = (
        need("embed", MILLION, embed={"batch_size": b}, **images).memory for b in (256, 128)
    )
    assert whole - PROCESS == pytest.approx(2 * (half - PROCESS))
