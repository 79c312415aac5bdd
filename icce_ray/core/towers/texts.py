"""Text towers: an open_clip backbone's own, and those that open_clip has for timm's SigLIP.

Shapes: V texts, D features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone, towers
from icce_ray.core.device import default_device
from icce_ray.core.towers import openclip
from icce_ray.errors import ConfigError, one_line

BATCH = 256  # texts
SIGLIP = re.compile(r"vit_\w+_siglip_\d+\.(v2_)?webli")


class TextTower:
    """Texts in the space of a backbone's features, on this process's GPU or the CPU.

    Attributes:
        scale: what the model was trained to multiply cosines with before a softmax.
        sha256: hash of the image tower's weights, as the backbone describes them.
    """

    def __init__(self, whole: Any, tokenize: Any, sha256: str) -> None:
        self._whole, self._tokenize, self.sha256 = whole.to(default_device()), tokenize, sha256
        self.scale = float(whole.logit_scale.detach().exp())

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit rows, float32 [V, D]."""
        tokens = self._tokenize(list(texts)).to(default_device())
        length = int(tokens.ne(0).any(0).nonzero().max()) + 1
        with torch.inference_mode(), openclip.shortened(self._whole, length) as shorter:
            parts = [
                backbone.normalize(self._whole.encode_text(part)).cpu()
                for part in (tokens[:, :length] if shorter else tokens).split(BATCH)
            ]
        return torch.cat(parts)


def lacks(config: BackboneConfig) -> str:
    """Why a backbone's features have no texts beside them; empty where they may have some."""
    if config.name.startswith(openclip.PREFIX) or SIGLIP.fullmatch(config.name):
        if config.pooling == "auto" and config.pretrained:
            return ""
        how = f"pooling={config.pooling}" if config.pretrained else "random weights"
        return f"{config.name} with {how} has no text tower"
    return f"{config.name} has no text tower (open_clip:MODEL/WEIGHTS has one)"


def load(config: BackboneConfig, file: str | None = None) -> TextTower:
    """The text tower of a backbone that `lacks` nothing.

    file: the copy of `config.weights` on this node, where these are elsewhere.

    Raises ConfigError: what it needs is not installed, not to be had, or not known.
    """
    own = config.name.startswith(openclip.PREFIX)
    towers.of(openclip.PREFIX)  # says what is not installed
    asked = config if own else _of_siglip(config)
    model = openclip.split(asked.name)[0]
    try:
        whole = openclip.whole(asked, True, file)
        tokenize = openclip.tokenizer(model)
    except ConfigError:
        raise
    except Exception as error:  # of the hub's client, or of libraries that a tokenizer needs
        raise ConfigError(
            f"the text tower of {asked.name} cannot be had ({one_line(error, 150)})"
        ) from None
    image = openclip.image_tower(whole, asked) if own else whole.visual.trunk
    sha256 = backbone.state_hash(image.state_dict())
    return TextTower(whole, tokenize, sha256)


def _of_siglip(config: BackboneConfig) -> BackboneConfig:
    """The open_clip model of which a timm SigLIP is the image tower. Raises ConfigError."""
    trunk, _, tag = config.name.partition(".")
    version = "SigLIP2" if tag.startswith("v2") else "SigLIP"
    for model, vision in openclip.timm_towers().items():
        if vision == trunk and re.search(rf"-{version}(-\d+)?$", model):
            update = {"name": f"{openclip.PREFIX}{model}/webli", "weights": None}
            return config.model_copy(update=update)
    raise ConfigError(f"open_clip has no text tower for {config.name}")
