"""Images whose samples have more than 8 bits: which grey levels of 8 bits they become.

A camera of 12 bits, a microscope or a scanner uses a part of what 16 bits can hold. So the range is
taken from the images, one for all of a run: each its own would make dark images bright.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from icce_ray.core import tiff
from icce_ray.errors import DataError

Range = tuple[float, float]  # the values that become black and white

INTEGERS, FLOATS = (0.0, 65535.0), ((0.0, 1.0), (0.0, 255.0))  # the usual ranges
SHARE = 0.5  # of a usual range that the values must span for it to be taken
OUTSIDE = 0.1  # % of the values that may lie outside on either side: hot pixels
PER_IMAGE = 1 << 14  # values looked at


class Levels(NamedTuple):
    """The ranges of a run's images. Without one, each image is scaled by the range of its kind."""

    integers: Range | None = None
    floats: Range | None = None

    def describe(self) -> str:
        """For a line of the log."""
        known = [bounds for bounds in self if bounds is not None]
        texts = [f"{black:g} is black and {white:g} white" for black, white in known]
        return f"images of more than 8 bits: {'; of floats, '.join(texts)}"


AS_IS = Levels()


def with_levels(backbone: Mapping[str, Any], levels: Levels) -> dict[str, Any]:
    """The description of a backbone (`Backbone.describe`), whose transform begins with `levels`."""
    if levels == AS_IS:
        return dict(backbone)
    return {**backbone, "transform": {"levels": levels._asdict(), **backbone["transform"]}}


def levels_in(backbones: Sequence[Mapping[str, Any]]) -> Levels:
    """The levels that the described backbones of a run were given; all have the same."""
    found = backbones and (backbones[0].get("transform") or {}).get("levels")
    if not found:
        return AS_IS
    return Levels(**{kind: bounds and tuple(bounds) for kind, bounds in found.items()})


def is_deep(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded image has more than 8 bits per sample that we can read."""
    return image.mode.startswith(("I", "F")) or _low_mode(image) is not None


def is_deep_color(image: Image.Image) -> bool:
    """Whether it has more than 8 bits per sample, of which PIL would read the upper 8 alone."""
    return _low_mode(image) is not None


def color_values(image: Any, again: Any) -> np.ndarray:
    """uint16 [height, width, bands] of an image for which `is_deep_color`.

    image, again: the same image, opened twice, not loaded. The second is read in the wrong order of
    bytes: what PIL then takes for the upper 8 bits are the lower ones.
    """
    low = _low_mode(again)
    again.tile = [tile._replace(args=_with_mode(tile.args, low)) for tile in again.tile]
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)


def _mode_of(image: Any) -> Any:
    args = image.tile[0][3] if image.tile else None
    return args[0] if isinstance(args, tuple) and args else args


def _with_mode(args: Any, mode: Any) -> Any:
    return (mode, *args[1:]) if isinstance(args, tuple) else mode


def _low_mode(image: Any) -> str | None:
    """PIL's name for the other order of bytes of an image's samples."""
    mode = _mode_of(image)
    if image.mode not in ("RGB", "RGBA") or not isinstance(mode, str) or tiff.in_planes(image):
        return None
    other = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
    name, _, order = mode.partition(";16")
    return (
        f"{name};16{other[order]}" if name in ("RGB", "RGBA", "RGBX") and order in other else None
    )


# --- to 8 bits -----------------------------------------------------------------------------------


def grey(image: Any, levels: Levels) -> np.ndarray | None:
    """uint8 [height, width] of a loaded image of one band that PIL would not convert well, or None.

    Raises DataError: pixels that are not finite.
    """
    if image.mode.startswith(("I", "F")):
        return eight_bits(tiff.values(image), levels)
    if tiff.signed_bytes(image):
        return np.asarray(image) ^ 0x80
    return None


def eight_bits(values: np.ndarray, levels: Levels) -> np.ndarray:
    """Integers or floats as uint8, in their range.

    Where the levels have none, integers up to 65535 are 16-bit data, floats up to 1 or up to 255
    have that range; anything else is stretched between its own extremes.
    """
    if values.dtype == np.uint16:
        return _table(levels.integers or INTEGERS)[values]
    if not np.isfinite(values).all():
        raise DataError("pixels that are not finite")
    floats = values.dtype.kind == "f"
    known = levels.floats if floats else levels.integers
    return _scaled(values, known or _own_range(values, FLOATS if floats else (INTEGERS,)))


def _own_range(values: np.ndarray, usual: Iterable[Range]) -> Range:
    low, high = float(values.min()), float(values.max())
    fitting = (one for one in usual if one[0] <= low and high <= one[1])
    return next(fitting, (low, high))


@lru_cache(maxsize=4)
def _table(bounds: Range) -> np.ndarray:
    """uint8 [65536]: a look-up is faster than arithmetic, and needs no memory."""
    return _scaled(np.arange(65536), bounds)


def _scaled(values: np.ndarray, bounds: Range) -> np.ndarray:
    black, white = bounds
    x = (values.astype(np.float64) - black) * (255 / max(white - black, 1e-12))
    return np.rint(x.clip(0, 255)).astype(np.uint8)


# --- the range of a run --------------------------------------------------------------------------


def levels_of(pictures: Iterable[np.ndarray]) -> Levels:
    """The levels of a run, from the values of some of its images: see `Levels`."""
    pools: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for values in pictures:
        flat = values.reshape(-1)
        some = flat[:: max(1, len(flat) // PER_IMAGE)]
        pools[values.dtype.kind == "f"].append(some[np.isfinite(some)])
    return Levels(_common(pools[False], (INTEGERS,)), _common(pools[True], FLOATS))


def _common(pool: list[np.ndarray], usual: Iterable[Range]) -> Range | None:
    """A usual range that the values fill well enough, else their own. None for hardly any value."""
    values = np.concatenate([*pool, np.empty(0)])
    if not len(values) or values.min() == values.max():
        return None
    low, high = np.percentile(values, (OUTSIDE, 100 - OUTSIDE)).tolist()
    if low == high:
        low, high = float(values.min()), float(values.max())
    for black, white in usual:
        if black <= low and high <= white and high - low >= SHARE * (white - black):
            return black, white
    return low, high
