"""Numbers of a run's page, from small tables by hand."""

from __future__ import annotations

import types

import numpy as np

from icce_ray.core.evaluation import truth
from icce_ray.report import run_numbers


def facts_of(table: np.ndarray) -> types.SimpleNamespace:
    """Only what the functions below look at."""
    names = [f"class-{c}" for c in range(table.shape[0])]
    return types.SimpleNamespace(
        names=names,
        contingency=table,
        class_name=lambda code: names[code],
        cluster_name=lambda cluster: f"cluster {cluster}",
    )


TABLE = np.array([[8, 2, 0], [0, 9, 1], [0, 0, 10]])  # classes by clusters


def test_confused_pairs_leave_the_matched_cells_out():
    match = truth.match(TABLE)
    assert run_numbers.confused(TABLE, match) == [(0, 1), (1, 2)]
    first = run_numbers.pairs(facts_of(TABLE), TABLE, match)[0]
    assert first == {
        "true": "class-0", "found": "cluster 1", "cluster": 1, "count": 2, "share": 0.2
    }  # fmt: skip


def test_hardest_classes_have_the_lowest_recall_and_perfect_ones_are_left_out():
    rows = run_numbers.hardest(facts_of(TABLE), TABLE, truth.match(TABLE))
    assert [(row["name"], row["recall"]) for row in rows] == [("class-0", 0.8), ("class-1", 0.9)]


def test_a_class_that_has_no_cluster_has_recall_0():
    table = np.array([[5], [3]])
    rows = run_numbers.hardest(facts_of(table), table, truth.match(table))
    assert rows == [{"name": "class-1", "recall": 0.0, "count": 3}]


def test_mix_lists_the_most_frequent_classes_of_a_cluster():
    parts = run_numbers.mix(facts_of(TABLE), 1)
    assert [part["name"] for part in parts] == ["class-1", "class-0"]
    assert sum(part["share"] for part in parts) == 1


def test_machines_are_counted_in_words():
    assert run_numbers.machines({"nodes": 1, "cpus": 8, "gpus": 0.5}) == "1 node, 8 CPUs, 0.5 GPUs"
    assert run_numbers.machines({}) == ""
