"""From the bytes of an image to the pixels of a backbone: decode, resize, crop, normalize."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from icce_ray.core import samples, tiff
from icce_ray.core.metadata import ORIENTATION, without_metadata
from icce_ray.core.samples import AS_IS, Levels
from icce_ray.errors import DataError, one_line

# What PIL may try: only raster images, and nothing that starts another program (EPS).
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF")
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_ASPECT = 8  # thinner images lose their ends before scaling, see Preprocess


class BadImage(DataError):
    """One image cannot be read or decoded; the message is the reason, for the quarantine file."""


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    with contextlib.suppress(ImportError):  # data.formats counts these as undecodable then
        import pi_heif

        pi_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(data: bytes, max_pixels: int, levels: Levels = AS_IS) -> Image.Image:
    """An encoded image as RGB, 8 bits per channel, upright.

    Transparent parts are laid on white. Of more than 8 bits per sample, the range `levels` is kept.
    Of an animation, the first frame is taken. EXIF orientation is applied. Other metadata, however
    large or damaged, do not matter.

    Raises:
        BadImage: empty, of an unknown format, damaged, truncated, or of more than `max_pixels`
            (read from the header, before anything is decoded).
    """
    try:
        return _decode(data, max_pixels, levels)
    except BadImage:
        lean = without_metadata(data)
        if lean is None:
            raise
    return _decode(lean, max_pixels, levels)


def levels_of(images: Iterable[bytes], max_pixels: int) -> Levels:
    """The levels for all images of a run, from some of them, encoded. Bad ones do not count."""
    return samples.levels_of(_deep_values(images, max_pixels))


def _deep_values(images: Iterable[bytes], max_pixels: int) -> Iterator[np.ndarray]:
    for data in images:
        with contextlib.suppress(BadImage), _opened(data, max_pixels) as image:
            if samples.is_deep_color(image):
                yield _color_values(image, data, max_pixels)[..., :3]
            elif samples.is_deep(image):
                image.load()
                yield tiff.values(image)


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The image of `data`, not loaded. What PIL raises for it meanwhile comes as BadImage."""
    if not data:
        raise BadImage("empty file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the user asked for more than PIL would allow
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width} x {height} pixels: more than embed.max_pixels allows")
            tiff.prepare(image)
            yield image
    except DataError as error:
        raise BadImage(str(error)) from None
    except Image.DecompressionBombError:
        raise BadImage("more pixels than embed.max_pixels allows") from None
    except MemoryError:
        raise BadImage("too large for the memory") from None
    except Exception as error:  # PIL's readers raise almost anything on damaged input
        raise BadImage(_reason(data, error)) from None


def _reason(data: bytes, error: Exception) -> str:
    text = str(error)
    if isinstance(error, Image.UnidentifiedImageError) or "raw mode" in text:
        known = tiff.describe(data)
        return (
            f"{known}, which is not supported" if known else "not an image, or of an unknown format"
        )
    return "truncated" if "truncated" in text.lower() else f"damaged: {one_line(error, 200)}"


def _decode(data: bytes, max_pixels: int, levels: Levels) -> Image.Image:
    with _opened(data, max_pixels) as image:
        if levels.integers not in (None, samples.INTEGERS) and samples.is_deep_color(image):
            picture = _deep_color(image, data, max_pixels, levels)
        else:
            image.load()
            picture = _to_rgb(image, levels)
        return _upright(picture, image)


def _upright(picture: Image.Image, source: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a damaged EXIF block must not cost the image
        turn = TURNS.get(source.getexif().get(ORIENTATION, 1))
        return picture if turn is None else picture.transpose(turn)
    return picture


def _to_rgb(image: Image.Image, levels: Levels) -> Image.Image:
    grey = samples.grey(image, levels)
    if grey is not None:
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # the latter always copies


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _deep_color(image: Image.Image, data: bytes, max_pixels: int, levels: Levels) -> Image.Image:
    values = _color_values(image, data, max_pixels)
    scaled = samples.eight_bits(values, levels)
    if values.shape[2] == 3:
        return Image.fromarray(scaled)
    scaled[..., 3] = values[..., 3] >> 8
    return _on_white(Image.fromarray(scaled))


def _color_values(image: Image.Image, data: bytes, max_pixels: int) -> np.ndarray:
    with _opened(data, max_pixels) as again:
        return samples.color_values(image, again)


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


def distinct(each: Sequence[Preprocess]) -> tuple[tuple[Preprocess, ...], list[int]]:
    """The different ones of several backbones' preparations, and which of them each one uses."""
    different = tuple(dict.fromkeys(each))
    return different, [different.index(one) for one in each]


def pixels_of(
    data: bytes, preparations: Sequence[Preprocess], max_pixels: int, levels: Levels = AS_IS
) -> list[np.ndarray]:
    """An encoded image as a uint8 array [3, S, S] for each preparation. Raises BadImage."""
    image = decode(data, max_pixels, levels)
    try:
        return [prepare(image) for prepare in preparations]
    except (ValueError, OSError, MemoryError) as error:
        raise BadImage(f"cannot be resized: {error}") from None


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
