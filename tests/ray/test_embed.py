"""Embedding and prediction through Ray Data, with a tiny random model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.core import backbone as backbones
from icce_ray.core import outliers
from icce_ray.core.classifier import model as classifiers
from icce_ray.distributed import inference
from icce_ray.distributed import stream as streaming
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ArtifactError, ConfigError, DataError, StageError
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.rundir.schemas import PREDICTIONS_SCHEMA
from icce_ray.stages import embed, index, predict
from icce_ray.stages.base import Context
from icce_ray.stages.table import stage

BACKBONE = {"name": "test_resnet", "pretrained": False, "image_size": 32}


def write_images(folder: Path, count: int, start: int = 0) -> None:
    rng = np.random.default_rng(start)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(start, start + count):
        values = rng.integers(0, 256, (rng.integers(8, 60), rng.integers(8, 60), 3), np.uint8)
        Image.fromarray(values).save(folder / f"{number:04d}.png")


def make(tmp_path: Path, *overrides: str, **tree: Any) -> Config:
    base = {
        "num_classes": 2,
        "run_dir": str(tmp_path / "run"),
        "data": {"path": str(tmp_path / "images")},
        "backbone": BACKBONE,
        "embed": {"precision": "float32", "shard_size": 16, "batch_size": 8},
    }
    return configs.load({**base, **tree}, overrides)


def start(config: Config, resumed: bool = False) -> tuple[Context, Any]:
    """Index, then embed."""
    run = RunDirectory(config.run_dir)
    context = Context(config, run, Reporter(run, quiet=True), Cluster(config.ray))
    if not resumed:
        outcome = index.run(context)
        run.finish("index", Manifest("index", "x", {}, {}, outcome.rows, 0.0, outcome.results))
    context.resumed = run.begin("embeddings", {"fingerprint": "x"})
    return context, embed.run(context)


def finish(context: Context, outcome: Any) -> np.ndarray:
    manifest = Manifest("embed", "x", {}, {}, outcome.rows, 0.0, outcome.results)
    context.run.finish("embeddings", manifest)
    return context.run.matrix("embeddings", "embedding")


def reference(config: Config, paths: list[Path]) -> np.ndarray:
    """The same features, one image at a time, without Ray."""
    spaces = []
    for one in config.backbone:
        model = backbones.load(one)
        arrays = [model.transform(Image.open(path).convert("RGB")) for path in paths]
        spaces.append(torch.cat([model.embed(torch.from_numpy(a)[None]) for a in arrays]))
    return backbones.join(spaces).numpy()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tasks' and actors' code without Ray, blocks in reverse. Holds the ids asked for."""
    asked: list[int] = []

    def stream(cluster: Cluster, table: pa.Table, job: streaming.Job, _: Any) -> Iterator[Any]:
        asked.extend(table["image_id"].to_pylist())
        worker = streaming.Actor(job.model, threads=1, gpu=False)
        blocks = [table.slice(start, 8) for start in range(0, table.num_rows, 8)]
        for block in reversed(blocks):
            most = job.settings.max_pixels
            for chunk in streaming.decode_rows(block, job.preprocess, most, job.levels):
                batch = worker(chunk)
                streaming.raise_error(batch)
                yield batch

    monkeypatch.setattr(streaming, "stream", stream)
    return asked


# --- without Ray ---------------------------------------------------------------------------------


def test_given_embeddings(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)
    values[3] *= 1e30  # its squares overflow
    np.save(tmp_path / "e.npy", values)
    pq.write_table(pa.table({"embedding": list(values)}), tmp_path / "e.parquet", row_group_size=10)
    unit = values.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for name, limit in (("e.npy", None), ("e.parquet", None), ("e.npy", 20), ("e.parquet", 20)):
        data = {"embeddings": str(tmp_path / name), "limit": limit}
        config = make(tmp_path, data=data, run_dir=str(tmp_path / f"{name}{limit}"))
        matrix = finish(*start(config))
        expected = unit[np.arange(limit) * 37 // limit] if limit else unit
        assert matrix.dtype == np.float16
        np.testing.assert_allclose(matrix, expected, atol=1e-3)
        assert embed.features(config) == 5


def test_given_embeddings_that_are_bad(tmp_path: Path) -> None:
    values = np.ones((40, 3))
    values[[5, 20, 30]] = [[np.nan, 1, 1], [0, 0, 0], [1, np.inf, 1]]
    np.save(tmp_path / "e.npy", values)
    with pytest.raises(DataError, match=r"3 rows are zero or .*rows 5, 20, 30"):
        start(make(tmp_path, data={"embeddings": str(tmp_path / "e.npy")}))


def test_settings_that_change_nothing_are_left_out(tmp_path: Path) -> None:
    a = stage("embed").settings(make(tmp_path))
    assert a == stage("embed").settings(make(tmp_path, "embed.shard_size=3", "embed.batch_size=1"))
    assert a == stage("embed").settings(make(tmp_path, "embed.max_bad_fraction=0.5"))
    assert a != stage("embed").settings(make(tmp_path, "embed.precision=bfloat16"))
    assert a != stage("embed").settings(make(tmp_path, "backbone.image_size=64"))


def test_preflight(tmp_path: Path) -> None:
    embed.preflight(make(tmp_path))
    with pytest.raises(ConfigError, match="no model"):
        embed.preflight(make(tmp_path, "backbone.name=nope"))
    assert embed.features(make(tmp_path)) == 96


def test_restart_does_only_what_is_missing(tmp_path: Path, in_process: list[int]) -> None:
    folder = tmp_path / "images"
    write_images(folder, 40)
    config = make(tmp_path, "embed.max_bad_fraction=0.1")
    broken, whole = folder / "0005.png", (folder / "0005.png").read_bytes()
    broken.write_bytes(b"")
    context, outcome = start(config)
    assert outcome.rows == 39
    parts = Path(context.run.path("embeddings"))
    untouched = (parts / "part-00001.parquet").stat().st_mtime_ns
    (parts / "part-00002.parquet").write_bytes(b"damaged")
    broken.write_bytes(whole)  # repaired by the user: the restart takes it in

    again = make(tmp_path, "embed.shard_size=5")  # where and how fast, so the old size holds
    context, outcome = start(again, resumed=True)
    assert context.resumed and outcome.rows == 40
    assert (parts / "part-00001.parquet").stat().st_mtime_ns == untouched
    assert in_process[40:] == [5, *range(32, 40)]
    matrix = finish(context, outcome)
    assert context.run.matrix("embeddings", "image_id").tolist() == list(range(40))
    paths = [folder / f"{i:04d}.png" for i in range(40)]
    np.testing.assert_allclose(matrix, reference(config, paths), atol=2e-3)
    assert not context.run.read_table("embeddings", "_quarantine.parquet").num_rows


def test_dim_images_of_sixteen_bits(tmp_path: Path, in_process: list[int]) -> None:
    """One range for all, which a restart and new images get too."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(40):
        values = rng.integers(100, 611, (20, 20), np.uint16)
        Image.fromarray(values).save(folder / f"{number:04d}.tif")
        shown = np.rint((values - 100) * (255 / 510)).astype(np.uint8)
        Image.fromarray(shown).save(plain / f"{number:04d}.png")
    config = make(tmp_path)
    context, _ = start(config)
    Path(context.run.path("embeddings", "part-00001.parquet")).unlink()
    for path in sorted(folder.iterdir())[::39]:  # a restart keeps what the shards were made with
        Image.fromarray(np.full((20, 20), 60_000, np.uint16)).save(path)
    context, outcome = start(config, resumed=True)
    matrix = finish(context, outcome)
    expected = reference(config, sorted(plain.iterdir()))
    assert (matrix * expected).sum(1).min() > 0.999
    levels = inference.levels_of_run(context.run)
    assert levels.integers == pytest.approx((100, 610), abs=2) and levels.floats is None


def test_too_many_bad_images(tmp_path: Path, in_process: list[int]) -> None:
    """Stops as soon as it is certain, and says where to look."""
    folder = tmp_path / "images"
    write_images(folder, 20)
    for number in range(0, 20, 4):
        (folder / f"{number:04d}.png").write_bytes(b"nonsense")
    message = r"3 of 20 images \(15\.0%\).*0016\.png: not an image.*_quarantine\.parquet"
    with pytest.raises(DataError, match=message):
        start(make(tmp_path))
    bad = RunDirectory(str(tmp_path / "run")).read_table("embeddings", "_quarantine.parquet")
    assert bad["image_id"].to_pylist() == [8, 12, 16]  # the last batches come first
    context, outcome = start(make(tmp_path, "embed.max_bad_fraction=0.25"), resumed=True)
    assert (context.resumed, outcome.rows, outcome.results["quarantined"]) == (True, 15, 5)


def test_broken_weights(tmp_path: Path, in_process: list[int]) -> None:
    write_images(tmp_path / "images", 4)
    state = backbones.load(make(tmp_path).backbone[0]).model.state_dict()
    next(iter(state.values())).fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    weights = {**BACKBONE, "pretrained": True, "weights": str(tmp_path / "nan.pth")}
    with pytest.raises(StageError, match=r"test_resnet gave .* zero or not finite.*\.png"):
        start(make(tmp_path, backbone=weights))


def test_other_weights_than_before(tmp_path: Path, in_process: list[int]) -> None:
    """The file behind the same name was exchanged between two calls."""
    write_images(tmp_path / "images", 20)
    model = backbones.load(make(tmp_path).backbone[0]).model
    weights = {**BACKBONE, "pretrained": True, "weights": str(tmp_path / "w.pth")}
    config = make(tmp_path, backbone=weights)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    start(config)
    (tmp_path / "run" / "embeddings" / "part-00001.parquet").unlink()
    next(model.parameters()).data.mul_(2)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    with pytest.raises(StageError, match="weights of test_resnet differ"):
        start(config, resumed=True)


def trained(config: Config, weights: bytes, description: dict[str, Any]) -> RunDirectory:
    """A run directory with a finished classifier and nothing else."""
    run = RunDirectory(config.run_dir)
    run.write_bytes(weights, "classifier", "classifier.safetensors")
    run.write_json(description, "classifier", "classifier.json")
    run.write_bytes(configs.to_yaml(config).encode(), "config.yaml")
    run.finish("classifier", Manifest("classifier", "x", {}, {}, 43, 0.0))
    return run


def test_prediction_by_a_finetuned_model_and_restart(tmp_path: Path, in_process: list[int]) -> None:
    write_images(tmp_path / "new", 40)
    config = make(tmp_path)
    backbone = backbones.load(config.backbone[0])
    next(backbone.model.parameters()).data.mul_(1.5)  # as if trained
    head = classifiers.Classifier("linear", backbone.features, 3)
    torch.nn.init.normal_(head.out.weight, std=3)
    model = classifiers.FineTuned(backbone, head)
    saved = classifiers.save(model, {"backbone": [config.backbone[0].model_dump(mode="json")]})
    run = trained(config, *saved)
    done = predict.predict(run.uri, str(tmp_path / "new"), quiet=True)
    found = run.read_table("predictions")["cluster"].to_numpy()
    paths = sorted((tmp_path / "new").iterdir())
    arrays = [backbone.transform(Image.open(path).convert("RGB")) for path in paths]
    with torch.inference_mode():
        odds = torch.cat([model(torch.from_numpy(array)[None]) for array in arrays]).softmax(1)
    assert found.tolist() == odds.argmax(1).tolist()
    confidence = run.read_table("predictions")["confidence"].to_numpy()
    np.testing.assert_allclose(confidence, odds.amax(1), atol=1e-4)
    assert confidence.std() > 1e-3 and confidence.max() < 1
    assert run.read_table("predictions")["novelty"].null_count == 40  # its features have moved

    mark = {key: getattr(done, key) for key in ("fingerprint", "settings", "inputs")}
    run.write_json(mark, "predictions", "_partial.json")
    for name in ("_manifest.json", "part-00001.parquet"):
        Path(run.path("predictions", name)).unlink()
    predict.predict(run.uri, str(tmp_path / "new"), quiet=True)
    assert in_process[40:] == list(range(16, 32))
    assert run.read_table("predictions")["cluster"].to_numpy().tolist() == found.tolist()


def test_prediction_needs_a_classifier_of_images(tmp_path: Path) -> None:
    write_images(tmp_path / "new", 2)
    with pytest.raises(ArtifactError, match="no finished classifier"):
        predict.predict(str(tmp_path / "run"), str(tmp_path / "new"))
    saved = classifiers.save(classifiers.Classifier("linear", 4, 2))
    run = trained(make(tmp_path), *saved)
    with pytest.raises(ConfigError, match="given embeddings"):
        predict.predict(run.uri, str(tmp_path / "new"))


# --- with Ray ------------------------------------------------------------------------------------


@pytest.mark.ray
def test_features_quarantine_and_prediction(tmp_path: Path, ray_session: None) -> None:
    """One pass over good and bad images, two backbones; then the same images classified."""
    folder = tmp_path / "images"
    write_images(folder, 45)
    (folder / "0007.png").write_bytes(b"")
    (folder / "0020.png").write_bytes((folder / "0020.png").read_bytes()[:200])
    two = [BACKBONE, {**BACKBONE, "name": "test_vit", "image_size": 48}]
    config = make(tmp_path, "embed.max_bad_fraction=0.1", backbone=two)
    context, outcome = start(config)
    matrix = finish(context, outcome)

    good = [i for i in range(45) if i not in (7, 20)]
    assert outcome.rows == 43
    assert context.run.matrix("embeddings", "image_id").tolist() == good
    expected = reference(config, [folder / f"{i:04d}.png" for i in good])
    np.testing.assert_allclose(matrix, expected, atol=2e-3)
    assert len(context.run.list("embeddings", ".parquet")) == 4  # 3 shards, quarantine
    bad = context.run.read_table("embeddings", "_quarantine.parquet").to_pylist()
    assert (bad[0]["image_id"], bad[0]["reason"]) == (7, "empty file")
    assert bad[1]["uri"].endswith("0020.png") and bad[1]["reason"]
    results = outcome.results
    assert (results["features"], results["quarantined"]) == (160, 2)
    assert [one["features"] for one in results["backbones"]] == [96, 64]
    assert len(results["backbones"][0]["sha256"]) == 64

    check_prediction(tmp_path, context, results, expected)


def check_prediction(tmp_path: Path, context: Context, results: Any, expected: np.ndarray) -> None:
    torch.manual_seed(0)
    model = classifiers.Classifier("linear", 160, 5)
    torch.nn.init.normal_(model.out.weight, std=10)
    weights, description = classifiers.save(model, {"backbone": results["backbones"]})
    run, out = trained(context.config, weights, description), str(tmp_path / "out")
    known = outliers.make_reference(expected.astype(np.float16), 0, torch.device("cpu"))
    run.write_bytes(save(known.tensors()), "classifier", inference.NOVELTY)
    arguments = (run.uri, str(tmp_path / "images"), out)
    done = predict.predict(*arguments, quiet=True)

    with torch.inference_mode():
        probability = model(torch.from_numpy(expected)).softmax(1)
    table = RunDirectory(str(tmp_path)).read_table("out")
    assert table.schema.equals(PREDICTIONS_SCHEMA)
    assert [Path(uri).name for uri in table["uri"].to_pylist()] == [
        f"{i:04d}.png" for i in range(45)
    ]
    cluster = table["cluster"].to_numpy()
    assert np.flatnonzero(cluster < 0).tolist() == [7, 20] and done.results["bad"] == 2
    assert table["reason"].to_pylist()[7] == "empty file"
    assert np.array_equal(cluster[cluster >= 0], probability.argmax(1).numpy())
    confidence = table["confidence"].to_numpy()[cluster >= 0]
    np.testing.assert_allclose(confidence, probability.amax(1), atol=1e-4)
    novelty = table["novelty"].to_numpy()
    assert np.flatnonzero(np.isnan(novelty)).tolist() == [7, 20]
    assert np.nanmax(novelty) < 1  # each image is itself among those of the run

    assert predict.predict(*arguments, quiet=True).id == done.id  # nothing is done twice
    Path(out, "_manifest.json").rename(tmp_path / "kept.json")
    before = Path(out, "part-00001.parquet").stat().st_mtime_ns
    with pytest.raises(ArtifactError, match="other files"):
        predict.predict(*arguments, quiet=True)
    assert before == Path(out, "part-00001.parquet").stat().st_mtime_ns
    with pytest.raises(ArtifactError, match="predictions of other images"):
        (tmp_path / "kept.json").rename(Path(out, "_manifest.json"))
        predict.predict(run.uri, str(tmp_path / "images"), out, overrides=["data.limit=5"])
    with pytest.raises(ConfigError, match="settings only"):
        predict.predict(*arguments, overrides=["heads.count=3"])


@pytest.mark.ray
def test_errors_of_the_workers_keep_their_type(tmp_path: Path, ray_session: None) -> None:
    write_images(tmp_path / "images", 4)
    with pytest.raises(ConfigError, match=r"test_vit") as caught:
        start(make(tmp_path, "backbone.name=test_vit", "backbone.image_size=7"))
    assert "Traceback" not in str(caught.value)
