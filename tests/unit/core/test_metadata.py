"""Images whose pixels are sound and whose metadata are large, damaged, or nonsense."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from icce_ray.core.metadata import ORIENTATION, without_metadata
from icce_ray.core.preprocess import BadImage, decode

LIMIT = 1_000_000
LARGE = zlib.compress(bytes(2_000_000))
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # as importing icce_ray.data.reading does


def picture() -> Image.Image:
    """64 x 32, left half red, right half blue."""
    image = Image.new("RGB", (64, 32), (200, 30, 30))
    image.paste((30, 30, 200), (32, 0, 64, 32))
    return image


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture().save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes, spoil: int = 0) -> bytes:
    check = zlib.crc32(kind + data) ^ spoil
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png(*extra: bytes, last: bool = False) -> bytes:
    """`extra` chunks after IHDR, or after the pixels."""
    whole = encoded("PNG")
    at = whole.index(b"IEND") - 4 if last else 33
    return whole[:at] + b"".join(extra) + whole[at:]


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    whole = encoded("JPEG", quality=95, subsampling=0)
    extra = [struct.pack(">HH", marker, len(data) + 2) + data for marker, data in segments]
    return whole[:2] + b"".join(extra) + whole[2:]


def webp(kind: bytes, content: bytes) -> bytes:
    whole = encoded("WEBP", lossless=True, exif=b"Exif\0\0" + bytes(20))
    body = whole[12:] + kind + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def turned() -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif.tobytes()


SOUND = {
    "png icc": png(chunk(b"iCCP", b"p\0\0" + LARGE)),
    "png xmp": png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)),
    "png workflow": png(chunk(b"zTXt", b"workflow\0\0" + LARGE)),
    "png workflow last": png(chunk(b"zTXt", b"workflow\0\0" + LARGE), last=True),
    "png text checksum": png(chunk(b"tEXt", b"Comment\0hello", spoil=1)),
    "png many texts": png(*[chunk(b"tEXt", b"c\0" + bytes(900_000))] * 75),
    "png icc no zlib": png(chunk(b"iCCP", b"p\0\0 no zlib")),
    "png short chromaticities": png(chunk(b"cHRM", b"abc")),
    "png short resolution": png(chunk(b"pHYs", b"abc")),
    "png time checksum": png(chunk(b"tIME", bytes(7), spoil=1)),
    "png animation control": png(chunk(b"acTL", b"ab")),
    "jpeg icc": jpeg((0xFFE2, b"ICC_PROFILE\0")),
    "jpeg jfif": jpeg((0xFFE0, b"JFIF\0")),
    "jpeg adobe": jpeg((0xFFEE, b"Adobe")),
    "jpeg photoshop": jpeg((0xFFED, b"Photoshop 3.0\x008BIM\x04")),
    "jpeg mpf": jpeg((0xFFE2, b"MPF\0II*\0\x08\0\0\0\0\0")),
    "webp": webp(b"XMP ", bytes(3_000_001)),
}


@pytest.mark.parametrize("name", SOUND)
def test_metadata_do_not_cost_the_image(name: str) -> None:
    found = np.asarray(decode(SOUND[name], LIMIT)).astype(int)
    assert np.abs(found - np.asarray(picture())).max() <= (9 if "jpeg" in name else 0)


@pytest.mark.parametrize("big", [False, True])
def test_tiff_without_its_metadata(big: bool) -> None:
    """A resolution that is a text: PIL multiplies it by the centimeters of an inch."""
    data = bytearray(encoded("TIFF", big_tiff=big, dpi=(7, 7)))
    struct.pack_into("<H", data, data.index(struct.pack("<HH", 0x011A, 5)) + 2, 2)
    unit = data.index(struct.pack("<HH", 0x0128, 3))
    struct.pack_into("<H", data, unit + (12 if big else 8), 3)
    assert np.array_equal(np.asarray(decode(bytes(data), LIMIT)), np.asarray(picture()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_orientation_survives(kind: str) -> None:
    if kind == "PNG":
        data = png(chunk(b"eXIf", turned()[6:]), chunk(b"tEXt", b"Comment\0hello", spoil=1))
    else:
        data = jpeg((0xFFE2, b"ICC_PROFILE\0"), (0xFFE1, turned()))
    assert decode(data, LIMIT).size == (32, 64)
    lean = without_metadata(data)
    assert lean is not None and decode(lean, LIMIT).getpixel((16, 60))[2] > 190  # blue is below


@pytest.mark.skipif(not features.check("avif"), reason="PIL without AVIF")
def test_damaged_exif_of_an_avif() -> None:
    exif = turned()
    data = encoded("AVIF", exif=exif, quality=100)
    data = data.replace(exif[6:], b"\xff" * len(exif[6:]))
    assert decode(data, LIMIT).getpixel((16, 60))[2] > 190  # it is turned by a tag of its own


def test_pixels_that_do_not_decode_are_still_refused() -> None:
    sound = SOUND["png xmp"]
    for data in (sound[: sound.index(b"IDAT") + 20], jpeg((0xFFEE, b"Adobe"))[:700]):
        with pytest.raises(BadImage, match=r"truncated|damaged"):
            decode(data, LIMIT)


def test_bombs_of_pixels_are_still_refused() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"iCCP", b"p\0\0" + LARGE)
    with pytest.raises(BadImage, match="pixels"):
        decode(bomb + chunk(b"IDAT", LARGE), LIMIT)


@pytest.mark.parametrize("make", [bytes, lambda kind: kind + b"\xff" * 30])
def test_nonsense_is_left_alone(make: Callable[[bytes], bytes]) -> None:
    for kind in (
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8",
        b"RIFF\0\0\0\0WEBP",
        b"II*\0",
        b"MM\0*",
        b"II+\0",
    ):
        lean = without_metadata(make(kind))
        assert lean is None or len(lean) < 60
    assert without_metadata(b"GIF89a") is None
