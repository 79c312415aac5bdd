"""Public data sets as class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icce_ray.data import datasets
from icce_ray.errors import ConfigError, DataError


def tiny(split: str) -> datasets.Arrays:
    count = 6 if split == "train" else 3
    images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    return datasets.Arrays(images, np.arange(count) % 3, ("a", "b/c", "d"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def load(split: str) -> datasets.Arrays:
        calls.append(split)
        return tiny(split)

    monkeypatch.setattr(datasets, "_LOADERS", {"cifar10": load, "digits": load})
    return calls


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_digits_are_dark_on_white(tmp_path: Path) -> None:
    assert datasets.materialize("digits", str(tmp_path / "digits"))
    names = files(tmp_path / "digits")
    assert len(names) == 1797
    assert names[0] == "0/00000.png"
    assert sorted({name.split("/")[0] for name in names}) == [str(n) for n in range(10)]
    first = np.asarray(Image.open(tmp_path / "digits" / names[0]))
    assert first.shape == (8, 8)
    assert first[0, 0] == 255 and first.min() == 16  # 15 of 16 parts ink


def test_splits_lie_side_by_side(tmp_path: Path, fake: list[str]) -> None:
    assert datasets.materialize("cifar10", str(tmp_path / "c" / "train"))
    assert len(files(tmp_path / "c" / "train")) == 6
    assert files(tmp_path / "c" / "test") == ["a/00000.png", "b-c/00001.png", "d/00002.png"]
    assert not list((tmp_path / "c").glob(".tmp*"))


def test_a_finished_folder_is_left_alone(tmp_path: Path, fake: list[str]) -> None:
    folder = tmp_path / "digits"
    assert datasets.materialize("digits", str(folder))
    (folder / "a" / "00000.png").unlink()
    assert not datasets.materialize("digits", str(folder))
    assert len(files(folder)) == 2 and len(fake) == 1


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, fake: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Image.Image, *rest: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(DataError, match="No space left"):
            datasets.materialize("digits", str(tmp_path / "digits"))
    assert list(tmp_path.iterdir()) == []
    assert datasets.materialize("digits", str(tmp_path / "digits"))


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(split: str) -> datasets.Arrays:
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "_LOADERS", {"cifar10": fail})
    with pytest.raises(DataError, match=r"cifar10 .*no route to host.*by hand into .*/train/CLASS"):
        datasets.materialize("cifar10", str(tmp_path / "train"))


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cifar10/train"):
        datasets.check("cifar10", "data/cifar10")
    with pytest.raises(ConfigError, match="local"):
        datasets.check("digits", "s3://bucket/digits")
    datasets.check("digits", "data/digits")


def test_fashion_mnist_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip
    import struct

    images = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.array([9, 0], np.uint8))):
        head = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
        path = tmp_path / f"t10k-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(head + array.tobytes()))
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path)
    found = datasets._fashion_mnist("test")
    assert np.array_equal(found.images, images)
    assert [found.names[label] for label in found.labels] == ["Ankle boot", "T-shirt"]
