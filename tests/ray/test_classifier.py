"""The classifier stage on small runs made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from icce_ray import config
from icce_ray.core.classifier import model as core
from icce_ray.core.classifier import probe
from icce_ray.distributed import finetune
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.worker import Worker
from icce_ray.errors import ConfigError, DataError, StageError
from icce_ray.rundir import schemas
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import classify as classifier
from icce_ray.stages.base import Context, Outcome
from icce_ray.stages.table import stage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

COLORS = [(220, 40, 40), (40, 200, 60), (50, 60, 230)]
BACKBONE = [
    "backbone.name=test_efficientnet",
    "backbone.pretrained=false",
    "backbone.image_size=32",
]
FINETUNE = [
    *BACKBONE,
    "classifier.kind=finetune",
    "classifier.batch_size=16",
    "classifier.epochs=2",
    "classifier.backbone_lr=1e-4",
    "embed.precision=float32",
]


def make_run(tmp_path: Path, count: int, overrides: Sequence[str] = (), bad: int = 2) -> Context:
    """A run whose consensus is finished: images of three colors, the first `bad` in quarantine."""
    run = RunDirectory(str(tmp_path / "run"))
    rng = np.random.default_rng(0)
    kinds = np.arange(count) % 3
    uris = [_picture(tmp_path, i, COLORS[kind], rng, i < bad) for i, kind in enumerate(kinds)]
    nothing = pa.nulls(count, pa.int64())
    index = [pa.array(range(count)), uris, pa.nulls(count, pa.string()), nothing, nothing]
    _finish(run, "index", pa.table(index, schema=schemas.INDEX_SCHEMA))
    rows = np.arange(bad, count)
    features = np.eye(3, 16)[kinds[rows]] + 0.1 * rng.normal(size=(len(rows), 16))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    schema = schemas.embeddings_schema(16)
    tensor = schemas.tensor_column(features.astype(np.float16), schema.field("embedding").type)
    _finish(run, "embeddings", pa.table([pa.array(rows), tensor], schema=schema))
    clusters = ((kinds[rows] + 1) % 3).astype(np.int32)
    confidence = np.where(np.arange(len(rows)) % 5, 0.9, 0.2).astype(np.float32)
    _finish(run, "consensus", pa.table([rows, clusters, confidence], schemas.CONSENSUS_SCHEMA))
    tree = {"num_classes": 3, "run_dir": run.uri, "data": {"path": str(tmp_path / "images")}}
    settings = config.load(tree, list(overrides))
    return Context(settings, run, Reporter(run, quiet=True), Cluster(settings.ray))


def _picture(root: Path, number: int, color: Any, rng: Any, bad: bool) -> str:
    path = root / "images" / f"{number:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.array(color) + rng.integers(-25, 25, (32, 32, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    if bad:
        path.write_bytes(b"no image")
    return str(path)


def _finish(run: RunDirectory, folder: str, table: pa.Table) -> None:
    run.write_table(table, folder, "part-00000.parquet")
    run.finish(folder, Manifest(folder, "f", {}, {}, len(table), 1.0))


def finish(context: Context, outcome: Outcome) -> RunDirectory:
    """What the pipeline does after a stage."""
    manifest = Manifest("classifier", "f", {}, {}, outcome.rows, 1.0, outcome.results)
    context.run.finish("classifier", manifest)
    return context.run


def loaded(run: RunDirectory) -> tuple[Any, dict[str, Any]]:
    description = run.read_json("classifier", "classifier.json")
    return core.load(
        run.read_bytes("classifier", "classifier.safetensors"), description
    ), description


# --- probes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_probe_in_one_task(tmp_path: Path, kind: str) -> None:
    context = make_run(tmp_path, 92, [*BACKBONE, f"classifier.kind={kind}"])
    outcome = classifier.run(context)
    run = finish(context, outcome)
    assert outcome.rows == 90
    assert outcome.results["kind"] == kind and outcome.results["agreement"] == 1.0
    model, description = loaded(run)
    features = run.matrix("embeddings", "embedding")
    clusters, confidence = probe.predict(model, features)
    assert (clusters == run.matrix("consensus", "cluster")).all()
    assert (clusters == run.matrix("classifier", "cluster")).all()
    np.testing.assert_allclose(confidence, run.matrix("classifier", "confidence"), atol=1e-3)
    assert (run.matrix("classifier", "image_id") == np.arange(2, 92)).all()
    assert description["backbone"][0]["name"] == "test_efficientnet"
    assert description["clusters"] == [30, 30, 30]
    assert len(run.read_json("classifier", "_history.json")) == 20
    assert not run.exists("classifier", "train")


def test_imported_embeddings_name_no_backbone(tmp_path: Path) -> None:
    context = make_run(tmp_path, 32)
    tree = {"num_classes": 3, "run_dir": context.run.uri, "data": {"embeddings": "e.npy"}}
    context.config = config.load(tree)
    classifier.run(context)
    assert loaded(context.run)[1]["backbone"] == []


def test_an_error_in_the_task_keeps_its_kind(tmp_path: Path) -> None:
    context = make_run(tmp_path, 32)
    table = context.run.read_table("consensus", "part-00000.parquet")
    none = pa.array(np.zeros(30, np.float32))
    context.run.delete("consensus")
    _finish(context.run, "consensus", table.set_column(2, "confidence", none))
    with pytest.raises(DataError, match="confidence_weights=false"):
        classifier.run(context)


def test_a_task_that_can_never_start_ends_with_the_reason(tmp_path: Path) -> None:
    context = make_run(tmp_path, 32, ["ray.num_gpus=3", "ray.worker_wait=1"])
    with pytest.raises(StageError, match=r"could run for 1 s.*3 GPUs.*ray\.num_gpus"):
        classifier.run(context)


# --- fine-tuning ---------------------------------------------------------------------------------


def wide(context: Context) -> Context:
    """Embeddings as wide as the backbone's features, so that the probe fits as its head."""
    from icce_ray.core import backbone

    features = backbone.load(context.config.backbone[0]).features
    narrow = np.array(context.run.matrix("embeddings", "embedding"))
    image_ids = np.array(context.run.matrix("embeddings", "image_id"))
    matrix = np.zeros((len(narrow), features), np.float16)
    matrix[:, : narrow.shape[1]] = narrow
    schema = schemas.embeddings_schema(features)
    tensor = schemas.tensor_column(matrix, schema.field("embedding").type)
    context.run.delete("embeddings")
    _finish(context.run, "embeddings", pa.table([pa.array(image_ids), tensor], schema=schema))
    return context


def test_labels_follow_the_images_and_unreadable_ones_weigh_nothing(tmp_path: Path) -> None:
    context = make_run(tmp_path, 12)
    labeler = finetune.Labeler(context.run, context.config.classifier)
    batch = {
        "image_id": np.array([7, 2, 11]),
        "reason": np.array(["", "not found", ""], dtype=object),
        "pixels0": np.zeros((3, 3, 4, 4), np.uint8),
    }
    out = labeler(batch)
    assert out["label"].tolist() == [(7 + 1) % 3, 0, 0]
    weights = labeler.weights
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(out["weight"], [weights[5], 0, weights[9]])
    assert out["image"].dtype == torch.uint8 and out["label"].dtype == torch.int64


def test_finetune_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after its first epoch; then with an image that was embedded, but can no longer be
    read; then as it should be."""
    context = wide(make_run(tmp_path, 62, [*FINETUNE, "classifier.num_workers=0"]))
    lost = tmp_path / "images" / "0007.png"
    content = lost.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "save", interrupted(Worker.save))
        with pytest.raises(KeyboardInterrupt):
            classifier.run(context)
    lost.unlink()
    with pytest.raises(StageError, match=r"1 images.*0007\.png.*classifier is kept"):
        classifier.run(context)
    weights = context.run.read_bytes("classifier", "classifier.safetensors")
    lost.write_bytes(content)
    outcome = classifier.run(context)
    run = finish(context, outcome)
    assert run.read_bytes("classifier", "classifier.safetensors") == weights
    assert outcome.rows == 60 and outcome.results["kind"] == "finetune"
    history = run.read_json("classifier", "_history.json")
    assert [entry["epoch"] for entry in history] == [1, 2]
    model, description = loaded(run)
    assert description["kind"] == "finetune"
    assert (run.matrix("classifier", "image_id") == np.arange(2, 62)).all()
    paths = [tmp_path / "images" / f"{i:04d}.png" for i in range(2, 62)]
    pixels = torch.stack([torch.as_tensor(model.backbone.transform(_open(p))) for p in paths])
    with torch.inference_mode():
        value, index = model(pixels).softmax(1).max(1)
    assert (index.numpy() == run.matrix("classifier", "cluster")).mean() > 0.95
    np.testing.assert_allclose(value, run.matrix("classifier", "confidence"), atol=0.01)


def interrupted(save: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C as soon as a checkpoint is written."""

    def save_and_stop(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    return save_and_stop


def _open(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def test_workers_must_leave_a_core_for_decoding(tmp_path: Path) -> None:
    context = make_run(tmp_path, 12, [*FINETUNE, "classifier.num_workers=4"])
    with pytest.raises(ConfigError, match="at most 3"):
        finetune.worker_count(context, 0)


def test_packed_images_are_shuffled_in_stretches() -> None:
    count = 20 * finetune.BLOCK_ROWS + 7
    nothing, offset = pa.nulls(count, pa.int64()), pa.array(np.arange(count))
    names = [f"p.parquet#{i}" for i in range(count)]
    tables = {
        "files": pa.table({"uri": ["a/1.png"] * count, "offset": nothing}),
        "tar": pa.table({"uri": ["t.tar#1"] * count, "offset": offset}),
        "parquet": pa.table({"uri": names, "offset": nothing}),
    }
    for kind, table in tables.items():
        order = finetune.feeding_order(table, seed=1)
        assert sorted(order) == list(range(count))
        jumps = int((np.diff(order) != 1).sum())
        assert (jumps <= 21) == (kind != "files")
        assert jumps > 0


def test_settings_that_only_say_where_do_not_count() -> None:
    tree = {"num_classes": 3, "data": {"path": "x"}}
    base = stage("classify").settings(config.load(tree))
    moved = stage("classify").settings(config.load(tree, ["classifier.num_workers=4"]))
    other = stage("classify").settings(config.load(tree, ["classifier.lr=0.5"]))
    assert base == moved != other
    assert json.loads(json.dumps(base)) == base
