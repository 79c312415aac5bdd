"""Text towers of backbones, on tiny models of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone as core
from icce_ray.core.towers import texts
from icce_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "lack"),
    [
        ({"name": "open_clip:ViT-B-16/openai"}, ""),
        ({"name": "open_clip:ViT-B-16", "pretrained": False}, "random weights has no text tower"),
        ({"name": "vit_base_patch16_siglip_224.v2_webli"}, ""),
        ({"name": "vit_base_patch16_siglip_224.v2_webli", "pooling": "mean"}, "pooling=mean"),
        ({"name": "vit_base_patch16_siglip_gap_224.webli"}, "has no text tower .open_clip:"),
        ({"name": "vit_base_patch16_clip_224.openai"}, "has no text tower"),  # before projection
        ({"name": "vit_small_patch14_dinov2.lvd142m"}, "has no text tower"),
        ({"name": "transformers:openai/clip-vit-base-patch16"}, "has no text tower"),
    ],
)
def test_which_backbones_have_one(settings: Any, lack: str) -> None:
    found = texts.lacks(BackboneConfig.model_validate(settings))
    assert lack in found.replace("(", ".") and bool(lack) == bool(found)


def test_texts_lie_in_the_space_of_the_backbone(clip: Any) -> None:
    config = BackboneConfig(name="open_clip:tiny/tag")
    tower = texts.load(config)
    prompts = ["a photo of a cat.", "a photo of a dog."]
    with torch.inference_mode():
        expected = clip.tiny.encode_text(clip.get_tokenizer("tiny")(prompts), normalize=True)
    torch.testing.assert_close(tower.encode(prompts), expected)
    image = core.load(config)
    assert tower.sha256 == image.describe()["sha256"]
    assert expected.shape[1] == image.features
    assert tower.scale == pytest.approx(clip.tiny.logit_scale.exp().item())


def test_batches_change_nothing(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = texts.load(BackboneConfig(name="open_clip:tiny/tag"))
    prompts = ["one", "two", "three"]
    whole = tower.encode(prompts)
    monkeypatch.setattr(texts, "BATCH", 2)
    torch.testing.assert_close(tower.encode(prompts), whole)


def test_what_fills_up_texts_is_left_out_where_it_changes_nothing(clip: Any) -> None:
    tower, seen = texts.load(BackboneConfig(name="open_clip:tiny/tag")), []
    hook = tower._whole.transformer.register_forward_hook(
        lambda module, given, found: seen.append(found.shape[1])
    )
    short, long = "a photo of a cat.", "a photo of a cat beside a dog and a cow."
    both = tower.encode([short, long])
    torch.testing.assert_close(tower.encode([short]), both[:1])
    torch.testing.assert_close(tower.encode([long]), both[1:])
    assert seen == [14, 8, 14]
    hook.remove()
    clip.tiny.text_pool_type = tower._whole.text_pool_type = "last"  # which needs the filling
    tokens = clip.get_tokenizer("tiny")([short])
    with torch.inference_mode():
        expected = clip.tiny.encode_text(tokens, normalize=True)
    torch.testing.assert_close(tower.encode([short]), expected)


def test_weights_from_a_file_bring_their_own_texts(clip: Any) -> None:
    given = BackboneConfig(name="open_clip:tiny/tag", weights="s3://bucket/tiny.pt")
    assert texts.load(given, clip.tiny_file).sha256 == core.state_hash(
        core.load(BackboneConfig(name="open_clip:tiny/tag")).model.state_dict()
    )


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("vit_base_patch16_siglip_224.webli", "ViT-B-16-SigLIP"),
        ("vit_base_patch16_siglip_224.v2_webli", "ViT-B-16-SigLIP2"),
        ("vit_so400m_patch14_siglip_384.webli", "ViT-SO400M-14-SigLIP-384"),
    ],
)
def test_open_clips_counterpart_of_a_timm_siglip(
    clip: Any, monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    """Its trunk must have the very weights: the hash is that of timm's own model."""
    import timm

    trunk = timm.create_model("test_vit", num_classes=0).eval()
    whole = torch.nn.Module()
    whole.visual = torch.nn.Module()
    whole.visual.trunk, whole.logit_scale = trunk, torch.nn.Parameter(torch.zeros(()))
    asked = []
    monkeypatch.setattr(texts.openclip, "whole", lambda *given: asked.append(given) or whole)
    monkeypatch.setattr(texts.openclip, "tokenizer", asked.append)
    tower = texts.load(BackboneConfig(name=name))
    assert tower.sha256 == core.state_hash(trunk.state_dict())
    assert asked[0][0].name == f"open_clip:{model}/webli" and asked[1] == model


def test_a_counterpart_that_open_clip_lacks(clip: Any) -> None:
    with pytest.raises(ConfigError, match="open_clip has no text tower for vit_tiny"):
        texts.load(BackboneConfig(name="vit_tiny_patch16_siglip_224.webli"))


def test_what_a_tokenizer_lacks_is_said_in_one_line(
    clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: str) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(texts.openclip, "tokenizer", fail)
    with pytest.raises(ConfigError, match=r"of open_clip:tiny/tag cannot be had \(no route to"):
        texts.load(BackboneConfig(name="open_clip:tiny/tag"))
