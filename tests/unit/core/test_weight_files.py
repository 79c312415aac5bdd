"""Files that hold weights, and files that do not: read safely, or named with the remedy."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch.serialization import get_safe_globals

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone
from icce_ray.core.weight_files import check, read
from icce_ray.errors import ConfigError

WEIGHTS = {"a.weight": torch.arange(60_000.0).reshape(300, 200)}


def stored(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


HARMLESS = {
    "namespace": argparse.Namespace(lr=1, names=["x"], inner=argparse.Namespace(y=2)),
    "empty namespace": argparse.Namespace(),
    "double": np.float64(1),
    "others": [np.int64(3), np.float32(2), np.bool_(True)],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", HARMLESS)
def test_plain_data_beside_the_weights(tmp_path: Path, name: str, zipped: bool) -> None:
    path, before = tmp_path / "w.pth", set(get_safe_globals())
    content = {"model": WEIGHTS, "more": HARMLESS[name]}
    path.write_bytes(stored(content, _use_new_zipfile_serialization=zipped))
    found = read(path)
    assert list(found) == ["model.a.weight"]
    assert torch.equal(found["model.a.weight"], WEIGHTS["a.weight"])
    assert set(get_safe_globals()) == before


def test_what_others_allowed_stays_allowed(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(stored({"model": WEIGHTS, "args": argparse.Namespace(lr=1)}))
    with torch.serialization.safe_globals([argparse.Namespace]):
        read(path)
        assert argparse.Namespace in get_safe_globals()


class Evil:
    """Would create a file where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return pathlib.Path.touch, (self.place,)


def test_nothing_else_is_run(tmp_path: Path) -> None:
    path, before = tmp_path / "w.pth", set(get_safe_globals())
    for content in (Evil(tmp_path / "ran"), argparse.Namespace(x=Evil(tmp_path / "ran"))):
        for zipped in (True, False):
            path.write_bytes(stored({"x": content}, _use_new_zipfile_serialization=zipped))
            with pytest.raises(ConfigError, match="not loaded, since it may run code"):
                read(path)
    assert not (tmp_path / "ran").exists() and set(get_safe_globals()) == before


LEGACY = stored(WEIGHTS, _use_new_zipfile_serialization=False)
OTHERS = {
    "html": (b"<!DOCTYPE html><title>404</title>", "is an HTML page"),
    "html later": (b"\n  <HTML lang=en>", "is an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "json": (b'{"error": "Entry not found"}', "is JSON text"),
    "empty": (b"", "is empty"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "Unpack it first"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "an HDF5 file"),
    "cut zip": (stored(WEIGHTS)[:100_000], "is truncated"),
    "cut zip, early": (stored(WEIGHTS)[:50], "is truncated"),
    "cut legacy": (LEGACY[:100_000], "is truncated"),
    "cut legacy, early": (LEGACY[:200], "is truncated"),
    "cut safetensors": (save_safetensors(WEIGHTS)[:1000], "is truncated"),
    "cut header": (save_safetensors(WEIGHTS)[:20], "is truncated"),
    "path": (stored({"out": pathlib.PurePosixPath("x")}), "holds pathlib"),
    "array": (stored({"mean": np.zeros(3)}), r"holds numpy.*_reconstruct.*torch\.save\(model\."),
    "module": (stored(torch.nn.Linear(2, 2)), r"holds torch\.nn\.modules\.linear\.Linear"),
    "plain pickle": (pickle.dumps({"a": [1]}), "neither a safetensors file"),
    "text": (b"Entry not found", "neither a safetensors file"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, name: str, suffix: str) -> None:
    data, message = OTHERS[name]
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and "weights_only=False" not in text
    assert len(text) < 400 + len(str(path))


def test_the_end_of_an_archive_whose_parts_are_missing(tmp_path: Path) -> None:
    """It says that the archive lies on several disks, for which zipfile has an error of its own."""
    locator = b"PK\x06\x07" + (0).to_bytes(4, "little") + bytes(8) + (9).to_bytes(4, "little")
    end = locator + b"PK\x05\x06" + bytes(18)
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04" + bytes(99) + end)
    with pytest.raises(ConfigError, match=r"zip archive|truncated or damaged"):
        read(tmp_path / "w.pth")


def test_an_archive_without_weights(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(ConfigError, match="a zip archive without weights"):
        read(tmp_path / "w.npz")


def test_names_lie(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(save_safetensors(WEIGHTS))
    (tmp_path / "w.safetensors").write_bytes(stored(WEIGHTS))
    assert list(read(tmp_path / "w.bin")) == list(read(tmp_path / "w.safetensors")) == ["a.weight"]


def test_a_page_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(OTHERS["html"][0])
    with pytest.raises(ConfigError, match="HTML"):
        backbone.check(BackboneConfig(name="test_vit", weights=str(path)))
    with pytest.raises(ConfigError, match="no such file"):
        check(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be read"):
        check(tmp_path)


def test_a_dictionary_that_holds_itself(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"model": WEIGHTS}
    endless["again"] = endless
    (tmp_path / "w.pth").write_bytes(stored(endless))
    assert list(read(tmp_path / "w.pth")) == ["model.a.weight"]
