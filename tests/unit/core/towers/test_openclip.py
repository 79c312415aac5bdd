"""open_clip's image towers as backbones, on a tiny model of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone as core
from icce_ray.core import hub
from icce_ray.core.classifier import model as C
from icce_ray.errors import ConfigError


def config(name: str = "open_clip:tiny/tag", **more: Any) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, **more})


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 23, 3), np.uint8)
    return Image.fromarray(pixels).resize((460, 360), Image.Resampling.BICUBIC)


def test_equal_to_open_clip_with_its_own_transform(clip: Any, caplog: Any) -> None:
    """Preparation, activation and projection are those of the tag of weights."""
    found = core.load(config())
    about = clip.get_pretrained_cfg("tiny", "tag")
    keys = ("mean", "std", "interpolation", "resize_mode")
    given = {"size": 32, **{key: about[key] for key in keys}}
    usual = clip.transform.image_transform_v2(clip.transform.PreprocessCfg(**given), is_train=False)
    with torch.inference_mode():
        expected = clip.tiny.encode_image(usual(picture())[None])
        ours = found(torch.from_numpy(found.transform(picture()))[None])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert found.features == core.width(found.config) == 16
    assert found.source == "open_clip me/tiny"
    assert not caplog.records  # such as warnings of random weights, while shapes are tried


def test_weights_from_a_file(clip: Any, tmp_path: Path) -> None:
    of_tag = core.load(config()).describe()
    given = core.load(config(weights=clip.tiny_file))
    assert given.describe()["sha256"] == of_tag["sha256"]
    assert given.source == clip.tiny_file
    random = core.load(config("open_clip:tiny", pretrained=False)).describe()
    assert random["sha256"] != of_tag["sha256"]
    state = dict(clip.tiny.state_dict())
    del state["visual.proj"]
    torch.save(state, path := tmp_path / "part.pt")
    with pytest.raises(ConfigError, match=r"does not fit open_clip:tiny/tag: .*visual.proj"):
        core.load(config(weights=str(path)))
    path.write_text("<html>")
    with pytest.raises(ConfigError, match="HTML page"):
        core.check(config(weights=str(path)))


def test_an_image_size_of_its_own(clip: Any) -> None:
    found = core.load(config(image_size=64))
    assert found.transform(picture()).shape == (3, 64, 64)
    assert found(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 16)


def test_a_fine_tuned_tower_is_rebuilt_without_its_weights(clip: Any) -> None:
    backbone = core.load(config())
    model = C.FineTuned(backbone, C.Classifier("linear", 16, 3)).eval()
    weights, description = C.save(model, {"backbone": [backbone.describe()]})
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(C.load(weights, description)(images), model(images))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "open_clip:tinny/tag"}, "knows no model 'tinny'.* Near ones: .*open_clip:tiny"),
        ({"name": "open_clip:tiny/tags"}, "no weights 'tags' of tiny .*: open_clip:tiny/tag"),
        ({"name": "open_clip:tiny"}, "several weights of tiny: name one .*: open_clip:tiny/tag"),
        ({"weights": "none.pt"}, "no such file"),
        ({"pooling": "mean"}, "needs one map or sequence"),
        ({"pooling": "cls"}, "needs a class token"),
    ],
)
def test_mistakes_are_seen_before_any_work(clip: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core.check(config(**settings))


def test_the_hub_is_asked_whether_it_has_the_weights(
    clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(hub, "check", lambda *given: asked.append(given))
    core.check(config(), download=True)
    core.check(config(pretrained=False), download=True)
    core.check(config(weights=clip.tiny_file), download=True)
    assert asked == [("open_clip:tiny/tag", "me/tiny")]


def test_a_failed_download_names_the_remedies(clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(clip.factory, "download_pretrained", fail)
    with pytest.raises(ConfigError, match=r"tiny/tag failed .*no route.*Without a network"):
        core.load(config())
