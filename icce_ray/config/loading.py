"""Reading settings: YAML files, KEY=VALUE overrides, and messages about what is wrong in them."""

from __future__ import annotations

import copy
import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import ValidationError

from icce_ray.config import backbones, places
from icce_ray.config.removed import REMOVED
from icce_ray.config.schema import LABEL_MODES, NAMING_MODES, Config, Node, describe, fields
from icce_ray.errors import ArtifactError, ConfigError, one_line
from icce_ray.rundir.addresses import absolute, split_options

Tree = TypeVar("Tree", bound=Node)
Range: TypeAlias = tuple[int, int | None]  # numbers of classes; None: no bound
FEWEST_CLASSES = 2


class _Loader(yaml.SafeLoader):
    """YAML without dates: no setting is a date, but a folder may be named 2024-01-01. A key that
    occurs twice is an error: PyYAML would take the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (one.value for one, _ in node.value if isinstance(one, yaml.ScalarNode)):
            if key in seen:
                raise yaml.MarkedYAMLError(f"the key {key!r} occurs twice", node.start_mark)
            seen.add(key)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def golden_configs() -> dict[str, Path]:
    """Names and files of the configs that come with the package."""
    installed = Path(str(resources.files("icce_ray"))) / "configs"
    checkout = Path(__file__).resolve().parents[2] / "jobs" / "configs"
    folder = installed if installed.is_dir() else checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Resolve a golden config's name, a YAML file or a mapping, plus `key.sub=value` overrides.

    A path or address of images or embeddings, too, stands for the config that names it.

    Raises:
        ConfigError: with every problem found, each as dotted key, value, reason and fix.
    """
    return validate(merge(source, overrides))


def merge(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    say: backbones.Say | None = None,
) -> dict[str, Any]:
    """The plain tree that `load` checks.

    say: gets a line for a backbone that was named in short, or chosen here.

    Raises ConfigError for what cannot be read or set.
    """
    tree, name = _read(source)
    of_config = places.data_address(tree)
    tree["backbone"] = backbones.groups(tree.get("backbone"))
    for override in overrides:
        _apply(tree, override)
        tree["backbone"] = backbones.groups(tree["backbone"])  # backbone.name has to find a group
    tree["backbone"] = [backbones.resolve(group, say) for group in tree["backbone"]]
    missing = tree.get("num_classes") is None  # which the validation says, without torch's import
    if not (name or missing or isinstance(source, Mapping)):
        _choose_backbone(tree, say)
    if not tree.get("run_dir"):
        address = places.data_address(tree)
        parts = [name] if name else []
        if address and (not name or address != of_config):
            parts.append(places.data_name(address))
        tree["run_dir"] = f"runs/{'-'.join(parts) or 'run'}"
    return tree


def _choose_backbone(tree: dict[str, Any], say: backbones.Say | None) -> None:
    """For data in place of a config: a backbone that suits the machine, unless one was named."""
    data, ray, chosen = (tree.get(key) for key in ("data", "ray", "backbone"))
    embedded = isinstance(data, Mapping) and data.get("embeddings")
    given = [one for one in chosen or () if isinstance(one, Mapping)]
    if embedded or len(given) != 1 or "name" in given[0]:
        return
    gpus = isinstance(ray, Mapping) and bool(ray.get("num_gpus"))
    tree["backbone"] = [{**backbones.choose(gpus, say), **given[0]}]


def as_overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as KEY=VALUE, those of groups by their dotted names."""
    found: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += as_overrides(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={scalar(_plain(value))}")
    return found


def parse_range(num_classes: Any) -> Range | None:
    """Lowest and highest number of `auto` and "LOW-HIGH"; None: it is a plain number.

    Raises ConfigError: a range that is none, or another text.
    """
    if num_classes == "auto":
        return FEWEST_CLASSES, None
    text = num_classes if isinstance(num_classes, str) else ""
    ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", text)
    if ends is None and text.strip() and not text.strip().isdecimal():
        raise ConfigError(f"num_classes={text}: give a number, a range such as 4-30, or auto")
    if ends is None:
        return None
    low, high = int(ends[1]), int(ends[2])
    if not FEWEST_CLASSES <= low < high:
        raise ConfigError(
            f"num_classes={text}: a range goes from 2 or more to a higher number, such as 4-30"
        )
    return low, high


def validate(tree: Mapping[str, Any]) -> Config:
    """Check a plain tree. Raises ConfigError that lists all problems."""
    config = check(Config, tree)
    problems = [text for key, path in _paths(config) if (text := _path_problem(key, path))]
    if problems:
        raise problems_in("the settings", problems)
    return config


def _paths(config: Config) -> list[tuple[str, str | None]]:
    """Settings that name a file or folder; None where there is none."""
    data = config.data
    labels = None if data.labels in LABEL_MODES else data.labels
    words = config.answer.vocabulary
    weights = [(f"backbone.{i}.weights", one.weights) for i, one in enumerate(config.backbone)]
    return [
        ("run_dir", config.run_dir),
        ("data.path", data.path),
        ("data.embeddings", data.embeddings),
        ("data.labels", labels),
        ("answer.vocabulary", None if words in NAMING_MODES else words),
        *weights,
    ]


def _path_problem(key: str, path: str | None) -> str | None:
    try:
        absolute(path or "")
    except ArtifactError as error:
        return f"{key}: {error}"
    return None


def check(kind: type[Tree], tree: Mapping[str, Any]) -> Tree:
    """`validate` for any node of the tree, such as MethodConfig."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(problem, tree) for problem in error.errors()]
        raise problems_in("the settings", problems) from None


def problems_in(what: str, problems: Sequence[str]) -> ConfigError:
    """One error for all problems that were found."""
    head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return ConfigError(f"{head} in {what}:\n  " + "\n  ".join(problems))


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The tree and the name of a config; data in place of one have no name."""
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), ""
    if not isinstance(source, str | Path):
        raise ConfigError(
            f"data or a config, not {type(source).__name__}: give a folder, a pattern such as "
            "photos/**/*.jpg, or for single images a CSV file with a column of their paths"
        )
    text, known = str(source), golden_configs()
    if text not in known and (data := places.data_group(text)):
        return {"data": data}, ""
    if "://" in text:
        return parse_yaml(_fetch(text), text), Path(split_options(text)[0]).stem
    return read_named("config", source, known)


def read_named(
    kind: str, source: str | Path, known: Mapping[str, Path]
) -> tuple[dict[str, Any], str]:
    """The content and the name of a YAML file that comes with the package, or of the user's own.

    Args:
        kind: what such a file is called: config, or space.
        source: a name among `known`, or a path.
        known: names and files that come with the package.

    Raises:
        ConfigError: there is no such file, or it is not a mapping in YAML.
    """
    path = known.get(str(source)) or Path(source)
    if not places.is_file(path):
        there, beside = places.around(path)
        images = ", nor images or embeddings" if kind == "config" else ""
        raise ConfigError(
            f"no {kind} {str(source)!r}: it is neither a YAML file nor one of "
            f"{', '.join(known)}{images}. {there}{near(str(source), [*known, *beside])}"
        )
    return parse_yaml(path.expanduser().read_bytes(), str(path)), path.stem


def near(wanted: str, names: Sequence[str]) -> str:
    """A hint at the name that was meant; empty where none is like it."""
    close = difflib.get_close_matches(wanted, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _fetch(uri: str) -> bytes:
    """A file of settings in object storage, such as a sweep's best.yaml."""
    from icce_ray.rundir import storage

    try:
        with storage.hastily():
            return storage.read(uri)
    except OSError as error:
        raise ConfigError(f"{uri} cannot be read: {error}") from None


def _plain(value: Any) -> Any:
    """Paths and numpy's numbers as YAML knows them."""
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def parse_yaml(text: bytes, name: str) -> dict[str, Any]:
    """A YAML mapping as a plain tree. Raises ConfigError, which names the file by `name`."""
    try:
        tree = yaml.load(text.decode(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # numbers and depth have limits
        raise ConfigError(f"{name} is not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} must hold settings (key: value), not {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        quote = ". A pattern of names needs quotes" if places.there(override) else ""
        raise ConfigError(f"{override!r} is not an override; write key.sub=value{quote}")
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        group = group_of(node, parts, depth)
        if group is not node and part.isdecimal():
            node = group  # `part` was an index of a list
            continue
        if group.get(part) is None:
            group[part] = {}
        node = group[part]
    group_of(node, parts, len(parts) - 1)[parts[-1]] = _value(parts, text)


def group_of(node: Any, parts: Sequence[str], depth: int) -> Any:
    """The mapping in which to look up parts[depth]; of a list, the element that parts[depth]
    names."""
    part, above = parts[depth], ".".join(parts[:depth])
    if isinstance(node, list):
        if part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif part.isdecimal() or len(node) != 1:
            raise ConfigError(
                f"{'.'.join(parts)}: {above} is a list of {len(node)}; name one of them, "
                f"from {above}.0 to {above}.{len(node) - 1}"
            )
        else:
            node = node[0]  # so that backbone.name works where there is one backbone
    if not isinstance(node, dict):
        raise ConfigError(f"{'.'.join(parts)} cannot be set: {above} holds a value, not a group")
    return node


def _value(parts: Sequence[str], text: str) -> Any:
    """The value as YAML reads it, but the text unchanged for a text setting (run_dir=2024)."""
    if text in ("", "None"):
        return None
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    key = ".".join(part for part in parts if not part.isdecimal())
    kinds = {name: field.annotation for name, field, _ in describe()}
    quoted = text.lstrip().startswith(("'", '"'))
    if value is not None and not quoted and kinds.get(key) in (str, str | None):
        return text
    return value


def _explain(problem: Any, tree: Mapping[str, Any]) -> str:
    location = [part for part in problem["loc"] if part not in ("function-after",)]
    key = ".".join(str(part) for part in location)
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden" and key in REMOVED:
        return f"{key}: this setting was removed. {REMOVED[key]}"
    if kind == "literal_error" and isinstance(value, str) and f"{key}={value}" in REMOVED:
        return f"{key}={value}: this choice was removed. {REMOVED[f'{key}={value}']}"
    if kind == "extra_forbidden":
        return f"{key}: unknown setting.{suggest(location)}"
    if kind == "missing":
        short = " (`icce-ray run`: -k N, or -k auto)" if key == "num_classes" else ""
        return f"{key}: missing; add {key}=...{short}"
    if kind == "model_type":
        return f"{key}: this is a group of settings (key: value), not {shown(value)}"
    message = problem["msg"].removeprefix("Value error, ")
    prefix = f"{key}: " if key else ""
    got = "" if kind == "value_error" else f" (got {shown(value)})"
    return f"{prefix}{message}{got}"


def shown(value: Any) -> str:
    """A value of a file as text, its depth and length bounded: YAML's aliases make huge ones."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, 300, 300
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = 20
    return short.repr(value)


def suggest(location: Sequence[Any]) -> str:
    """Similar names for an unknown key: in its own group first, then anywhere in the tree."""
    wanted = ".".join(str(part) for part in location if not isinstance(part, int))
    every = [key for key, *_ in describe()]
    every += sorted({key.rpartition(".")[0] for key in every} - {""})  # groups: backbone, heads
    near = difflib.get_close_matches(wanted, every, n=1, cutoff=0.75)
    same_leaf = [key for key in every if key.split(".")[-1] == wanted.split(".")[-1]]
    guess = near or same_leaf[:1]
    if guess:
        return f" Did you mean {guess[0]}?"
    group = [key for key in every if key.rpartition(".")[0] == wanted.rpartition(".")[0]]
    return f" Known there: {', '.join(key.rpartition('.')[2] for key in group)}." if group else ""


def to_yaml(config: Config) -> str:
    """The resolved tree with each setting's documentation above it; loads back to the same tree."""
    docs = {key: text for key, _, text in describe()}
    lines: list[str] = []
    tree = config.model_dump(mode="json")
    _dump({name: tree[name] for name, _ in fields(Config)}, "", 0, docs, lines)
    return "\n".join(lines) + "\n"


def _dump(tree: Any, prefix: str, depth: int, docs: Mapping[str, str], lines: list[str]) -> None:
    pad = "  " * depth
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if docs.get(key):
            lines.extend(f"{pad}# {line}" for line in _wrap(docs[key], 96 - len(pad)))
        if isinstance(value, dict):
            lines.append(f"{pad}{name}:")
            _dump(value, key + ".", depth + 1, docs, lines)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{pad}{name}:")
            for item in value:
                start = len(lines)
                _dump(item, key + ".", depth + 2, docs, lines)
                lines.insert(start, f"{pad}  -")
        else:
            lines.append(f"{pad}{name}: {scalar(value)}")


def scalar(value: Any) -> str:
    """A plain value as YAML, on one line."""
    # Only double quotes keep a text with line breaks on one line.
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=1_000_000)
    return text.split("\n")[0]


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(width, 40))
