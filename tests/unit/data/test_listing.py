"""Listing: messages name the setting, or the argument, that the user gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from icce_ray.config.schema import DataConfig
from icce_ray.data.embeddings import open_vectors
from icce_ray.data.listing import list_images
from icce_ray.errors import DataError


@pytest.mark.parametrize("files", [(), ("a.txt",), ("a.png", "b.tar")])
def test_a_message_names_what_the_user_gave(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).touch()
    for setting, options in (("data.path", ()), ("images", ("images",))):
        with pytest.raises(DataError, match=rf"^{setting}={tmp_path} holds"):
            list_images(DataConfig(path=str(tmp_path)), *options)


def test_an_argument_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^images=.*no such file or folder"):
        list_images(DataConfig(path=str(tmp_path / "none")), "images")
    with pytest.raises(DataError, match=r"^data\.embeddings=.*no such file or folder"):
        open_vectors(str(tmp_path / "none.npy"))


def test_a_file_that_is_no_image_is_not_called_left_out(tmp_path: Path) -> None:
    (tmp_path / "edits.yaml").touch()
    with pytest.raises(DataError, match="holds no images") as error:
        list_images(DataConfig(path=str(tmp_path / "edits.yaml")))
    assert "Found" not in str(error.value)
