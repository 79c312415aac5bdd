"""What embedding checks before anything is started."""

from __future__ import annotations

import pytest

from icce_ray import config as configs
from icce_ray.core import hub
from icce_ray.stages import embed


@pytest.mark.parametrize(("address", "asked"), [(None, 1), ("ray://elsewhere:10001", 0)])
def test_weights_must_be_within_reach_of_a_local_ray(
    monkeypatch: pytest.MonkeyPatch, address: str | None, asked: int
) -> None:
    names: list[str] = []
    monkeypatch.setattr(hub, "check", lambda name, repository: names.append(repository))
    tree = {"num_classes": 3, "data": {"path": "x"}, "backbone": "clip-base"}
    embed.preflight(configs.load({**tree, "ray": {"address": address}}))
    assert names == ["timm/vit_base_patch16_clip_224.openai"] * asked
