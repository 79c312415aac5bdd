"""Endings: what Pillow decodes is taken, whatever the place that asks."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icce_ray.config.schema import DataConfig
from icce_ray.core.preprocess import FORMATS, BadImage, decode
from icce_ray.data import formats, listing
from icce_ray.data.reading import read_bytes
from icce_ray.errors import DataError

# 48 x 32 pixels turned by EXIF: the left half blue, above here, the right one red.
HEIC = base64.b64decode(
    """
    AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAA
    AAAAAAAAADRpbG9jAAAAAERAAAIAAQAAAAAB7AABAAAAAAAAACkAAgAAAAACFQABAAAAAAAAACQAAAA4aWluZgAAAAAA
    AgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcnAAAADm
    aXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAq
    QgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQAN
    AAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAADAAAAABAAAAIAAAAAH////wAAAAAv///+AAAAACAAAAEHBp
    eGkAAAAAAwgICAAAAAlpcm90AwAAABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEA
    AQAAAFVtZGF0AAAAJSgBrxOA5TH3/9uDRB0+oPkZLBKy7D3/nt8uYu7+EsPrKKPac/AAAAAGRXhpZgAATU0AKgAAAAgA
    AQESAAMAAAABAAYAAAAAAAA=
"""
)


def pillow() -> dict[str, str]:
    """Pillow's format by ending, of those that are decoded."""
    with pytest.raises(BadImage):
        decode(b"none", 100)  # which registers all of them
    known = Image.registered_extensions().items()
    return {end[1:]: kind for end, kind in known if kind in FORMATS}


def test_the_endings_are_those_of_the_formats_that_are_decoded() -> None:
    assert set(formats.IMAGES) == set(pillow())
    assert len(set(formats.IMAGES)) == len(formats.IMAGES)
    assert not set(formats.IMAGES) & set(formats.UNDECODABLE)


@pytest.mark.parametrize("end", sorted(set(formats.IMAGES) - {"avifs", "apng", "mpo", "pfm"}))
def test_an_image_of_each_ending_is_listed_and_decoded(tmp_path: Path, end: str) -> None:
    if pillow()[end] not in Image.SAVE:
        pytest.skip("this Pillow was built without it")
    image = Image.new("1" if end == "pbm" else "L" if end == "pgm" else "RGB", (8, 6))
    stream = io.BytesIO()
    image.save(stream, pillow()[end])
    path = tmp_path / f"a.{end.upper()}"
    path.write_bytes(stream.getvalue())
    found = listing.list_images(DataConfig(path=str(tmp_path)))
    assert found.table["uri"].to_pylist() == [str(path)]
    assert decode(read_bytes(str(path)), 100).size == (8, 6)


def test_heic_of_a_phone(tmp_path: Path) -> None:
    if "heic" not in formats.IMAGES:
        pytest.skip("pi-heif is not installed")
    (tmp_path / "IMG_0001.HEIC").write_bytes(HEIC)
    found = listing.list_images(DataConfig(path=str(tmp_path))).table["uri"].to_pylist()
    image = decode(read_bytes(found[0]), 48 * 32)
    assert (image.mode, image.size) == ("RGB", (32, 48)), "upright"
    above, below = image.getpixel((16, 8)), image.getpixel((16, 40))
    assert np.allclose((above, below), ((30, 30, 200), (200, 30, 30)), atol=12)
    with pytest.raises(BadImage, match="more than"):
        decode(HEIC, 48 * 32 - 1)
    for end in range(0, 530, 10):  # up to the last byte of the pixels
        with pytest.raises(BadImage):
            decode(HEIC[:end], 10_000)


def test_without_its_decoder_heic_is_counted(tmp_path: Path) -> None:
    if "heic" in formats.IMAGES:
        pytest.skip("pi-heif is installed")
    (tmp_path / "IMG_0001.HEIC").write_bytes(HEIC)
    (tmp_path / "a.png").touch()
    left = str(listing.list_images(DataConfig(path=str(tmp_path))).left)
    assert "1 images of formats that cannot be decoded, in .heic" in left


def test_names_without_an_ending(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n:032x}").touch()
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"3 files without an ending .*data\.format names") as error:
        listing.list_images(DataConfig(path=str(tmp_path)))
    assert "1 files ending in .txt (a.txt)" in str(error.value)
    found = listing.list_images(DataConfig(path=str(tmp_path), format="folder"))
    assert found.found == 3
    (tmp_path / "b.png").touch()  # now the endings decide, and the rest is counted
    found = listing.list_images(DataConfig(path=str(tmp_path), format="folder"))
    assert found.found == 1 and "3 files without an ending" in str(found.left)
