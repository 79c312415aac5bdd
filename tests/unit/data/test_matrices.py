"""Matrices in files of numpy and torch: read in blocks, whatever their layout; never unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.data import embeddings, matrices
from icce_ray.errors import DataError
from icce_ray.rundir.storage import Storage

MATRIX = np.arange(21, dtype=np.float32).reshape(7, 3)
TENSOR = torch.from_numpy(MATRIX)

WRITERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "rows": ("x.npy", lambda path: np.save(path, MATRIX)),
    "columns": ("x.npy", lambda path: np.save(path, np.asfortranarray(MATRIX))),
    "big endian": ("x.npy", lambda path: np.save(path, MATRIX.astype(">f8"))),
    "npz": ("x.npz", lambda path: np.savez(path, features=MATRIX, labels=np.arange(7))),
    "compressed": ("x.npz", lambda path: np.savez_compressed(path, np.asfortranarray(MATRIX))),
    "tensor": ("x.pt", lambda path: torch.save(TENSOR, path)),
    "half": ("x.PT", lambda path: torch.save(TENSOR.bfloat16(), path)),
    "view": ("x.pth", lambda path: torch.save(torch.nn.Parameter(TENSOR.T.contiguous().T), path)),
    "dictionary": ("x.pt", lambda path: torch.save({"x": TENSOR, "y": torch.arange(7)}, path)),
    "old": (
        "x.pt",
        lambda path: torch.save(TENSOR, path, _use_new_zipfile_serialization=False),
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_it_is_read_in_blocks(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    write(str(tmp_path / name))
    given = embeddings.open_vectors(str(tmp_path / name))
    assert (given.total, given.features) == MATRIX.shape
    found = list(given.blocks(3))
    assert [len(block) for block in found] == [3, 3, 1]
    assert all(block.dtype == np.float32 for block in found)
    assert np.array_equal(np.concatenate(found), MATRIX)


@pytest.mark.parametrize("kind", WRITERS)
def test_it_is_read_from_an_object_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name, write = WRITERS[kind]
    write(str(tmp_path / name))
    monkeypatch.setattr(Storage, "is_local", False)
    (block,) = embeddings.open_vectors(str(tmp_path / name)).blocks(10)
    assert np.array_equal(block, MATRIX)


def zipped(path: str, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "text")


class Evil:
    """Would leave a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.npz", lambda p: np.savez(p, a=MATRIX, b=MATRIX), r"holds a\.npy \[7, 3\], b\.npy"),
        ("x.npz", lambda p: np.savez(p, a=np.arange(3)), "must hold one N x D array"),
        ("x.npz", lambda p: np.savez(p, a=np.full((2, 2), "x")), "must hold N x D numbers"),
        ("x.npz", lambda p: Path(p).write_bytes(b"nonsense"), "is not a .npz file"),
        ("x.npz", lambda p: zipped(p, "notes.txt"), r"x\.npz, notes\.txt is not a \.npy file"),
        ("x.pt", lambda p: torch.save({"a": TENSOR, "b": TENSOR}, p), r"holds a \[7, 3\], b"),
        ("x.pt", lambda p: torch.save(torch.ones(3), p), "must hold one N x D array"),
        ("x.pt", lambda p: torch.save(TENSOR > 3, p), "must hold N x D numbers"),
        ("x.pt", lambda p: torch.save(TENSOR.to_sparse(), p), "sparse"),
        ("x.pt", lambda p: torch.save([1, 2], p), "it holds no arrays"),
        ("x.pt", lambda p: Path(p).write_bytes(b"nonsense"), "not a tensor that torch reads"),
        ("x.pt", lambda p: Path(p).write_bytes(b""), "not a tensor that torch reads"),
    ],
)
def test_what_is_no_matrix_is_refused(
    tmp_path: Path, name: str, write: Callable[[str], Any], message: str
) -> None:
    write(str(tmp_path / name))
    with pytest.raises(DataError, match=message):
        embeddings.open_vectors(str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
def test_half_a_file_is_refused(tmp_path: Path, name: str) -> None:
    whole = np.random.default_rng(0).normal(size=(500, 40))
    path = tmp_path / name
    np.savez(path, whole) if name == "x.npz" else torch.save(torch.from_numpy(whole), path)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(DataError):
        embeddings.open_vectors(str(path))


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    """Whatever zipfile and zlib raise; the head of the array is sound."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, np.random.default_rng(0).normal(size=(300, 40)).round(1))
    sound = path.read_bytes()
    for start in range(1000, len(sound) - 1000, 1500):
        one = tmp_path / f"{start}.npz"
        one.write_bytes(sound[:start] + bytes(40) + sound[start + 40 :])
        with pytest.raises(DataError, match=r"its array is damaged|is not a \.npz file"):
            list(matrices.blocks(str(one), 100))


def test_no_pickle_is_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"x": Evil(ran)}, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", x=np.array([[Evil(ran)]], object))
    for name in ("x.pt", "x.npz"):
        with pytest.raises(DataError):
            embeddings.open_vectors(str(tmp_path / name))
    assert not ran.exists()
