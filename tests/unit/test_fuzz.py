"""Damaged input of every kind: a result or an error of ours, never another, a hang, or much memory.

A few seconds in the suite. By hand, with thousands of examples each: pytest -m fuzz
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import shutil
import struct
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.torch import save as save_safetensors

from icce_ray import cli, pipeline
from icce_ray import config as configs
from icce_ray.config.schema import DataConfig
from icce_ray.core import preprocess, samples, weight_files
from icce_ray.core.classifier import model as classifiers
from icce_ray.core.preprocess import BadImage
from icce_ray.data import embeddings, labels, listing, reading
from icce_ray.distributed.cluster import Cluster
from icce_ray.errors import ConfigError, IcceError, StageError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages import evaluate, predict, report

LIMIT = 1_000_000  # pixels
MOST_MEMORY = 1 << 30  # bytes that no input here may take
DEADLINE = 60_000  # ms for one example; a hang is longer on any machine
HARD = [0, 1, 2, 4, 8, 16, 127, 128, 254, 255]

# Examples of each property: in the suite, and by hand.
EXAMPLES = pytest.mark.parametrize(
    "examples",
    [15, pytest.param(3000, marks=[pytest.mark.fuzz, pytest.mark.slow, pytest.mark.timeout(0)])],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that read the damaged files


def holds(examples: int, what: Any, check: Callable[[Any], None]) -> None:
    """`check` accepts that many draws of the strategy `what`, within the memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = settings(
        max_examples=examples,
        deadline=DEADLINE,
        database=None,
        derandomize=examples < 100,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if examples < 100 else list(Phase),
        report_multiple_bugs=False,
    )
    with no_more_than(4 * MOST_MEMORY):
        limits(given(what)(check))()
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken * (1 if sys.platform == "darwin" else 1024) < MOST_MEMORY


@contextlib.contextmanager
def no_more_than(memory: int) -> Iterator[None]:
    """Meanwhile more memory is a MemoryError, not the end of this process and of others."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = Path("/proc/self/statm")
    if pages.exists():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@st.composite
def damaged(draw: st.DrawFn, *sound: bytes) -> bytes:
    """One of the files, cut, overwritten, with parts that are lost or repeated."""
    data = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, 4))):
        # mostly at the beginning and the end, where formats keep their sizes and places
        low, high = draw(st.sampled_from([(0, 64), (0, 512), (0, len(data)), (-64, 0)]))
        at = draw(st.integers(low, high)) % max(1, len(data))
        kind = draw(st.sampled_from(["byte", "byte", "word", "cut", "lose", "repeat", "insert"]))
        size = draw(st.integers(1, 40))
        if kind == "byte":
            data[at : at + 1] = bytes([draw(st.sampled_from(HARD) | st.integers(0, 255))])
        elif kind == "word":
            number = draw(st.sampled_from([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1]))
            data[at : at + 4] = struct.pack(draw(st.sampled_from(["<I", ">I"])), number)
        elif kind == "cut":
            del data[at:]
        elif kind == "lose":
            del data[at : at + size]
        elif kind == "repeat":
            data[at:at] = data[at : at + size]
        else:
            data[at:at] = draw(st.binary(max_size=size))
    return bytes(data)


# --- images --------------------------------------------------------------------------------------


def encoded(array: np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def image_files() -> dict[str, list[bytes]]:
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (12, 17, 3), np.uint8)
    grey, deep = color[..., 0], rng.integers(100, 700, (12, 17)).astype(np.uint16)
    alpha = rng.integers(0, 256, (12, 17, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    extra = [Image.fromarray(color[::-1].copy())]
    files = {
        "PNG": [encoded(color, "PNG", exif=exif), encoded(deep, "PNG"), encoded(alpha, "PNG")],
        "JPEG": [encoded(color, "JPEG", exif=exif), encoded(grey, "JPEG", progressive=True)],
        "GIF": [encoded(grey, "GIF"), encoded(color, "GIF", save_all=True, append_images=extra)],
        "BMP": [encoded(color, "BMP"), encoded(grey, "BMP")],
        "TIFF": [
            encoded(color, "TIFF"),
            encoded(deep, "TIFF"),
            encoded(deep.astype(np.float32), "TIFF"),
            encoded(color, "TIFF", compression="tiff_lzw"),
            encoded(color, "TIFF", compression="jpeg"),
            encoded(color, "TIFF", big_tiff=True),
        ],
        "WEBP": [encoded(color, "WEBP", exif=exif), encoded(alpha, "WEBP", lossless=True)],
        "PPM": [encoded(color, "PPM"), encoded(deep, "PPM"), b"P3 2 1 255 1 2 3 4 5 6"],
        "JPEG2000": [encoded(color, "JPEG2000")] if features.check("jpg_2000") else [],
        "AVIF": [encoded(color, "AVIF", exif=exif)] if features.check("avif") else [],
    }
    return {kind: made for kind, made in files.items() if made}


IMAGES = image_files()


@EXAMPLES
@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind: str, examples: int) -> None:
    def check(data: bytes) -> None:
        try:
            levels = preprocess.levels_of([data], LIMIT)
            for one in (samples.AS_IS, levels, samples.Levels((100.0, 600.0), (0.0, 700.0))):
                image = preprocess.decode(data, LIMIT, one)
                assert image.mode == "RGB" and image.width * image.height <= LIMIT
                assert np.asarray(image).shape == (image.height, image.width, 3)
        except BadImage as error:
            assert str(error) and "\n" not in str(error)

    holds(examples, damaged(*IMAGES[kind]), check)


# --- containers ----------------------------------------------------------------------------------


def tar_file() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, data in enumerate(IMAGES["PNG"]):
            for name, content in ((f"{number}.png", data), (f"{number}.cls", b"3")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def parquet_file(column: str) -> bytes:
    stream = io.BytesIO()
    rows = IMAGES["PNG"] if column == "image" else [[float(i), 1.0, 2.0] for i in range(3)]
    pq.write_table(pa.table({column: rows, "label": [0, 1, 0]}), stream)
    return stream.getvalue()


def matrix_file(suffix: str) -> list[bytes]:
    matrix, made = np.arange(1200, dtype=np.float32).reshape(400, 3), []
    for save in {
        "npy": [np.save],
        "npz": [np.savez, np.savez_compressed],
        "pt": [lambda stream, array: torch.save(torch.from_numpy(array), stream)],
    }[suffix]:
        stream = io.BytesIO()
        save(stream, matrix)  # type: ignore[operator]
        made.append(stream.getvalue())
    return made


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[[bytes, str], str]]:
    """place(data, suffix) stores it under a new name, since readers keep what they know of files;
    the file before is deleted."""
    written: list[Path] = []

    def store(data: bytes, suffix: str) -> str:
        if written:
            written[-1].unlink()
        written.append(tmp_path / f"{len(written)}.{suffix}")
        written[-1].write_bytes(data)
        return str(written[-1])

    yield store


@EXAMPLES
@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_containers_of_images(place: Any, suffix: str, examples: int) -> None:
    def check(data: bytes) -> None:
        try:
            table = listing.list_images(DataConfig(path=place(data, suffix))).table
            columns = (table[name].to_pylist() for name in ("uri", "offset", "size"))
            for one in reading.read_many(*columns):
                assert isinstance(one, (bytes, BadImage))
        except IcceError as error:
            assert str(error)

    sound = tar_file() if suffix == "tar" else parquet_file("image")
    holds(examples, damaged(sound), check)


@EXAMPLES
@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "parquet"])
def test_embeddings(place: Any, suffix: str, examples: int) -> None:
    def check(data: bytes) -> None:
        try:
            path = place(data, suffix)
            listing_ = embeddings.list_rows(DataConfig(embeddings=path))
            given_ = embeddings.open_vectors(path)
            for block in given_.blocks(100):
                assert block.ndim == 2 and block.shape[1] == given_.features
            assert listing_.table.num_rows == given_.total
        except IcceError as error:
            assert str(error)

    sound = [parquet_file("embedding")] if suffix == "parquet" else matrix_file(suffix)
    holds(examples, damaged(*sound), check)


@EXAMPLES
@pytest.mark.parametrize("suffix", ["npy", "txt"])
def test_labels(place: Any, suffix: str, examples: int) -> None:
    def check(data: bytes) -> None:
        try:
            assert labels.read_labels(place(data, suffix)).ndim == 1
        except IcceError as error:
            assert str(error)

    stream = io.BytesIO()
    np.save(stream, np.arange(300))
    text = "\n".join(f"class {number % 3}" for number in range(300))
    sound = [stream.getvalue()] if suffix == "npy" else [text.encode(), text.encode("utf-16")]
    holds(examples, damaged(*sound), check)


# --- weights, configs ----------------------------------------------------------------------------


def torch_file(**options: Any) -> bytes:
    stream = io.BytesIO()
    content = {"model": {"a.weight": torch.ones(3, 2), "b": torch.zeros(4)}, "epoch": 3}
    torch.save(content, stream, **options)
    return stream.getvalue()


@EXAMPLES
def test_weights(place: Any, examples: int) -> None:
    def check(data: bytes) -> None:
        try:
            found = weight_files.read(Path(place(data, "pth")))
            assert all(isinstance(one, torch.Tensor) for one in found.values())
        except ConfigError as error:
            assert "\n" not in str(error)

    legacy = torch_file(_use_new_zipfile_serialization=False)
    tensors = save_safetensors({"a": torch.ones(3, 2), "b": torch.zeros(4)})
    holds(examples, damaged(torch_file(), legacy, tensors), check)


@EXAMPLES
def test_classifiers(tmp_path: Path, examples: int) -> None:
    run = RunDirectory(str(tmp_path))

    def run_json(data: bytes) -> Any:
        run.write_bytes(data, "classifier", "classifier.json")
        return run.read_json("classifier", "classifier.json")

    weights, description = classifiers.save(classifiers.Classifier("linear", 4, 3), {})
    text = json.dumps(description).encode()

    def check(drawn: tuple[bytes, bytes]) -> None:
        with contextlib.suppress(IcceError):
            classifiers.load(drawn[0], run_json(drawn[1]))

    whole, bad = st.just(weights), damaged(weights)
    holds(examples, st.tuples(whole | bad, st.just(text) | damaged(text)), check)


@EXAMPLES
def test_configs(place: Any, examples: int) -> None:
    sound = [path.read_bytes() for path in configs.golden_configs().values()]
    plain = [b"num_classes: 3\ndata: {path: x}\nbackbone: [{name: a}, {name: b}]\nheads: {lr: 1}\n"]

    def check(data: bytes) -> None:
        try:
            assert configs.load(place(data, "yaml")).num_classes
        except ConfigError as error:
            assert str(error)

    holds(examples, damaged(*plain, *sound), check)


# --- a finished run ------------------------------------------------------------------------------


VALUES: list[Any] = [None, True, 0, -1, 7, 1e300, "", "text", [], [1], {}, {"a": 1}]


@st.composite
def edited(draw: st.DrawFn, path: Path) -> bytes:
    """Another content of a file: valid JSON or Parquet with other values, or damaged bytes."""
    kind = draw(st.sampled_from(["bytes", path.suffix]))
    if kind == ".json":
        return json.dumps(_other_json(draw, json.loads(path.read_bytes()))).encode()
    if kind == ".parquet":
        stream = io.BytesIO()
        pq.write_table(_other_table(draw, pq.read_table(path)), stream)
        return stream.getvalue()
    return draw(damaged(path.read_bytes()))


def _other_json(draw: st.DrawFn, value: Any) -> Any:
    """One value, somewhere in it, is lost or another."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(VALUES))
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    changed = value.copy()
    if draw(st.integers(0, 3)) == 0:
        del changed[key]
    else:
        changed[key] = _other_json(draw, value[key])
    return changed


def _other_table(draw: st.DrawFn, table: pa.Table) -> pa.Table:
    number = draw(st.integers(0, table.num_columns - 1))
    name = table.column_names[number]
    rows = range(table.num_rows)
    return draw(
        st.sampled_from(
            [
                table.drop_columns([name]),
                table.slice(0, table.num_rows // 2),
                table.slice(0, 0),
                pa.concat_tables([table, table]),
                table.set_column(number, name, pa.array([str(row) for row in rows])),
                table.set_column(number, name, pa.array([None for _ in rows], pa.int64())),
                table.set_column(number, name, pa.array([10**9 + row for row in rows])),
                table.set_column(number, name, pa.array([-1.5 for _ in rows])),
                table.set_column(number, name, pa.array([[row] for row in rows])),
            ]
        )
    )


class NoCluster(Cluster):
    """As far as a prediction comes without Ray."""

    def start(self) -> Any:
        raise StageError("no Ray here")


@EXAMPLES
def test_artifacts(make_run: Any, make_context: Any, tmp_path: Path, examples: int) -> None:
    """Whatever file is damaged, status, plan and report say so in a line."""
    made = make_run(12, 3)
    outcome = evaluate.run(make_context(made))
    made.finish("evaluation", outcome.rows, outcome.results)
    made.run.write_json({"state": "running", "time": 1.0, "pid": 1, "stage": "x"}, "status.json")
    about = {"kind": "linear", "backbone": [{"name": "test_resnet", "pretrained": False}]}
    made.run.write_json(about, "classifier", "classifier.json")
    shutil.copytree(tmp_path / "images" / "class-0", tmp_path / "new")
    files = sorted(p for p in Path(made.run.uri).rglob("*") if p.suffix not in ("", ".lock"))
    copies = iter(range(10**9))

    def check(drawn: tuple[Path, bytes]) -> None:
        copy = tmp_path / f"copy-{next(copies)}"
        shutil.copytree(made.run.uri, copy)
        (copy / drawn[0].relative_to(made.run.uri)).write_bytes(drawn[1])
        run = RunDirectory(str(copy))
        for look in (
            lambda: cli.status(str(copy)),
            lambda: pipeline.make_steps(made.config, run),
            lambda: report.build(str(copy)),
            lambda: predict.predict(
                str(copy), str(tmp_path / "images"), quiet=True, cluster=NoCluster()
            ),
        ):
            try:
                look()
            except IcceError as error:
                assert str(error)
        shutil.rmtree(copy)

    edits = st.sampled_from(files).flatmap(lambda path: st.tuples(st.just(path), edited(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holds(examples, edits, check)
