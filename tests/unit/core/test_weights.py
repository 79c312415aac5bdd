"""Which part of a file of weights is the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone as core
from icce_ray.errors import ConfigError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def own() -> State:
    """The weights that are to be found."""
    torch.manual_seed(7)
    return timm.create_model("test_vit", num_classes=0).state_dict()


@pytest.fixture(scope="module")
def other() -> State:
    torch.manual_seed(8)
    return timm.create_model("test_vit", num_classes=0).state_dict()


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(path: Path, content: Any, **more: Any) -> core.Backbone:
    torch.save(content, path)
    tree = {"name": "test_vit", "weights": str(path), **more}
    return core.load(BackboneConfig.model_validate(tree))


HEAD = {"head.mlp.0.weight": torch.zeros(4, 64)}
DECODER = {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(2, 2)}
OPTIMIZER = {"optimizer": {"state": {n: {"exp_avg": torch.zeros(3)} for n in range(99)}}}

LAYOUTS: dict[str, Callable[[State, State], Any]] = {
    "bare": lambda a, b: a,
    "dino": lambda a, b: {"teacher": {**under("backbone.", a), **HEAD}},
    "dino, both": lambda a, b: {
        "student": under("module.backbone.", b),
        "teacher": under("backbone.", a),
        **OPTIMIZER,
    },
    "dinov2": lambda a, b: {
        "model": {**under("teacher.backbone.", a), **under("student.backbone.", b)}
    },
    "student alone": lambda a, b: {"state_dict": {**under("student.backbone.", a), **HEAD}},
    "lightning, model": lambda a, b: {"state_dict": under("model.", a)},
    "lightning, backbone and head": lambda a, b: {
        "state_dict": {**under("backbone.", a), "projection_head.0.weight": torch.zeros(4, 4)}
    },
    "moco v3": lambda a, b: {
        "state_dict": {**under("module.base_encoder.", b), **under("module.momentum_encoder.", a)}
    },
    "moco, the key encoder is the average": lambda a, b: {
        "state_dict": {**under("module.encoder_q.", b), **under("module.encoder_k.", a)}
    },
    "moco, query encoder alone": lambda a, b: {
        "state_dict": {**under("module.encoder_q.", a), "module.queue": torch.zeros(4, 9)}
    },
    "byol": lambda a, b: {"online_network": under("net.", b), "target_network": under("net.", a)},
    "timm training": lambda a, b: {"state_dict": b, "state_dict_ema": a, "epoch": 3},
    "model and model_ema": lambda a, b: {
        "model": under("module.", b),
        "model_ema": under("module.", a),
    },
    "encoder": lambda a, b: {"state_dict": under("encoder.", a)},
    "model_state_dict": lambda a, b: {"model_state_dict": a, "epoch": 3},
    "mae with its decoder": lambda a, b: {"model": {**a, **DECODER}},
    "mae with its decoder, bare": lambda a, b: {**a, **DECODER},
    "compiled, then ddp": lambda a, b: under("_orig_mod.module.", a),
    "compiled blocks": lambda a, b: {
        name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in a.items()
    },
    "deep": lambda a, b: {"a": {"b": {"c.d": under("net.model.", a)}}},
    "the same twice": lambda a, b: {"model": a, "copy": {n: t.clone() for n, t in a.items()}},
    "the same object twice": lambda a, b: {"model": a, "net": a},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_is_found(tmp_path: Path, own: State, other: State, name: str) -> None:
    found = loaded(tmp_path / "w.pth", LAYOUTS[name](own, other))
    assert found.describe()["sha256"] == core.state_hash(own)


def test_where_it_was_found_is_said(tmp_path: Path, own: State) -> None:
    path = tmp_path / "w.pth"
    found = loaded(path, {"teacher": under("backbone.", own)})
    assert found.source == f"{path}, below teacher.backbone"


def test_several_networks_are_listed(tmp_path: Path, own: State, other: State) -> None:
    content = {"left": own, "right": {"net": other}}
    with pytest.raises(
        ConfigError, match=r"several networks that fit, below left, right\.net\. Save"
    ):
        loaded(tmp_path / "w.pth", content)


def test_conversion_below_a_prefix(tmp_path: Path, own: State) -> None:
    """Position embeddings of another size, inside a checkpoint."""
    content = {"teacher": under("backbone.", own), "student": under("backbone.", own)}
    found = loaded(tmp_path / "w.pth", content, image_size=96)
    state = found.model.state_dict()
    assert state["pos_embed"].shape != own["pos_embed"].shape
    torch.testing.assert_close(state["norm.weight"], own["norm.weight"])


def test_parts_that_change_the_features_are_refused(tmp_path: Path, own: State) -> None:
    """All of the model's names are there, but it would leave out a layer or a normalization."""
    for name in ("blocks.0.ls9.gamma", "norm_pre.weight", "blocks.99.norm1.weight"):
        with pytest.raises(ConfigError, match=f"has unknown {name}"):
            loaded(tmp_path / "w.pth", {"model": {**own, name: torch.zeros(64)}})


def test_the_nearest_part_is_named(tmp_path: Path, own: State) -> None:
    less = {name: tensor for name, tensor in own.items() if name != "norm.weight"}
    with pytest.raises(
        ConfigError, match=r"w\.pth \(below a\.net\) does not fit .*lacks norm\.weight$"
    ):
        loaded(tmp_path / "w.pth", {"a": under("net.", less), "b": under("x.", HEAD)})
    wide = {**own, "norm.weight": torch.zeros(3)}
    with pytest.raises(ConfigError, match=r"has norm\.weight of shape \[3\] for \[64\]"):
        loaded(tmp_path / "w.pth", {"model": wide})
    with pytest.raises(ConfigError, match="lacks"):
        loaded(tmp_path / "w.pth", {"epoch": 3, **HEAD})
    with pytest.raises(ConfigError, match="no state dict"):
        loaded(tmp_path / "w.pth", {"epoch": 3})
