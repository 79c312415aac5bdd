"""Thumbnails: images of a run, read where they lie, small enough to be part of a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config
from icce_ray.core import preprocess
from icce_ray.core.samples import Levels
from icce_ray.data import reading
from icce_ray.report.facts import RunFacts

QUALITY = 72


def places_of(facts: RunFacts, rows: np.ndarray) -> list[dict[str, Any]]:
    """Where images are: uri, offset, size."""
    image_ids = facts.image_ids[rows]
    if facts.index is None:
        return [{"uri": f"row {i}", "offset": None, "size": None} for i in image_ids]
    return facts.index.take(pa.array(image_ids)).to_pylist()


def thumbnails(
    config: Config,
    places: Sequence[Mapping[str, Any]],
    side: int,
    levels: Levels,
    whole: bool = False,
) -> list[str | None]:
    """Thumbnails as data URIs; None where there is no image, or it cannot be read. See `data_uri`.

    A moved or deleted image must not prevent the report.

    places: uri, offset and size of each. levels: the ranges of the run's images.
    """
    if config.data.embeddings:
        return [None] * len(places)
    data = reading.read_many(
        *([place[key] for place in places] for key in ("uri", "offset", "size"))
    )
    limit = config.embed.max_pixels
    shrink = partial(_thumbnail, side=side, max_pixels=limit, levels=levels, whole=whole)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(shrink, data))


def _thumbnail(data: Any, side: int, max_pixels: int, levels: Levels, whole: bool) -> str | None:
    if not isinstance(data, bytes):
        return None
    try:
        return data_uri(preprocess.decode(data, max_pixels, levels), side, whole)
    except preprocess.BadImage:
        return None


def data_uri(picture: Any, side: int, whole: bool = False) -> str:
    """A PIL image as WebP (or JPEG) text, at most `side` pixels wide and high.

    whole: else it is cut to its central square.
    """
    from PIL import ImageOps, features

    # A smaller image is scaled up by the browser.
    if whole:
        small = picture.convert("RGB")
        small.thumbnail((side, side))
    else:
        side = min(side, *picture.size)
        small = ImageOps.fit(picture.convert("RGB"), (side, side))
    kind = "webp" if features.check("webp") else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind, quality=QUALITY)
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()
