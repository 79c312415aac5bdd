"""Images or embeddings in place of a config: the tree they make, and their run directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images in many forms."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("photos", "other/photos", "my photos", "quickstart"):
        Path(name).mkdir(parents=True)
    for name in ("a.parquet", "a.tar", "a.csv", "a.npy", "one.JPG", "notes.txt"):
        Path(name).write_bytes(b"x")
    Path("mine.yaml").write_text("num_classes: 5\ndata: {path: photos}\n")
    Path("plain").write_text("num_classes: 5\ndata: {path: photos}\n")
    return tmp_path


def load(source: str, *overrides: str) -> Config:
    return configs.load(source, [*overrides, "num_classes=3"])


@pytest.mark.parametrize(
    ("source", "run_dir"),
    [
        ("photos", "runs/photos"),
        ("./photos/", "runs/photos"),
        ("other/../photos", "runs/photos"),
        ("a.parquet", "runs/a.parquet"),
        ("a.tar", "runs/a.tar"),
        ("a.csv", "runs/a.csv"),
        ("one.JPG", "runs/one.JPG"),
        ("./quickstart", "runs/quickstart"),
        ("other/photos", r"runs/photos-\w{8}"),
        ("my photos", r"runs/my-photos-\w{8}"),
        ("s3://bucket/photos", r"runs/photos-\w{8}"),
        ("s3://bucket/photos?region=eu-west-1", r"runs/photos-\w{8}"),
        ("gs://bucket", r"runs/bucket-\w{8}"),
        ("photos/*.jpg", r"runs/photos-\w{8}"),
        ("s3://bucket/photos/**/*.jpg", r"runs/photos-\w{8}"),
    ],
)
def test_images_stand_for_a_config(source: str, run_dir: str) -> None:
    found = load(source)
    assert (found.data.path, found.data.embeddings) == (source, None)
    assert re.fullmatch(run_dir, found.run_dir)
    assert found.backbone[0].name == "vit_small_patch14_dinov2.lvd142m"


def test_it_is_the_tree_that_yaml_would_make() -> None:
    Path("same.yaml").write_text(
        "num_classes: 3\ndata: {path: photos}\nbackbone: dinov2-small\nrun_dir: runs/photos\n"
    )
    assert configs.load("same.yaml") == load("photos")


def test_an_absolute_path_names_the_same_run(folder: Path) -> None:
    assert load(str(folder / "photos")).run_dir == "runs/photos"
    Path("link").symlink_to("other/photos")
    assert load("link").run_dir == "runs/link"


def test_embeddings_need_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)  # nobody asks
    found = load("a.npy")
    assert (found.data.path, found.data.embeddings) == (None, "a.npy")
    assert load("photos", "backbone=clip-base").backbone[0].name.startswith("vit_base")


def test_parquet_is_images_or_embeddings_by_its_columns() -> None:
    pq.write_table(pa.table({"clip": [[1.0, 2.0]], "name": ["a"]}), "lists.parquet")
    pq.write_table(pa.table({"image": [b"x"], "clip": [[1.0, 2.0]]}), "images.parquet")
    assert load("lists.parquet").data.embeddings == "lists.parquet"
    assert load("images.parquet").data.path == "images.parquet"


def test_names_that_the_shell_made_of_a_pattern() -> None:
    with pytest.raises(ConfigError, match="A pattern of names needs quotes"):
        load("photos", "one.JPG")


def test_a_part_of_a_backbone_completes_the_default() -> None:
    (found,) = load("photos", "backbone.image_size=112").backbone
    assert (found.name, found.image_size) == ("vit_small_patch14_dinov2.lvd142m", 112)


def test_configs_go_before_data_of_their_name() -> None:
    assert configs.load("quickstart").data.path == "data/digits"
    assert configs.load("mine.yaml").run_dir == "runs/mine"
    assert configs.load("plain").num_classes == 5, "YAML of any ending"


@pytest.mark.parametrize(
    ("source", "overrides", "run_dir"),
    [
        ("mine.yaml", ["data.path=photos"], "runs/mine"),  # what it says itself
        ("mine.yaml", ["data.path=quickstart"], "runs/mine-quickstart"),
        ("mine.yaml", ["data.path=other/photos"], r"runs/mine-photos-\w{8}"),
        ("mine.yaml", ["data.path=", "data.embeddings=a.npy"], r"runs/mine-a\.npy"),
        ("mine.yaml", ["data.path=quickstart", "run_dir=x"], "x"),
    ],
)
def test_the_run_directory_follows_config_and_data(
    source: str, overrides: list[str], run_dir: str
) -> None:
    assert re.fullmatch(run_dir, load(source, *overrides).run_dir)


def test_a_mapping_is_named_by_its_data() -> None:
    assert configs.load({"num_classes": 3, "data": {"path": "photos"}}).run_dir == "runs/photos"


@pytest.mark.parametrize(
    ("source", "hints"),
    [
        ("phtos", ["no config 'phtos'", "quickstart", "holds a.csv", "Did you mean 'photos'?"]),
        ("other/phots", ["other holds photos.", "Did you mean 'other/photos'?"]),
        ("nowhere/at/all", ["holds a.csv, a.npy, a.parquet"]),
        ("none.yaml", ["neither a YAML file"]),
        ("none.npy", ["nor images or embeddings"]),
        ("none/*.jpg", ["no config 'none/*.jpg'"]),
    ],
)
def test_a_mistyped_path_says_what_there_is(source: str, hints: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    for hint in hints:
        assert hint in str(caught.value)


@pytest.mark.parametrize("name", ["pipe", "pipe.npy", "pipe.yaml"])
def test_a_pipe_is_neither_a_config_nor_data(tmp_path: Path, name: str) -> None:
    """A shell makes one of <(...)."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} is a pipe, a socket or a device, not a file"):
        load(str(tmp_path / name))


@pytest.mark.parametrize("source", ["", "~nobody/photos", "a" * 5000, "a\0b", "x/" * 3000])
def test_what_can_be_no_path_is_no_config(source: str) -> None:
    with pytest.raises(ConfigError, match="no config"):
        load(source)
    with pytest.raises(ConfigError, match="is not an override"):
        load("photos", source)


def test_settings_as_python_values() -> None:
    given = {
        "num_classes": 3,
        "backbone": "dinov2-small",
        "run_dir": Path("out"),
        "heads": {"count": 8, "hidden": (512, 256), "pca": None, "batch_norm": False},
        "data": {"labels": "none", "image_column": "a: b"},
    }
    found = configs.load("photos", configs.as_overrides(given))
    assert (found.num_classes, found.run_dir, found.backbone[0].image_size) == (3, "out", 224)
    assert (found.heads.count, found.heads.hidden, found.heads.pca) == (8, (512, 256), None)
    assert (found.heads.batch_norm, found.data.labels) == (False, "none")
    assert found.data.image_column == "a: b" and found.data.path == "photos"


def test_a_run_of_data_with_a_long_name_has_a_name_that_a_folder_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = Path("p" * 250)
    long.mkdir()
    name = Path(load(str(long)).run_dir).name
    assert name.startswith("p" * 100) and len(name) < 120
