"""TIFF files that PIL misreads or does not read: the right pixels, or what they are."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest

from icce_ray.core import tiff as core
from icce_ray.core.preprocess import BadImage, decode

LIMIT = 1_000_000
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as importing icce_ray.data.reading does
FORMATS = {"u": 1, "i": 2, "f": 3, "c": 6}
LEFT, RIGHT = 204, 51


def tiff(
    values: np.ndarray,
    photometric: int,
    planar: int = 1,
    order: str = "<",
    packed: bool = False,
    orientation: int = 1,
) -> bytes:
    """A file of `values` [height, width, bands]: one strip, or one per plane."""
    height, width, bands = values.shape
    values = values.astype(values.dtype.newbyteorder(order))
    planes = [values] if planar == 1 else list(values.transpose(2, 0, 1))
    strips = [zlib.compress(p.tobytes()) if packed else p.tobytes() for p in planes]
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * values.dtype.itemsize] * bands),
        259: ("H", [8 if packed else 1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        274: ("H", [orientation]),
        277: ("H", [bands]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [planar]),
        339: ("H", [FORMATS[values.dtype.kind]] * bands),
    }
    extra = bands - {2: 3, 5: 4}.get(photometric, 1)
    if extra:
        tags[338] = ("H", [0] * extra)
    sizes = [len(numbers) * (2 if kind == "H" else 4) for kind, numbers in tags.values()]
    place = 14 + 12 * len(tags)
    start = place + sum(size for size in sizes if size > 4)
    tags[273] = ("I", [start + sum(map(len, strips[:i])) for i in range(len(strips))])
    entries = blob = b""
    for tag, (kind, numbers) in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(content) > 4:
            content, blob = struct.pack(order + "I", place + len(blob)), blob + content
        code = 3 if kind == "H" else 4
        entries += struct.pack(order + "HHI", tag, code, len(numbers)) + content.ljust(4, b"\0")
    head = b"II*\0" if order == "<" else b"MM\0*"
    head += struct.pack(order + "IH", 8, len(tags))
    return head + entries + bytes(4) + blob + b"".join(strips)


def bands(dtype: str, count: int) -> np.ndarray:
    """[32, 64, count], left 80 % of the range, right 20 %."""
    level = np.full((32, 64, 1), 0.2)
    level[:, :32] = 0.8
    top = 1 if dtype[0] == "f" else np.iinfo(dtype).max
    return (level * top).astype(dtype).repeat(count, 2)


def check(data: bytes, left: int = LEFT, right: int = RIGHT) -> None:
    found = np.asarray(decode(data, LIMIT)).astype(int)
    assert found.shape == (32, 64, 3)
    assert np.abs(found[:, :32] - left).max() <= 1 and np.abs(found[:, 32:] - right).max() <= 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_separate_planes(order: str, packed: bool) -> None:
    kinds = [("u2", 3, 2), ("u2", 4, 2), ("u1", 3, 2), ("u2", 1, 1), ("u2", 2, 1), ("f4", 1, 1)]
    for dtype, count, photometric in kinds:
        check(tiff(bands(dtype, count), photometric, 2, order, packed))


@pytest.mark.parametrize("order", ["<", ">"])
def test_packed_numbers_are_read_in_their_order(order: str) -> None:
    for dtype in ("u1", "u2", "f4"):
        check(tiff(bands(dtype, 1), 1, order=order, packed=True))
    signed = np.full((32, 64, 1), -1000, np.int32)
    signed[:, :32] = 70_000
    check(tiff(signed, 1, order=order, packed=True), 255, 0)
    check(tiff(signed.clip(-1000, 1000).astype(np.int16), 1, order=order, packed=True), 255, 0)


def test_separate_planes_keep_their_colors() -> None:
    values = bands("u2", 3) // np.array([1, 2, 4], np.uint16)
    found = np.asarray(decode(tiff(values, 2, planar=2), LIMIT))
    assert np.abs(found[9, 9].astype(int) - (204, 102, 51)).max() <= 1


def test_separate_planes_that_lie_on_their_side() -> None:
    found = decode(tiff(bands("u2", 3), 2, planar=2, orientation=6), LIMIT)
    assert found.size == (32, 64)
    assert found.getpixel((9, 9)) == (LEFT,) * 3 and found.getpixel((9, 60)) == (RIGHT,) * 3


@pytest.mark.parametrize("packed", [False, True])
def test_separate_planes_of_inks(packed: bool) -> None:
    """No ink but black, of 80 and 20 %."""
    values = bands("u2", 4)
    values[..., :3] = 0
    check(tiff(values, 5, planar=2, packed=packed), 255 - LEFT, 255 - RIGHT)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_zero_may_be_white(dtype: str) -> None:
    check(tiff(bands(dtype, 1), 0), 255 - LEFT, 255 - RIGHT)


def test_numbers_of_32_bits_have_no_sign() -> None:
    values = np.full((32, 64, 1), 100, np.uint32)
    values[:, :32] = 4_000_000_000
    check(tiff(values, 1), 255, 0)


def test_signed_bytes() -> None:
    values = np.full((32, 64, 1), -128, np.int8)
    values[:, :32] = 127
    check(tiff(values, 1), 255, 0)


@pytest.mark.parametrize(
    ("values", "photometric", "expected"),
    [
        (bands("u1", 5), 1, "a TIFF of 5 bands of 8 bits"),
        (bands("f8", 1), 1, "a TIFF of 1 band of float64"),
        (bands("u2", 2), 1, "a TIFF of 2 bands of 16 bits"),
        (bands("f2", 1), 1, "a TIFF of 1 band of float16"),
        (bands("f4", 3), 2, "a TIFF of 3 bands of float32"),
        (bands("i2", 3), 2, "a TIFF of 3 bands of signed 16 bits"),
        (bands("u1", 12), 1, "a TIFF of 12 bands of 8 bits"),
        (bands("f4", 1).astype("c8"), 1, "a TIFF of 1 band of complex64"),
    ],
)
def test_what_is_not_supported_is_named(values: Any, photometric: int, expected: str) -> None:
    for order in "<>":
        with pytest.raises(BadImage) as caught:
            decode(tiff(values, photometric, order=order), LIMIT)
        assert str(caught.value) == f"{expected}, which is not supported"


def test_only_a_tiff_is_described() -> None:
    assert core.describe(b"GIF89a") is core.describe(b"") is None
    assert core.describe(b"II*\0\xff\xff\xff\xff") is None  # no directory there
    assert core.describe(tiff(bands("u1", 1), 1)[:40]) is None
