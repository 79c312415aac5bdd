"""Names that any file system takes, and a folder that nothing else is lost from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.data.places import FILES, MARK, Names, Place, safe_name
from icce_ray.errors import ArtifactError, ConfigError, StageError


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_safe_name_is_one_plain_file(text: str) -> None:
    name = safe_name(text)
    assert name and name == name.strip(". ") and len(name.encode()) < 200
    assert not set(name) & set('/\\\0\n\r:*?"<>|')
    assert (Path("a") / name).parts == ("a", name)


def test_safe_names_keep_what_they_can() -> None:
    assert safe_name("photos/Grüße 1.JPG") == "Grüße 1.JPG"
    assert safe_name("../../etc/passwd") == "passwd"
    assert safe_name("a\\..\\b.png") == "b.png"
    assert [safe_name(text) for text in ("..", "", "/", "...")] == ["image"] * 4
    assert safe_name("x" * 500 + ".jpeg") == "x" * 120 + ".jpeg"


@given(st.lists(st.sampled_from(["a.jpg", "A.png", "a-2.jpg", "a", "b.jpg", "a-3.png"])))
@settings(max_examples=200, deadline=None)
def test_names_differ_without_ending_and_case(wanted: list[str]) -> None:
    names = Names()
    given_ = [names.give("x", one) for one in wanted]
    assert len({name.rpartition(".")[0].casefold() or name.casefold() for name in given_}) == len(
        given_
    )
    assert [Path(a).suffix for a in given_] == [Path(b).suffix for b in wanted]
    assert all(names.give(f"other-{k}", one) == one for k, one in enumerate(wanted))


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="holds other files"):
        Place(str(tmp_path / "full"), "run")
    for out in (str(tmp_path / "file"), "s3://bucket/x"):
        with pytest.raises(ConfigError, match="must be a local folder"):
            Place(out, "run")
    Place(str(tmp_path / "full" / "new"), "run").clear()
    with pytest.raises(ArtifactError, match="the export of another run"):
        Place(str(tmp_path / "full" / "new"), "other")


def test_an_earlier_export_goes_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "source.png").write_bytes(b"x")
    out = tmp_path / "out"
    place = Place(str(out), "run")
    place.clear()
    place.announce(["0/a.png", "1/b.png", "c.json"])
    place.link("0/a.png", str(tmp_path / "source.png"))
    place.put("1/b.png", b"b")
    place.write("c.json", b"{}")
    (out / "1" / "mine.txt").touch()
    again = Place(str(out), "run")
    again.clear()
    left = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert left == [FILES, "1", "1/mine.txt", MARK]
    assert (tmp_path / "source.png").read_bytes() == b"x"  # what the link led to


def test_a_list_that_was_edited_removes_nothing_outside(tmp_path: Path) -> None:
    outside = tmp_path / "kept.txt"
    outside.touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept.txt").touch()
    place = Place(str(tmp_path / "out"), "run")
    place.clear()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "folder")
    place.announce(["../kept.txt", str(outside), "link/kept.txt", "x/../../kept.txt"])
    Place(str(tmp_path / "out"), "run").clear()
    assert outside.exists() and (tmp_path / "folder" / "kept.txt").exists()


def test_a_file_of_the_user_is_not_overwritten(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "out"), "run")
    place.clear()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    for work in (place.put, place.write):
        with pytest.raises(ArtifactError, match="no file of the earlier export"):
            work("a.png", b"x")
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StageError, match="cannot be written"):
        Place(str(tmp_path / "file" / "out"), "run").clear()
