"""The settings tree: loading, overrides, errors, and the way back to YAML."""

from __future__ import annotations

import contextlib
import json

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from icce_ray import config as configs
from icce_ray.config import loading
from icce_ray.config.removed import REMOVED
from icce_ray.config.schema import BackboneConfig, Config, HeadsConfig
from icce_ray.errors import ConfigError
from icce_ray.rundir.cache import environment_cache

BASE = {"num_classes": 10, "data": {"path": "images"}}
TWO = {**BASE, "backbone": [{"name": "one"}, {"name": "two"}]}


def load(*overrides, source=BASE):
    return configs.load(source, overrides)


def problems(*overrides, source=BASE):
    with pytest.raises(ConfigError) as caught:
        configs.load(source, overrides)
    return str(caught.value)


# --- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("heads.count=16", 16),
        ("heads.lr=0.01", 0.01),
        ("heads.lr=1e-4", 1e-4),  # text for YAML 1.1
        ("heads.lr=3", 3.0),
        ("heads.batch_norm=false", False),
        ("heads.hidden=[512, 256]", (512, 256)),
        ("heads.hidden=[]", ()),
        ("heads.pca=null", None),
        ("heads.pca=None", None),
        ("heads.steps=", None),
        ("neighbors.rule=fixed", "fixed"),
        ("data.labels=none", "none"),  # a word here, not the absence of one
        ("run_dir=2024-01-01", "2024-01-01"),
        ("run_dir=007", "007"),
        ("run_dir=yes", "yes"),
        ("run_dir=a: b", "a: b"),
        ("run_dir='007'", "007"),
        ("run_dir=s3://bucket/a=b", "s3://bucket/a=b"),
        ("data.path=@odd[name", "@odd[name"),
        ("data.path=~/images", "~/images"),
    ],
)
def test_an_override_has_the_type_of_its_setting(override, value):
    node = load(override)
    for part in override.partition("=")[0].split("."):
        node = getattr(node, part)
    assert node == value and type(node) is type(value)


def test_later_overrides_win_and_the_source_stays_as_it_was():
    source = {"num_classes": 10, "data": {"path": "images"}, "backbone": {"name": "a"}}
    assert load("seed=1", "seed=2", "backbone.name=b", source=source).seed == 2
    assert source == {**BASE, "backbone": {"name": "a"}}


@pytest.mark.parametrize("key", ["backbone.name", "backbone.0.name"])
@pytest.mark.parametrize("source", [BASE, {**BASE, "backbone": {"name": "a"}}, "list"])
def test_one_backbone_goes_with_and_without_a_number(key, source):
    source = {**BASE, "backbone": [{"name": "a"}]} if source == "list" else source
    found = load(f"{key}=b", "backbone.pretrained=false", source=source).backbone
    assert found == (BackboneConfig(name="b", pretrained=False),)


def test_of_several_backbones_one_is_named():
    assert [b.name for b in load("backbone.1.name=c", source=TWO).backbone] == ["one", "c"]
    whole = load("backbone=[{name: x}, {name: y, pooling: both}]")
    assert [b.pooling for b in whole.backbone] == ["auto", "both"]
    message = problems("backbone.name=c", source=TWO)
    assert "list of 2" in message and "backbone.0" in message and "backbone.1" in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("heads.count", "key.sub=value"),
        ("=5", "key.sub=value"),
        ("heads..count=5", "key.sub=value"),
        ("backbone.2.name=c", "list of 1"),
        ("backbone.1=c", "list of 1"),
        ("backbone.foo.bar=c", "backbone.0.foo: unknown setting"),
        ("backbone=5", "backbone"),
        ("seed.x=1", "seed"),
        ("data.path.x=1", "data.path holds a value"),
        ("heads=5", "heads: this is a group"),
        ("heads=", "heads: this is a group"),
        ("heads.count=0", "heads.count: Input should be greater than or equal to 1 (got 0)"),
        ("heads.count=16.5", "heads.count"),
        ("heads.lr=.nan", "finite"),
        ("num_classes=1", "num_classes"),
        ("seed=-1", "seed"),
        ("neighbors.rule=fixd", "'auto', 'threshold' or 'fixed'"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override, hint):
    assert hint in problems(override)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(max_size=8))
def test_no_override_gives_a_traceback(key, value):
    for override in (f"{key}={value}", f"data.{key}={value}", f"backbone.{key}={value}"):
        with contextlib.suppress(ConfigError):
            configs.load(BASE, [override])


# --- errors --------------------------------------------------------------------------------------


def test_all_problems_come_at_once():
    source = {"num_classes": 1, "heads": {"count": 0, "lr": "fast"}, "bogus": 1, "data": {"pth": 1}}
    message = problems(source=source)
    assert message.startswith("5 problems in the settings:")
    for key in ("num_classes: ", "heads.count: ", "heads.lr: ", "bogus: ", "data.pth: "):
        assert f"\n  {key}" in message
    assert "(got 'fast')" in message


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("heads.cuont", "heads.count"),
        ("neighbours.k", "neighbors"),
        ("temperature", "heads.temperature"),  # the right name in the wrong place
        ("backbone.0.weight", "backbone.weights"),
        ("num_class", "num_classes"),
        ("backbon", "Did you mean backbone?"),
        ("bogus", "seed, track, answer, backbone"),
    ],
)
def test_an_unknown_key_suggests_a_near_one(key, suggestion):
    message = problems(f"{key}=1")
    assert "unknown setting" in message and suggestion in message


@pytest.mark.parametrize("key", sorted(key for key in REMOVED if "=" not in key))
def test_a_removed_setting_says_what_to_do(key):
    if key in {name for name, *_ in configs.describe()}:
        pytest.skip("it is still there")
    assert f"{key}: this setting was removed. {REMOVED[key]}" in problems(f"{key}=1")


def test_a_removed_choice_says_what_to_use():
    message = problems("consensus.method=hgpa")
    assert "consensus.method=hgpa: this choice was removed. Use mcla" in message


def test_a_missing_setting_is_named():
    assert "num_classes: missing; add num_classes=..." in problems(source={"data": {"path": "x"}})
    assert "data.path=IMAGES" in problems(source={"num_classes": 3})


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["data.embeddings=e.npy"], "not both"),
        (["neighbors.threshold=0.5"], "rule=threshold"),
        (["neighbors.rule=threshold"], "rule=threshold"),
        (["neighbors.min_neighbors=200"], "max_neighbors"),
        (["data.path=", "data.embeddings=e.npy", "classifier.kind=finetune"], "needs images"),
        (["backbone=[{name: a}, {name: b}]", "classifier.kind=finetune"], "one backbone"),
        (["backbone=[]"], "at least one"),
    ],
)
def test_settings_that_exclude_each_other(overrides, hint):
    assert hint in problems(*overrides)


# --- files ---------------------------------------------------------------------------------------


def test_a_file_with_all_its_habits(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "num_classes: 5\ndata: {path: 'a b'}\nheads:\n  lr: 1e-4\n  hidden: [8, 4]\n  pca: null\n"
        "backbone:\n  - name: x\n  - name: y\n"
    )
    found = configs.load(path, ["heads.count=3"])
    assert found.heads == HeadsConfig(count=3, lr=1e-4, hidden=(8, 4), pca=None)
    assert [b.name for b in found.backbone] == ["x", "y"]
    assert found.run_dir == "runs/mine"
    assert configs.load(str(path), ["run_dir=else"]).run_dir == "else"


def test_dates_in_files_are_names(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("num_classes: 5\nrun_dir: 2024-01-01\ndata:\n  path: 2024-02-03 10:00:00\n")
    found = configs.load(path)
    assert (found.run_dir, found.data.path) == ("2024-01-01", "2024-02-03 10:00:00")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a: [1", "not valid YAML"),
        ("\tx: 1", "not valid YAML"),
        ("", "must hold settings"),
        ("- 1\n- 2", "must hold settings"),
        ("1: 2", "1: Keys should be strings"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("data: {path: !!python/name:os.getcwd }", "not valid YAML"),
        ("num_classes: 5\nheads:\n", "heads: this is a group"),
        ("num_classes: 5\nnum_classes: 6", "not valid YAML: the key 'num_classes' occurs twice"),
        ("data: {path: a, labels: none, path: b}", "the key 'path' occurs twice"),
        (f"num_classes: {5000 * '9'}", "not valid YAML"),
        (f"a: {2000 * '['}{2000 * ']'}", "not valid YAML"),
    ],
)
def test_broken_files(tmp_path, text, hint):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert hint in problems(source=path)
    if "not valid" in hint:
        assert str(path) in problems(source=path)


def test_aliases_of_aliases_take_no_time(tmp_path):
    lines = ["num_classes: 5", "a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "heads: *a19", "seed: *a19"]))
    assert len(problems(source=tmp_path / "c.yaml")) < 100_000


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "not valid YAML" in problems(source=path)


def test_a_missing_file_lists_the_golden_configs(tmp_path):
    message = problems(source="quickstrat")
    assert "Did you mean 'quickstart'?" in message
    assert all(name in message for name in configs.golden_configs())
    assert "neither a YAML file" in problems(source=tmp_path / "none.yaml")


GOLDEN = sorted(configs.golden_configs())


def test_golden_configs_are_all_of_the_folder(repository):
    assert sorted(p.stem for p in (repository / "jobs" / "configs").glob("*.yaml")) == GOLDEN
    assert "quickstart" in GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_config_loads(name):
    found = configs.load(name)
    assert found.run_dir == f"runs/{name}"
    assert configs.load(name, ["heads.count=3"]).heads.count == 3


# --- the tree ------------------------------------------------------------------------------------


def test_every_setting_is_documented():
    rows = list(configs.describe())
    assert len(rows) == len({key for key, *_ in rows}) > 60
    for key, _, text in rows:
        assert len(text) > 8 and text.endswith((".", ")")), key


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load().heads.count = 3


RUNTIME = {
    "run_dir",
    "embed.batch_size",
    "embed.shard_size",
    "embed.max_actors",
    "heads.num_workers",
    "heads.checkpoint_every",
    "classifier.num_workers",
    "ray.address",
    "ray.num_cpus",
    "ray.num_gpus",
    "ray.min_workers",
    "ray.max_failures",
    "ray.worker_wait",
    "track",
}


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif name == "backbone":
            yield from leaves(value[0], "backbone.")
        else:
            yield prefix + name


def test_settings_leave_out_what_does_not_affect_results():
    kept = set(leaves(configs.settings(load())))
    assert {key for key, *_ in configs.describe()} - kept == RUNTIME
    assert configs.settings(load(source=TWO).backbone)[1]["name"] == "two"


def test_settings_are_plain_json():
    tree = configs.settings(load("heads.hidden=[4, 2]"))
    assert json.loads(json.dumps(tree)) == tree


# --- back to YAML --------------------------------------------------------------------------------


def round_trip(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(configs.to_yaml(config))
    return configs.load(path)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_configs_survive_the_way_to_yaml_and_back(name, tmp_path):
    assert round_trip(configs.load(name), tmp_path) == configs.load(name)


def test_yaml_carries_the_documentation_and_all_backbones(tmp_path):
    config = load("heads.hidden=[8, 4]", "heads.lr=1e-5", "heads.pca=null", source=TWO)
    text = configs.to_yaml(config)
    assert round_trip(config, tmp_path) == config
    assert "# H: clustering heads (the paper: 50)." in text
    assert max(map(len, text.splitlines())) <= 100
    assert yaml.safe_load(text)["heads"]["lr"] == 1e-5


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT, st.floats(1e-30, 1e30), st.integers(0, 2**31 - 1))
def test_any_text_and_number_survives(tmp_path_factory, path, column, lr, seed):
    source = {"num_classes": 2, "data": {"path": path, "image_column": column}}
    source |= {"heads": {"lr": lr}, "seed": seed, "run_dir": path}
    assume(not path.startswith("~"))  # a home directory, which need not exist
    config = configs.load(source)
    text = configs.to_yaml(config)
    assert configs.validate(yaml.load(text, loading._Loader)) == config


@pytest.mark.parametrize(
    "text", ["null", "1e-4", "2024-01-01", "yes", "- a", "#x", "a: b", "a\nb", "a\n", "a\u2028b"]
)
def test_text_that_looks_like_something_else_survives(text, tmp_path):
    config = Config(num_classes=2, run_dir=text, data={"path": text, "labels": text})
    assert round_trip(config, tmp_path) == config


def test_the_node_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ICCE_RAY_CACHE", raising=False)
    assert environment_cache() == tmp_path / "xdg" / "icce_ray"
    monkeypatch.setenv("ICCE_RAY_CACHE", str(tmp_path / "own"))
    assert environment_cache() == tmp_path / "own"
    monkeypatch.delenv("ICCE_RAY_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment_cache().parts[-2:] == (".cache", "icce_ray")
