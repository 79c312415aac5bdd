"""Prefixes of backbones' names, whether or not their libraries are installed."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone as core
from icce_ray.core import towers
from icce_ray.core.towers import tower
from icce_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("open_clip:ViT-B-16/openai", "open_clip_torch", "open-clip"),
        ("transformers:facebook/dinov2-base", "transformers", "transformers"),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, extra: str
) -> None:
    monkeypatch.setattr(towers, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"{name} needs {package}: pip install '\.\[{extra}\]'"):
        core.check(BackboneConfig(name=name), download=True)


def test_the_install_lines_are_those_of_the_package(repository: Any) -> None:
    text = (repository / "pyproject.toml").read_text()
    for one in towers.EXTRAS.values():
        assert f'\n{one.name} = ["{one.package}>=' in text


def test_timm_models_need_no_other_library() -> None:
    assert towers.of("vit_base_patch16_clip_224.openai") is None
    assert towers.of("hf-hub:owner/name") is None


def test_quiet_leaves_logging_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.root.handlers), logging.root.manager.disable
    with tower.quiet():
        logging.warning("random weights")
        warnings.warn("mismatch", stacklevel=1)
    assert (logging.root.handlers, logging.root.manager.disable) == before
    assert "random" not in capsys.readouterr().err
