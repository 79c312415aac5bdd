"""Lists of paths and URLs: the same images as by their folder, from anywhere."""

from __future__ import annotations

import http.server
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from icce_ray.config.schema import DataConfig
from icce_ray.core.preprocess import BadImage
from icce_ray.data.listing import list_images
from icce_ray.data.reading import read_many
from icce_ray.errors import DataError
from icce_ray.rundir import web


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in a folder beside that of the list."""
    for name in ("list/a.png", "list/b c.png", "list/007", "other/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def listed(path: Path, **more: Any) -> list[tuple[str, str | None]]:
    """Content and label of each image."""
    found = list_images(DataConfig(path=str(path), **more)).table
    data = read_many(found["uri"].to_pylist())
    texts = [one.decode() if isinstance(one, bytes) else f"! {one}" for one in data]
    return list(zip(texts, found["label"].to_pylist(), strict=True))


ALL = ["list/a.png", "list/b c.png", "list/007", "other/d.png"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", "path,label\na.png,1.0\n./b c.png,2\n007,\n../other/d.png,1.0\n"),
        ("x.csv", "id,url,label\n1,a.png,1.0\n2,b c.png,2\n3,007,\n4,{folder}/other/d.png,1.0\n"),
        ("x.TSV", "label\tFile\n1.0\ta.png\n2\tb c.png\n\t007\n1.0\t../other/d.png\n"),
        ("x.csv", '\ufeffpath,label\r\n"a.png",1.0\r\n"b c.png",2\r\n007,\r\n../other/d.png,1.0'),
    ],
)
def test_csv(folder: Path, name: str, text: str) -> None:
    file = folder / "list" / name
    file.write_text(text.format(folder=folder), encoding="utf-8")
    assert listed(file) == list(zip(ALL, ["1.0", "2", None, "1.0"], strict=True))


@pytest.mark.parametrize("text", ["a.png\n007\n", "\ufeffa.png\n007\n", "whatever\na.png\n007\n"])
def test_one_column_needs_no_head(folder: Path, text: str) -> None:
    file = folder / "list" / "x.csv"
    file.write_text(text, encoding="utf-8")
    assert listed(file) == [("list/a.png", None), ("list/007", None)]


def test_parquet(folder: Path) -> None:
    paths = ["a.png", "b c.png", "007", "../other/d.png"]
    table = pa.table({"n": [1, 2, 3, 4], "image_path": paths, "label": list("xyxy")})
    pq.write_table(table, folder / "list" / "x.parquet")
    assert listed(folder / "list" / "x.parquet") == list(zip(ALL, "xyxy", strict=True))
    pq.write_table(table.rename_columns(["n", "p", "label"]), folder / "list" / "x.parquet")
    assert len(listed(folder / "list" / "x.parquet", image_column="p")) == 4
    with pytest.raises(DataError, match=r"column 'image' does not exist"):
        listed(folder / "list" / "x.parquet")


def test_a_list_beside_images_is_no_image(folder: Path) -> None:
    (folder / "list" / "x.csv").write_text("path\na.png\n")
    found = list_images(DataConfig(path=str(folder / "list")))
    assert found.kind == "folder" and found.found == 2
    assert "1 files ending in .csv (x.csv)" in str(found.left)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,b\n1,2\n",
            r"no column of paths; its columns are a, b\. Name one by data\.image_column",
        ),
        ("path,label\na.png,1\n,2\n", r"1 rows name no image, the first is row 1 \(from 0\)"),
        ("path,path\na.png,1\n", "two columns have the same name"),
        ("path,label\na.png\n", "cannot be read as CSV"),
        ("", "cannot be read as CSV"),
        ("path,label\n", "names no images"),
        ("path\na.png\n./a.png\n", "occur more than once"),
    ],
)
def test_what_is_no_list_is_refused(folder: Path, text: str, message: str) -> None:
    file = folder / "list" / "x.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        listed(file)


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; /busy answers at the third try, /closed and /broken never."""

    tries = 0

    def do_GET(self) -> None:
        if self.path in ("/busy", "/closed", "/broken"):
            type(self).tries += 1
            if self.path != "/busy" or self.tries < 3:
                self.send_error(403 if self.path == "/closed" else 503)
                return
            self.path = "/list/a.png"
        super().do_GET()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def site(folder: Path, monkeypatch: pytest.MonkeyPatch, serve: Any) -> Iterator[str]:
    monkeypatch.setattr(web, "PAUSE", 0.0)
    monkeypatch.setattr(Server, "tries", 0)
    with serve(Server, folder) as address:
        yield address


def test_urls_and_paths_in_one_list(folder: Path, site: str) -> None:
    (folder / "list" / "x.csv").write_text(
        f"url\n{site}/list/a.png\n007\n{site}/none.png\n{site}/busy\n"
    )
    found = [text for text, _ in listed(folder / "list" / "x.csv")]
    assert found == ["list/a.png", "list/007", "! not found", "list/a.png"]


@pytest.mark.parametrize(("name", "tries"), [("closed", 1), ("broken", web.TRIES)])
def test_a_site_that_refuses_costs_only_its_images(site: str, name: str, tries: int) -> None:
    (found,) = read_many([f"{site}/{name}"])
    assert isinstance(found, BadImage) and "cannot be read: HTTPError" in str(found)
    assert Server.tries == tries


def test_a_site_that_is_gone_or_sends_too_much(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MOST", 5)
    found = read_many([f"{site}/list/a.png", "http://127.0.0.1:9/a.png"])
    assert "more than 5 bytes" in str(found[0])
    assert "refused" in str(found[1])
