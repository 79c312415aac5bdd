"""The classifier as an ONNX file, beside torch. B batch, S image side."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import export_onnx
import numpy as np
import pytest
import torch

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone
from icce_ray.core.classifier import model as C
from icce_ray.core.classifier import onnx
from icce_ray.errors import ArtifactError, ConfigError, StageError
from icce_ray.rundir.directory import Manifest, RunDirectory

CLUSTERS = 4
SMALL = BackboneConfig(name="test_efficientnet", pretrained=False, image_size=32)
OTHER = BackboneConfig(name="test_vit", pretrained=False, image_size=64)


@pytest.fixture
def runtime() -> Any:
    """onnxruntime; where it is not installed, the export is not tested, and the run says so."""
    if any(importlib.util.find_spec(name) is None for name in onnx.NEEDS):
        warnings.warn("ONNX export is not tested: uv sync --extra onnx", stacklevel=1)
        pytest.skip("NOT TESTED: onnx, onnxscript or onnxruntime is missing (--extra onnx)")
    return importlib.import_module("onnxruntime")


def described(
    configs: tuple[BackboneConfig, ...], kind: str = "linear"
) -> tuple[C.Classifier | C.FineTuned, dict[str, Any], list[backbone.Backbone]]:
    """A classifier of random weights, its description, and its backbones."""
    networks = [backbone.load(config) for config in configs]
    head = C.Classifier("mlp" if kind == "mlp" else "linear", sum(n.features for n in networks), 4)
    with torch.no_grad():
        head.out.weight.normal_(std=20, generator=torch.Generator().manual_seed(0))
    model = C.FineTuned(networks[0], head) if kind == "finetune" else head
    each = [network.describe() for network in networks]
    extra = {"backbone": each, "transform": [one["transform"] for one in each]}
    return model.eval(), C.save(model, extra)[1], networks


def noise(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (count, 3, side, side), np.uint8)


@pytest.mark.parametrize("kind", ["linear", "mlp", "finetune"])
def test_the_file_gives_torchs_probabilities(tmp_path: Path, runtime: Any, kind: str) -> None:
    model, description, (network,) = described((SMALL,), kind)
    onnx.export(model, description, path := tmp_path / "new" / "model.onnx")
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(str(path))
    (name,) = (one.name for one in session.get_inputs())
    images = noise(5, 32)  # another number than was exported
    with torch.inference_mode():
        features = backbone.normalize(network(torch.from_numpy(images)))
        head = model.head if isinstance(model, C.FineTuned) else model
        exact = head(features).softmax(1).numpy()
    (found,) = session.run(None, {name: images})
    assert found.shape == (5, CLUSTERS) and len(set(found.argmax(1))) > 1
    np.testing.assert_allclose(found, exact, atol=1e-4)
    about = json.loads(session.get_modelmeta().custom_metadata_map["icce_ray"])
    assert about == {"transform": description["transform"], "num_clusters": CLUSTERS}


def test_several_backbones_take_an_input_for_each_preparation(tmp_path: Path, runtime: Any) -> None:
    model, description, networks = described((SMALL, OTHER, SMALL))
    onnx.export(model, description, path := tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(path))
    assert [one.name for one in session.get_inputs()] == ["images0", "images1"]
    images = [noise(2, 32), noise(2, 64)]
    pixels = [torch.from_numpy(images[slot]) for slot in (0, 1, 0)]
    with torch.inference_mode():
        pairs = zip(networks, pixels, strict=True)
        exact = model(backbone.join([n(x) for n, x in pairs])).softmax(1).numpy()
    (found,) = session.run(None, {"images0": images[0], "images1": images[1]})
    np.testing.assert_allclose(found, exact, atol=1e-4)
    about = json.loads(session.get_modelmeta().custom_metadata_map["icce_ray"])
    assert [one["crop"] for one in about["transform"]] == [32, 64]


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, description, _ = described((SMALL,))
    monkeypatch.setattr(onnx, "MOST_OFF", -1.0)
    with pytest.raises(StageError, match="its probabilities are off by"):
        onnx.export(model, description, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_the_script_exports_a_run(
    tmp_path: Path, runtime: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model, description, _ = described((SMALL,))
    run = RunDirectory(str(tmp_path / "run"))
    run.write_bytes(C.save(model)[0], "classifier", "classifier.safetensors")
    run.write_json(description, "classifier", "classifier.json")
    run.finish("classifier", Manifest("classifier", "f", {}, {}, 9, 1.0))
    export_onnx.main([run.uri, str(path := tmp_path / "model.onnx")])
    assert capsys.readouterr().out == f"{path}\n"
    assert runtime.InferenceSession(str(path)).get_outputs()[0].name == "probability"


# --- without the packages ------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "NEEDS", ())


def test_what_is_missing_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "NEEDS", ("json", "no_such_module"))
    model, description, _ = described((SMALL,))
    with pytest.raises(ConfigError, match=r"needs no_such_module: pip install '.\[onnx\]'"):
        onnx.export(model, description, tmp_path / "model.onnx")


def test_the_script_names_what_it_takes(tmp_path: Path) -> None:
    for arguments in ([], ["run"], ["run", "model"], ["run", "model.onnx", "more"]):
        with pytest.raises(ConfigError, match=r"export_onnx.py RUN_DIR model.onnx"):
            export_onnx.main(arguments)
    with pytest.raises(ArtifactError, match="has no finished classifier"):
        export_onnx.main([str(tmp_path), "model.onnx"])


@pytest.mark.usefixtures("pretended")
def test_other_weights_than_the_runs_are_refused(tmp_path: Path) -> None:
    model, description, _ = described((SMALL,))
    description["backbone"][0]["sha256"] = "0" * 64
    with pytest.raises(StageError, match="test_efficientnet differ from those that the run had"):
        onnx.export(model, description, tmp_path / "model.onnx")


@pytest.mark.usefixtures("pretended")
def test_a_classifier_of_given_embeddings_has_no_images(tmp_path: Path) -> None:
    model, description, _ = described((SMALL,))
    with pytest.raises(ConfigError, match="made from given embeddings"):
        onnx.export(model, {**description, "backbone": []}, tmp_path / "model.onnx")
