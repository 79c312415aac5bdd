"""The walk through a folder: it ends, one bad entry costs only itself, and nothing is left out in
silence."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from icce_ray.config.schema import DataConfig
from icce_ray.data import omissions, walking
from icce_ray.data.listing import list_images
from icce_ray.data.omissions import Omissions
from icce_ray.errors import DataError
from icce_ray.rundir.storage import Storage


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root: Path | str) -> tuple[list[str], dict[str, tuple[int, str]]]:
    """Names, and by reason how many were left out, with the example."""
    files = walking.find_files(str(root))
    left = {one["reason"]: (one["count"], one["example"]) for one in files.left.results()}
    return files.names.to_pylist(), left


# --- links ---------------------------------------------------------------------------------------


def test_links_that_lead_nowhere_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "me").symlink_to("me")
    (tmp_path / "b.png").symlink_to("../annex/b.png")
    (tmp_path / "c").symlink_to("a.png/nothing")
    names, left = found(tmp_path)
    assert names == ["a.png"]
    assert {reason: count for reason, (count, _) in left.items()} == {omissions.NOWHERE: 3}


def test_no_folder_is_entered_from_within_itself(tmp_path: Path) -> None:
    touch(tmp_path, "a/b/1.png")
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    (tmp_path / "a/root").symlink_to(tmp_path)
    names, left = found(tmp_path)
    assert names == ["a/b/1.png"] and left.keys() == {omissions.AGAIN}
    assert left[omissions.AGAIN][0] == 2


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    """Twelve folders have 12! ways through all of them."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    root.mkdir()
    for i in range(12):
        touch(outside, f"{i}/{i}.png")
        for j in range(12):
            (outside / f"{i}/to-{j}").symlink_to(outside / str(j))
    (root / "in").symlink_to(outside / "0")
    names, left = found(root)
    assert sorted(name.rpartition("/")[2] for name in names) == sorted(
        f"{i}.png" for i in range(12)
    )
    assert "in/to-7/7.png" in names  # by its shortest name
    assert left[omissions.AGAIN][0] == 12 * 12 - 11


def test_links_are_followed_to_files_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "real/1.png", "else/2.png", "root/0.png")
    (tmp_path / "root/link").symlink_to(tmp_path / "else")
    (tmp_path / "root/one.png").symlink_to(tmp_path / "real/1.png")
    assert found(tmp_path / "root") == (["0.png", "link/2.png", "one.png"], {})


# --- bad entries ---------------------------------------------------------------------------------


def test_a_name_that_is_no_text_costs_only_itself(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "é.png")
    (tmp_path / os.fsdecode(b"notes-caf\xe9.txt")).touch()
    folder = tmp_path / os.fsdecode(b"\xff")
    touch(folder, "b.png", "c.png")
    names, left = found(tmp_path)
    assert names == ["a.png", "é.png"]
    assert left[omissions.NOT_TEXT][0] == 3
    assert left[omissions.NOT_TEXT][1] in ("notes-caf\\udce9.txt", "\\udcff/b.png", "\\udcff/c.png")


def test_special_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "s"))
        assert found(tmp_path)[1][omissions.SPECIAL][0] == 2


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str, error: OSError) -> None:
    """Let os.scandir fail for a folder of this name: these tests may run as root."""
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).rstrip("/").endswith(name):
            raise error
        return real(path)

    monkeypatch.setattr(walking.os, "scandir", scandir)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "I/O error")])
def test_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    touch(tmp_path, "a.png", "lost+found/b.png")
    unreadable(monkeypatch, "lost+found", error)
    assert found(tmp_path) == (["a.png"], {omissions.LOCKED: (1, "lost+found/")})
    unreadable(monkeypatch, tmp_path.name, error)
    with pytest.raises(DataError, match="cannot be listed"):
        found(tmp_path)


def test_a_failure_that_may_pass_does_not_shorten_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.png", "b/b.png")
    unreadable(monkeypatch, "b", TimeoutError(110, "timed out"))
    with pytest.raises(DataError, match="timed out"):
        found(tmp_path)


# --- names ---------------------------------------------------------------------------------------


def test_hidden_and_foreign_folders_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "x/@eaDir/t.jpg", "__MACOSX/._a.png", ".thumbnails/a.png", ".DS_Store")
    touch(tmp_path, ".git/x.png", "macosx/b.png")
    names, left = found(tmp_path)
    assert names == ["a.png", "macosx/b.png"]
    assert {reason: count for reason, (count, _) in left.items()} == {
        omissions.FOREIGN: 3,
        omissions.HIDDEN: 2,
    }
    assert found(tmp_path / "x/@eaDir")[0] == ["t.jpg"]  # what the user names is what he wants


def test_names_and_endings_that_are_not_taken(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.jxl", "c.SVG", "d.txt", "e.txt", "f.jpg_large", "g.json", "0a1b")
    listed = list_images(DataConfig(path=str(tmp_path)))
    assert listed.found == 1
    assert listed.left.results() == [
        {"reason": "files ending in .txt, .jpg_large, .json", "count": 4, "example": "d.txt"},
        {
            "reason": "images of formats that cannot be decoded, in .jxl, .svg",
            "count": 2,
            "example": "b.jxl",
        },
        {"reason": "files without an ending", "count": 1, "example": "0a1b"},
    ]
    assert str(listed.left).startswith("4 files ending in .txt, .jpg_large, .json (d.txt); 2 ")


def test_a_line_with_many_endings_stays_short(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", *(f"{i}.{i:03d}" for i in range(50)))
    assert "50 files ending in .000, .001, .002, .003, .004, ... (0.000)" in str(
        list_images(DataConfig(path=str(tmp_path))).left
    )


def test_a_line_shows_what_a_terminal_would_act_on() -> None:
    left = Omissions()
    left.add("x", "\x1b[31mred\n\udcff")
    assert str(left) == r"1 x (\x1b[31mred\n\udcff)"


# --- what icce-ray wrote itself ------------------------------------------------------------------


def run_folder(root: Path) -> None:
    touch(root, "index/part-00000.parquet", "log", "config.yaml", "pictures/a.png")
    status = {"state": "done", "stage": "", "time": 1.0}
    (root / "status.json").write_text(json.dumps(status))
    manifest = {"stage": "index", "fingerprint": "f", "settings": {}}
    (root / "index/manifest.json").write_text(json.dumps(manifest))


def test_run_directories_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "runs0/b.png", "runs/c.png", "z/status.json", "y/x/manifest.json")
    (tmp_path / "z/d.png").touch()
    (tmp_path / "y/x/manifest.json").write_text('{"stage": "index"}')
    for name in ("runs/first", "runs/second", "z/run"):
        run_folder(tmp_path / name)
    names, left = found(tmp_path)
    kept = ["a.png", "runs/c.png", "runs0/b.png", "y/x/manifest.json", "z/d.png", "z/status.json"]
    assert names == kept
    assert left == {omissions.OWN: (3, "runs/first/")}


def test_unfinished_predictions_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "out/part-00000.parquet")
    partial = {"fingerprint": "f", "settings": {}, "inputs": {}}
    (tmp_path / "out/partial.json").write_text(json.dumps(partial))
    assert found(tmp_path)[0] == ["a.png"]


def test_images_may_lie_in_the_run_directory_itself(tmp_path: Path) -> None:
    run_folder(tmp_path)
    listed = list_images(DataConfig(path=str(tmp_path)))
    assert listed.table["uri"].to_pylist() == [f"{tmp_path}/pictures/a.png"]


# --- object stores -------------------------------------------------------------------------------


def test_keys_with_empty_parts_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyarrow lists p/x//a.png: x lies in x, for ever."""
    listed = {"p": ("p/x", "p/b.png"), "p/x": ("p/x", "p/x/c.png"), "p/": ("p/",)}
    folders = {"p/x", "p/"}

    def infos(self: Storage, *parts: str) -> list[pafs.FileInfo]:
        kinds = {True: pafs.FileType.Directory, False: pafs.FileType.File}
        names = listed["/".join(["p", *parts])]
        return [pafs.FileInfo(name, kinds[name in folders]) for name in names]

    monkeypatch.setattr(Storage, "list", infos)
    place, left = Storage("/p"), Omissions()
    monkeypatch.setattr(place, "path", lambda *parts: "/".join(["p", *parts]))
    names = [name for block in walking._RemoteWalk(place, left).blocks() for name in block]
    assert sorted(names) == ["b.png", "x/c.png"]
    assert left.results() == [{"reason": omissions.EMPTY_NAME, "count": 1, "example": "x//"}]


def put(s3: Any, key: str, data: bytes) -> None:
    """As pyarrow would not: it takes no empty names."""
    import requests

    requests.put(f"{s3.endpoint}/{s3.bucket}/{key}", data=data, timeout=10).raise_for_status()


def test_a_bucket_with_empty_parts_is_listed(s3) -> None:
    for name in ("x//a.png", "b.png", "x/c.png", "/d.png", ".h/e.png", "@eaDir/f.png"):
        put(s3, f"empty/{name}", b"")
    names, left = found(s3.uri("empty"))
    assert names == ["b.png", "x/c.png"]
    assert left[omissions.EMPTY_NAME][0] == 2
    assert left[omissions.HIDDEN][0] == left[omissions.FOREIGN][0] == 1


def test_runs_in_a_bucket_are_left_out(s3) -> None:
    status = json.dumps({"state": "done", "stage": "", "time": 1.0}).encode()
    for name, data in {"a.png": b"", "run/status.json": status, "run/x/b.parquet": b""}.items():
        put(s3, f"own/{name}", data)
    assert found(s3.uri("own"))[0] == ["a.png"]


# --- a sign of life ------------------------------------------------------------------------------


def test_a_long_walk_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "LINE_EVERY", 0.0)
    touch(tmp_path, "a/1.png", "b/2.png", "c/d/3.png")
    said: list[str] = []
    assert len(walking.find_files(str(tmp_path), say=said.append).names) == 3
    assert said[-1] == f"listing {tmp_path}: 3 files so far"


# --- patterns ------------------------------------------------------------------------------------

TREE = ("a.jpg", "b.png", "x/a.jpg", "x/y/a.jpg", "x/y/b.JPG", "z[1]/c d.jpg", "2024-1/a.png")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("*/*.jpg", ["x/a.jpg", "z[1]/c d.jpg"]),
        ("**/*.jpg", ["a.jpg", "x/a.jpg", "x/y/a.jpg", "z[1]/c d.jpg"]),
        ("x/**/*.[jJ]*", ["x/a.jpg", "x/y/a.jpg", "x/y/b.JPG"]),
        ("[!ab]/a.???", ["x/a.jpg"]),
        ("20??-*", ["2024-1/a.png"]),  # all of a folder
        ("z[1]", ["z[1]/c d.jpg"]),  # the name itself is there
        ("z?1]/c d*", ["z[1]/c d.jpg"]),
        ("x/*(1)+.jpg", []),
    ],
)
def test_patterns_match_names(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    touch(tmp_path, *TREE)
    files = walking.find_files(str(tmp_path / pattern))
    assert files.uris().to_pylist() == sorted(str(tmp_path / name) for name in expected)


def test_what_a_pattern_does_not_match_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, *TREE, "x/.hidden.jpg")
    listed = list_images(DataConfig(path=str(tmp_path / "*/*.jpg")))
    assert listed.table["label"].to_pylist() == ["x", "z[1]"]
    assert "5 files that the pattern does not match (2024-1/a.png)" in str(listed.left)
    assert omissions.HIDDEN in str(listed.left)
    with pytest.raises(DataError, match=r"no images.*7 files that the pattern does not match"):
        list_images(DataConfig(path=str(tmp_path / "*.tif")))
    with pytest.raises(DataError, match="no such file or folder"):
        list_images(DataConfig(path=str(tmp_path / "none/*.jpg")))
    with pytest.raises(DataError, match=r"cannot be listed: .*z-a"):
        list_images(DataConfig(path=str(tmp_path / "[z-a]*")))
