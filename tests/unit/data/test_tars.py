"""Tars: joined ones are read to the end, damaged ones are errors, never shorter lists."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from icce_ray.config.schema import DataConfig
from icce_ray.data import omissions, tars
from icce_ray.data.listing import list_images
from icce_ray.data.reading import BadImage, member_uri, read_many, tar_of
from icce_ray.errors import DataError

BLOCK = tarfile.BLOCKSIZE


def tar_of_members(*names: str, size: int = 700, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(name[-8:].encode().ljust(size, b"x")))
    return out.getvalue()


def numbered(start: int) -> bytes:
    return tar_of_members(*(f"{n:04d}.jpg" for n in range(start, start + 6)))


@pytest.fixture(params=["sought", "streamed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As a local file and an object store's are read."""
    if request.param == "streamed":
        monkeypatch.setattr(tars.pafs, "LocalFileSystem", type(None))
    return str(request.param)


def scan(tmp_path: Path, data: bytes) -> tars.Members:
    (tmp_path / "a.tar").write_bytes(data)
    return tars.scan(str(tmp_path / "a.tar"))


def check_read(found: tars.Members) -> None:
    """Each member's bytes begin with its name."""
    data = read_many(found.uris, found.offsets, found.sizes)
    for uri, one in zip(found.uris, data, strict=True):
        assert not isinstance(one, BadImage) and one.startswith(uri[-8:].encode())


@pytest.mark.parametrize("parts", [2, 3])
def test_joined_tars_are_read_wholly(tmp_path: Path, way: str, parts: int) -> None:
    found = scan(tmp_path, b"".join(numbered(6 * i) for i in range(parts)))
    assert [uri[-8:-4] for uri in found.uris] == [f"{n:04d}" for n in range(6 * parts)]
    check_read(found)
    assert not found.left


def test_joined_tars_with_short_ends_and_an_empty_one(tmp_path: Path, way: str) -> None:
    """Writers other than tar and Python end with two blocks of zeros."""
    one = numbered(0).rstrip(b"\0")
    one += bytes(-len(one) % BLOCK + 2 * BLOCK)
    long = tar_of_members("k" * 150 + ".png", form=tarfile.GNU_FORMAT)
    found = scan(tmp_path, bytes(2 * BLOCK) + one + long)
    assert len(found.uris) == 7 and not found.left
    check_read(found)


def start_of(data: bytes, member: int) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[member].offset


def damage(data: bytes, kind: str) -> bytes:
    third = start_of(data, 3)
    return {
        "header": data[:third] + b"\x7f" * BLOCK + data[third + BLOCK :],
        "hole": data[:third] + bytes(BLOCK) + data[third + BLOCK :],
        "large hole": data[: third - BLOCK] + bytes(3 * BLOCK) + data[third + 2 * BLOCK :],
        "first header": bytes(BLOCK) + data[BLOCK:],
        "bit": data[: third + 3] + b"!" + data[third + 4 :],
        "cut in a header": data[: third + 100],
        "cut in a member": data[: third + BLOCK + 100],
        "rubbish behind": data + b"\nhello",
        "second of two": numbered(6) + b"\x7f" * BLOCK + data[BLOCK:],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("header", "hole", "large hole", "first header", "bit"),
        *("cut in a header", "cut in a member", "rubbish behind", "second of two"),
    ],
)
def test_damage_is_an_error(tmp_path: Path, way: str, kind: str) -> None:
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar: .*again"):
        scan(tmp_path, damage(numbered(0), kind))


def test_a_lone_block_of_zeros_is_damage(tmp_path: Path, way: str) -> None:
    """It may have been the header of an empty member."""
    data, third = numbered(0), start_of(numbered(0), 3)
    with pytest.raises(DataError, match="block of zeros"):
        scan(tmp_path, data[:third] + bytes(BLOCK) + data[third:])


def test_what_may_be_a_lost_end_is_said(tmp_path: Path, way: str) -> None:
    data = tar_of_members(*(f"{n:04d}.jpg" for n in range(20)))
    half = start_of(data, 10)
    for content, reason in (
        (data[:half] + bytes(len(data) - half), "long runs of zeros"),
        (data[:half], "no end mark"),
    ):
        found = scan(tmp_path, content)
        assert len(found.uris) == 10
        assert f"tars that may lack members ({reason})" in str(found.left)


def test_members_that_are_not_taken_are_counted(tmp_path: Path, way: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("a.jpg", "a.json", "._a.jpg", "b.jxl", "c.seg.png", "c.cls"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    found = scan(tmp_path, out.getvalue())
    assert len(found.uris) == 1
    left = {one["reason"]: one["count"] for one in found.left.results()}
    assert left == {
        omissions.HIDDEN: 1,
        "links and special files in tars": 1,
        "files ending in .json, .seg.png": 2,
        "images of formats that cannot be decoded, in .jxl": 1,
    }


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SHARD.TAR", {}),
        ("x.Tar", {}),
        ("shard-000", {"format": "webdataset"}),
        ("shard.bin", {"format": "webdataset"}),
        ("c# 1/shard-000", {"format": "webdataset"}),
        ("c# 1/a.tar", {}),
    ],
)
def test_a_tar_of_any_name_is_listed_and_read(tmp_path: Path, name: str, options: dict) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(numbered(0))
    for given in (path, path.parent):
        if given == path.parent and name.endswith(".bin"):
            continue
        table = list_images(DataConfig(path=str(given), **options)).table
        columns = (table[name].to_pylist() for name in ("uri", "offset", "size"))
        data = read_many(*columns)
        assert [one[:8] for one in data] == [f"{n:04d}.jpg".encode() for n in range(6)]  # type: ignore[index]


def test_addresses_come_apart_as_they_were_joined() -> None:
    for tar in ("/a/b.tar", "s3://b/a.TAR?region=x", "/a/shard-000", "/a #/shard-000"):
        assert tar_of(member_uri(tar, "x/1.png")) == tar
    assert tar_of(member_uri("/a/b.tar", "x#1.png")) == "/a/b.tar"
    for tar, name in (("/a/shard-000", "x#1.png"), ("/a.tar#b/c.tar", "1.png")):
        with pytest.raises(DataError, match="Rename"):
            member_uri(tar, name)
