"""Short names of backbones: what they stand for, near ones, and the default of a machine."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from icce_ray import config as configs
from icce_ray.config import backbones
from icce_ray.config.schema import BackboneConfig

BASE = {"num_classes": 10, "data": {"path": "images"}}
DINO = "vit_small_patch14_dinov2.lvd142m"


def load(*overrides: str, **more: Any) -> tuple[BackboneConfig, ...]:
    return configs.load({**BASE, **more}, overrides).backbone


@pytest.mark.parametrize("name", backbones.SHORT)
def test_a_short_name_is_a_model_with_weights(name: str) -> None:
    (found,) = load(f"backbone={name}")
    known = timm.get_pretrained_cfg(found.name, allow_unregistered=False)
    assert known.has_weights and found.image_size == 224
    assert backbones.HUB.get(found.name, known.hf_hub_id) == known.hf_hub_id
    assert (name == backbones.OFFLINE) == bool(found.weights), "installed, or on the hub"


def test_names_and_groups_mean_the_same_everywhere() -> None:
    (short,) = load("backbone=dinov2-small")
    assert (short.name, short.image_size) == (DINO, 224)
    assert load("backbone.name=dinov2-small") == load(backbone="dinov2-small") == (short,)
    assert load(backbone=[{"name": "dinov2-small"}]) == (short,)
    assert load("backbone=resnet50") == (BackboneConfig(name="resnet50"),)
    both = load("backbone=[dinov2-small, resnet50]")
    assert [one.name for one in both] == [DINO, "resnet50"]


def test_own_settings_go_before_those_of_a_short_name() -> None:
    (found,) = load("backbone=dinov2-small", "backbone.image_size=448", "backbone.pooling=both")
    assert (found.name, found.image_size, found.pooling) == (DINO, 448, "both")
    (other,) = load("backbone.name=resnet50", backbone="dinov2-small")
    assert other == BackboneConfig(name="resnet50"), "nothing is left of the name replaced"
    (whole,) = load("backbone=clip-base", backbone={"name": "a", "weights": "w.pth", "crop": 1})
    assert whole.weights is None and whole.crop is None, "a config's own do not suit another model"


def test_what_a_short_name_stands_for_is_said() -> None:
    lines: list[str] = []
    configs.merge(BASE, ["backbone=dinov3-base", "backbone=dinov2-small"], lines.append)
    assert lines == [f"backbone dinov2-small is {DINO}"]


KNOWN = ["inception_v3", "vit_base_patch16_dinov3", "vit_base_patch14_dinov2", "resnet50"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("dinov3", ["vit_base_patch16_dinov3"]),  # not what is spelled most alike
        ("DINOv3-base", ["vit_base_patch16_dinov3"]),
        ("resnet5", ["resnet50"]),
        ("resnt50", ["resnet50"]),
        ("inceptoin_v3", ["inception_v3"]),
        ("xyz", []),
    ],
)
def test_near_names_hold_the_words_that_were_given(wanted: str, found: list[str]) -> None:
    assert backbones.near(wanted, KNOWN) == found


@pytest.mark.parametrize(
    ("gpu", "asked", "name", "why"),
    [
        (False, False, "dinov2-small", "there is no GPU here"),
        (True, False, "dinov2-large", "there is a GPU here"),
        (False, True, "dinov2-large", "GPUs are asked for"),
    ],
)
def test_the_default_is_what_the_machine_can_bear(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, asked: bool, name: str, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    lines: list[str] = []
    assert backbones.choose(asked, lines.append) == backbones.SHORT[name]
    assert lines == [
        f"backbone {name}, since {why}: {backbones.SHORT[name]['name']}. "
        "backbone=NAME chooses another"
    ]
