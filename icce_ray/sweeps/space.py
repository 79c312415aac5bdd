"""A search space: which settings a sweep varies, how its trials are drawn, what they are judged by.

Draws depend only on the seed, so a sweep of more trials extends one of fewer.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import FiniteFloat, StrictInt, TypeAdapter, ValidationError, create_model

from icce_ray import config as configs
from icce_ray.config import loading
from icce_ray.config.schema import RUNTIME, Config, Node, Positive
from icce_ray.errors import ConfigError

TRIES = 50  # draws per trial wanted, before a small space is taken to be used up
GRID_MOST = 10_000  # combinations of a grid
REFUSED = {
    "data": "all trials work on the same data",
    "run_dir": "the sweep chooses where things go",
    "ray": "it says where the work is done, not what comes out",
    "evaluate": "it comes after the clustering and reads ground truth",
    "report": "it only shows the results",
    "classifier": "the scores look at the clustering, which comes before it",
}


@dataclass(frozen=True)
class Range:
    """Integers (both ends included), or numbers, all or their logarithms equally likely."""

    kind: Literal["int", "uniform", "log"]
    low: float
    high: float

    def draw(self, generator: np.random.Generator) -> int | float:
        if self.kind == "int":
            return int(generator.integers(int(self.low), int(self.high), endpoint=True))
        if self.kind == "log":
            return _short(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        return _short(generator.uniform(self.low, self.high))

    def describe(self) -> dict[str, Any]:
        log, whole = self.kind == "log", self.kind == "int"
        return {"low": self.low, "high": self.high, "log": log, "int": whole}


KINDS: dict[str, TypeAdapter[Any]] = {
    "int": TypeAdapter(tuple[StrictInt, StrictInt]),
    "uniform": TypeAdapter(tuple[FiniteFloat, FiniteFloat]),
    "log": TypeAdapter(tuple[FiniteFloat, FiniteFloat]),
}


def _short(value: float) -> float:
    """Four digits: enough to tell trials apart, and readable."""
    return float(f"{value:.4g}")


class Space(Node):
    """The content of a space file."""

    objective: str = "neighbor_information"
    """Label-free score to maximize."""
    trials: Positive = 30
    """Trials that search=random draws."""
    search: Literal["random", "grid", "each"] = "random"
    """random: independent draws. grid: all combinations of the choices. each: the config as it is,
    and each choice by itself (an ablation); choices of `seed` repeat all of these."""
    early_stop: bool = True
    """Stop head trainings that fall behind the others (ASHA), where there are at least four: the
    better third continues at a quarter, and again at three quarters, of the steps."""
    concurrent: Positive | None = None
    """Trials at once. Default: as many as the cluster carries."""
    space: dict[str, Any]
    """Setting -> list of choices, {int: [low, high]}, {uniform: [low, high]} or
    {log: [low, high]}."""


@dataclass(frozen=True)
class Draws:
    """Distinct settings of the trials, in order, and what was left out."""

    settings: tuple[dict[str, Any], ...]
    configs: tuple[Config, ...]
    dropped: int = 0  # combinations that contradict themselves
    why: str = ""  # an example of those


def trial_id(settings: Mapping[str, Any]) -> str:
    """A trial's name: a hash of its settings."""
    content = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def golden_spaces() -> dict[str, Path]:
    """Names and files of the spaces that come with the package."""
    folder = next(iter(configs.golden_configs().values())).parent / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(source: str | Path | tuple[str, Mapping[str, Any]]) -> tuple[Space, str]:
    """Read a golden space's name, a YAML file, or a name and the content of one; returns the space
    and its name.

    Raises:
        ConfigError: with every problem found.
    """
    if isinstance(source, tuple):
        return parse(source[1]), source[0]
    tree, name = loading.read_named("space", source, golden_spaces())
    return parse(tree), name


def parse(tree: Mapping[str, Any]) -> Space:
    """Check a plain tree, and make ranges of what describes them.

    Raises:
        ConfigError: with every problem found, each as key, reason and fix.
    """
    from icce_ray.core.evaluation.labelfree import SCORES  # imports torch

    problems: list[str] = []
    space = None
    try:
        space = Space.model_validate(tree)
    except ValidationError as error:
        problems += [_explain(problem) for problem in error.errors()]
    objective = tree.get("objective", Space.model_fields["objective"].default)
    if objective not in SCORES:
        problems.append(
            f"objective: no score {objective!r}.{loading.near(str(objective), list(SCORES))} "
            f"The scores are {', '.join(SCORES)}."
        )
    inner = tree.get("space")
    ranges = {}
    if isinstance(inner, Mapping):
        if not inner:
            problems.append("space: names no setting to vary")
        for key, value in inner.items():
            lists_only = tree.get("search") in ("grid", "each")
            ranges[str(key)], wrong = _parse_entry(str(key), value, lists_only)
            problems += wrong
    if problems or space is None:
        raise loading.problems_in("the space", problems)
    return space.model_copy(update={"space": ranges})


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown.{loading.near(key, list(Space.model_fields))}"
    if problem["type"] == "missing":
        return f"{key}: missing"
    return f"{key}: {problem['msg']} (got {loading.shown(problem.get('input'))})"


def _parse_entry(key: str, value: Any, lists_only: bool) -> tuple[Any, list[str]]:
    """The choices or the range of one setting, and what is wrong with it."""
    plain = ".".join(part for part in key.split(".") if not part.isdecimal())
    field = {name: info for name, info, _ in configs.describe()}.get(plain)
    reason = REFUSED.get(plain.split(".", maxsplit=1)[0])
    if reason is None and field is not None and RUNTIME in field.metadata:
        reason = "it changes where or how fast the work is done, not what comes out"
    if reason is not None:
        return value, [f"{key}: cannot be swept: {reason}"]
    if field is None:
        return value, [f"{key}: unknown setting.{loading.suggest(plain.split('.'))}"]
    if isinstance(value, list):
        if not value:
            return value, [f"{key}: the list of choices is empty"]
        fitted = [_fit(key, field, choice) for choice in value]
        return [choice for choice, _ in fitted], [p for _, wrong in fitted for p in wrong]
    return _parse_range(key, field, value, lists_only)


def _parse_range(key: str, field: Any, value: Any, lists_only: bool) -> tuple[Any, list[str]]:
    names = list(value) if isinstance(value, Mapping) else []
    if len(names) != 1 or names[0] not in KINDS:
        return value, [
            f"{key}: give a list of choices, or one of {{int: [low, high]}}, "
            f"{{uniform: [low, high]}}, {{log: [low, high]}} (got {loading.shown(value)})"
        ]
    if lists_only:
        return value, [f"{key}: needs a list of choices; ranges are for search: random"]
    kind = cast(Literal["int", "uniform", "log"], names[0])
    try:
        low, high = KINDS[kind].validate_python(value[kind])
    except ValidationError as error:
        return value, [
            f"{key}: {kind}: {error.errors()[0]['msg']} (got {loading.shown(value[kind])})"
        ]
    if low >= high:
        return value, [f"{key}: the range {low} to {high} is empty; low must be below high"]
    if kind == "log" and low <= 0:
        return value, [f"{key}: a log range must be above 0 (got {low})"]
    return Range(kind, low, high), [p for end in (low, high) for p in _fit(key, field, end)[1]]


def _fit(key: str, field: Any, value: Any) -> tuple[Any, list[str]]:
    """A value as the setting takes it (YAML reads 1e-3 as text), and why it cannot have it."""
    one: Any = create_model("One", value=(field.annotation, field))
    try:
        return one.model_validate({"value": value}).model_dump(mode="json")["value"], []
    except ValidationError as error:
        return value, [f"{key}: {error.errors()[0]['msg']} (got {loading.shown(value)})"]


def draw(space: Space, base: Mapping[str, Any], seed: int) -> Draws:
    """The trials' settings, each put into the config `base` and checked.

    Combinations that contradict themselves are left out.

    Raises:
        ConfigError: where no combination is left, naming one and its reason.
    """
    valid: dict[str, tuple[dict[str, Any], Config]] = {}
    bad: dict[str, str] = {}
    wanted = space.trials if space.search == "random" else GRID_MOST
    for settings in _candidates(space, base, seed):
        name = trial_id(settings)
        if name in valid or name in bad:
            continue
        try:
            valid[name] = (settings, apply(base, settings))
        except ConfigError as error:
            bad[name] = f"{show(settings)}: {str(error).splitlines()[-1].strip()}"
        if len(valid) == wanted:
            break
    if not valid:
        raise ConfigError(
            f"no combination of this space is valid, for example {next(iter(bad.values()))}"
        )
    settings_, resolved = zip(*valid.values(), strict=True)
    return Draws(settings_, resolved, len(bad), next(iter(bad.values()), ""))


def _candidates(space: Space, base: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    keys = list(space.space)
    if space.search == "each":
        yield from _one_at_a_time(space.space, base)
        return
    if space.search == "grid":
        total = math.prod(len(choices) for choices in space.space.values())
        if total > GRID_MOST:
            raise ConfigError(
                f"this grid has {total:,} combinations; at most {GRID_MOST:,} are tried. "
                "Use search: random"
            )
        for values in itertools.product(*space.space.values()):
            yield dict(zip(keys, values, strict=True))
        return
    for index in range(space.trials * TRIES):
        generator = np.random.default_rng([seed, index])
        yield {key: _draw_one(space.space[key], generator) for key in keys}


def _one_at_a_time(
    choices: Mapping[str, list[Any]], base: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """For each seed the config's own values, and these with one of them replaced."""
    own = {key: lookup(base, key) for key in choices}
    seeds = choices.get("seed", [None])
    for seed in seeds:
        repeated = own | ({} if seed is None else {"seed": seed})
        yield repeated
        for key, values in choices.items():
            for value in values if key != "seed" else ():
                yield repeated | {key: value}


def lookup(tree: Any, key: str) -> Any:
    """The value of a dotted key."""
    group, last = _holder(tree, key)
    return group[last]


def _holder(tree: Any, key: str) -> tuple[Any, str]:
    """The group that holds a dotted key's value, and the value's name in it."""
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        group = loading.group_of(tree, parts, depth)
        tree = group if group is not tree and part.isdecimal() else group[part]
    return loading.group_of(tree, parts, len(parts) - 1), parts[-1]


def _draw_one(choices: Any, generator: np.random.Generator) -> Any:
    if isinstance(choices, list):
        return choices[int(generator.integers(len(choices)))]
    return choices.draw(generator)


def apply(base: Mapping[str, Any], settings: Mapping[str, Any]) -> Config:
    """The config with these settings in it. Raises ConfigError where they do not fit together."""
    tree = copy.deepcopy(dict(base))
    for key, value in settings.items():
        group, last = _holder(tree, key)
        group[last] = value
    return configs.validate(tree)


def show(settings: Mapping[str, Any]) -> str:
    """Settings in one line, as on the command line."""
    return ", ".join(f"{key}={'null' if v is None else v}" for key, v in settings.items())


def describe(space: Space) -> dict[str, dict[str, Any]]:
    """The space as plain data, for results.json."""
    return {
        key: {"choices": value} if isinstance(value, list) else value.describe()
        for key, value in space.space.items()
    }
