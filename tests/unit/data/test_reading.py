"""Reading, decoding and cropping of images, the nasty kinds above all."""

from __future__ import annotations

import io
import itertools
import os
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from PIL import Image

from icce_ray.config.schema import DataConfig
from icce_ray.core import preprocess
from icce_ray.core.metadata import ORIENTATION
from icce_ray.core.preprocess import BadImage, decode
from icce_ray.data import listing
from icce_ray.data import reading as images
from icce_ray.data.reading import read_bytes, read_many
from icce_ray.rundir import storage

LIMIT = 1_000_000
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as importing the module does


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 5, y * 7, (x + y) * 3], -1).astype(np.uint8))


def pixel(data: bytes, where: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode(data, LIMIT)
    assert image.mode == "RGB"
    return image.getpixel(where)


def noise(side: int = 100) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds hardly any pixels."""
    parts = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)]
    parts.append(b"IDAT" + zlib.compress(bytes(100)))
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# --- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_their_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(photo(), kind, **options), LIMIT)
    assert np.array_equal(np.asarray(found), np.asarray(photo()))


def test_grey_bilevel_and_palette() -> None:
    assert pixel(encoded(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    palette = photo().quantize(8)
    assert pixel(encoded(palette)) == palette.convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    color = (0, 128) if mode == "LA" else (0, 0, 0, 128)
    assert pixel(encoded(Image.new(mode, (4, 4), color))) == (127, 127, 127)


def test_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((3, 3), 1)
    for transparency in (0, bytes([0, 255])):
        data = encoded(image, transparency=transparency)
        assert pixel(data) == (255, 255, 255)
        assert pixel(data, (3, 3)) == (40, 50, 60)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 25_700, 65_535]], np.uint16)
    found = np.asarray(decode(encoded(Image.fromarray(values), kind), LIMIT))[0, :, 0]
    assert found.tolist() == [0, 1, 100, 255]


def test_dark_sixteen_bit_images_stay_dark() -> None:
    assert pixel(encoded(Image.fromarray(np.full((2, 2), 200, np.uint16)))) == (1, 1, 1)


def test_float_images() -> None:
    for values, expected in (([0.0, 0.5, 1.0], [0, 128, 255]), ([-1.0, 0.0, 1.0], [0, 128, 255])):
        data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
        assert np.asarray(decode(data, LIMIT))[0, :, 0].tolist() == expected
    broken = encoded(Image.fromarray(np.array([[np.nan, 1]], np.float32)), "TIFF")
    with pytest.raises(BadImage, match="finite"):
        decode(broken, LIMIT)


def test_cmyk_jpeg() -> None:
    red = pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red[0] > 240 and max(red[1:]) < 15


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(data) == (255, 0, 0)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turned by 90 degrees
    turned = decode(encoded(photo(), "PNG", exif=exif), LIMIT)
    assert turned.size == (30, 40)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(photo()), -1))


def test_damaged_exif_does_not_cost_the_image() -> None:
    data = encoded(photo(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff\xff\xff")
    assert decode(data, LIMIT).size == (40, 30)


def test_one_pixel() -> None:
    assert pixel(encoded(Image.new("RGB", (1, 1), "lime"))) == (0, 255, 0)


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"<html>not found</html>", "not an image"),
    "zeros": (bytes(1000), "not an image"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "truncated jpeg": (encoded(noise(), "JPEG")[:2000], "truncated"),
    "truncated png": (encoded(noise())[:1000], "truncated|damaged"),
    "truncated webp": (encoded(noise(), "WEBP")[:500], "not an image|damaged"),
    "truncated tiff": (encoded(noise(), "TIFF")[:5000], "truncated|damaged"),
    "truncated gif": (encoded(noise(), "GIF")[:3000], "truncated|damaged"),
    "truncated bmp": (encoded(noise(), "BMP")[:300], "truncated|damaged"),
    "header only": (png_header(10, 10), "truncated|damaged|not an image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_give_a_reason(name: str) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data, LIMIT)
    assert "\n" not in str(caught.value)


def test_bombs_are_refused_from_the_header() -> None:
    for side in (1001, 12_000, 60_000):  # below, between and above PIL's own limits
        with pytest.raises(BadImage, match="pixels"):
            decode(png_header(side, side), LIMIT)


def test_random_damage_never_escapes() -> None:
    rng = np.random.default_rng(0)
    for kind, number in itertools.product(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"], range(25)):
        data = bytearray(encoded(photo(), kind))
        for place in rng.integers(0, len(data), 1 + number):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data), LIMIT).mode == "RGB"
        except BadImage as error:
            assert str(error)


def test_a_file_that_is_no_image_is_not_quoted(tmp_path: Path) -> None:
    """A link may name any file: its reason in the quarantine must not show what is in there."""
    for data in (
        b"password=hunter2",
        b"\xff\xd8\xff\xe0 hunter2",
        b"BM hunter2" * 9,
    ):
        (tmp_path / "secret").write_bytes(data)
        (tmp_path / "x.png").unlink(missing_ok=True)
        (tmp_path / "x.png").symlink_to(tmp_path / "secret")
        with pytest.raises(BadImage) as caught:
            decode(read_bytes(str(tmp_path / "x.png")), LIMIT)
        assert "hunter2" not in str(caught.value)


def test_decoding_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as importing the module does
        for data, _ in BROKEN.values():
            with pytest.raises(BadImage):
                decode(data, LIMIT)
        decode(encoded(photo(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff"), LIMIT)
    assert not caught


# --- reading -------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    names = ["a.png", "b c.png", "d#3.png", "ä.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    uris = [str(tmp_path / name) for name in names]
    assert read_many(uris) == [name.encode() for name in names]
    assert read_many(["file://" + uri for uri in uris[:2]]) == [b"a.png", b"b c.png"]
    assert read_many([]) == []


@pytest.mark.parametrize("name", ["pipe", "device", "socket"])
def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    """A list may name one, and a file may be replaced by one after it was listed."""
    path = tmp_path / "a.png"
    with socket.socket(socket.AF_UNIX) as listener:
        if name == "pipe":
            os.mkfifo(path)
        elif name == "device":
            path.symlink_to("/dev/zero")
        else:
            listener.bind(str(path))
        for uri in (str(path), f"file://{path}"):
            assert "a pipe, a socket or a device, not a file" in str(read_many([uri])[0])


def test_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    found = read_many([str(tmp_path / "none.png"), str(tmp_path / "a.png"), str(tmp_path)])
    assert isinstance(found[0], BadImage) and str(found[0]) == "not found"
    assert found[1] == b"x"
    assert isinstance(found[2], BadImage)
    with pytest.raises(BadImage, match="not found"):
        read_bytes(str(tmp_path / "none.png"))


def test_tar_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "GAP", 1000)
    monkeypatch.setattr(images, "RANGE", 5000)
    path = tmp_path / "x.tar"
    contents = [bytes([i]) * size for i, size in enumerate((10, 3000, 9000, 0, 700, 20))]
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(contents):
            info = tarfile.TarInfo(f"m#{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    order = [4, 0, 5, 2, 1, 3]
    found = read_many(
        [f"{path}#{members[i].name}" for i in order],
        [members[i].offset_data for i in order],
        [members[i].size for i in order],
    )
    assert found == [contents[i] for i in order]


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_rows(tmp_path: Path, nested: bool) -> None:
    rows: list[Any] = [f"image {i}".encode() for i in range(25)]
    rows[7] = None
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if nested else pa.binary()
    values = [None if r is None else {"bytes": r, "path": ""} for r in rows] if nested else rows
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"img": pa.array(values, kind)}), path, row_group_size=6)
    order = [24, 0, 7, 6, 5, 12, 25]
    found = read_many([f"{path}#img/{i}" for i in order])
    for row, data in zip(order, found, strict=True):
        if row in (7, 25):
            assert isinstance(data, BadImage) and "no image bytes" in str(data)
        else:
            assert data == rows[row]
    assert "cannot be read" in str(read_many([f"{path}#0"])[0])  # no column `image`


def test_images_are_never_unpickled(tmp_path: Path, pickled: Any) -> None:
    path = str(tmp_path / "x.parquet")
    inner = pa.StructArray.from_arrays([pickled(2)], ["bytes"])
    outer = pa.StructArray.from_arrays([inner], ["bytes"])
    pq.write_table(pa.table({"image": pickled(2), "one": inner, "two": outer}), path)
    for column in ("image", "one", "two"):
        for data in read_many([f"{path}#{column}/{row}" for row in range(2)]):
            assert isinstance(data, BadImage) and "Python objects" in str(data)


def test_addresses() -> None:
    assert images.row_uri("a.parquet") == "a.parquet#"
    assert images.row_uri("a.parquet", "img") == "a.parquet#img/"


# --- resize and crop -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_same_pixels_as_timm(mode: str, crop: float) -> None:
    from timm.data import create_transform

    rng = np.random.default_rng(0)
    for side, filter_ in ((112, "bicubic"), (37, "bilinear")):
        config: dict[str, Any] = {
            "input_size": (3, side, side),
            "interpolation": filter_,
            "crop_pct": crop,
            "crop_mode": mode,
            "mean": (0.4, 0.5, 0.6),
        }
        theirs = create_transform(**config, is_training=False, normalize=False)
        ours = preprocess.preprocess_from(config)
        for size in ((8, 8), (200, 133), (133, 201), (1, 1), (side, side), (280, 40), (37, 250)):
            image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
            assert np.array_equal(theirs(image).numpy(), ours(image)), size


def test_extremely_thin_images_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spy(self: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        sizes.append(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", spy)
    prepare = preprocess.Preprocess(size=64, resize=64)
    for size in ((20_000, 1), (1, 20_000)):
        assert prepare(Image.new("RGB", size, "red")).shape == (3, 64, 64)
    assert max(map(max, sizes)) <= 64 * preprocess.MAX_ASPECT


def test_decoding_needs_no_torch() -> None:
    """Else every decoding process would take seconds longer to start, and 300 MB more."""
    script = (
        "import sys; import icce_ray.data.reading, icce_ray.distributed.stream; "
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- data sets on the Hugging Face hub -----------------------------------------------------------


class Hub(DirFileSystem):
    """The hub's file system, for what pyarrow makes of it: its paths begin with datasets/."""

    protocol = "hf"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("hf://").rstrip("/")


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing and reading by an fsspec client. The real one was not within reach."""
    folder = tmp_path / "datasets" / "owner" / "name"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").touch()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number in range(2):
        values = pa.array(
            [{"bytes": f"{number}-{i}".encode(), "path": "x"} for i in range(3)], kind
        )
        table = pa.table({"img": values, "label": [0, 1, number]})
        pq.write_table(table, folder / "data" / f"train-0000{number}.parquet")
    hub = Hub(str(tmp_path), fsspec.filesystem("file"))
    monkeypatch.setattr(fsspec, "url_to_fs", lambda uri: (hub, Hub._strip_protocol(uri)))
    storage._filesystem.cache_clear()
    try:
        for path in ("hf://datasets/owner/name", "hf://datasets/owner/name/data/*1.parquet"):
            found = listing.list_images(DataConfig(path=path))
            uris = found.table["uri"].to_pylist()
            data = [b"0-0", b"0-1", b"0-2", b"1-0", b"1-1", b"1-2"]
            assert read_many(uris) == data[-len(uris) :]
            assert uris[-1] == "hf://datasets/owner/name/data/train-00001.parquet#img/2"
            assert found.table["label"].to_pylist()[-3:] == ["0", "1", "1"]
        assert found.found == 3
    finally:
        storage._filesystem.cache_clear()
