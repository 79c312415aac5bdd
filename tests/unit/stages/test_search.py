"""The search without Ray: which kind it is, its shards, and the files that a node keeps of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from icce_ray import config as configs
from icce_ray.core import constants
from icce_ray.core import neighbors as core
from icce_ray.rundir import schemas
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.stages import search

HOUR = constants.EXACT_SECONDS
ROWS, FEATURES = 200, 8


@pytest.fixture
def context(tmp_path: Path) -> SimpleNamespace:
    said: list[str] = []
    return SimpleNamespace(
        config=configs.load({"num_classes": 2, "data": {"embeddings": "x.npy"}}),
        run=RunDirectory(str(tmp_path)),
        reporter=SimpleNamespace(say=said.append),
        said=said,
    )


def embed(run: RunDirectory, seed: int = 0) -> np.ndarray:
    """Embeddings as that stage leaves them; other ones for another seed."""
    x = np.random.default_rng(seed).normal(size=(ROWS, FEATURES))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    schema = schemas.embeddings_schema(FEATURES)
    tensor = schemas.tensor_column(x, schema.field("embedding").type)
    table = pa.table([np.arange(ROWS) + 2, tensor], schema=schema)
    run.write_table(table, "embeddings", "part-0.parquet")
    run.finish("embeddings", Manifest("embed", "f", {}, {}, ROWS, 1.0))
    return x


def work(run: RunDirectory, start: int, stop: int, ivf: bool = False) -> None:
    config = configs.load({"num_classes": 2, "data": {"embeddings": "x.npy"}}, ["neighbors.pca=4"])
    search._search_task(run, start, stop, 5, ivf, config.neighbors, 1)


def node_files(run: RunDirectory) -> list[str]:
    return sorted(p.name for p in Path(run.root, ".cache").iterdir() if p.suffix != ".lock")


def test_a_search_that_resumes_elsewhere_stays_what_it_was(context: SimpleNamespace) -> None:
    assert not search._settle(context, HOUR - 1)
    assert not search._settle(context, 100 * HOUR), "begun exactly, on a larger machine"
    assert not context.said
    context.run.delete(search.FOLDER)
    assert search._settle(context, 2 * HOUR)
    assert search._settle(context, 1.0)
    assert len(context.said) == 1 and "neighbors.search=exact" in context.said[0]


def test_the_shards_of_the_tasks_are_the_artifact(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    embed(run)
    for start in (120, 0):
        work(run, start, min(start + 120, ROWS))
    run.finish("neighbors", Manifest("search", "f", {}, {}, ROWS, 1.0))
    ids, similarity = core.search(search.searched(run, 4), 0, ROWS, 5)
    np.testing.assert_array_equal(run.matrix("neighbors", "ids"), ids)
    np.testing.assert_array_equal(run.matrix("neighbors", "similarity"), similarity.astype("f2"))
    assert run.matrix("neighbors", "image_id").tolist() == list(range(2, ROWS + 2))


def test_node_files_of_earlier_embeddings_are_removed(tmp_path: Path) -> None:
    run = RunDirectory(str(tmp_path))
    other = RunDirectory(str(tmp_path), {"embeddings": "store/embeddings-1"})
    for seed, one in ((0, run), (1, other), (2, run)):
        embed(one, seed)
        work(one, 0, ROWS, ivf=True)
    ids = [done.id for one in (run, other) if (done := one.manifest("embeddings"))]
    derived = [name for name in node_files(run) if "components" in name or "ivf" in name]
    assert derived == [
        f"embeddings-components-4-{ids[0]}.npy",
        f"embeddings-ivf-4-{ids[0]}.faiss",
        f"store-embeddings-1-components-4-{ids[1]}.npy",
        f"store-embeddings-1-ivf-4-{ids[1]}.faiss",
    ]
