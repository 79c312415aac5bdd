"""open_clip's image towers: backbone.name=open_clip:MODEL/WEIGHTS.

Their features lie in the space that images and texts share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icce_ray.config import backbones
from icce_ray.config.schema import BackboneConfig
from icce_ray.core.towers.tower import Tower, quiet
from icce_ray.errors import ConfigError, one_line

PREFIX = "open_clip:"
CROPS = {"shortest": "center", "squash": "squash", "longest": "border"}  # as timm calls them
TAGS = 8  # names of weights that a message lists


class _ImageTower(Tower):
    def __init__(self, network: nn.Module, about: dict[str, Any], features: int) -> None:
        super().__init__(about, features, features)
        self.network = network

    def pooled(self, x: Tensor) -> Tensor:
        found = self.network(x)
        return found[0] if isinstance(found, tuple) else found  # CoCa adds its tokens

    def forward_features(self, x: Tensor) -> Tensor:
        return self.pooled(x)  # tokens are not of the shared space


def described(config: BackboneConfig) -> Any:
    """timm's PretrainedCfg of the image tower, from open_clip's own tables.

    Raises ConfigError: an unknown model or tag of weights (naming near ones), or no tag.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict
    from timm.models import PretrainedCfg

    model, tag = split(config.name)
    if model not in open_clip.list_models():
        near = [PREFIX + one for one in backbones.near(model, open_clip.list_models())]
        hint = f" Near ones: {', '.join(near)}." if near else ""
        raise ConfigError(f"open_clip knows no model {model!r} (backbone.name).{hint}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    about = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    if (tag and not about) or (config.pretrained and not config.weights and not tag):
        shown = [f"{PREFIX}{model}/{one}" for one in backbones.near(tag, tags) or tags[:TAGS]]
        what = f"no weights {tag!r} of {model}" if tag else f"several weights of {model}: name one"
        hint = f"There are: {', '.join(shown)}." if shown else "Give backbone.weights=FILE."
        raise ConfigError(f"open_clip knows {what} (backbone.name). {hint}")
    size = open_clip.get_model_config(model)["vision_cfg"].get("image_size", 224)
    given = merge_preprocess_dict(PreprocessCfg(), about)
    return PretrainedCfg(
        hf_hub_id=about.get("hf_hub", "").rpartition("/")[0] or None,  # OWNER/NAME/FILE
        url=about.get("url") or None,
        input_size=(3, *((size, size) if isinstance(size, int) else size)),
        mean=given["mean"],
        std=given["std"],
        interpolation=given["interpolation"],
        crop_pct=1.0,
        crop_mode=CROPS[given["resize_mode"]],
    )


def split(name: str) -> tuple[str, str]:
    """Model and tag of its weights, from a backbone's name; the tag may be empty."""
    model, _, tag = name.removeprefix(PREFIX).partition("/")
    return model, tag


def build(config: BackboneConfig, pretrained: bool, file: str | None = None) -> Tower:
    """The image tower. See `whole`."""
    return image_tower(whole(config, pretrained, file), config)


def image_tower(both: Any, config: BackboneConfig) -> Tower:
    """The one of two towers that takes images."""
    about = described(config).to_dict()
    return _ImageTower(both.visual, about, getattr(both.visual, "output_dim", 0))


def whole(config: BackboneConfig, pretrained: bool, file: str | None = None) -> Any:
    """Image and text tower, on the CPU.

    file: the copy of `config.weights` on this node, where these are elsewhere.

    Raises ConfigError: a file of weights that does not fit. Other errors are of the download.
    """
    import open_clip

    model, tag = split(config.name)
    place = file or config.weights
    path = str(Path(place).expanduser().absolute()) if place and pretrained else None
    # Some models have weights of both activations: those of the tag decide.
    about = open_clip.get_pretrained_cfg(model, tag) if tag else {}
    own = {"quick_gelu": about.get("quick_gelu", False)} if about else {}
    try:
        with quiet():
            return open_clip.create_model(
                model,
                pretrained=(path or tag) if pretrained else None,
                device=torch.get_default_device(),
                force_image_size=config.image_size,
                pretrained_text=False,
                **own,
            ).eval()
    except Exception as error:  # open_clip passes on what torch and others raise
        if path is None:
            raise
        raise ConfigError(f"{place} does not fit {config.name}: {one_line(error)}") from None


def tokenizer(model: str) -> Any:
    """What turns a list of texts into tokens for a model's text tower. Some need transformers, and
    a download: errors are theirs."""
    import open_clip

    with quiet():
        return open_clip.get_tokenizer(model)


@contextlib.contextmanager
def shortened(whole: Any, length: int) -> Iterator[bool]:
    """Meanwhile, a text tower takes texts of `length` tokens. Yields whether it does.

    Only where a text is read up to its end: there, what fills up all texts to one length takes most
    of the time and changes nothing.
    """
    import open_clip

    plain = isinstance(whole, open_clip.CLIP) and whole.text_pool_type in ("argmax", "eos")
    if not plain or whole.attn_mask is None:
        yield False
        return
    mask, places = whole.attn_mask, whole.positional_embedding
    whole.attn_mask = mask[:length, :length]
    whole.positional_embedding = nn.Parameter(places[:length], requires_grad=False)
    try:
        yield True
    finally:
        whole.attn_mask, whole.positional_embedding = mask, places


def timm_towers() -> dict[str, str]:
    """The timm models that are image towers of open_clip models without a projection, by model."""
    import open_clip

    visions = {
        name: open_clip.get_model_config(name)["vision_cfg"] for name in open_clip.list_models()
    }
    return {
        name: vision["timm_model_name"]
        for name, vision in visions.items()
        if vision.get("timm_proj") == "none"
    }


def source(config: BackboneConfig, cfg: Any) -> str:
    """Where the weights come from, for the description."""
    return config.weights or f"open_clip {cfg.hf_hub_id or cfg.url}"
