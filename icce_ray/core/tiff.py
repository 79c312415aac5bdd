"""What PIL reads wrong of TIFF files, put right, and what it does not read, in words."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from PIL import TiffImagePlugin

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _BANDS, _PLANES, _FORMAT = (
    256,
    257,
    258,
    262,
    277,
    284,
    339,
)  # tags
_KINDS = {1: "{} bits", 2: "signed {} bits", 3: "float{}", 5: "complex integers", 6: "complex{}"}

# Names of PIL for what libtiff gives: numbers in the machine's own order of bytes.
_NATIVE = {
    (16, "I;16"): "I;16N",
    (16, "I;16B"): "I;16N",
    (16, "I"): "I;16NS",
    (32, "I"): "I;32N",
    (32, "F"): "F;32NF",
    (16, "RGB"): "RGB;16N",
    (16, "RGBA"): "RGBA;16N",
    (16, "CMYK"): "CMYK;16N",
}


def describe(data: bytes) -> str | None:
    """What a TIFF holds, as "a TIFF of 5 bands of 8 bits". None for other and damaged files."""
    if not data.startswith(tuple(TiffImagePlugin.PREFIXES)):
        return None
    with contextlib.suppress(Exception):  # PIL raises almost anything on damaged tags
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        if _PHOTOMETRIC not in tags:  # which every TIFF has
            return None
        bits, formats = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
        bands = int(tags.get(_BANDS, 1))
        kinds = [_KINDS.get(kind, "{} bits of an unknown kind") for kind in formats]
        each = sorted({kind.format(size) for kind in kinds for size in bits})
        planes = " in separate planes" if tags.get(_PLANES) == 2 else ""
        return f"a TIFF of {bands} band{'s' * (bands != 1)} of {' and '.join(each)}{planes}"
    return None


def prepare(image: Any) -> None:
    """Have libtiff read what PIL's own reader misreads, and say rightly what libtiff gives.

    PIL takes 8 bits where separate planes have more, and takes numbers of 32 bits that libtiff has
    put into the machine's order for those of the file.

    image: as opened by PIL, not loaded; anything but a TIFF is left alone.
    """
    if image.format != "TIFF" or not (image.use_load_libtiff or in_planes(image)):
        return
    if image.use_load_libtiff and image.mode not in ("I", "F"):
        return
    rawmode = _NATIVE.get((max(image.tag_v2.get(_BITS, (1,))), image.mode))
    if rawmode is not None:
        size = (image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT])  # PIL turns the image's own size
        whole = {"codec_name": "libtiff", "extents": (0, 0, *size), "offset": 0}
        arguments = (rawmode, False, image.tag_v2.offset)
        image.tile = [image.tile[0]._replace(**whole, args=arguments)]
        image.use_load_libtiff = True


def in_planes(image: Any) -> bool:
    """Whether an opened image is a TIFF whose bands lie one after the other."""
    return getattr(image, "tag_v2", {}).get(_PLANES) == 2


def signed_bytes(image: Any) -> bool:
    """Whether the pixels of a TIFF are -128 to 127, which PIL takes for 0 to 255."""
    return image.mode == "L" and set(getattr(image, "tag_v2", {}).get(_FORMAT, ())) == {2}


def values(image: Any) -> np.ndarray:
    """The pixels [height, width] of a loaded image of one band, also of a TIFF: dark is low.

    PIL takes 32 bits for signed ones, and leaves 16 bits and floats as they are where 0 is white.
    """
    found = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and max(tags.get(_BITS, (1,))) == 32 and max(tags.get(_FORMAT, (1,))) == 1:
        found = found.view(np.uint32)
    if tags.get(_PHOTOMETRIC, 1) == 0:
        tops = {"I": 65535, "F": 1}
        found = max(tops[image.mode[0]], found.max()) - found
    return found
