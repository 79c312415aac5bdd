"""Addresses that cannot be used: one line, never a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from icce_ray.config.loading import load
from icce_ray.config.schema import DataConfig
from icce_ray.data.embeddings import open_vectors
from icce_ray.data.listing import check_exists, list_images
from icce_ray.errors import ArtifactError, ConfigError, DataError, IcceError
from icce_ray.rundir.addresses import absolute
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.storage import Storage
from icce_ray.stages.predict import _target

BAD = (
    "~nosuchuser/x",
    "LOOP",
    os.fsdecode(b"/tmp/caf\xe9"),
    "a\0b",
    os.fsdecode(b"s3://b/\xe9"),
    300 * "x",
)


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A path that cannot be resolved."""
    if request.param != "LOOP":
        return str(request.param)
    (tmp_path / "loop").symlink_to("loop")
    return str(tmp_path / "loop/x")


def check_line(error: IcceError, name: str) -> None:
    text = str(error).removeprefix("1 problem in the settings:\n  ")
    assert text.startswith(name) and text.isprintable()


def test_a_bad_path_is_named(bad: str) -> None:
    for use in (absolute, Storage, RunDirectory):
        with pytest.raises(ArtifactError) as error:
            use(bad)
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "key", ["run_dir", "data.path", "data.embeddings", "data.labels", "backbone.0.weights"]
)
def test_a_bad_path_in_the_settings(bad: str, key: str) -> None:
    source = "embeddings" if key == "data.embeddings" else "path"
    tree = {"num_classes": 2, "data": {source: "x"}}
    with pytest.raises(ConfigError) as error:
        load(tree, [f'{key}="{bad}"' if bad != BAD[3] else f'{key}="a\\0b"'])
    check_line(error.value, f"{key}: ")


def test_a_bad_path_as_an_argument(bad: str) -> None:
    with pytest.raises(DataError) as error:
        check_exists("images", bad)
    check_line(error.value, "images=")
    with pytest.raises(DataError) as error:
        list_images(DataConfig(path=bad), "images")
    check_line(error.value, "images=")
    with pytest.raises(DataError) as error:
        open_vectors(bad)
    check_line(error.value, "data.embeddings=")
    with pytest.raises(ConfigError) as fault:
        _target(bad)
    check_line(fault.value, "out=")


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("s3a://b/x", "Write s3:// instead of s3a://"),
        ("S3://b/x", "Write s3:// instead of S3://"),
        ("GS://b/x", "Write gs:// instead of GS://"),
        ("wasbs://c@a/x", "Write abfs:// instead of wasbs://"),
        ("https://host/x", "begin with s3://, gs://, abfs:// or hf://, .*; a CSV file may list"),
        ("ftp://host/x", "begin with s3://, gs://, abfs:// or hf://, or are local paths"),
    ],
)
def test_a_scheme_that_is_not_known_gets_a_hint(uri: str, hint: str) -> None:
    with pytest.raises(DataError, match=hint):
        check_exists("data.path", uri)


def test_a_foreign_client_may_raise_what_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As hf:// does without a network."""
    from icce_ray.rundir import storage

    class Client:
        def get_file_info(self, path: str) -> None:
            raise RuntimeError("\x1b[31mno\nroute")

    monkeypatch.setattr(storage, "locate", lambda uri: (Client(), "x"))
    with pytest.raises(DataError, match=r"data\.path=hf://x: the storage failed") as error:
        check_exists("data.path", "hf://x")
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError):  # pyarrow's own raise OSError; all else is our mistake
        check_exists("data.path", "s3://x/y")
