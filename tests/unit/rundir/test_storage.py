"""Object stores: addresses, patience, errors; against a real S3 server on this machine."""

from __future__ import annotations

import contextlib
import errno
import io
import pickle
import resource
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from icce_ray import config, pipeline
from icce_ray.config.schema import DataConfig
from icce_ray.data import embeddings as vectors
from icce_ray.data import reading as images
from icce_ray.data.labels import read_labels
from icce_ray.data.listing import list_images
from icce_ray.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    IcceError,
    NoAnswerError,
    StageError,
    StorageError,
)
from icce_ray.rundir import addresses, copies, schemas, storage
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import index
from icce_ray.stages.predict import _target

# --- addresses -----------------------------------------------------------------------------------

REMOTE = "s3://bucket/a?region=us-east-1&endpoint_override=localhost:1"


def test_names_are_joined_before_the_options() -> None:
    join = addresses.join_uri
    assert join("/a/b/", "c/d.png") == "/a/b/c/d.png"
    assert join(REMOTE, "b c.png") == REMOTE.replace("?", "/b c.png?")
    full = "s3://bucket/a/?endpoint_override=http://localhost:1&scheme=http"
    assert (
        join(full, "b", "c") == "s3://bucket/a/b/c?endpoint_override=http://localhost:1&scheme=http"
    )
    assert join("s3://bucket/what?/a", "b") == "s3://bucket/what?/a/b"  # a name, not options
    assert join("/what?region=x", "b") == "/what?region=x/b"


def test_odd_object_names_are_taken_as_they_are() -> None:
    filesystem, path = storage.locate(REMOTE.replace("?", "/b c#1.png?"))
    assert path == "bucket/a/b c#1.png" and filesystem.type_name == "s3"
    assert storage.locate("/a b/c.png")[1] == "/a b/c.png"
    assert storage.locate("file:///a/b")[1] == "/a/b"


@pytest.mark.parametrize("uri", ["nothing://x", "s3://bucket/x?region=a&what=1", "abfs://c/x"])
def test_an_address_that_cannot_be_understood(uri: str) -> None:
    with pytest.raises(ArtifactError, match=rf"^{uri[:6]}.* cannot be opened: "):
        storage.open_filesystem(uri)


def test_an_address_with_a_secret_is_refused_and_not_shown() -> None:
    for uri in (
        "s3://key:hunter2@bucket/x",
        "abfs://c@a.dfs.core.windows.net/x?client_id=a&client_secret=hunter2",
    ):
        with pytest.raises(ArtifactError, match="must not hold a password") as caught:
            storage.Storage(uri).exists()
        assert "hunter2" not in str(caught.value)
    assert storage.locate("s3://bucket/a:b@c?region=us-east-1")[1] == "bucket/a:b@c"


def test_where_predictions_go() -> None:
    folder, target = _target("s3://bucket/a/out/?region=us-east-1")
    assert folder == "out" and target.uri == "s3://bucket/a?region=us-east-1"
    assert target.address(folder) == "s3://bucket/a/out?region=us-east-1"
    with pytest.raises(IcceError, match="below the bucket"):
        _target("s3://bucket?region=us-east-1")


def test_the_environment_names_the_server_as_well(s3, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    storage._filesystem.cache_clear()
    try:
        RunDirectory(f"s3://{s3.bucket}/by-environment").write_bytes(b"x", "a b#c")
    finally:
        storage._filesystem.cache_clear()
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert RunDirectory(s3.uri("by-environment")).read_bytes("a b#c") == b"x"


# --- the run directory ---------------------------------------------------------------------------


def finish(run: RunDirectory, folder: str, rows: int) -> Manifest:
    manifest = Manifest(folder, "f", {}, {}, rows, 1.0)
    run.finish(folder, manifest)
    return manifest


def test_files_come_back_and_replace_each_other(s3) -> None:
    run = pickle.loads(pickle.dumps(RunDirectory(s3.uri("files/run"))))
    assert not run.exists("x") and run.list("x") == [] and run.folders("") == []
    big = np.random.default_rng(0).bytes(12 << 20)  # more than one part of an upload
    run.write_bytes(big, "x", "big")
    run.write_bytes(b"", "x", "empty")
    run.write_json({"a": 1}, "x", "sub", "deep.json")
    assert run.read_bytes("x", "big") == big and run.read_bytes("x", "empty") == b""
    assert run.list("x") == ["big", "empty"] and run.folders("x") == ["sub"]
    run.write_bytes(b"other", "x", "big")
    assert run.read_bytes("x", "big") == b"other"
    with pytest.raises(ArtifactError, match="none is missing"):
        run.read_bytes("x", "none")


def test_a_reader_never_sees_half_an_object(s3) -> None:
    run = RunDirectory(s3.uri("whole/run"))
    contents = [bytes([i]) * (6 << 20) for i in range(3)]
    run.write_bytes(contents[0], "x")
    ended = threading.Event()

    def write() -> None:
        for content in contents:
            run.write_bytes(content, "x")
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while not ended.is_set():
        seen.add(run.read_bytes("x"))
    writer.join()
    assert seen <= set(contents) and run.read_bytes("x") == contents[-1]


def test_a_patience_that_is_no_number_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ICCE_RAY_STORAGE_PATIENCE", "abc")
    with pytest.raises(ConfigError, match="PATIENCE=abc must be a number of seconds"):
        storage.Storage(str(tmp_path)).list()


def test_a_folder_of_many_files_is_listed_and_deleted(s3) -> None:
    run = RunDirectory(s3.uri("many/run"))
    for number in range(1030):  # a listing, and a deletion, hold 1000 at most
        run.write_bytes(b"", "x", f"{number:04d}")
    run.write_bytes(b"", "xy", "other")
    finish(run, "x", 0)
    assert len(run.list("x")) == 1031
    run.delete("x")
    run.delete("x")
    assert run.list("x") == [] and run.manifest("x") is None and not run.exists("x")
    assert run.list("xy") == ["other"]


def test_an_emptied_folder_holds_nothing_to_resume(s3) -> None:
    run = RunDirectory(s3.uri("emptied/run"))
    run.write_bytes(b"", "heads", "train", "step-1", "x")
    run.delete("heads/train")  # leaves the empty "folder" heads/ behind, as an object
    assert run.list("heads") == [] and run.folders("heads") == []
    assert run.partial("heads") is None and run.manifest("heads") is None
    assert run.begin("heads", {"fingerprint": "f"}) is False


def test_partial_and_finished_work(s3) -> None:
    run = RunDirectory(s3.uri("stages/run"))
    mark = {"fingerprint": "f", "settings": {}, "inputs": {}}
    assert run.begin("x", mark) is False and run.begin("x", mark) is True
    assert run.partial("x") == mark
    made = finish(run, "x", 3)
    assert run.partial("x") is None and run.manifest("x").id == made.id  # type: ignore[union-attr]
    assert run.list("x") == ["_manifest.json"]


def test_a_matrix_is_built_in_the_nodes_cache(s3, tmp_path) -> None:
    run = RunDirectory(s3.uri("matrix/run"))
    whole = np.arange(24, dtype=np.float16).reshape(6, 4)
    schema = schemas.embeddings_schema(4)
    for part in range(2):
        rows = slice(3 * part, 3 * part + 3)
        tensor = schemas.tensor_column(whole[rows], schema.field("embedding").type)
        table = pa.table([np.arange(6)[rows], tensor], schema=schema)
        run.write_table(table, "embeddings", f"part-{part:05d}.parquet")
    finish(run, "embeddings", 6)
    found = run.matrix("embeddings", "embedding")
    assert (found == whole).all() and str(tmp_path / "cache") in str(found.filename)
    assert run.read_table("embeddings")["image_id"].to_pylist() == list(range(6))


def _one_matrix(run: RunDirectory) -> np.ndarray:
    table = pa.table({"image_id": np.arange(50_000)})
    run.write_table(table, "embeddings", "part-00000.parquet")
    finish(run, "embeddings", 50_000)
    return table["image_id"].to_numpy()


def test_a_full_cache_disk_is_named_with_its_remedy(s3, tmp_path) -> None:
    run = RunDirectory(s3.uri("full-cache/run"))
    values = _one_matrix(run)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # of 400 kB
    try:
        with pytest.raises(StageError, match=r"no disk space left .*cache/.*ICCE_RAY_CACHE"):
            run.matrix("embeddings", "image_id")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix in (".npy", ".tmp")]
    assert (run.matrix("embeddings", "image_id") == values).all()


def test_a_full_cache_disk_under_an_index(s3) -> None:
    from icce_ray.core import neighbors

    run = RunDirectory(s3.uri("full-index/run"))
    path = run.node_file("ivf.faiss")
    matrix = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float16)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # of 256 kB
    try:
        with pytest.raises(StageError, match="no disk space left"), run.writing(path):
            neighbors.build_ivf(matrix, path, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(path.parent.iterdir())
    with run.writing(path):
        neighbors.build_ivf(matrix, path, seed=0)
    assert path.stat().st_size > 256_000


def test_a_cache_that_cannot_be_written(s3, monkeypatch) -> None:
    monkeypatch.setenv("ICCE_RAY_CACHE", "/dev/null/cache")
    with pytest.raises(StageError, match="Name another folder by ICCE_RAY_CACHE"):
        RunDirectory(s3.uri("no-cache/run")).node_file("x")


# --- data ----------------------------------------------------------------------------------------


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), value).save(buffer, "png")
    return buffer.getvalue()


def put(uri: str, data: bytes) -> None:
    filesystem, path = storage.locate(uri)
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_all(uri: str) -> tuple[list[bytes], list[str | None], str]:
    listing = list_images(DataConfig(path=uri))
    columns = (listing.table[name].to_pylist() for name in ("uri", "offset", "size"))
    return images.read_many(*columns), listing.table["label"].to_pylist(), listing.kind  # type: ignore[return-value]


def test_images_of_every_kind_are_listed_and_read(s3) -> None:
    pictures = [png(value) for value in (10, 20, 30)]
    for number, data in enumerate(pictures):
        put(s3.uri(f"folder/{number % 2}/image {number}?.png"), data)
    found, labels, kind = read_all(s3.uri("folder"))
    assert kind == "folder" and labels == ["0", "0", "1"]
    assert found == [pictures[0], pictures[2], pictures[1]]
    put(s3.uri("tars/a.tar"), tar_of({f"{n}.png": data for n, data in enumerate(pictures)}))
    assert read_all(s3.uri("tars"))[::2] == (pictures, "webdataset")
    table = pa.table({"image": pictures, "label": ["x", "y", "x"]})
    RunDirectory(s3.uri("tables")).write_table(table, "one.parquet")
    assert read_all(s3.uri("tables")) == (pictures, ["x", "y", "x"], "parquet")
    assert read_all(s3.uri("tables/one.parquet"))[0] == pictures


def test_embeddings_and_labels_are_read(s3) -> None:
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    for name, array in (("x.npy", values), ("y.npy", np.arange(6))):
        buffer = io.BytesIO()
        np.save(buffer, array)
        put(s3.uri(f"given/{name}"), buffer.getvalue())
    given = vectors.open_vectors(s3.uri("given/x.npy"))
    assert (np.concatenate(list(given.blocks(4))) == values).all()
    assert read_labels(s3.uri("given/y.npy")).tolist() == list(range(6))
    table = pa.table({"embedding": values.tolist(), "label": list("aabbcc")})
    RunDirectory(s3.uri("given")).write_table(table, "x.parquet")
    given = vectors.open_vectors(s3.uri("given/x.parquet"))
    assert (np.concatenate(list(given.blocks(4))) == values).all()
    labels = vectors.read_column(given.files, "label")
    assert labels is not None and labels.to_pylist() == list("aabbcc")


def test_weights_are_copied_once_and_again_after_a_change(
    s3, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("ICCE_RAY_CACHE", str(tmp_path))
    put(uri := s3.uri("weights/w.pth"), b"first")
    first = copies.local("backbone.weights", uri)
    assert first == copies.local("backbone.weights", uri) and storage.read(first) == b"first"
    put(uri, b"second one")
    assert storage.read(copies.local("backbone.weights", uri)) == b"second one"
    with pytest.raises(ConfigError, match="there is no such file"):
        copies.check("backbone.weights", s3.uri("weights/none.pth"))


# --- what will not pass --------------------------------------------------------------------------


def settings(run_dir: str, **data: str) -> config.Config:
    return config.load(
        {"num_classes": 2, "data": {"embeddings": "x.npy", **data}}, [f"run_dir={run_dir}"]
    )


def fails(uri: str, match: str) -> None:
    """A run whose run_dir cannot be used ends at once, with one line that says why."""
    start = time.monotonic()
    with pytest.raises(StorageError, match=match) as caught:
        pipeline.run(settings(uri), quiet=True)
    assert time.monotonic() - start < 30 and "\n" not in str(caught.value)


def test_settings_are_read(s3) -> None:
    """As a sweep in a bucket leaves them."""
    uri = s3.uri("sweep/best.yaml")
    RunDirectory(s3.uri("sweep")).write_bytes(b"num_classes: 7\ndata: {path: x}", "best.yaml")
    assert config.load(uri, ["data.path=y"]).num_classes == 7
    with pytest.raises(ConfigError, match=r"none\.yaml\?.* cannot be read"):
        config.load(s3.uri("sweep/none.yaml"))


def test_a_bucket_that_is_not_there(s3) -> None:
    fails(s3.uri("runs/1").replace("s3://bucket", "s3://other-bucket"), "there is no such bucket")


def test_wrong_keys(s3) -> None:
    s3.require_known_keys(True)
    try:
        fails(s3.uri("runs/1"), "refuses access .*INVALID_ACCESS_KEY_ID.*AWS_ACCESS_KEY_ID")
        with pytest.raises(DataError, match=r"data\.path=.*refuses access"):
            index.preflight(config.load({"num_classes": 2, "data": {"path": s3.uri("a")}}))
        with pytest.raises(StorageError, match="refuses access"):  # at once, although patient
            RunDirectory(s3.uri("runs/1")).write_bytes(b"x", "a")
    finally:
        s3.require_known_keys(False)


def test_nobody_at_the_address(s3, monkeypatch) -> None:
    monkeypatch.setenv("ICCE_RAY_STORAGE_PATIENCE", "300")  # for later failures, not the first
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        fails(s3.uri("runs/1", taken.getsockname()[1]), "does not answer .*Could not connect")


def test_a_server_that_hangs(s3) -> None:
    hanging = s3.uri("runs/1")
    with s3.stopped():
        fails(hanging, "does not answer .*Timeout was reached")


def test_a_cloud_without_credentials(monkeypatch) -> None:
    error = OSError("google::cloud::Status(UNAVAILABLE: Could not create a OAuth2 access token)")
    found = storage.explain(error, "gs://bucket/x")  # says nothing of an image, either
    assert isinstance(found, NoAnswerError) and "GOOGLE_APPLICATION_CREDENTIALS" in str(found)
    with pytest.raises(ArtifactError, match=r"account name.*abfs://CONTAINER@ACCOUNT"):
        storage.check("abfs://container/x")
    monkeypatch.setenv("PATH", "")  # no `az`
    with pytest.raises(StorageError, match=r"refuses access .*AZURE_CLIENT_ID"):
        storage.check("abfs://container@account.dfs.core.windows.net/x")


# --- what may pass -------------------------------------------------------------------------------

S3_ERROR = (
    "When uploading object with key 'x' in bucket 'b': AWS Error {} during PutObject operation: x"
)


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(S3_ERROR.format("NETWORK_CONNECTION")), True),
        (OSError(S3_ERROR.format("SLOW_DOWN")), True),
        (OSError(S3_ERROR.format("SERVICE_UNAVAILABLE")), True),
        (OSError(S3_ERROR.format("INTERNAL_FAILURE")), True),
        (OSError(S3_ERROR.format("UNKNOWN (HTTP status 503)")), True),
        (OSError(S3_ERROR.format("UNKNOWN (HTTP status 429)")), True),
        (OSError(S3_ERROR.format("REQUEST_TIMEOUT")), True),
        (OSError("google::cloud::Status(UNAVAILABLE: later)"), True),
        (pa.ArrowException("Unknown error: HTTP status code: 500"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(S3_ERROR.format("ACCESS_DENIED")), False),
        (OSError(S3_ERROR.format("NO_SUCH_BUCKET")), False),
        (OSError(S3_ERROR.format("INVALID_ACCESS_KEY_ID")), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (FileNotFoundError("x"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (pa.ArrowInvalid("Could not open Parquet: connection reset"), False),
        (ValueError("timeout"), False),
    ],
)
def test_what_may_pass(error: Exception, passing: bool) -> None:
    assert storage.may_pass(error) is passing


class Door:
    """A way to the server that can be shut: `refuse` connections, answer that it is `busy`, or
    break off (`cut`) what comes back after CUT bytes."""

    CUT = 4000

    BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    def __init__(self, target: int) -> None:
        self.target, self.mode, self.port = target, "open", 0
        self._listen()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                if self.mode == "busy":
                    client.recv(1 << 16)
                    client.sendall(self.BUSY)
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
                self._open += [client, server]
                for ends in ((client, server, False), (server, client, self.mode == "cut")):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, cut: bool) -> None:
        left = self.CUT if cut else 1 << 62
        with contextlib.suppress(OSError):
            while (data := source.recv(1 << 16)) and left > 0:
                sink.sendall(data[:left])
                left -= len(data)
            sink.shutdown(socket.SHUT_RDWR if cut else socket.SHUT_WR)

    def set(self, mode: str) -> None:
        for one in [*self._open, *([self._listener] if mode == "refuse" else [])]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        if self.mode == "refuse" and mode != "refuse":
            self._listen()
        self._open, self.mode = [], mode


@pytest.fixture
def door(s3, monkeypatch) -> Iterator[Door]:
    monkeypatch.setenv("ICCE_RAY_STORAGE_PATIENCE", "30")
    door = Door(s3.port)
    yield door
    door.set("refuse")


def answers(door: Door, mode: str, works: Mapping[str, Callable[[], object]]) -> dict[str, object]:
    """What works give that begin while the door is shut so, and end once it is open."""
    found: dict[str, object] = {}
    door.set(mode)
    threads = [
        threading.Thread(target=lambda n=name, w=work: found.update({n: w()}))
        for name, work in works.items()
    ]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    assert not found
    door.set("open")
    for thread in threads:
        thread.join(30)
    return found


def test_what_breaks_off_is_read_again(s3, door) -> None:
    """Neither half a file nor an image in quarantine comes of it."""
    run = RunDirectory(s3.uri("cut/run", door.port))
    content = np.random.default_rng(0).bytes(100_000)
    picture = png(1) + content  # PNG readers ignore what follows
    put(s3.uri("cut/a.png"), picture)
    run.write_bytes(content, "f", "x")
    run.write_table(pa.table({"a": np.frombuffer(content, np.uint8)}), "t", "t.parquet")
    works = {
        "file": partial(run.read_bytes, "f", "x"),
        "table": lambda: run.read_table("t")["a"].to_numpy().tobytes(),
        "image": lambda: next(iter(images.read_many([s3.uri("cut/a.png", door.port)]))),
    }
    assert answers(door, "cut", works) == {"file": content, "table": content, "image": picture}


@pytest.mark.parametrize("mode", ["refuse", "busy"])
def test_every_request_waits_until_the_storage_is_back(s3, door, mode: str) -> None:
    run = RunDirectory(s3.uri(f"{mode}/run", door.port))
    picture = png(1)
    put(s3.uri(f"{mode}/a.png"), picture)
    for name in ("read", "list", "delete"):
        run.write_bytes(name.encode(), name, "x")
    run.write_table(pa.table({"a": [1, 2]}), "t", "t.parquet")
    heard: list[tuple[str, bool]] = []
    works = {
        "write": partial(run.write_bytes, b"new", "write", "x"),
        "read": partial(run.read_bytes, "read", "x"),
        "list": partial(run.list, "list"),
        "exists": partial(run.exists, "read", "x"),
        "table": partial(run.read_table, "t"),
        "delete": partial(run.delete, "delete"),
        "image": partial(images.read_many, [s3.uri(f"{mode}/a.png", door.port)] * 2),
    }
    with storage.listening(lambda text, well: heard.append((text, well))):
        found = answers(door, mode, works)
    expected = {"write": None, "read": b"read", "list": ["x"], "exists": True}
    assert found == expected | {
        "table": pa.table({"a": [1, 2]}),
        "delete": None,
        "image": [picture] * 2,
    }
    assert run.read_bytes("write", "x") == b"new" and not run.exists("delete")
    assert any("trying again in" in text for text, well in heard if not well)
    assert any("answers again" in text for text, well in heard if well)


def test_an_outage_says_nothing_of_an_image(s3, door, monkeypatch) -> None:
    monkeypatch.setenv("ICCE_RAY_STORAGE_PATIENCE", "0.2")
    uris = [s3.uri(f"pictures/{n}.png", door.port) for n in range(100)]
    assert {str(found) for found in images.read_many(uris)} == {"not found"}
    door.set("refuse")
    start = time.monotonic()
    with pytest.raises(NoAnswerError, match="does not answer"):
        images.read_many(uris)
    assert time.monotonic() - start < 20


# --- what the user sees --------------------------------------------------------------------------


def test_trouble_is_one_event_and_its_end_another(s3, door, capsys) -> None:
    run = RunDirectory(s3.uri("trouble/run", door.port))
    run.write_bytes(b"x", "a")
    reporter = Reporter(run)
    door.set("refuse")
    threading.Timer(1.0, door.set, ("open",)).start()
    with reporter.listening():
        assert run.read_bytes("a") == b"x"
    assert len(reporter.events) == 2
    with reporter.listening(), pytest.raises(ArtifactError):  # "missing" is an answer as well
        door.set("refuse")
        threading.Timer(1.0, door.set, ("open",)).start()
        run.read_bytes("none")
    assert len(reporter.events) == 4 and "answers again" in reporter.events[3]
    assert "does not answer" in reporter.events[0] and "answers again" in reporter.events[1]
    assert "trying again in" in capsys.readouterr().err


def test_the_log_grows_while_a_stage_runs(s3, door, monkeypatch) -> None:
    from icce_ray.rundir import progress

    run = RunDirectory(s3.uri("log/run", door.port))
    reporter = Reporter(run, quiet=True)
    reporter.say("one")
    assert not run.exists("log")  # not each line: each write costs
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    reporter.say("two")
    assert [line[-3:] for line in run.read_bytes("log").decode().splitlines()] == ["one", "two"]
    door.set("refuse")
    reporter.say("three")  # is kept
    reporter.status("running")
    door.set("open")
    reporter.say("four")
    assert run.read_bytes("log").decode().count("\n") == 4
    again = Reporter(run, quiet=True)
    again.say("five")
    again.flush()
    assert run.read_bytes("log").decode().count("\n") == 5
