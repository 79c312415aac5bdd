"""Models of transformers as backbones: tiny, of random weights, from folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone as core
from icce_ray.core import hub
from icce_ray.core.towers import hugging as ours
from icce_ray.errors import ConfigError

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
}
SQUARE = {"height": 64, "width": 64}
TEXT = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}


def saved(model: Any, processor: Any, folder: Path) -> str:
    """The backbone's name of a model that was written to a folder."""
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"transformers:{folder}"


def made(library: Any, kind: str) -> tuple[Any, Any]:
    """A model and its image processor."""
    one = library
    vision = {**SMALL, "image_size": 64, "patch_size": 16}
    if kind == "dinov2":
        config = one.Dinov2WithRegistersConfig(**{**vision, "image_size": 70, "patch_size": 14})
        processor = one.BitImageProcessor(
            size={"shortest_edge": 80}, crop_size={"height": 70, "width": 70}
        )
        return one.Dinov2WithRegistersModel(config), processor
    if kind == "vit":
        return one.ViTModel(one.ViTConfig(**vision)), one.ViTImageProcessor(size=SQUARE)
    if kind == "clip":
        config = one.CLIPConfig(
            vision_config=vision, text_config={**SMALL, **TEXT}, projection_dim=24
        )
        processor = one.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SQUARE)
        return one.CLIPModel(config), processor
    config = one.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    processor = one.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.8)
    return one.ConvNextModel(config), processor


def pooled(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=pixels)
        return found if isinstance(found, torch.Tensor) else found.pooler_output
    return model(pixel_values=pixels).pooler_output.flatten(1)


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip", "convnext"])
def test_equal_to_transformers_with_its_own_processor(
    hugging: Any, kind: str, tmp_path: Path
) -> None:
    model, processor = made(hugging, kind)
    found = core.load(BackboneConfig(name=saved(model, processor, tmp_path)))
    noise = np.random.default_rng(0).integers(0, 256, (18, 23, 3), np.uint8)
    picture = Image.fromarray(noise).resize((460, 360), Image.Resampling.BICUBIC)
    with torch.inference_mode():
        expected = pooled(model, processor(images=picture, return_tensors="pt")["pixel_values"])
        features = found(torch.from_numpy(found.transform(picture))[None])
        elsewhere = found(torch.from_numpy(found.transform(picture.rotate(180)))[None])
    same = torch.cosine_similarity(features, expected)
    assert same > 0.999 and same > torch.cosine_similarity(features, elsewhere)
    assert found.features == core.width(found.config) == expected.shape[1]
    assert found.source == f"transformers {tmp_path}"


def test_poolings_leave_out_the_tokens_before_the_patches(hugging: Any, tmp_path: Path) -> None:
    model, processor = made(hugging, "dinov2")
    name = saved(model, processor, tmp_path)
    loaded = {
        pool: core.load(BackboneConfig(name=name, pooling=pool)) for pool in ("cls", "mean", "both")
    }
    images = torch.randint(0, 256, (2, 3, 70, 70), dtype=torch.uint8)
    with torch.inference_mode():
        x = (images.float() / 255 - loaded["cls"].mean) / loaded["cls"].std
        tokens = model(pixel_values=x).last_hidden_state
        out = {pool: one(images) for pool, one in loaded.items()}
    torch.testing.assert_close(out["cls"], tokens[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["mean"], tokens[:, -25:].mean(1), rtol=1e-4, atol=1e-5)
    assert out["both"].shape[1] == loaded["both"].features == 64


def test_another_image_size_keeps_the_share_of_the_crop(hugging: Any, tmp_path: Path) -> None:
    found = core.load(BackboneConfig(name=saved(*made(hugging, "dinov2"), tmp_path), image_size=84))
    assert (found.transform.size, found.transform.resize) == (84, 96)
    assert found(torch.zeros(1, 3, 84, 84, dtype=torch.uint8)).shape == (1, 32)


def test_half_precision_weights_are_computed_in_float32(hugging: Any, tmp_path: Path) -> None:
    model, processor = made(hugging, "vit")
    found = core.load(BackboneConfig(name=saved(model.half(), processor, tmp_path)))
    assert {one.dtype for one in found.model.parameters()} == {torch.float32}


def test_no_weight_is_left_at_random(hugging: Any, tmp_path: Path) -> None:
    """Many files lack the pooling layer, which was not trained; nothing else may be missing."""
    name = saved(*made(hugging, "vit"), tmp_path)
    file = tmp_path / "model.safetensors"
    state = {key: one for key, one in load_file(file).items() if not key.startswith("pooler")}
    save_file(state, file, metadata={"format": "pt"})
    found = core.load(BackboneConfig(name=name))
    assert not any("pooler" in key for key in found.model.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    token = core.load(BackboneConfig(name=name, pooling="cls"))
    assert torch.equal(found(images), token(images))
    lost = next(key for key in state if key.endswith("layernorm_after.weight"))
    save_file({k: v for k, v in state.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights for .*layernorm_after.weight"):
        core.load(BackboneConfig(name=name))


def test_random_weights_need_the_folder_alone(hugging: Any, tmp_path: Path) -> None:
    name = saved(*made(hugging, "vit"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, second = (core.load(BackboneConfig(name=name, pretrained=False)) for _ in range(2))
    assert first.describe()["sha256"] == second.describe()["sha256"]
    with pytest.raises(ConfigError, match="cannot be read"):
        core.load(BackboneConfig(name=name))


def test_what_is_no_model_of_images_is_refused(hugging: Any, tmp_path: Path) -> None:
    model = hugging.BertModel(hugging.BertConfig(**SMALL, vocab_size=50))
    name = saved(model, hugging.ViTImageProcessor(), tmp_path)
    with pytest.raises(ConfigError, match="is a BertModel, not a model of images"):
        core.check(BackboneConfig(name=name))


def test_a_preparation_that_is_not_ours_is_refused(hugging: Any, tmp_path: Path) -> None:
    """LeViT's processor scales by another rule than its settings tell."""
    model, _ = made(hugging, "vit")
    name = saved(model, hugging.LevitImageProcessor(), tmp_path)
    with pytest.raises(ConfigError, match="LevitImageProcessor, is not supported"):
        core.check(BackboneConfig(name=name))


def test_code_beside_the_weights_is_not_run(hugging: Any, tmp_path: Path) -> None:
    name = saved(*made(hugging, "vit"), tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    for file, kind in (("config.json", "AutoModel"), ("preprocessor_config.json", "AutoConfig")):
        path = tmp_path / file
        about = json.loads(path.read_text()) if path.exists() else {}
        about |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", kind: "evil.C"}}
        path.write_text(json.dumps(about))
    with pytest.raises(ConfigError):
        core.load(BackboneConfig(name=name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["./none", "/none/at/all", "bert", "a/b/c"])
def test_folders_that_are_not_there(hugging: Any, where: str) -> None:
    with pytest.raises(ConfigError, match=r"there is no such folder.*transformers:OWNER/NAME"):
        core.check(BackboneConfig(name=f"transformers:{where}"))


def test_a_folder_without_a_model(hugging: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        core.check(BackboneConfig(name=f"transformers:{tmp_path}"))
    with pytest.raises(ConfigError, match="name the folder of a model"):
        core.check(BackboneConfig(name=f"transformers:{tmp_path}", weights="x.pt"))


def test_the_hub_is_asked_first(hugging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: str) -> None:
        raise ConfigError(f"asked for {given}")

    monkeypatch.setattr(hub, "check", fail)
    ours._described.cache_clear()
    with pytest.raises(ConfigError, match=r"asked for \('transformers:me/mine', 'me/mine'\)"):
        core.check(BackboneConfig(name="transformers:me/mine"), download=True)
