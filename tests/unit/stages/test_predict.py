"""Prediction up to where a worker would start: its messages name what the user gave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import icce_ray
from icce_ray import cli
from icce_ray import config as configs
from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone as backbones
from icce_ray.core import outliers
from icce_ray.core.classifier import model as classifiers
from icce_ray.data.listing import list_images
from icce_ray.distributed import stream
from icce_ray.distributed.inference import CLASSIFIER, DESCRIPTION, NOVELTY, WEIGHTS
from icce_ray.errors import ArtifactError, ConfigError, DataError
from icce_ray.pipeline.results import Result
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.stages import predict


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with a classifier, as far as `predict` looks before it starts workers."""
    run = RunDirectory(str(tmp_path / "run"))
    tree = {"num_classes": 2, "run_dir": run.uri, "data": {"path": str(tmp_path / "old")}}
    run.write_bytes(configs.to_yaml(configs.load(tree)).encode(), "config.yaml")
    description = {"kind": "linear", "backbone": [{"name": "resnet18", "pretrained": False}]}
    run.write_json(description, CLASSIFIER, DESCRIPTION)
    run.finish(CLASSIFIER, Manifest(CLASSIFIER, "f", {}, {}, 4, 1.0))
    (tmp_path / "new").mkdir()
    for name in ("a.png", "b.png", "c.txt"):
        (tmp_path / "new" / name).touch()
    return run


def finished(run: RunDirectory, images: Path, out: Path) -> Manifest:
    """Predictions as an earlier call leaves them."""
    config = predict._config(run, str(images), ())
    trained = run.manifest(CLASSIFIER)
    assert trained is not None
    task = predict._task(run, str(images), ())
    mark: Any = predict._mark(str(images), list_images(config.data).table, task)
    manifest = Manifest("predict", mark["fingerprint"], mark["settings"], mark["inputs"], 2, 1.0)
    RunDirectory(str(out.parent)).finish(out.name, manifest)
    return manifest


@pytest.mark.parametrize("quiet", [False, True])
def test_a_repeated_call_says_that_all_is_done(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    out = tmp_path / "out"
    done = finished(run, tmp_path / "new", out)
    assert predict.predict(run.uri, str(tmp_path / "new"), str(out), quiet=quiet).id == done.id
    said = capsys.readouterr().err
    assert said == ("" if quiet else f"done already: 2 images are in {out}\n")
    assert [path.name for path in out.iterdir()] == ["_manifest.json"]


@pytest.mark.parametrize("override", ["data.path=x", "data.embeddings=x", "data.dataset=digits"])
def test_the_images_are_named_once(run: RunDirectory, tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=f"{override}: predict takes its images as its second"):
        predict.predict(run.uri, str(tmp_path / "new"), overrides=[override])


@pytest.mark.parametrize("images", ["", "none", "~nosuchuser/x", "run", "new/c.txt", "s3a://b/x"])
def test_a_message_names_the_argument(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=r"^images") as error:
        predict.predict(run.uri, images)
    assert "data.path" not in str(error.value)


def test_predictions_among_the_images_are_no_images(run: RunDirectory, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = finished(run, tmp_path / "new", out)
    (out / "part-00000.parquet").touch()
    again = predict.predict(run.uri, str(tmp_path / "new"), str(out), quiet=True)
    assert again.id == done.id


# --- what a classifier says ----------------------------------------------------------------------


def picture(rng: np.random.Generator, color: tuple[int, int, int]) -> Image.Image:
    """Nearly of one color."""
    values = np.clip(np.array(color) + rng.integers(-20, 20, (32, 32, 3)), 0, 255)
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def trained(run: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A run of 30 red and green images, with a tiny backbone; `new` holds other images."""
    config = BackboneConfig(name="test_resnet", pretrained=False, image_size=32)
    rng = np.random.default_rng(0)
    red, green = (200, 30, 30), (30, 200, 30)
    known = [picture(rng, color) for color in [red, green] * 15]
    model = backbones.load(config)
    pixels = torch.stack([torch.from_numpy(model.transform(one)) for one in known])
    features = backbones.join([model.embed(pixels)])
    head = classifiers.Classifier("linear", features.shape[1], 2)
    apart = features[::2].mean(0) - features[1::2].mean(0)
    head.out.weight.data = 100 * torch.stack([apart, -apart])
    head.out.bias.data = -(head.out.weight.data @ features.mean(0))
    described = {**config.model_dump(mode="json"), **model.describe()}
    weights, description = classifiers.save(head, {"backbone": [described]})
    run.write_bytes(weights, CLASSIFIER, WEIGHTS)
    run.write_json(description, CLASSIFIER, DESCRIPTION)
    reference = outliers.make_reference(features.numpy().astype(np.float16), 0, torch.device("cpu"))
    run.write_bytes(save(reference.tensors()), CLASSIFIER, NOVELTY)
    for old in (tmp_path / "new").iterdir():
        old.unlink()
    picture(rng, red).save(tmp_path / "new" / "a-red.png")
    picture(rng, green).save(tmp_path / "new" / "b-green.png")
    noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    noise.save(tmp_path / "new" / "c-noise.png")
    (tmp_path / "new" / "d-broken.png").write_bytes(b"no image")
    return run


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "stream", lambda _, table, job, __: stream.here(table, job))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    with pytest.raises(SystemExit):
        cli.main(list(arguments))
    return capsys.readouterr()


@pytest.mark.usefixtures("without_ray")
def test_predictions_say_what_is_new(trained: RunDirectory, tmp_path: Path) -> None:
    done = icce_ray.predict(trained.uri, tmp_path / "new", out=str(tmp_path / "out"), quiet=True)
    assert done.clusters.tolist()[:2] == [0, 1] and done.clusters[3] == -1
    assert done.novelty[2] == 1 > done.novelty[:2].max()
    assert np.isnan(done.novelty[3])
    reason = pq.read_table(tmp_path / "out" / "part-00000.parquet")["reason"].to_pylist()
    assert reason[:3] == [None] * 3 and reason[3]


@pytest.mark.usefixtures("without_ray")
def test_images_that_are_not_sure_enough_get_no_cluster(
    trained: RunDirectory, tmp_path: Path
) -> None:
    before = icce_ray.predict(trained.uri, tmp_path / "new", quiet=True)
    least = float(np.sort(before.confidence[:3])[1])
    out = str(tmp_path / "out")
    chosen = icce_ray.predict(
        trained.uri, tmp_path / "new", out=out, min_confidence=least, quiet=True
    )
    expected = np.where(before.confidence >= np.float32(least), before.clusters, -1)
    assert chosen.clusters.tolist() == expected.tolist() and (chosen.clusters[:3] < 0).sum() == 1
    assert chosen.confidence.tolist() == before.confidence.tolist()
    results = json.loads((tmp_path / "out" / "_manifest.json").read_text())["results"]
    assert (results["bad"], results["unsure"]) == (1, 1)
    with pytest.raises(ArtifactError, match="another --min-confidence"):
        icce_ray.predict(trained.uri, tmp_path / "new", out=out, min_confidence=0.1, quiet=True)


def test_one_image_is_classified_at_once_and_leaves_nothing(
    trained: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    out, err = call(capsys, "predict", trained.uri, str(tmp_path / "new" / "b-green.png"))
    assert out.startswith("cluster 1, confidence 1.00, novelty 0.") and not err
    assert "look at it" not in out and out.count("\n") == 1
    noise = str(tmp_path / "new" / "c-noise.png")
    assert "novelty 1.00: 99% of the run's images" in call(capsys, "predict", trained.uri, noise)[0]
    out, _ = call(capsys, "predict", trained.uri, noise, "--min-confidence", "1")
    assert out.startswith("no cluster is sure enough: the likeliest is cluster ")
    assert sorted(tmp_path.rglob("*")) == before


def test_images_are_classified_in_this_process(trained: RunDirectory, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    found, new = Result(trained.uri), tmp_path / "new"
    every = found.predict(new)
    names = ["a-red.png", "b-green.png", "c-noise.png", "d-broken.png"]
    assert every["uri"].tolist() == [str(new / name) for name in names]
    assert every["cluster"].tolist()[:2] == [0, 1] and every["cluster"][3] == -1
    assert every["novelty"][2] == 1 and np.isnan(every["novelty"][3])
    assert every["reason"].isna().tolist() == [True] * 3 + [False]
    some = [new / names[1], str(new / names[0]), new / names[1]]
    for given in (some, pd.Series(some), np.array(some)):
        assert found.predict(given)["cluster"].tolist() == [1, 0, 1]
    assert len(found.predict(str(new / names[0]))) == 1
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DataError, match=r"gone\.png: there is no such file"):
        found.predict([new / names[0], new / "gone.png"])
    with pytest.raises(DataError, match="embeddings"):
        found.predict([])


def test_the_backbone_is_loaded_once_for_all_calls(
    trained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, load = [], backbones.load
    monkeypatch.setattr(backbones, "load", lambda *a: loads.append(a) or load(*a))
    found, one = Result(trained.uri), tmp_path / "new" / "b-green.png"
    first, again = found.predict(one), found.predict([one])
    assert len(loads) == 1 and first.equals(again)
    trained.finish(CLASSIFIER, Manifest(CLASSIFIER, "another", {}, {}, 4, 1.0))  # was trained anew
    found.predict(one)
    assert len(loads) == 2


def test_one_image_needs_no_ray(trained: RunDirectory, tmp_path: Path) -> None:
    code = (
        "import sys; from icce_ray.stages import predict\n"
        "predict.predict_one(*sys.argv[1:])\n"
        "print('ray' in sys.modules)"
    )
    arguments = [trained.uri, str(tmp_path / "new" / "a-red.png")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("d-broken.png", (), "d-broken.png cannot be classified: not an image"),
        ("nowhere.png", (), "there is no such file or folder"),
        ("a-red.png", ("--min-confidence", "1.5"), "min_confidence=1.5 must lie between 0 and 1"),
        ("a-red.png", ("heads.count=3",), "settings only"),
    ],
)
def test_what_is_wrong_with_one_image_is_one_line(
    trained: RunDirectory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    image: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    arguments = [trained.uri, str(tmp_path / "new" / image), *options]
    out, err = call(capsys, "predict", *arguments)
    assert message in err and err.count("\n") == 1 and not out


def test_a_damaged_reference_is_named(trained: RunDirectory, tmp_path: Path) -> None:
    trained.write_bytes(b"damaged", CLASSIFIER, NOVELTY)
    with pytest.raises(ArtifactError, match=r"novelty\.safetensors is damaged"):
        predict.predict_one(trained.uri, str(tmp_path / "new" / "a-red.png"))
