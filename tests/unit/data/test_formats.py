"""Endings: what Pillow decodes is taken, whatever the place that asks."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from icce_ray.config.schema import DataConfig
from icce_ray.core.preprocess import FORMATS, decode
from icce_ray.data import formats, listing
from icce_ray.data.reading import read_bytes
from icce_ray.errors import DataError


def pillow() -> dict[str, str]:
    """Pillow's format by ending, of those that are decoded."""
    Image.init()
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
