"""Image models of transformers: backbone.name=transformers:OWNER/NAME, or transformers:FOLDER.

Of a model for images and texts, the image tower is taken, with its projection to the space that
both share.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import hub
from icce_ray.core.preprocess import preprocess_from
from icce_ray.core.towers.tower import Tower, quiet
from icce_ray.errors import ConfigError, one_line

PREFIX = "transformers:"
TOKENS = ("cls_token", "class_embedding")  # parameters that are the class token
OTHERS = ("register_tokens", "distillation_token")  # further tokens before the patches
TRIED = (200, 300)  # sides of the image that preparations are compared on, pixels
MOST_OFF = 0.05  # mean difference of normalized pixels


class _ImageTower(Tower):
    def __init__(self, network: Any, about: Mapping[str, Any]) -> None:
        vision = getattr(network.config, "vision_config", network.config)
        widths = getattr(vision, "hidden_sizes", None) or [0]
        width = getattr(vision, "hidden_size", 0) or widths[-1]
        projection = getattr(network, "visual_projection", None)
        super().__init__(about, width, projection.out_features if projection else width)
        self.network = network
        self.joint = hasattr(network, "get_image_features")
        trunk = network.vision_model if self.joint else network
        self.own = {"interpolate_pos_encoding": True} if _takes_any_size(trunk) else {}
        tokens = {name.rpartition(".")[2]: one for name, one in trunk.named_parameters()}
        self.cls_token = next((True for name in TOKENS if name in tokens), None)
        others = sum(tokens[name].shape[1] for name in OTHERS if name in tokens)
        self.num_prefix_tokens = others + bool(self.cls_token)

    def pooled(self, x: Tensor) -> Tensor:
        if self.joint:
            found = self.network.get_image_features(pixel_values=x, **self.own)
            return found if isinstance(found, Tensor) else found.pooler_output
        found = self.network(pixel_values=x, **self.own)
        pooled = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        features = found.last_hidden_state
        if self.cls_token:
            return features[:, 0]
        return features.mean(1) if features.dim() == 3 else features.mean((2, 3))

    def forward_features(self, x: Tensor) -> Tensor:
        trunk = self.network.vision_model if self.joint else self.network
        return trunk(pixel_values=x, **self.own).last_hidden_state


def _takes_any_size(network: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(network.forward).parameters


def described(config: BackboneConfig) -> Any:
    """timm's PretrainedCfg, from the model's own files.

    Raises ConfigError: no such folder; a model that cannot be had, is not one of images, or whose
    preparation of images is not one of ours; `weights` beside the folder.
    """
    if config.weights:
        raise ConfigError(
            f"backbone.weights={config.weights} is not for {config.name}: name the folder of a "
            f"model that save_pretrained wrote, as backbone.name={PREFIX}FOLDER"
        )
    return _described(config.name)


@lru_cache(maxsize=16)
def _described(name: str) -> Any:
    from timm.models import PretrainedCfg
    from transformers import AutoImageProcessor

    where, folder = _place(name)
    if folder is None:
        hub.check(name, where)
    processor = _read(AutoImageProcessor, name)
    try:
        about = _data_config(processor)
        same = _agree(processor, about)
    except (AttributeError, LookupError, TypeError, ValueError):
        same = False
    if not same:
        kind = type(processor).__name__
        raise ConfigError(f"{name}: its preparation of images, {kind}, is not supported")
    return PretrainedCfg(file=folder, hf_hub_id=None if folder else where, **about)


def _place(name: str) -> tuple[str, str | None]:
    """What transformers takes for a backbone's name; and the same again where it is a folder."""
    where = name.removeprefix(PREFIX)
    path = Path(where).expanduser()
    if path.is_dir():
        return str(path), str(path)
    if where.startswith((".", "/", "~")) or where.count("/") != 1:
        raise ConfigError(
            f"backbone.name={name}: there is no such folder, and a model of the hub is named "
            f"{PREFIX}OWNER/NAME"
        )
    return where, None


def _read(kind: Any, name: str, **more: Any) -> Any:
    """`kind.from_pretrained`, from this machine where it has the files. Raises ConfigError.

    Python code beside the weights is not run, nor does transformers ask whether it may.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where, folder = _place(name)
    more["trust_remote_code"] = False
    try:
        with quiet():
            try:
                return kind.from_pretrained(where, local_files_only=True, **more)
            except OSError:
                if folder:
                    raise
                return kind.from_pretrained(where, **more)
    except Exception as error:  # whatever the hub's client, JSON and torch raise
        if folder is None:
            raise hub.unreachable(name, error) from None
        raise ConfigError(f"{name} cannot be read: {one_line(error)}") from None


def _data_config(processor: Any) -> dict[str, Any]:
    """What timm's data config says, of an image processor. Raises LookupError for other sizes."""
    resized, crop, mode = _sides(processor)
    return {
        "input_size": (3, crop, crop),
        "mean": tuple(processor.image_mean or (0.0,) * 3),
        "std": tuple(processor.image_std or (1.0,) * 3),
        "interpolation": Image.Resampling(int(processor.resample)).name.lower(),
        "crop_pct": crop / (resized + 1e-3),  # the quotient will be rounded down
        "crop_mode": mode,
    }


def _sides(processor: Any) -> tuple[int, int, str]:
    """Side after scaling, side after the crop, and timm's name of the way."""
    short = _given(processor.size, "shortest_edge")
    if share := getattr(processor, "crop_pct", None):  # ConvNeXt's way
        return (short, short, "squash") if short >= 384 else (int(short / share), short, "center")
    resized, mode = (short, "center") if short else (_square(processor.size), "squash")
    crops = getattr(processor, "do_center_crop", False)
    return resized, _square(processor.crop_size) if crops else resized, mode


def _square(size: Any) -> int:
    height, width = (_given(size, name) for name in ("height", "width"))
    if not height or height != width:
        raise LookupError("no square")
    return height


def _given(size: Any, name: str) -> int:
    """One of the numbers of a size, as transformers writes it; 0 where it is not there."""
    return int((size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)) or 0)


def _agree(processor: Any, about: dict[str, Any]) -> bool:
    """Whether the library prepares a picture of slopes as we do: its processors differ in more
    than their settings tell."""
    down, right = np.meshgrid(*(np.linspace(0, 255, side) for side in TRIED), indexing="ij")
    pixels = np.stack([down, right, 255 - right], -1).astype(np.uint8)
    picture = Image.fromarray(pixels)
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"][0].numpy()
    mean, std = (np.reshape(about[name], (3, 1, 1)) for name in ("mean", "std"))
    found = (preprocess_from(about)(picture) / 255 - mean) / std
    return theirs.shape == found.shape and float(np.abs(theirs - found).mean()) < MOST_OFF


def build(config: BackboneConfig, pretrained: bool, file: str | None = None) -> Tower:
    """The image tower; `pretrained` as in `_loaded`. file: unused, `described` refuses weights.

    Raises ConfigError: no model of images, or weights that lack a part of it.
    """
    from transformers import AutoConfig, AutoModel

    about = described(config).to_dict()
    if pretrained:
        network = _loaded(config.name)
    else:
        with quiet():
            network = AutoModel.from_config(_read(AutoConfig, config.name))
    if hasattr(network, "get_image_features") and hasattr(network, "get_text_features"):
        network.text_model = None
        if getattr(network, "text_projection", None) is not None:
            network.text_projection = None
    elif network.main_input_name != "pixel_values":
        raise ConfigError(f"{config.name} is a {type(network).__name__}, not a model of images")
    return _ImageTower(network, about)


def _loaded(name: str) -> Any:
    """The model with its weights in float32. A pooling layer that has none is left out."""
    from transformers import AutoModel

    network, report = _read(AutoModel, name, output_loading_info=True, dtype=torch.float32)
    lacking = sorted(set(report["missing_keys"]) | {one[0] for one in report["mismatched_keys"]})
    if lacking and all(key.startswith("pooler.") for key in lacking):
        network.pooler = None
    elif lacking:
        raise ConfigError(
            f"{name} lacks weights for {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
        )
    return network


def source(config: BackboneConfig, cfg: Any) -> str:
    """Where the weights come from, for the description."""
    return f"transformers {cfg.file or cfg.hf_hub_id}"
