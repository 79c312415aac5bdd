"""Images of more than 8 bits per sample: the range is the data's, one for all images of a run."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icce_ray.core.preprocess import decode, levels_of
from icce_ray.core.samples import AS_IS, INTEGERS, Levels, levels_in, with_levels

LIMIT = 1_000_000


def encoded(values: np.ndarray, kind: str = "TIFF", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, kind, **options)
    return stream.getvalue()


def ramp(low: float, high: float, dtype: Any = np.uint16, side: int = 64) -> np.ndarray:
    return np.linspace(low, high, side * side).reshape(side, side).astype(dtype)


def grey_levels(data: bytes, levels: Levels) -> int:
    return len(np.unique(np.asarray(decode(data, LIMIT, levels))[..., 0]))


@pytest.mark.parametrize(
    ("low", "high", "dtype", "kind"),
    [
        (100, 610, np.uint16, "TIFF"),  # a dim scene
        (100, 610, np.uint16, "PNG"),
        (0, 4095, np.uint16, "PNG"),  # a camera of 12 bits
        (32_000, 33_500, np.uint16, "TIFF"),  # tomography with an offset
        (-1000, 400, np.int32, "TIFF"),
        (200_000, 300_000, np.int32, "TIFF"),
        (0.0, 3.0, np.float32, "TIFF"),
        (0.2, 0.25, np.float32, "TIFF"),
    ],
)
def test_a_small_part_of_the_range_is_spread(low, high, dtype, kind) -> None:
    data = [encoded(ramp(low, high, dtype), kind) for _ in range(3)]
    levels = levels_of(data, LIMIT)
    assert grey_levels(data[0], levels) >= 100
    pixels = np.asarray(decode(data[0], LIMIT, levels))[..., 0].reshape(-1)
    assert pixels[0] == 0 and pixels[-1] == 255 and (np.diff(pixels.astype(int)) >= 0).all()


def test_one_range_for_all_images_of_a_run() -> None:
    dark, bright = encoded(ramp(100, 300)), encoded(ramp(2000, 4000))
    levels = levels_of([dark, bright], LIMIT)
    assert np.asarray(decode(dark, LIMIT, levels)).max() < 20  # not made bright
    assert np.asarray(decode(bright, LIMIT, levels)).max() >= 254


def test_hot_pixels_do_not_set_the_range() -> None:
    values = ramp(100, 610)
    values[5, 7], values[9, 9] = 65_535, 0
    levels = levels_of([encoded(values)], LIMIT)
    assert levels.integers is not None and levels.integers[0] >= 95 and levels.integers[1] < 620
    assert np.asarray(decode(encoded(values), LIMIT, levels))[5, 7, 0] == 255  # cut, not wrapped


def test_a_range_that_is_used_stays() -> None:
    assert levels_of([encoded(ramp(500, 60_000))], LIMIT).integers == INTEGERS
    assert levels_of([encoded(ramp(0.1, 0.9, np.float32))], LIMIT).floats == (0, 1)
    assert levels_of([encoded(ramp(3, 250, np.float32))], LIMIT).floats == (0, 255)


def test_kinds_do_not_mix_and_bad_images_do_not_count() -> None:
    broken = encoded(np.array([[np.nan, 1]], np.float32))
    plain = encoded(ramp(0, 255, np.uint8), "PNG")
    assert levels_of([b"", b"text", plain], LIMIT) == AS_IS
    found = levels_of([broken, plain, encoded(ramp(7, 9000)), b"II*\0"], LIMIT)
    assert found.floats is None and found.integers is not None
    assert decode(plain, LIMIT, found).tobytes() == decode(plain, LIMIT).tobytes()
    assert levels_of([encoded(np.full((4, 4), 300, np.uint16))], LIMIT) == AS_IS  # says nothing


# --- color, of which PIL gives the upper 8 bits --------------------------------------------------


def deep_png(values: np.ndarray) -> bytes:
    """uint16 [height, width, bands], which PIL cannot write."""
    import struct
    import zlib

    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[bands], 0, 0, 0)
    parts = [b"IHDR" + head, b"IDAT" + zlib.compress(rows), b"IEND"]
    chunks = [struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_deep_color() -> None:
    grey = ramp(100, 610)
    data = deep_png(np.stack([grey, grey[::-1], np.full_like(grey, 355)], -1))
    levels = levels_of([data], LIMIT)
    assert grey_levels(data, levels) >= 100
    found = np.asarray(decode(data, LIMIT, levels)).astype(int)
    expected = np.clip((grey - 100.0) * 255 / 510, 0, 255)
    assert np.abs(found[..., 0] - expected).max() <= 1
    assert np.abs(found[..., 1] - expected[::-1]).max() <= 1
    assert np.ptp(found[..., 2]) == 0


def test_deep_color_with_alpha_is_laid_on_white() -> None:
    grey = ramp(100, 610)
    alpha = np.full_like(grey, 65_535)
    alpha[:8] = 0
    data = deep_png(np.stack([grey, grey, grey, alpha], -1))
    levels = levels_of([data], LIMIT)
    assert levels.integers is not None and levels.integers[1] < 620  # alpha is no color
    found = np.asarray(decode(data, LIMIT, levels))
    assert (found[:8] == 255).all() and found[10, 0, 0] < 60


# --- in descriptions -----------------------------------------------------------------------------


def test_levels_travel_in_the_description_of_a_backbone() -> None:
    plain = {"name": "x", "transform": {"crop": 7}}
    assert with_levels(plain, AS_IS) == plain
    assert levels_in([plain]) == levels_in([]) == levels_in([{"name": "x"}]) == AS_IS
    levels = Levels((100.0, 610.0))
    assert levels_in([with_levels(plain, levels)]) == levels
    assert levels.describe() == "images of more than 8 bits: 100 is black and 610 white"
