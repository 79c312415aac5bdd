"""Spaces and draws: what a sweep varies, and which trials come of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from icce_ray import config as configs
from icce_ray.errors import ConfigError
from icce_ray.sweeps import space

BASE = {"num_classes": 3, "data": {"embeddings": "e.npy"}, "neighbors": {"max_neighbors": 12}}


def parse(**tree: Any) -> space.Space:
    return space.parse(tree)


def draws(tree: dict[str, Any], base: dict[str, Any], seed: int = 0) -> space.Draws:
    return space.draw(parse(**tree), configs.load(base).model_dump(mode="json"), seed)


# --- spaces --------------------------------------------------------------------------------------


def test_all_problems_of_a_space_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(
            objectve=1,
            objective="neighbor_consistncy",
            trials=0,
            space={
                "heads.cuont": [1],
                "data.limit": [100],
                "heads.num_workers": [1, 2],
                "neighbors.rule": ["fixd"],
                "heads.beta": {"uniform": [0.5, 1.5]},
                "heads.lr": {"log": [0, 1]},
                "neighbors.k": {"int": [1.5, 2]},
                "heads.count": {"int": [9, 9]},
                "heads.pca": [],
                "consensus.method": {"any": [1]},
                "evaluate.kmeans": [True],
            },
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "14 problems in the space:"
    for start, text in (
        ("objectve:", "Did you mean 'objective'?"),
        ("objective:", "Did you mean 'neighbor_consistency'?"),
        ("trials:", "greater than or equal to 1"),
        ("heads.cuont:", "Did you mean heads.count?"),
        ("data.limit:", "same data"),
        ("heads.num_workers:", "not what comes out"),
        ("neighbors.rule:", "'fixd'"),
        ("heads.beta:", "got 1.5"),
        ("heads.lr:", "above 0"),
        ("neighbors.k:", "integer"),
        ("heads.count:", "empty"),
        ("heads.pca:", "empty"),
        ("consensus.method:", "{uniform: [low, high]}"),
        ("evaluate.kmeans:", "ground truth"),
    ):
        assert any(line.strip().startswith(start) and text in line for line in lines), start


def test_choices_are_what_the_setting_takes() -> None:
    """YAML reads 1e-3 and 1.0e30 as text."""
    found = parse(
        space={"heads.lr": ["1e-3", 1], "heads.pca": [None, 8], "heads.hidden": [[], [4]]}
    )
    assert found.space == {
        "heads.lr": [0.001, 1.0],
        "heads.pca": [None, 8],
        "heads.hidden": [[], [4]],
    }


def test_a_grid_takes_no_ranges() -> None:
    with pytest.raises(ConfigError, match=r"heads\.beta: needs a list"):
        parse(search="grid", space={"heads.beta": {"uniform": [0.5, 0.9]}})


@pytest.mark.parametrize("name", ["ensemble", "neighbors", "heads", "full"])
@pytest.mark.parametrize("config", ["quickstart", "imagenet"])
def test_golden_spaces_fit_golden_configs(name: str, config: str) -> None:
    found, known = space.load(name)
    drawn = space.draw(found, configs.load(config).model_dump(mode="json"), 0)
    assert known == name and len(drawn.configs) == len(drawn.settings) > 1
    if found.search == "random":
        assert len(drawn.settings) == found.trials
    assert space.golden_spaces()[name].read_text().startswith("# ")


def test_an_unknown_space_is_named_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'ensemble'"):
        space.load("ensembel")


# --- draws ---------------------------------------------------------------------------------------

RANDOM = {
    "neighbors.max_neighbors": {"int": [20, 25]},
    "heads.beta": {"uniform": [0.5, 0.9]},
    "heads.lr": {"log": [1e-4, 1e-1]},
    "consensus.method": ["voting", "mcla"],
}


def test_more_trials_extend_fewer_and_draws_depend_on_the_seed_alone() -> None:
    few = draws({"trials": 5, "space": RANDOM}, BASE).settings
    many = draws({"trials": 200, "space": RANDOM}, BASE).settings
    assert many[:5] == few
    assert draws({"trials": 5, "space": RANDOM}, BASE, seed=1).settings != few
    widths = {one["neighbors.max_neighbors"] for one in many}
    assert widths == set(range(20, 26))
    rates = np.log10([one["heads.lr"] for one in many])
    assert rates.min() >= -4 and rates.max() <= -1 and -2.8 < np.median(rates) < -2.2


def test_draws_are_distinct_and_reach_the_config() -> None:
    found = draws(
        {"trials": 50, "space": {"heads.count": [3, 4], "backbone.pooling": ["cls"]}}, BASE
    )
    assert [one["heads.count"] for one in found.settings] in ([3, 4], [4, 3])
    assert [one.heads.count for one in found.configs] == [
        one["heads.count"] for one in found.settings
    ]
    assert all(one.backbone[0].pooling == "cls" for one in found.configs)


def test_combinations_that_contradict_themselves_are_left_out_and_counted() -> None:
    rule = {"neighbors.rule": ["auto", "threshold"], "neighbors.threshold": [None, 0.5]}
    found = draws({"search": "grid", "space": rule}, BASE)
    assert found.settings == (
        {"neighbors.rule": "auto", "neighbors.threshold": None},
        {"neighbors.rule": "threshold", "neighbors.threshold": 0.5},
    )
    assert found.dropped == 2 and "threshold goes with rule=threshold" in found.why
    with pytest.raises(ConfigError, match=r"neighbors.rule=threshold: .*threshold goes with"):
        draws({"search": "grid", "space": {"neighbors.rule": ["threshold"]}}, BASE)


def test_each_choice_alone_beside_the_config_as_it_is_and_all_again_for_each_seed() -> None:
    choices = {
        "seed": [0, 3],
        "heads.beta": [0.6, 0.8],  # 0.6 is the config's own
        "backbone.pooling": ["cls"],
        "consensus.method": ["voting", "mcla"],
    }
    found = draws({"search": "each", "space": choices}, BASE)
    own = {"heads.beta": 0.6, "backbone.pooling": "auto", "consensus.method": "dawid-skene"}
    changes = [{}, {"heads.beta": 0.8}, {"backbone.pooling": "cls"}]
    changes += [{"consensus.method": "voting"}, {"consensus.method": "mcla"}]
    expected = [{"seed": seed} | own | change for seed in (0, 3) for change in changes]
    assert list(found.settings) == [{key: one[key] for key in choices} for one in expected]
    assert [one.seed for one in found.configs] == [0] * 5 + [3] * 5
    assert found.configs[2].backbone[0].pooling == "cls"
