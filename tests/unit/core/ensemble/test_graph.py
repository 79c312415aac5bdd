"""Cuts of small graphs whose answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from icce_ray.core import constants
from icce_ray.core.ensemble import graph
from icce_ray.errors import ConfigError


def test_cspa_refuses_many_images_and_names_alternatives(solve):
    assignments = np.zeros((constants.CSPA_ROWS + 1, 2), np.int16)
    with pytest.raises(ConfigError, match=r"10,000.*mcla"):
        solve(assignments, 4, "cspa")


def two_cliques(size):
    """The edges of two cliques, and one light edge between them."""
    inside = [
        (a + start, b + start)
        for start in (0, size)
        for a, b in itertools.combinations(range(size), 2)
    ]
    a, b = np.array([*inside, (0, size)]).T
    return (a, b), np.r_[np.ones(len(inside)), 0.01]


def test_metis_cuts_the_light_edge():
    ends, weights = two_cliques(6)
    parts = graph.metis(2, 12, ends, weights, seed=0)
    assert len(set(parts[:6].tolist())) == len(set(parts[6:].tolist())) == 1
    assert parts[0] != parts[6]


def test_as_many_parts_as_vertices_need_no_cut():
    ends, weights = two_cliques(2)
    assert graph.metis(4, 4, ends, weights, seed=0).tolist() == [0, 1, 2, 3]


def test_co_association_counts_the_heads_that_put_two_images_together(make_ensemble):
    assignments = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]])
    ensemble = make_ensemble(assignments, 2)
    found = graph._co_association(ensemble.heads, ensemble).toarray() / graph.WEIGHT_SCALE
    same = (assignments[:, None] == assignments[None]).sum(-1)
    np.fill_diagonal(same, 0)
    assert found.tolist() == same.tolist()
