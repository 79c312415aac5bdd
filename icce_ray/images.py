"""Reading, decoding and cropping images. PIL, numpy and pyarrow only: what decodes needs no torch.

An image's address (`uri` in the index) is one of

    FILE                   an image file
    FILE.tar#MEMBER        with `offset` and `size`: bytes inside an uncompressed tar
    FILE.parquet#ROW       a row of the column `image`; of another column: FILE.parquet#COLUMN/ROW

where FILE is a local path or an s3://, gs:// URI (options such as ?region=... may follow the path).
Shapes: S side of the square input.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from icce_ray import storage
from icce_ray.errors import DataError, IcceError, NoAnswerError
from icce_ray.storage import is_remote, locate, patiently

IMAGE_COLUMN = "image"
THREADS = 4  # concurrent reads of local files
REMOTE_THREADS = 32  # ... of an object store, where each read waits for the network
GAP = 1 << 18  # bytes between two tar members that are read along rather than skipped
RANGE = 1 << 25  # bytes read from a tar at once, at most (a larger member is read whole)
# What PIL may try: raster images alone, and nothing that starts another program (EPS).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
MAX_ASPECT = 8  # thinner images lose their ends before scaling, see Preprocess
ORIENTATION = 0x0112  # EXIF tag

warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters is raised or quarantined


class BadImage(DataError):
    """One image cannot be read or decoded; the message is the reason, for the quarantine file."""


# --- addresses -----------------------------------------------------------------------------------

_ROW = re.compile(r"(?P<file>.*)#(?:(?P<column>[^#]+)/)?(?P<row>\d+)", re.DOTALL)
_TAR = re.compile(r"(?P<file>.*?\.tar(?:\?[^#]*)?)#", re.DOTALL)


def row_uri(file: str, column: str = IMAGE_COLUMN) -> str:
    """The address of a Parquet row, up to the row's number."""
    return f"{file}#" if column == IMAGE_COLUMN else f"{file}#{column}/"


# --- reading -------------------------------------------------------------------------------------


def read_bytes(uri: str, offset: int | None = None, size: int | None = None) -> bytes:
    """The encoded bytes of one image.

    Raises:
        BadImage: where it cannot be read.
        NoAnswerError: as read_many.
    """
    found = read_many([uri], [offset], [size])[0]
    if isinstance(found, BadImage):
        raise found
    return found


def read_many(
    uris: Sequence[str],
    offsets: Sequence[int | None] | None = None,
    sizes: Sequence[int | None] | None = None,
) -> list[bytes | BadImage]:
    """The encoded bytes of many images, in their order; in place of an unreadable one, why.

    Each tar and Parquet file is read in few large ranges, and several files at a time. A storage
    that fails for a while is waited for: that says nothing of an image.

    Raises:
        NoAnswerError: the storage did not come back in time.
    """
    offsets = offsets or [None] * len(uris)
    sizes = sizes or [None] * len(uris)
    out: list[bytes | BadImage] = [BadImage("not read")] * len(uris)
    jobs = _jobs(uris, offsets, sizes, out)
    if len(jobs) == 1:
        jobs[0]()
        return out
    threads = REMOTE_THREADS if any(is_remote(uri) for uri in uris[:1]) else THREADS
    with ThreadPoolExecutor(min(threads, max(1, len(jobs)))) as pool:
        try:
            for _ in pool.map(lambda job: job(), jobs):
                pass
        except NoAnswerError:
            pool.shutdown(cancel_futures=True)  # each of the others would wait as long
            raise
    return out


def _jobs(
    uris: Sequence[str],
    offsets: Sequence[int | None],
    sizes: Sequence[int | None],
    out: list[bytes | BadImage],
) -> list[Callable[[], None]]:
    """One job per plain file, per range of a tar, and per Parquet file; each fills its part."""
    jobs: list[Callable[[], None]] = []
    tars: dict[str, list[tuple[int, int, int]]] = {}
    tables: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for position, (uri, offset, size) in enumerate(zip(uris, offsets, sizes, strict=True)):
        if offset is not None and (member := _TAR.match(uri)):
            tars.setdefault(member["file"], []).append((int(offset), int(size or 0), position))
        elif row := _ROW.fullmatch(uri):
            key = (row["file"], row["column"] or IMAGE_COLUMN)
            tables.setdefault(key, []).append((int(row["row"]), position))
        else:
            jobs.append(partial(_read_file, uri, position, out))
    for file, members in tars.items():
        jobs += [partial(_read_range, file, part, out) for part in _ranges(members)]
    for (file, column), rows in tables.items():
        jobs.append(partial(_read_rows, file, column, rows, out))
    return jobs


def _unreadable(error: Exception) -> BadImage:
    if isinstance(error, FileNotFoundError):
        return BadImage("not found")
    return BadImage(f"cannot be read: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _read_file(uri: str, position: int, out: list[bytes | BadImage]) -> None:
    try:
        out[position] = storage.read(uri)
    except NoAnswerError:
        raise
    except (OSError, pa.ArrowException, IcceError, ValueError) as error:
        out[position] = _unreadable(error)


def _ranges(members: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Members (offset, size, position) of a tar, grouped into ranges to read at once."""
    groups: list[list[tuple[int, int, int]]] = []
    for member in sorted(members):
        last = groups[-1] if groups else None
        near = last and member[0] - (last[-1][0] + last[-1][1]) <= GAP
        if last and near and member[0] + member[1] - last[0][0] <= RANGE:
            last.append(member)
        else:
            groups.append([member])
    return groups


def _read_range(
    file: str, members: list[tuple[int, int, int]], out: list[bytes | BadImage]
) -> None:
    start = members[0][0]
    stop = max(offset + size for offset, size, _ in members)

    def read() -> bytes:
        filesystem, path = locate(file)
        with filesystem.open_input_file(path) as stream:
            return stream.read_at(stop - start, start)

    try:
        data = patiently(read, file)
    except NoAnswerError:
        raise
    except (OSError, pa.ArrowException, IcceError, ValueError) as error:
        for _, _, position in members:
            out[position] = _unreadable(error)
        return
    for offset, size, position in members:
        out[position] = data[offset - start : offset - start + size]


@lru_cache(maxsize=64)
def _group_ends(file: str) -> np.ndarray:
    """Row numbers at which the row groups of a Parquet file end."""
    filesystem, path = locate(file)
    with filesystem.open_input_file(path) as stream:
        metadata = pq.ParquetFile(stream).metadata
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return np.cumsum(rows, dtype=np.int64)


@lru_cache(maxsize=1)  # the next batch of rows is usually in the same group
def _group(file: str, column: str, group: int) -> pa.ChunkedArray:
    """One row group's encoded images."""
    filesystem, path = locate(file)
    with filesystem.open_input_file(path) as stream:
        parquet = pq.ParquetFile(stream)
        kind = parquet.schema_arrow.field(column).type
        leaf = f"{column}.bytes" if pa.types.is_struct(kind) else column
        values = parquet.read_row_group(group, columns=[leaf]).column(column)
    return pc.struct_field(values, "bytes") if pa.types.is_struct(kind) else values


def _read_rows(
    file: str, column: str, rows: list[tuple[int, int]], out: list[bytes | BadImage]
) -> None:
    try:
        ends = patiently(lambda: _group_ends(file), file)
        groups = np.searchsorted(ends, [row for row, _ in rows], side="right")
        for group in np.unique(groups):
            chosen = [rows[i] for i in np.flatnonzero(groups == group)]
            if group == len(ends):
                values: list[Any] = [None] * len(chosen)
            else:
                first = int(ends[group - 1]) if group else 0
                take = pa.array([row - first for row, _ in chosen])
                read = partial(_group, file, column, int(group))
                values = patiently(read, file).take(take).to_pylist()
            for (_, position), value in zip(chosen, values, strict=True):
                out[position] = value if isinstance(value, bytes) else BadImage("no image bytes")
    except NoAnswerError:
        raise
    except (OSError, pa.ArrowException, IcceError, KeyError, ValueError) as error:
        for _, position in rows:
            if isinstance(out[position], BadImage):
                out[position] = _unreadable(error)


# --- decoding ------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """An encoded image as RGB, 8 bits per channel, upright.

    Transparent parts are laid on white. 16-bit images are scaled, not clipped. Of an animation, the
    first frame is taken. EXIF orientation is applied.

    Raises:
        BadImage: empty, of an unknown format, damaged, truncated, or of more than `max_pixels`
            (read from the header, before anything is decoded).
    """
    if not data:
        raise BadImage("empty file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the user asked for more than PIL would allow
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} pixels: more than embed.max_pixels allows")
            image.load()
            return _to_rgb(_upright(image))
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("more pixels than embed.max_pixels allows") from None
    except Image.UnidentifiedImageError:
        raise BadImage("not an image, or of an unknown format") from None
    except MemoryError:
        raise BadImage("too large for the memory") from None
    except Exception as error:  # PIL's readers raise almost anything on damaged input
        truncated = "truncated" in str(error).lower()
        reason = "truncated" if truncated else f"damaged: {_one_line(error)}"
        raise BadImage(reason) from None


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a damaged EXIF block must not cost the image
        if image.getexif().get(ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_eight_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _to_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit, 32-bit and float pixels [height, width] as uint8.

    Integers up to 65535 are 16-bit data, floats up to 1 or up to 255 have that range; anything else
    is stretched between its own extremes.
    """
    x = values.astype(np.float64)
    if not np.isfinite(x).all():
        raise BadImage("pixels that are not finite")
    low, high = x.min(), x.max()
    if mode.startswith("I") and low >= 0 and high <= 65535:
        x = x / 257
    elif mode == "F" and low >= 0 and high <= 1:
        x = x * 255
    elif not (mode == "F" and low >= 0 and high <= 255):
        x = (x - low) * (255 / max(high - low, 1e-12))
    return np.rint(x).astype(np.uint8)


# --- resize and crop -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """Resize and crop to a model's input: RGB image -> uint8 [3, S, S].

    The same pixels as timm's evaluation transform without ToTensor and Normalize (a test compares
    them), but without importing torch, which costs each decoding process seconds and 300 MB. One
    difference: images thinner than 1:8 lose their ends before they are scaled, which the crop would
    cut off anyway; scaled whole, a 1 x 20,000 image would take gigabytes.
    """

    size: int  # S
    resize: int  # side after scaling, before the crop
    interpolation: str = "bicubic"  # the name of one of PIL's filters
    mode: Literal["center", "squash", "border"] = "center"
    fill: tuple[int, ...] = (0, 0, 0)  # of border

    def __call__(self, image: Image.Image) -> np.ndarray:
        method = Image.Resampling[self.interpolation.upper()]
        if self.mode == "center":
            image = _cut_ends(image)
        image = image.resize(self._scaled(image.size), method)
        if self.mode == "border":
            image = _pad(image, self.size, self.fill)
        left, top = (round((side - self.size) / 2) for side in image.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _scaled(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after scaling."""
        if self.mode == "squash":
            return self.resize, self.resize
        if self.mode == "border":  # longest edge
            ratio = max(size) / self.resize
            return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))
        width, height = size
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize

    @property
    def nbytes(self) -> int:
        """Bytes of one output."""
        return 3 * self.size**2

    def describe(self) -> dict[str, Any]:
        """As plain data, for the classifier's description."""
        return {
            "resize": self.resize,
            "crop": self.size,
            "interpolation": self.interpolation,
            "mode": self.mode,
        }


def _cut_ends(image: Image.Image) -> Image.Image:
    short, long = min(image.size), max(image.size)
    if long <= MAX_ASPECT * short:
        return image
    cut = (long - MAX_ASPECT * short) // 2
    if image.width > image.height:
        return image.crop((cut, 0, cut + MAX_ASPECT * short, short))
    return image.crop((0, cut, short, cut + MAX_ASPECT * short))


def _pad(image: Image.Image, size: int, fill: tuple[int, ...]) -> Image.Image:
    width, height = max(size, image.width), max(size, image.height)
    if (width, height) == image.size:
        return image
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def preprocess_from(data_config: dict[str, Any]) -> Preprocess:
    """The Preprocess of timm's data config. Raises DataError where its input is not square."""
    _, height, width = data_config["input_size"]
    if height != width:
        raise DataError(f"its input is {height} x {width}; only square inputs are supported")
    return Preprocess(
        size=height,
        resize=math.floor(height / data_config["crop_pct"]),
        interpolation=data_config["interpolation"],
        mode=data_config["crop_mode"] or "center",
        fill=tuple(round(255 * value) for value in data_config["mean"]),
    )
