"""Tiny models of other libraries, made without a download. Where a library is missing, its tests
are skipped, and the run says so."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from icce_ray.core import towers

SIDE = 32  # of the images of open_clip's tiny model
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def library(prefix: str) -> Any:
    """The library of a prefix, imported; skips where it is missing."""
    extra = towers.EXTRAS[prefix]
    if importlib.util.find_spec(extra.module) is None:
        warnings.warn(f"{prefix} is not tested: uv sync --extra {extra.name}", stacklevel=1)
        pytest.skip(f"NOT TESTED: {extra.module} is missing (--extra {extra.name})")
    return importlib.import_module(extra.module)


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """open_clip with a model `tiny`, and a file of its weights in place of the download of a tag.

    The tag's activation is another than the model's own.
    """
    found = library("open_clip:")
    vision = {"image_size": SIDE, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setitem(found.factory._MODEL_CONFIGS, "tiny", config)
    tag = {"hf_hub": "me/tiny/", "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    tags = {"tag": {**tag, "resize_mode": "squash", "quick_gelu": True}}
    monkeypatch.setitem(found.pretrained._PRETRAINED, "tiny", tags)
    torch.manual_seed(7)
    model = found.create_model("tiny", pretrained=None, quick_gelu=True).eval()
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    path = str(tmp_path / "tiny.pt")
    monkeypatch.setattr(found.factory, "download_pretrained", lambda *_, **__: path)
    found.tiny, found.tiny_file = model, path
    return found


@pytest.fixture
def hugging() -> Any:
    """The library transformers."""
    return library("transformers:")
