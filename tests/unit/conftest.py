"""A finished run directory without running anything: what `evaluate` and `report` read.

Shapes: N images, D features, M neighbors, H heads, K clusters.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import pickle
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.rundir import schemas
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.stages.base import Context


class SyntheticRun:
    """One image file, label and feature per row; heads and consensus err at a given rate."""

    def __init__(
        self,
        root: Path,
        images: Sequence[Any],
        labels: np.ndarray,
        names: Sequence[str] | None,
        *,
        overrides: Sequence[str] = (),
        errors: float = 0.1,
        heads: int = 4,
        bad: int = 0,
        file_name: str = "{:05d}.png",
    ) -> None:
        """images: PIL images, or none for a run from embeddings. names: None for no labels.
        bad: so many of the first images are quarantined."""
        self.rng = np.random.default_rng(0)
        self.labels, self.names, self.bad = np.asarray(labels), names, bad
        self.k = int(self.labels.max()) + 1
        self.run = RunDirectory(str(root / "run"))
        self.config = self._config(root, images, [f"heads.count={heads}", *overrides])
        self.uris = self._store(root, images, file_name)
        self.rows = np.arange(bad, len(labels))
        self.truth = self.labels[self.rows]
        self._index()
        self._embeddings()
        self._neighbors()
        self._heads(heads, errors)
        self._consensus(errors)
        self._classifier()

    def _config(self, root: Path, images: Sequence[Any], overrides: Sequence[str]) -> Config:
        data = {"path": str(root / "images")} if len(images) else {"embeddings": "e.npy"}
        if self.names is None:
            data["labels"] = "none"
        tree = {"num_classes": self.k, "run_dir": self.run.uri, "data": data}
        config = configs.load(tree, overrides)
        self.run.write_bytes(configs.to_yaml(config).encode(), "config.yaml")
        return config

    def _store(self, root: Path, images: Sequence[Any], file_name: str) -> list[str]:
        if not len(images):
            return [f"e.npy#{row}" for row in range(len(self.labels))]
        uris = []
        for number, (image, label) in enumerate(zip(images, self.labels, strict=True)):
            folder = root / "images" / (self.names[label] if self.names else "all")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / file_name.format(number)
            image.save(path)
            uris.append(str(path))
        return uris

    def finish(
        self, folder: str, rows: int, results: Any = None, events: Any = (), inputs: Any = None
    ) -> None:
        """The manifest of a stage."""
        read = inputs or {}
        seconds = 3.0 + 11.0 * self.rng.random()
        resources = {"nodes": 1, "cpus": 16, "gpus": 1, "ray": True}
        self.run.finish(
            folder,
            Manifest(folder, "f", {}, read, rows, seconds, results or {}, resources, events),
        )

    def _index(self) -> None:
        count = len(self.labels)
        label = [self.names[code] for code in self.labels] if self.names else [None] * count
        nothing = pa.nulls(count, pa.int64())
        columns = [range(count), self.uris, label, nothing, nothing]
        table = pa.table(
            {
                name: pa.array(column) if isinstance(column, range) else column
                for name, column in zip(schemas.INDEX_SCHEMA.names, columns, strict=True)
            }
        )
        self.run.write_table(table.cast(schemas.INDEX_SCHEMA), "index", "index.parquet")
        self.finish("index", count)

    def _embeddings(self) -> None:
        centers = self.rng.normal(size=(self.k, 32))
        features = centers[self.truth] + self.rng.normal(0, 1.9, (len(self.rows), 32))
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        self.features = features.astype(np.float16)
        self.write_embeddings(self.features)
        if self.bad:
            lost = range(self.bad)
            reason = ["cannot identify image file" if i % 3 else "truncated" for i in lost]
            columns = [list(lost), [self.uris[i] for i in lost], reason]
            table = pa.table(columns, schema=schemas.QUARANTINE_SCHEMA)
            self.run.write_table(table, "embeddings", "_quarantine.parquet")
        self.finish("embeddings", len(self.rows), events=("embed resumes from partial work",))

    def write_embeddings(self, features: np.ndarray) -> None:
        schema = schemas.embeddings_schema(32)
        tensor = schemas.tensor_column(features, schema.field("embedding").type)
        table = pa.table([pa.array(self.rows), tensor], schema=schema)
        self.run.write_table(table, "embeddings", "part-00000.parquet")

    def _neighbors(self, m: int = 8) -> None:
        n = len(self.rows)
        order = np.argsort(self.truth, kind="stable")
        place = np.empty(n, dtype=np.int64)
        place[order] = np.arange(n)
        ids = order[(place[:, None] + np.arange(1, m + 1)) % n].astype(np.int32)
        count = self.rng.integers(2, m + 1, n).astype(np.int32)
        schema = schemas.neighbors_schema(m)
        columns = [
            pa.array(self.rows),
            schemas.tensor_column(ids, schema.field("ids").type),
            schemas.tensor_column(
                np.full((n, m), 0.5, np.float16), schema.field("similarity").type
            ),
        ]
        self.run.write_table(pa.table(columns, schema=schema), "neighbors", "part-00000.parquet")
        self.finish("neighbors", n, {"search": "exact"})
        table = pa.table([pa.array(self.rows), pa.array(count)], schema=schemas.SELECTION_SCHEMA)
        self.run.write_table(table, "selection", "part-00000.parquet")
        counts, edges = np.histogram(count, bins=np.arange(m + 1))
        histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
        results = {"threshold": 0.52, "mean": float(count.mean()), "histogram": histogram}
        self.finish("selection", n, results)

    def _noisy(self, errors: float) -> np.ndarray:
        """Labels under other names, most mistakes going to the next class."""
        wrong = self.rng.random(len(self.truth)) < errors
        shift = np.where(
            self.rng.random(len(self.truth)) < 0.7, 1, self.rng.integers(1, self.k + 1)
        )
        return (np.where(wrong, self.truth + shift, self.truth) + 3) % self.k

    def _heads(self, heads: int, errors: float) -> None:
        columns = [self._noisy(errors * (1.2 + self.rng.random())) for _ in range(heads)]
        assignments = np.stack(columns, axis=1).astype(np.int32)
        kind = pa.fixed_shape_tensor(pa.int32(), [heads])
        tensor = schemas.tensor_column(assignments, kind)
        table = pa.table({"image_id": self.rows, "assignments": tensor})
        self.run.write_table(table, "heads", "assignments.parquet")
        steps = np.arange(0, 2001, 20)
        loss = 2.5 * np.exp(-steps[:, None] / 400) - 1 + self.rng.normal(0, 0.04, (101, heads))
        rate = np.sin(np.pi * np.clip(steps / 2000, 0.05, 1)) * 1e-3
        history = {"step": steps.tolist(), "loss": loss.tolist(), "lr": rate.tolist()}
        self.run.write_bytes(json.dumps(history).encode(), "heads", "_history.json")
        self.finish("heads", len(self.rows))

    def _consensus(self, errors: float) -> None:
        self.clusters = self._noisy(errors).astype(np.int32)
        right = self.clusters == (self.truth + 3) % self.k
        draw = self.rng.beta(9, 1, len(right))
        confidence = np.where(right, draw, 0.3 + 0.5 * self.rng.random(len(right)))
        self.confidence = confidence.astype(np.float32)
        self._predictions("consensus", self.clusters)

    def _classifier(self) -> None:
        other = np.where(self.rng.random(len(self.rows)) < 0.05, 0, self.clusters)
        self._predictions("classifier", other.astype(np.int32))

    def _predictions(self, folder: str, clusters: np.ndarray) -> None:
        columns = [pa.array(self.rows), pa.array(clusters), pa.array(self.confidence)]
        table = pa.table(columns, schema=schemas.CONSENSUS_SCHEMA)
        self.run.write_table(table, folder, f"{folder}.parquet")
        self.finish(folder, len(self.rows))


def plain_images(count: int, size: int = 12) -> list[Image.Image]:
    """Small images of one color each."""
    colors = np.random.default_rng(1).integers(0, 256, (count, 3))
    return [Image.new("RGB", (size, size), tuple(color)) for color in colors.tolist()]


class Done:
    """Stands in for the reference to a task's result."""

    def __init__(self, value: Any) -> None:
        self.value = value


class LocalTasks:
    """Stands in for Cluster: a Ray task is a plain call."""

    def __init__(self) -> None:
        self.calls = 0

    def start(self) -> LocalTasks:
        return self

    def remote(self, **_: Any) -> Any:
        def bind(function: Any) -> Any:
            self.calls += 1
            return types.SimpleNamespace(remote=lambda *given: Done(function(*given)))

        return bind

    def get(self, ref: Done) -> Any:
        return ref.value

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return refs, []

    def gpus_each(self, wanted: float | None = None) -> float:
        return 0.0

    def cpus_each(self, workers: int, gpus: float) -> float:
        return 1


def context_of(made: SyntheticRun) -> Context:
    reporter = Reporter(made.run, quiet=True)
    return Context(made.config, made.run, reporter, LocalTasks())  # type: ignore[arg-type]


Handler = type[http.server.SimpleHTTPRequestHandler]


@pytest.fixture
def serve() -> Callable[[Handler, Path], contextlib.AbstractContextManager[str]]:
    """A function that serves a folder by HTTP from this process; gives the address."""

    @contextlib.contextmanager
    def serving(kind: Handler, folder: Path) -> Iterator[str]:
        handler = functools.partial(kind, directory=str(folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()

    return serving


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """make_run(N, K, names=..., images=True, **options of SyntheticRun) -> SyntheticRun."""

    def make(count: int, clusters: int, names: Any = "plain", images: bool = True, **more: Any):
        labels = np.arange(count) % clusters
        if names == "plain":
            names = [f"class-{code}" for code in range(clusters)]
        pictures = plain_images(count) if images else []
        return SyntheticRun(tmp_path, pictures, labels, names, **more)

    return make


@pytest.fixture
def make_context() -> Any:
    """make_context(SyntheticRun) -> Context without Ray."""
    return context_of


class PickledScalar(pa.ExtensionScalar):
    """A value that is unpickled where it is looked at."""

    def as_py(self, **_: Any) -> Any:
        return pickle.loads(self.value.as_py())


class PickledArray(pa.ExtensionArray):
    """The same of many values."""

    def to_numpy(self, **_: Any) -> Any:
        return np.array(self.to_pylist(), object)


class PickledType(pa.ExtensionType):
    """As Ray Data's `ray.data.arrow_pickled_object`, which importing ray.data registers."""

    def __init__(self) -> None:
        super().__init__(pa.large_binary(), "test.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> PickledType:
        return cls()

    def __arrow_ext_class__(self) -> type:
        return PickledArray

    def __arrow_ext_scalar_class__(self) -> type:
        return PickledScalar


@pytest.fixture
def pickled(tmp_path: Path) -> Iterator[Any]:
    """pickled(N) -> a column of N values. Unpickling one fails the test."""
    trap = tmp_path / "unpickled"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (trap,)

    def column(count: int) -> pa.Array:
        storage = pa.array([pickle.dumps(Evil())] * count, pa.large_binary())
        return pa.ExtensionArray.from_storage(PickledType(), storage)

    pa.register_extension_type(PickledType())
    try:
        yield column
    finally:
        pa.unregister_extension_type("test.pickled")
    assert not trap.exists(), "a pickle was loaded"
