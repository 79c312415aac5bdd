"""Prediction up to where a worker would start: its messages name what the user gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from icce_ray import config as configs
from icce_ray.data.listing import list_images
from icce_ray.distributed.inference import CLASSIFIER, DESCRIPTION
from icce_ray.errors import ConfigError, DataError
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
    mark: Any = predict._mark(str(images), list_images(config.data).table, trained, config)
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
