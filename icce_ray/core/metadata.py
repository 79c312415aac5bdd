"""Encoded images without their metadata, for readers that fail over it.

PIL refuses a whole image for a large text, a colour profile or a wrong checksum beside it. Only
such images come here: what is left is what the pixels need, and the EXIF orientation.
"""

from __future__ import annotations

import contextlib
import re
import struct
import zlib
from typing import Literal

from PIL import Image

ORIENTATION = 0x0112  # EXIF tag

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_JPEG_START, _JPEG_SCAN = b"\xff\xd8", 0xDA
_JPEG_LENGTHS = {0xE0: 16, 0xEE: 14}  # APP0 and APP14, with their length: they tell the colours
_WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}  # and their flags in VP8X
_AVIF_HEADER = 1 << 16  # bytes in which an AVIF's items are named
_AVIF_METADATA = re.compile(rb"(infe[\x02\x03].{7,9}?)(?:Exif|mime)", re.DOTALL)
_TIFF_KEPT = frozenset(  # baseline and decoding tags, and the orientation
    {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323}
    | {324, 325, 332, 338, 339, 347, 512, 513, 514, 519, 520, 521, 529, 530, 531, 532}
)


def without_metadata(data: bytes) -> bytes | None:
    """The same pixels of a PNG, JPEG, WebP, TIFF or AVIF file; None where there is nothing to drop.

    Never raises: of damaged data, it keeps what it does not understand.
    """
    with contextlib.suppress(struct.error, IndexError, OverflowError):
        if data.startswith(_PNG):
            return _changed(data, _png(data))
        if data.startswith(_JPEG_START):
            return _changed(data, _jpeg(data))
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _changed(data, _webp(data))
        if data[:2] in (b"II", b"MM"):
            return _changed(data, _tiff(data))
        if data[4:8] == b"ftyp":
            named = _AVIF_METADATA.sub(rb"\1skip", data[:_AVIF_HEADER])  # a type nobody reads
            return _changed(data, named + data[_AVIF_HEADER:])
    return None


def _changed(data: bytes, lean: bytes) -> bytes | None:
    return None if lean == data else lean


def _orientation(exif: bytes) -> bytes:
    """An EXIF block with nothing but the orientation of another; empty where that says nothing."""
    with contextlib.suppress(Exception):  # a damaged block must not cost the image
        full, lean = Image.Exif(), Image.Exif()
        full.load(exif)
        if full.get(ORIENTATION, 1) != 1:
            lean[ORIENTATION] = full[ORIENTATION]
            return lean.tobytes()
    return b""


def _png(data: bytes) -> bytes:
    parts = [_PNG]
    at = len(_PNG)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        whole = data[at : at + size + 12]
        if kind in _PNG_KEPT:
            parts.append(whole)
        elif kind == b"eXIf" and (exif := _orientation(whole[8:-4])):
            exif = exif.removeprefix(b"Exif\0\0")
            check = struct.pack(">I", zlib.crc32(kind + exif))
            parts.insert(2, struct.pack(">I4s", len(exif), kind) + exif + check)  # after IHDR
        at += len(whole)
    return b"".join(parts) + struct.pack(">I4sI", 0, b"IEND", zlib.crc32(b"IEND"))


def _jpeg(data: bytes) -> bytes:
    parts = [_JPEG_START]
    at = 2
    while data[at] == 0xFF and data[at + 1] != _JPEG_SCAN:
        if data[at + 1] == 0xFF:  # a fill byte
            at += 1
            continue
        marker, size = struct.unpack_from(">BH", data, at + 1)
        segment = data[at : at + 2 + size]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            if exif := _orientation(segment[4:]):
                parts.append(struct.pack(">HH", 0xFFE1, len(exif) + 2) + exif)
        elif marker in _JPEG_LENGTHS:
            parts += [segment] if size >= _JPEG_LENGTHS[marker] else []
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):  # APPn, COM
            parts.append(segment)
        at += 2 + size
    return b"".join(parts) + data[at:]


def _webp(data: bytes) -> bytes:
    parts = []
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        whole = data[at : at + 8 + size + size % 2]
        if kind == b"VP8X":
            flags = whole[8] & ~sum(_WEBP_METADATA.values())
            whole = whole[:8] + bytes([flags]) + whole[9:]
        if kind not in _WEBP_METADATA:
            parts.append(whole)
        at += len(whole)
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _tiff(data: bytes) -> bytes:
    """The first directory alone, with fewer entries, in the same place."""
    order, start, count, entries = _tiff_directory(data)
    kept = [entry for entry in entries if struct.unpack_from(order + "H", entry)[0] in _TIFF_KEPT]
    size = struct.calcsize(count)
    changed = bytearray(data)
    changed[start : start + size] = struct.pack(count, len(kept))
    place = start + size
    room = sum(map(len, entries)) + (4 if size == 2 else 8)  # the pointer to the next directory
    block = b"".join(kept).ljust(room, b"\0")
    changed[place : place + len(block)] = block[: len(data) - place]
    return bytes(changed)


def _tiff_directory(data: bytes) -> tuple[Literal["<", ">"], int, str, list[bytes]]:
    """Byte order, place, format of the count, and entries of a TIFF's first directory."""
    order: Literal["<", ">"] = "<" if data.startswith(b"II") else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    pointer, count, width = ("Q", order + "Q", 20) if big else ("I", order + "H", 12)
    (start,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
    (number,) = struct.unpack_from(count, data, start)
    first = start + struct.calcsize(count)
    whole = min(number, (len(data) - first) // width)
    places = range(first, first + whole * width, width)
    return order, start, count, [data[at : at + width] for at in places]
