"""The neighbors and heads stages on a small run made by hand. For several workers and killed ones,
see test_nodes.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from icce_ray import config
from icce_ray.core.heads import trainer as head_trainer
from icce_ray.distributed import train as training
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ArtifactError, DataError, StageError
from icce_ray.rundir import schemas
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import heads, search, select
from icce_ray.stages.base import Context, Outcome

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

ROWS, FEATURES, CLUSTERS, HEADS, STEPS = 600, 16, 4, 5, 60
QUICK = [
    f"heads.count={HEADS}",
    f"heads.steps={STEPS}",
    "heads.batch_size=256",
    "heads.checkpoint_every=25",
    "heads.num_workers=0",
    "neighbors.max_neighbors=20",
]


def blobs(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """float16 unit rows around orthogonal centers, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % CLUSTERS
    x = np.eye(CLUSTERS, FEATURES)[labels] + 0.25 * rng.normal(size=(rows, FEATURES))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16), labels


def make_run(folder: Path, overrides: Sequence[str] = (), rows: int = ROWS) -> Context:
    """A run whose embeddings are finished; two images before them were quarantined."""
    run = RunDirectory(str(folder))
    matrix, _ = blobs(rows)
    schema = schemas.embeddings_schema(FEATURES)
    for part, start in enumerate(range(0, rows, 250)):
        piece = matrix[start : start + 250]
        tensor = schemas.tensor_column(piece, schema.field("embedding").type)
        ids = np.arange(start, start + len(piece)) + 2
        table = pa.table([ids, tensor], schema=schema)
        run.write_table(table, "embeddings", f"part-{part:05d}.parquet")
    run.finish("embeddings", Manifest("embed", "f", {}, {}, rows, 1.0))
    tree = {"num_classes": CLUSTERS, "run_dir": run.uri, "data": {"embeddings": "e.npy"}}
    settings = config.load(tree, [*QUICK, *overrides])
    return Context(settings, run, Reporter(run, quiet=True), Cluster(settings.ray))


def finish(context: Context, folder: str, outcome: Outcome) -> None:
    """What the pipeline does after a stage; the results must be JSON."""
    manifest = Manifest(folder, "f", {}, {}, outcome.rows, 1.0, outcome.results)
    context.run.finish(folder, manifest)


def with_neighbors(folder: Path, overrides: Sequence[str] = (), rows: int = ROWS) -> Context:
    context = make_run(folder, overrides, rows)
    for stage in (search, select):
        finish(context, stage.FOLDER, stage.run(context))
    return context


def trained(context: Context) -> tuple[np.ndarray, Outcome]:
    outcome = heads.run(context)
    finish(context, "heads", outcome)
    return np.array(context.run.matrix("heads", "assignments")), outcome


# --- neighbors -----------------------------------------------------------------------------------


def brute(most: int, matrix: np.ndarray | None = None) -> np.ndarray:
    """Similarities to the best `most` neighbors, float64."""
    x = (blobs()[0] if matrix is None else matrix).astype(np.float64)
    scores = x @ x.T
    np.fill_diagonal(scores, -np.inf)
    return -np.sort(-scores, axis=1)[:, :most]


def search_part(context: Context, start: int, stop: int) -> None:
    """What one task of the search does."""
    search._search_task(context.run, start, stop, 20, False, context.config.neighbors, 1)


@pytest.mark.parametrize("kind", ["exact", "ivf"])
@pytest.mark.parametrize("components", [None, 5])
def test_neighbors_in_shards_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, components: int | None
) -> None:
    monkeypatch.setattr(search, "QUERY_ROWS", 170)
    settings = {"search": kind, "nprobe": 1000, "pca": components}
    run = with_neighbors(tmp_path, [f"neighbors.{k}={v}" for k, v in settings.items()]).run
    ids, counts = run.matrix("neighbors", "ids"), run.matrix("selection", "count")
    searched = search.searched(run, components)
    assert searched.shape == (ROWS, components or FEATURES)
    expected = brute(20) if components is None else brute(20, searched)
    np.testing.assert_allclose(run.matrix("neighbors", "similarity"), expected, atol=2e-3)
    assert (ids != np.arange(ROWS)[:, None]).all() and ids.min() >= 0
    for folder in ("neighbors", "selection"):
        assert (run.matrix(folder, "image_id") == np.arange(2, ROWS + 2)).all()
    assert counts.min() >= 5 and counts.max() <= 20
    done, chosen = run.manifest("neighbors"), run.manifest("selection")
    assert done is not None and done.results["search"] == kind
    assert chosen is not None and chosen.results["k"] == 15


def test_done_shards_are_not_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "QUERY_ROWS", 300)
    context = make_run(tmp_path)
    for start in (0, 300):
        search_part(context, start, start + 300)
    shards = sorted((tmp_path / "neighbors").iterdir())
    before = [shard.stat().st_mtime_ns for shard in shards]
    search._search_shards(context, ROWS, FEATURES)
    assert sorted((tmp_path / "neighbors").glob("*.parquet")) == shards
    assert [shard.stat().st_mtime_ns for shard in shards] == before and len(before) == 2


def test_one_image_has_no_neighbors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 2 images"):
        search.run(make_run(tmp_path, rows=1))


# --- heads ---------------------------------------------------------------------------------------


def test_training_in_process_finds_the_blobs_and_writes_all(tmp_path: Path) -> None:
    from safetensors.torch import load

    # After 60 steps, heads still show where they began; sizes left free, one of them merges blobs.
    steps = 200
    context = with_neighbors(tmp_path, [f"heads.steps={steps}", "heads.balance=0.5"])
    assignments, outcome = trained(context)
    run, (_, labels) = context.run, blobs()
    assert assignments.shape == (ROWS, HEADS) and assignments.dtype == np.int16
    tables = [np.histogram2d(column, labels, bins=CLUSTERS)[0] for column in assignments.T]
    purity = [table.max(1).sum() / ROWS for table in tables]
    assert min(purity) > 0.9, purity
    assert outcome.rows == ROWS and outcome.results["workers"] == 0
    assert outcome.results["clusters_used"] == [CLUSTERS] * HEADS
    assert len(outcome.results["final_loss"]) == HEADS
    history = json.loads(run.read_bytes("heads", "_history.json"))
    assert history["step"] == list(range(1, steps + 1))
    assert np.array(history["loss"]).shape == (steps, HEADS)
    assert (run.matrix("heads", "image_id") == np.arange(2, ROWS + 2)).all()
    assert run.list("heads") == ["_heads.safetensors", "_history.json", "_manifest.json",
                                 "part-00000.parquet"]  # fmt: skip
    assert not run.exists("heads", "train")
    tensors = load(run.read_bytes("heads", "_heads.safetensors"))
    features = torch.from_numpy(np.array(run.matrix("embeddings", "embedding"))).float()
    x = (features - tensors["projection.center"]) @ tensors["projection.basis"]
    x = torch.nn.functional.normalize(x, dim=-1)
    logits = torch.einsum("np,hpk->nhk", x, tensors["last.weight"]) + tensors["last.bias"][:, 0]
    assert (logits.argmax(-1).numpy() == assignments).mean() > 0.999  # stored heads are these


class Lost(Exception):
    """A worker that dies."""


@pytest.fixture
def dies_at(monkeypatch: pytest.MonkeyPatch):
    """dies_at(step): training stops before that step; dies_at(None): it resumes."""
    step = head_trainer.HeadTrainer.step

    def start(when: int | None) -> None:
        def half(self: head_trainer.HeadTrainer, **options: bool) -> torch.Tensor | None:
            if self.step_number == when:
                raise Lost
            return step(self, **options)

        monkeypatch.setattr(head_trainer.HeadTrainer, "step", half)

    return start


def test_a_stopped_training_resumes_from_its_checkpoint_exactly(tmp_path: Path, dies_at) -> None:
    expected, _ = trained(with_neighbors(tmp_path / "whole"))
    context = with_neighbors(tmp_path / "broken", ["ray.max_failures=0"])
    dies_at(40)
    with pytest.raises(StageError, match=r"(?s)training in heads failed.*Run the same command"):
        heads.run(context)
    assert training.Checkpoints(context.run, "heads").latest() == 25
    dies_at(None)
    steps = []
    step = head_trainer.HeadTrainer.step

    def noted(self: head_trainer.HeadTrainer, **options: bool) -> torch.Tensor | None:
        steps.append(self.step_number)
        return step(self, **options)

    head_trainer.HeadTrainer.step = noted
    try:
        found, _ = trained(context)
    finally:
        head_trainer.HeadTrainer.step = step
    assert steps == list(range(25, STEPS))
    assert (found == expected).all()
    one, two = (
        json.loads(RunDirectory(str(tmp_path / name)).read_bytes("heads", "_history.json"))
        for name in ("whole", "broken")
    )
    assert one == two


def test_work_that_was_trained_but_not_written_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at
) -> None:
    context = with_neighbors(tmp_path)
    write = heads._write
    monkeypatch.setattr(heads, "_write", lambda *a: (_ for _ in ()).throw(StageError("full")))
    with pytest.raises(StageError, match="full"):
        heads.run(context)
    monkeypatch.setattr(heads, "_write", write)
    dies_at(0)
    assignments, _ = trained(context)
    assert assignments.shape == (ROWS, HEADS)


def test_an_error_of_ours_keeps_its_kind_and_text(tmp_path: Path) -> None:
    context = with_neighbors(tmp_path, ["heads.lr=1e30", "ray.max_failures=0"])
    with pytest.raises(StageError, match=r"loss of head \d is not finite at step \d"):
        heads.run(context)


# --- checkpoints ---------------------------------------------------------------------------------


def save(checkpoints: training.Checkpoints, step: int, world: int) -> None:
    for rank in range(world):
        numbers = torch.arange(6)[rank::world].contiguous()
        checkpoints.save(step, rank, world, {"numbers": numbers, "w": numbers * 1.0})


def numbers_of(checkpoints: training.Checkpoints) -> list[int]:
    latest = checkpoints.latest()
    assert latest is not None
    return sorted(int(n) for state in checkpoints.load(latest) for n in state["numbers"])


def test_checkpoints_are_complete_or_ignored(tmp_path: Path) -> None:
    checkpoints = training.Checkpoints(RunDirectory(str(tmp_path)), "heads")
    assert checkpoints.latest() is None
    save(checkpoints, 10, 2)
    assert checkpoints.latest() is None
    checkpoints.complete(10, 2)
    save(checkpoints, 20, 2)
    assert checkpoints.latest() == 10 and numbers_of(checkpoints) == list(range(6))
    checkpoints.complete(20, 2)
    assert checkpoints.latest() == 20 and checkpoints._steps() == [20]


def test_files_of_a_lost_group_of_another_size_are_left_out(tmp_path: Path) -> None:
    checkpoints = training.Checkpoints(RunDirectory(str(tmp_path)), "heads")
    save(checkpoints, 10, 2)  # lost before it was complete
    save(checkpoints, 10, 3)
    checkpoints.complete(10, 3)
    assert len(checkpoints.load(10)) == 3 and numbers_of(checkpoints) == list(range(6))


def test_a_damaged_checkpoint_names_its_file_and_the_way_out(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    checkpoints = training.Checkpoints(run, "heads")
    save(checkpoints, 10, 1)
    checkpoints.complete(10, 1)
    run.write_bytes(b"nonsense", "heads/train/step-00000010/rank-00000-of-00001.safetensors")
    with pytest.raises(ArtifactError, match=r"rank-00000.*cannot be read.*Delete .*step-00000010"):
        checkpoints.load(10)
