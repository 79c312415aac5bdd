"""Images made small enough to be part of a page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from icce_ray.report import thumbnails


def size_of(uri: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size


def test_thumbnails_are_small_squares():
    uri = thumbnails.data_uri(Image.new("RGBA", (300, 100), (10, 200, 30, 255)), 48)
    assert size_of(uri) == (48, 48)
    assert size_of(thumbnails.data_uri(Image.new("L", (8, 20)), 48)) == (8, 8)


def test_whole_ones_keep_their_shape_and_are_never_enlarged():
    picture = Image.new("RGB", (300, 100))
    assert size_of(thumbnails.data_uri(picture, 48, whole=True)) == (48, 16)
    assert picture.size == (300, 100)
    assert size_of(thumbnails.data_uri(Image.new("L", (8, 20)), 48, whole=True)) == (8, 20)
