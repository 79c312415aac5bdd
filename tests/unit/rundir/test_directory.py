"""The run directory: writes are whole, reads are checked, half-done work resumes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.errors import ArtifactError, StageError
from icce_ray.rundir import directory as artifacts
from icce_ray.rundir import schemas
from icce_ray.rundir.cache import NodeCache
from icce_ray.rundir.directory import (
    Manifest,
    RunDirectory,
    differing_keys,
    fingerprint,
    stored,
)
from icce_ray.rundir.storage import Storage


@pytest.fixture
def run(tmp_path):
    return RunDirectory(str(tmp_path / "run"))


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A run directory on something that behaves like an object store."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setenv("ICCE_RAY_CACHE", str(tmp_path / "cache"))
    store = pafs.PyFileSystem(pafs.FSSpecHandler(MemoryFileSystem(skip_instance_cache=True)))
    run = RunDirectory(f"store://bucket/{tmp_path.name}")
    run.storage._opened = (store, f"/bucket/{tmp_path.name}")
    return run


@pytest.fixture(params=["run", "remote"])
def anywhere(request):
    """The same on a disk and on an object store."""
    return request.getfixturevalue(request.param)


def finish(run, folder="embeddings", rows=0, **options):
    manifest = Manifest(folder, "f", {}, {}, rows, 1.0, **options)
    run.finish(folder, manifest)
    return manifest


def write_embeddings(run, *parts, features=4, first=0):
    """Shards of that many rows each; returns the whole matrix, float16."""
    matrix = np.random.default_rng(first).normal(size=(sum(parts), features)).astype(np.float16)
    schema, start = schemas.embeddings_schema(features), 0
    for number, rows in enumerate(parts):
        tensor = schemas.tensor_column(matrix[start : start + rows], schema.field("embedding").type)
        table = pa.table([np.arange(start, start + rows), tensor], schema=schema)
        run.write_table(table, "embeddings", f"part-{number:05d}.parquet")
        start += rows
    return matrix


def files(path):
    return sorted(p.name for p in Path(path).rglob("*") if p.is_file())


# --- writing -------------------------------------------------------------------------------------


class Broken:
    """Stands for an open file whose disk fails while it is written."""

    def __init__(self, stream, code):
        self.stream, self.code = stream, code

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, data):
        self.stream.write(bytes(data)[: len(data) // 2])
        self.stream.flush()
        raise OSError(self.code, os.strerror(self.code))


@pytest.fixture
def disk_fails(monkeypatch):
    """disk_fails(code): from now on, every write to a temporary file stops half way."""
    whole = Path.open

    def start(code):
        def half(self, mode="r", *args, **kwargs):
            stream = whole(self, mode, *args, **kwargs)
            temporary = ".tmp" in self.name
            return Broken(stream, code) if temporary and "w" in mode else stream

        monkeypatch.setattr(Path, "open", half)

    yield start
    monkeypatch.undo()


def test_what_is_written_is_read(anywhere):
    anywhere.write_bytes(b"data", "x", "b")
    anywhere.write_json({"n": np.int64(3), "a": np.arange(2), "f": np.float32(0.5)}, "x", "j.json")
    assert anywhere.read_bytes("x", "b") == b"data"
    assert anywhere.read_json("x", "j.json") == {"n": 3, "a": [0, 1], "f": 0.5}
    assert anywhere.list("x") == ["b", "j.json"] and anywhere.list("x", ".json") == ["j.json"]
    assert anywhere.exists("x", "b") and not anywhere.exists("x", "c")
    anywhere.write_bytes(b"other", "x", "b")
    assert anywhere.read_bytes("x", "b") == b"other"
    assert anywhere.list("nowhere") == []
    with pytest.raises(ArtifactError, match="missing"):
        anywhere.read_bytes("x", "none")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(run, disk_fails, code):
    run.write_bytes(b"old", "x", "file")
    disk_fails(code)
    with pytest.raises((OSError, StageError)):
        run.write_bytes(b"new and longer", "x", "file")
    with pytest.raises((OSError, StageError)):
        run.write_bytes(b"new and longer", "x", "other")
    assert files(run.root) == ["file"]
    assert run.read_bytes("x", "file") == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(run, disk_fails, code):
    disk_fails(code)
    with pytest.raises(StageError, match=r"no disk space left while writing .*run/x/file"):
        run.write_bytes(b"0123", "x", "file")
    with pytest.raises(StageError, match="no disk space left"):
        run.write_table(pa.table({"a": [1]}), "x", "t.parquet")


def test_other_failures_keep_their_own_error(run, disk_fails):
    disk_fails(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        run.write_bytes(b"0123", "x", "file")


def test_a_full_store_says_so(remote, monkeypatch):
    def full(path):
        raise OSError("AWS Error: No space left on device")

    monkeypatch.setattr(Storage, "_write_remote", lambda self, path, data: full(path))
    with pytest.raises(StageError, match="no disk space left"):
        remote.write_bytes(b"x", "a")


def test_temporary_files_of_others_are_not_listed(run):
    run.write_bytes(b"x", "a", "b.parquet")
    Path(run.path("a", ".tmp-c.parquet-12")).write_bytes(b"half")
    assert run.list("a") == ["b.parquet"]


def test_a_reader_never_sees_half_a_file(run):
    stop = threading.Event()
    run.write_bytes(b"a" * 200_000, "f")
    sizes = set()

    def read():
        while not stop.is_set():
            sizes.add(len(set(run.read_bytes("f"))) * len(run.read_bytes("f")))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in (b"b", b"c", b"d") * 5:
        run.write_bytes(letter * 200_000, "f")
    stop.set()
    reader.join()
    assert sizes == {200_000}


def test_a_run_directory_travels_as_its_address(run):
    assert run.filesystem is not None  # opened
    again = pickle.loads(pickle.dumps(run))
    assert again.uri == run.uri and again.storage._opened is None and again.root == run.root


def test_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDirectory("runs/a b").root == str(tmp_path / "runs" / "a b")
    assert RunDirectory("~/r").root == str(tmp_path / "r")
    assert RunDirectory(f"file://{tmp_path}/r").is_local
    assert RunDirectory("runs/x/").path("a", "b.json") == str(tmp_path / "runs" / "x" / "a/b.json")
    with pytest.raises(ArtifactError, match="nothing://x/ cannot be opened"):
        RunDirectory("nothing://x").exists("a")


def test_free_space_of_a_directory_that_is_not_there_yet(run, remote):
    assert run.free_bytes() > 0
    assert remote.free_bytes() is None


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"nope"])
def test_damaged_json_is_named(anywhere, content):
    anywhere.write_bytes(content, "x", "d.json")
    with pytest.raises(ArtifactError, match=r"x/d\.json is damaged"):
        anywhere.read_json("x", "d.json")


def test_tables_by_file_and_by_folder(anywhere):
    for number in (1, 0):
        anywhere.write_table(pa.table({"a": [number], "b": ["x"]}), "x", f"part-{number}.parquet")
    assert anywhere.read_table("x", "part-1.parquet")["a"].to_pylist() == [1]
    whole = anywhere.read_table("x", columns=["a"])
    assert whole.to_pydict() == {"a": [0, 1]}


def test_tables_that_cannot_be_read(anywhere):
    with pytest.raises(ArtifactError, match="holds no Parquet files"):
        anywhere.read_table("x")
    with pytest.raises(ArtifactError, match="missing"):
        anywhere.read_table("x", "a.parquet")
    anywhere.write_bytes(b"PAR1 no PAR1", "x", "a.parquet")
    with pytest.raises(ArtifactError, match=r"a\.parquet cannot be read"):
        anywhere.read_table("x", "a.parquet")
    anywhere.write_table(pa.table({"a": [1]}), "x", "a.parquet")
    with pytest.raises(ArtifactError, match="cannot be read"):
        anywhere.read_table("x", "a.parquet", columns=["none"])


def test_tables_are_never_unpickled(run, pickled):
    column = pickled(2)
    lists = pa.ListArray.from_arrays([0, 1, 2], column)
    words = pa.DictionaryArray.from_arrays([0, 1], pa.array(["a", "b"]))
    for values in (column, lists, pa.StructArray.from_arrays([column], ["a"])):
        run.write_table(pa.table({"image_id": values, "word": words}), "index", "index.parquet")
        with pytest.raises(ArtifactError, match="holds Python objects"):
            run.read_table("index")
        assert run.read_table("index", columns=["word"]).num_rows == 2
    with pytest.raises(ArtifactError, match="holds Python objects"):
        schemas.to_matrix(lists)


def test_what_stored_files_should_not_hold_is_an_error_of_ours():
    with pytest.raises(ArtifactError, match="the index is damaged"), stored("the index"):
        pc.min_max(pa.array([[1], [2]]))


def test_the_path_adds_no_columns(tmp_path):
    run = RunDirectory(str(tmp_path / "lr=0.1" / "k=3"))  # looks like a partitioned data set
    run.write_table(pa.table({"a": [1]}), "x", "t.parquet")
    assert run.read_table("x", "t.parquet").column_names == ["a"]


def test_a_file_system_below_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("ICCE_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "below" / "run" / "embeddings").mkdir(parents=True)
    run = RunDirectory("below://run")
    run.storage._opened = (
        pafs.SubTreeFileSystem(str(tmp_path / "below"), pafs.LocalFileSystem()),
        "run",
    )
    matrix = write_embeddings(run, 3, 4)
    finish(run, rows=7)
    assert run.manifest("embeddings").rows == 7 and not run.is_local
    found = run.matrix("embeddings", "embedding")
    assert (found == matrix).all() and (tmp_path / "cache") in Path(found.filename).parents
    assert len(files(tmp_path / "below")) == 3  # the cache is no part of the run


# --- columns -------------------------------------------------------------------------------------

KINDS = st.sampled_from(
    [(pa.float16(), np.float16), (pa.int32(), np.int32), (pa.int16(), np.int16)]
)


@settings(max_examples=30, deadline=None)
@given(KINDS, st.integers(0, 6), st.integers(1, 4), st.data())
def test_a_matrix_survives_the_way_through_a_column(kind, rows, width, data):
    arrow, plain = kind
    array = np.random.default_rng(rows).integers(-99, 99, (rows, width)).astype(plain)
    column = schemas.tensor_column(array, pa.fixed_shape_tensor(arrow, [width]))
    found = schemas.to_matrix(column)
    assert found.dtype == plain and (found == array).all() and found.shape == array.shape
    start = data.draw(st.integers(0, rows))
    for form in (
        column,
        pa.chunked_array([column.slice(0, start), column.slice(start)]),
        column.storage,
    ):
        found = schemas.to_matrix(form[start:])
        assert found.shape == (rows - start, width) and (found == array[start:]).all()


def test_a_column_that_is_not_contiguous():
    array = np.arange(24, dtype=np.int32).reshape(4, 6)[:, ::2]
    column = schemas.tensor_column(array, pa.fixed_shape_tensor(pa.int32(), [3]))
    assert (schemas.to_matrix(column) == array).all()


def test_lists_of_one_length_are_a_matrix_and_others_an_error():
    lists = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert schemas.to_matrix(lists).tolist() == lists.to_pylist()
    assert schemas.to_matrix(lists[1:]).tolist() == lists.to_pylist()[1:]
    assert schemas.to_matrix(lists.cast(pa.large_list(pa.float64()))).shape == (3, 2)
    with pytest.raises(ArtifactError, match="differ in length"):
        schemas.to_matrix(pa.array([[1.0], [1.0, 2.0]]))
    assert schemas.to_matrix(pa.chunked_array([], pa.int64())).shape == (0,)


def test_embeddings_are_plain_parquet(run):
    matrix = write_embeddings(run, 5)
    path = run.path("embeddings", "part-00000.parquet")
    column = pq.read_table(path)["embedding"]
    assert str(column.type).startswith("extension<arrow.fixed_shape_tensor")
    tensor = column.combine_chunks()
    tensor = tensor.chunk(0) if isinstance(tensor, pa.ChunkedArray) else tensor
    assert tensor.to_numpy_ndarray().dtype == np.float16
    assert (tensor.to_numpy_ndarray() == matrix).all()
    stored = pq.ParquetFile(path).schema_arrow.field("embedding").type.storage_type
    assert stored.value_type == pa.float16() and stored.list_size == 4


# --- manifests -----------------------------------------------------------------------------------


def test_a_manifest_comes_back(anywhere):
    assert anywhere.manifest("x") is None
    written = Manifest(
        stage="x",
        fingerprint="abc",
        settings={"a": {"b": [1, None]}},
        inputs={"index": "1"},
        rows=7,
        seconds=1.5,
        results={"n": np.int64(2), "q": np.array([0.5])},
        events=("a worker was lost",),
    )
    anywhere.finish("x", written)
    found = anywhere.manifest("x")
    plain = json.loads(json.dumps(vars(written), default=artifacts._plain))
    assert vars(found) == plain
    assert found.id == written.id and found.results == {"n": 2, "q": [0.5]}
    assert found.versions["python"] and "torch" in found.versions


def test_two_manifests_differ_in_id():
    one, two = (Manifest("x", "f", {}, {}, 1, 1.0) for _ in range(2))
    assert one.id != two.id and one.format == artifacts.FORMAT_VERSION


@pytest.mark.parametrize("content", ["{", "[1]", '{"stage": "x"}', '{"newer": 1}', "null"])
def test_a_damaged_manifest_is_an_error_of_ours(run, content):
    run.write_bytes(content.encode(), "x", "_manifest.json")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        run.manifest("x")


def test_another_format_is_refused_with_the_remedy(run):
    finish(run, "x", format=artifacts.FORMAT_VERSION + 1)
    with pytest.raises(ArtifactError, match=r"format 5; this one reads 4.*another run_dir"):
        run.manifest("x")


def test_begin_reuses_partial_work_of_the_same_mark_alone(anywhere):
    mark = {"fingerprint": "a", "settings": {"k": (1, 2)}, "inputs": {}}
    assert anywhere.partial("x") is None
    assert anywhere.begin("x", mark) is False
    anywhere.write_bytes(b"1", "x", "shard")
    assert anywhere.partial("x") == {**mark, "settings": {"k": [1, 2]}}
    assert anywhere.begin("x", mark) is True and anywhere.exists("x", "shard")
    assert anywhere.begin("x", {**mark, "fingerprint": "b"}) is False
    assert not anywhere.exists("x", "shard")
    assert anywhere.partial("x")["fingerprint"] == "b"


def test_begin_may_keep_files_until_they_are_replaced(run):
    run.write_bytes(b"1", "x", "shard")
    finish(run, "x")
    assert run.begin("x", {"fingerprint": "b"}, keep=True) is False
    assert run.manifest("x") is None and run.read_bytes("x", "shard") == b"1"


def test_a_finished_stage_is_not_partial_and_begins_anew(run):
    mark = {"fingerprint": "a"}
    run.begin("x", mark)
    run.write_bytes(b"1", "x", "shard")
    finish(run, "x")
    assert run.partial("x") is None and not run.exists("x", "_partial.json")
    assert run.begin("x", mark) is False
    assert run.manifest("x") is None and not run.exists("x", "shard")


def test_a_stage_killed_between_manifest_and_cleaning_counts_as_finished(run):
    run.begin("x", {"fingerprint": "a"})
    run.write_json(vars(Manifest("x", "f", {}, {}, 1, 1.0)), "x", "_manifest.json")
    assert run.partial("x") is None and run.manifest("x") is not None


def test_delete_takes_the_manifest_first(run, monkeypatch):
    finish(run, "x")
    run.write_bytes(b"1", "x", "shard")

    def lost(self, path):
        raise OSError("connection lost")

    class Weak:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        delete_dir = lost

    inner, root = run.filesystem, run.root
    run.storage._opened = (Weak(inner), root)
    with pytest.raises(OSError, match="lost"):
        run.delete("x")
    run.storage._opened = (inner, root)
    assert run.manifest("x") is None  # what is left cannot pass for finished work
    run.delete("x")
    run.delete("x")
    assert not run.exists("x")


def test_fingerprints_follow_content_not_order():
    one = fingerprint("heads", {"a": 1, "b": {"c": [2], "d": None}}, {"x": "1", "y": "2"})
    assert one == fingerprint("heads", {"b": {"d": None, "c": [2]}, "a": 1}, {"y": "2", "x": "1"})
    others = [
        fingerprint("head", {"a": 1, "b": {"c": [2], "d": None}}, {"x": "1", "y": "2"}),
        fingerprint("heads", {"a": 1, "b": {"c": [3], "d": None}}, {"x": "1", "y": "2"}),
        fingerprint("heads", {"a": 1, "b": {"c": [2], "d": None}}, {"x": "1", "y": "3"}),
        fingerprint("heads", {"a": True, "b": {"c": [2], "d": None}}, {"x": "1", "y": "2"}),
    ]
    assert len({one, *others}) == 5


def test_differing_keys_name_both_values():
    old = {"heads": {"lr": 0.1, "hidden": [1], "gone": 1}, "seed": 0, "same": {"x": None}}
    new = {"heads": {"lr": 0.2, "hidden": [1], "new": "a"}, "seed": 0, "same": {"x": None}}
    assert differing_keys(old, new) == [
        "heads.gone: 1 -> None",
        "heads.lr: 0.1 -> 0.2",
        "heads.new: None -> 'a'",
    ]
    assert differing_keys(old, old) == []
    assert differing_keys({"a": {"b": 1}}, {"a": 2}) == ["a: {'b': 1} -> 2"]


# --- big matrices --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(7,), (5, 1, 9)])
def test_a_matrix_is_its_shards_joined_and_mapped(anywhere, parts):
    matrix = write_embeddings(anywhere, *parts)
    finish(anywhere, rows=len(matrix))
    found = anywhere.matrix("embeddings", "embedding")
    assert isinstance(found, np.memmap) and found.mode == "r" and not found.flags.writeable
    assert found.dtype == np.float16 and (found == matrix).all()
    assert (anywhere.matrix("embeddings", "image_id") == np.arange(len(matrix))).all()
    again = anywhere.matrix("embeddings", "embedding")
    assert again.filename == found.filename


def test_the_file_of_a_matrix_is_kept_and_shared(run):
    write_embeddings(run, 6)
    finish(run, rows=6)
    file = Path(run.matrix("embeddings", "embedding").filename)
    before = file.stat()
    again = RunDirectory(run.uri).matrix("embeddings", "embedding")
    assert Path(again.filename) == file and file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_ino == before.st_ino
    assert not run.list(".cache", ".tmp")


def test_a_new_manifest_makes_a_new_matrix_and_drops_the_old(run):
    write_embeddings(run, 6)
    finish(run, rows=6)
    old = run.matrix("embeddings", "embedding").filename
    run.delete("embeddings")
    matrix = write_embeddings(run, 4, first=1)
    finish(run, rows=4)
    found = run.matrix("embeddings", "embedding")
    assert (found == matrix).all() and not Path(old).exists()


def test_quarantine_is_no_part_of_the_matrix(run):
    matrix = write_embeddings(run, 3, 2)
    bad = pa.table([[9], ["u"], ["broken"]], schema=schemas.QUARANTINE_SCHEMA)
    run.write_table(bad, "embeddings", "_quarantine.parquet")
    finish(run, rows=5)
    assert (run.matrix("embeddings", "embedding") == matrix).all()
    assert len(run.read_table("embeddings")) == 5


def test_a_matrix_of_an_unfinished_stage_is_refused(run):
    write_embeddings(run, 3)
    with pytest.raises(ArtifactError, match="not finished; run that stage first"):
        run.matrix("embeddings", "embedding")


@pytest.mark.parametrize("rows", [4, 6])
def test_shards_that_do_not_match_the_manifest_are_refused(run, rows):
    write_embeddings(run, 3, 2)
    finish(run, rows=rows)
    with pytest.raises(ArtifactError, match=f"has 5 rows, its manifest {rows}"):
        run.matrix("embeddings", "embedding")
    assert not [n for n in files(run.root) if n.endswith((".npy", ".tmp"))]


def test_shards_of_different_width_are_refused(run):
    write_embeddings(run, 3, 2)
    schema = schemas.embeddings_schema(5)
    tensor = schemas.tensor_column(np.zeros((2, 5), np.float16), schema.field("embedding").type)
    run.write_table(pa.table([[3, 4], tensor], schema=schema), "embeddings", "part-00001.parquet")
    finish(run, rows=5)
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet does not fit part-00000"):
        run.matrix("embeddings", "embedding")


def test_a_stage_without_shards_is_refused(run):
    finish(run, rows=0)
    with pytest.raises(ArtifactError, match="has 0 rows"):
        run.matrix("embeddings", "embedding")
    assert not [n for n in files(run.root) if n.endswith((".npy", ".tmp"))]


def test_a_full_disk_while_a_matrix_is_built(run, disk_fails):
    matrix = write_embeddings(run, 6)
    finish(run, rows=6)
    disk_fails(errno.ENOSPC)
    with pytest.raises(StageError, match=r"no disk space left while writing .*embedding"):
        run.matrix("embeddings", "embedding")
    assert not [n for n in files(run.root) if n.endswith((".npy", ".tmp"))]
    assert len(matrix) == 6


def test_many_readers_build_one_matrix(run, monkeypatch):
    matrix = write_embeddings(run, 20)
    finish(run, rows=20)
    built, build = [], NodeCache.write_matrix
    monkeypatch.setattr(
        NodeCache, "write_matrix", lambda self, *a: (built.append(a), build(self, *a))
    )
    found = []
    readers = [
        threading.Thread(
            target=lambda: found.append(RunDirectory(run.uri).matrix("embeddings", "embedding"))
        )
        for _ in range(6)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(built) == 1 and len(found) == 6
    assert all((array == matrix).all() for array in found)


def test_folders_may_lie_elsewhere(tmp_path: Path) -> None:
    places = {"heads": "store/heads-1", "neighbors": "n"}
    view = pickle.loads(pickle.dumps(RunDirectory(str(tmp_path), places)))
    assert view.places == places and view.is_local
    assert view.path("heads", "a.json") == f"{tmp_path}/store/heads-1/a.json"
    assert view.path("heads/train", "a") == f"{tmp_path}/store/heads-1/train/a"
    assert view.address("neighbors") == f"{tmp_path}/n" and view.path() == str(tmp_path)
    assert view.path("neighborsandmore", "a") == f"{tmp_path}/neighborsandmore/a"
    assert view.path("index", "a") == f"{tmp_path}/index/a"
