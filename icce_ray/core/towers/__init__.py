"""Models of other libraries than timm, named with a prefix. Each library is an optional extra.

A module here knows one library: `described` says what timm's PretrainedCfg says of a timm model,
`build` makes a Tower, and `source` tells where its weights come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from icce_ray.errors import ConfigError


@dataclass(frozen=True)
class Extra:
    """A library that the plain install leaves out."""

    module: str  # which it is imported as
    package: str  # which brings it
    name: str  # of the extra in pyproject.toml
    here: str  # the module of this folder


EXTRAS = {
    "open_clip:": Extra("open_clip", "open_clip_torch", "open-clip", "openclip"),
    "transformers:": Extra("transformers", "transformers", "transformers", "hugging"),
}


def prefix_of(name: str) -> str:
    """The prefix of a backbone's name; empty for a timm model."""
    return next((prefix for prefix in EXTRAS if name.startswith(prefix)), "")


def of(name: str) -> Any:
    """The module for the library of a backbone's name; None for a timm model.

    Raises ConfigError: the library is not installed.
    """
    prefix = prefix_of(name)
    if not prefix:
        return None
    extra = EXTRAS[prefix]
    if find_spec(extra.module) is None:
        raise ConfigError(f"{name} needs {extra.package}: pip install '.[{extra.name}]'")
    return import_module(f"icce_ray.core.towers.{extra.here}")
