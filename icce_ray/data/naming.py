"""Suggested names of a run's clusters: of a vocabulary's words, or by a function of the user's.

Shapes: K clusters, D features.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from icce_ray.config.schema import NAMING_MODES, BackboneConfig, Config
from icce_ray.errors import ConfigError, one_line
from icce_ray.rundir import copies
from icce_ray.rundir.directory import RunDirectory

if TYPE_CHECKING:  # torch takes long to import, and the settings are looked at before each run
    from icce_ray.core.words import Word

LONGEST = 100  # characters of a name
Namer = Callable[[list[Any]], Any]
Names = list[list["Word"]]  # [K], best first


def preflight(config: Config) -> None:
    """What can be wrong with `answer.vocabulary` and `answer.namer`. Raises ConfigError."""
    chosen = config.answer
    if chosen.namer is None and chosen.vocabulary in NAMING_MODES:
        return
    if chosen.namer is not None:
        if config.data.embeddings:
            raise ConfigError("answer.namer needs images (data.path), not embeddings")
        namer(chosen.namer)
        return
    from icce_ray.core import words

    words.vocabulary(chosen.vocabulary)
    if why := lacks(config):
        raise ConfigError(f"answer.vocabulary={chosen.vocabulary} cannot be used: {why}")


def lacks(config: Config) -> str:
    """Why a run's clusters get no words of a vocabulary; empty where they may get some."""
    from icce_ray.core.towers import texts

    if config.data.embeddings:
        return "nothing is known of given embeddings"
    reasons = [texts.lacks(one) for one in config.backbone]
    return "" if "" in reasons else reasons[0]


def by_vocabulary(
    run: RunDirectory, backbones: Sequence[BackboneConfig], vocabulary: str, count: int
) -> Names:
    """The words nearest to each cluster, in the space of the first backbone that has texts.

    vocabulary: answer.vocabulary. count: K.

    Raises ConfigError: the text tower cannot be had, or belongs to other weights than the run's.
    """
    from icce_ray.core import words
    from icce_ray.core.towers import texts

    place = next(n for n, one in enumerate(backbones) if not texts.lacks(one))
    chosen = backbones[place]
    file = copies.local("backbone.weights", chosen.weights) if chosen.weights else None
    tower = texts.load(chosen, file)
    done = run.manifest("embeddings")
    made = done.results["backbones"] if done else []
    if not made or made[place]["sha256"] != tower.sha256:
        raise ConfigError(f"the text tower of {chosen.name} is of other weights than the run's")
    start = sum(one["features"] for one in made[:place])
    features = run.matrix("embeddings", "embedding")[:, start : start + made[place]["features"]]
    clusters = np.asarray(run.matrix("consensus", "cluster"))
    confidence = np.asarray(run.matrix("consensus", "confidence"))
    listed = words.vocabulary(None if vocabulary in NAMING_MODES else vocabulary)
    vectors = tower.encode([words.PROMPT.format(word) for word in listed])
    centers = words.means(features, clusters, confidence, count)
    return words.suggest(centers, vectors, tower.scale, listed)


def namer(setting: str) -> Namer:
    """The function that answer.namer=MODULE:FUNCTION names, also of the working directory.

    Raises ConfigError: there is none, or its module cannot be imported.
    """
    module, _, name = setting.partition(":")
    if not module or not name:
        raise ConfigError(f"answer.namer={setting} must be MODULE:FUNCTION")
    try:
        with _working_directory():
            found = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module's own code runs
        raise ConfigError(
            f"answer.namer={setting} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from None
    if not callable(found):
        raise ConfigError(f"answer.namer={setting} is a {type(found).__name__}, not a function")
    function: Namer = found
    return function


@contextmanager
def _working_directory() -> Any:
    """Modules of the working directory can be imported, as with `python -m`."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def by_function(
    function: Namer, galleries: Iterable[list[Any]], trouble: Callable[[int, str], None]
) -> Names:
    """What a function calls each cluster, [K]: nothing where it returns None, or fails.

    galleries: the RGB images that it is given of each cluster; without any, it is not called.
    trouble: gets a cluster and what went wrong.
    """
    from icce_ray.core.words import Word

    names: Names = []
    for cluster, images in enumerate(galleries):
        found = None
        try:
            found = function(images) if images else None
            if not isinstance(found, (str, type(None))):
                raise TypeError(f"it returned a {type(found).__name__}, not a text")
        except Exception as error:  # the user's own code
            found = None
            trouble(cluster, f"{type(error).__name__}: {one_line(error)}")
        text = " ".join(found.split())[:LONGEST] if found else ""
        names.append([Word(text, None)] if text else [])
    return names
