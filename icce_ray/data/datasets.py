"""Public data sets, written once as class folders of PNG files.

A data set with splits is written as sibling folders, e.g. data/fashion-mnist/train and
data/fashion-mnist/test; `digits` has none and is written to the folder itself.
"""

from __future__ import annotations

import gzip
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icce_ray.errors import ConfigError, DataError, one_line
from icce_ray.rundir.cache import environment_cache

SPLITS = ("train", "test")
WITHOUT_SPLITS = ("digits",)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FASHION = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@dataclass(frozen=True)
class Arrays:
    """A split in memory."""

    images: np.ndarray  # uint8 [N, height, width] or [N, height, width, 3]
    labels: np.ndarray  # int [N]
    names: tuple[str, ...]  # of the classes


def check(name: str, folder: str) -> None:
    """Raises ConfigError where the folder cannot be that of the data set."""
    if "://" in folder:
        raise ConfigError(
            f"data.dataset={name} writes to local folders only; data.path is {folder}"
        )
    if name not in WITHOUT_SPLITS and Path(folder).name not in SPLITS:
        raise ConfigError(
            f"{name} has the splits train and test: let data.path end in one of them, "
            f"e.g. data.path={folder.rstrip('/')}/train"
        )


def materialize(name: str, folder: str) -> bool:
    """Write a data set below `folder`, unless it is there. Returns whether anything was written.

    Each folder appears whole or not at all. The other split is written beside it.

    Raises:
        ConfigError: for a folder that does not fit the data set.
        DataError: where its files can neither be found nor downloaded.
    """
    check(name, folder)
    target = Path(folder).expanduser().resolve()
    parts = {"": target} if name in WITHOUT_SPLITS else {s: target.parent / s for s in SPLITS}
    missing = {split: path for split, path in parts.items() if not _filled(path)}
    for split, path in missing.items():
        _write(_load(name, split, target), path)
    return bool(missing)


def _filled(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _load(name: str, split: str, target: Path) -> Arrays:
    try:
        return _LOADERS[name](split)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        where = target if not split else target.parent / split
        raise DataError(
            f"could not get {name} ({type(error).__name__}: {one_line(error, 200)}). "
            f"Without a network, put its images by hand into {where}/CLASS/NAME.png and leave "
            "data.dataset out."
        ) from None


def _write(arrays: Arrays, folder: Path) -> None:
    """Class folders of PNG files, named by the position in the data set."""
    from PIL import Image

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".tmp-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        places = [temporary / _folder_name(name) for name in arrays.names]
        for place in places:
            place.mkdir(parents=True)
        for number, (pixels, label) in enumerate(zip(arrays.images, arrays.labels, strict=True)):
            Image.fromarray(pixels).save(places[int(label)] / f"{number:05d}.png")
        temporary.replace(folder)
    except OSError as error:
        if not _filled(folder):  # else another process was faster
            raise DataError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _digits(split: str) -> Arrays:
    """scikit-learn's digits: dark ink on white, as on the paper they were written on.

    On the quickstart's features that serves better than white on black (k-means 71 instead of 68 %,
    10 nearest neighbors 87 instead of 82 %).
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = 255 - np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    return Arrays(images, bundle.target, tuple(str(n) for n in bundle.target_names))


def _fashion_mnist(split: str) -> Arrays:
    prefix = "train" if split == "train" else "t10k"
    files = [DEBIAN / f"{prefix}-{kind}" for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    packed = [file.with_name(f"{file.name}.gz") for file in files]
    if not all(file.is_file() for file in packed):
        return _torchvision("FashionMNIST", split)
    images, labels = (_read_idx(file) for file in packed)
    return Arrays(images, labels, FASHION)


def _read_idx(path: Path) -> np.ndarray:
    """An array in the IDX format of MNIST (http://yann.lecun.com/exdb/mnist): only uint8."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _torchvision(kind: str, split: str) -> Arrays:
    """A data set that torchvision downloads (and checks) into the cache."""
    from torchvision import datasets

    root = environment_cache() / "downloads"
    root.mkdir(parents=True, exist_ok=True)
    if kind == "STL10":
        stl = datasets.STL10(str(root), split=split, download=True)
        return Arrays(stl.data.transpose(0, 2, 3, 1), np.asarray(stl.labels), tuple(stl.classes))
    chosen = getattr(datasets, kind)(str(root), train=split == "train", download=True)
    return Arrays(np.asarray(chosen.data), np.asarray(chosen.targets), tuple(chosen.classes))


_LOADERS: Mapping[str, Callable[[str], Arrays]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": lambda split: _torchvision("CIFAR10", split),
    "cifar100": lambda split: _torchvision("CIFAR100", split),
    "stl10": lambda split: _torchvision("STL10", split),
}
