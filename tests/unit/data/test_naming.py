"""Suggested names of a run's clusters: of a vocabulary's words, or by a function of the user's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from icce_ray import config as configs
from icce_ray.config.schema import BackboneConfig
from icce_ray.core import words
from icce_ray.core.towers import texts
from icce_ray.data import naming
from icce_ray.errors import ConfigError

CLIP = "open_clip:ViT-B-32/openai"
OTHER = "vit_small_patch14_dinov2.lvd142m"


def settings(*overrides: str, **data: str) -> Any:
    tree = {"num_classes": 3, "run_dir": "runs/x", "data": data or {"path": "images"}}
    return configs.load(tree, overrides)


def made_by(run: Any, *backbones: tuple[str, int]) -> tuple[BackboneConfig, ...]:
    """Say that the run's features are those of backbones, each with its number of features."""
    described = [{"name": name, "features": width, "sha256": name} for name, width in backbones]
    run.finish("embeddings", len(run.rows), {"backbones": described})
    return tuple(BackboneConfig(name=name) for name, _ in backbones)


class Texts:
    """A text tower that knows where the words lie."""

    scale = 100.0

    def __init__(self, places: dict[str, torch.Tensor], sha256: str = CLIP) -> None:
        self.places, self.sha256 = places, sha256

    def encode(self, prompts: list[str]) -> torch.Tensor:
        assert all(prompt.startswith("a photo of a ") for prompt in prompts)
        names = [prompt.removeprefix("a photo of a ").removesuffix(".") for prompt in prompts]
        return torch.stack([self.places[name] for name in names])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """told(run, columns) -> a vocabulary whose words lie at the middles of the run's clusters."""

    def place(run: Any, columns: slice = slice(None), sha256: str = CLIP) -> str:
        features = torch.from_numpy(run.features[:, columns].astype(np.float32))
        spots = {
            f"word-{k}": F.normalize(features[torch.from_numpy(run.clusters == k)].mean(0), dim=0)
            for k in range(run.k)
        }
        spots["elsewhere"] = -sum(spots.values())
        monkeypatch.setattr(texts, "load", lambda config, file: Texts(spots, sha256))
        path = tmp_path / "words.txt"
        path.write_text("\n".join(spots))
        return str(path)

    return place


def test_each_cluster_gets_its_own_word(make_run: Any, told: Any) -> None:
    run = make_run(90, 3, bad=4)
    backbones = made_by(run, (CLIP, 32))
    found = naming.by_vocabulary(run.run, backbones, told(run), 3)
    assert [one[0].text for one in found] == ["word-0", "word-1", "word-2"]
    assert all(len(one) == words.BEST and one[0].score > one[1].score for one in found)


def test_of_joined_features_those_of_the_tower_with_texts_count(make_run: Any, told: Any) -> None:
    run = make_run(90, 3)
    backbones = made_by(run, (OTHER, 20), (CLIP, 12))
    found = naming.by_vocabulary(run.run, backbones, told(run, slice(20, 32)), 3)
    assert [one[0].text for one in found] == ["word-0", "word-1", "word-2"]


def test_texts_of_other_weights_are_refused(make_run: Any, told: Any) -> None:
    run = make_run(60, 3)
    backbones = made_by(run, (CLIP, 32))
    with pytest.raises(ConfigError, match=f"text tower of {CLIP} is of other weights"):
        naming.by_vocabulary(run.run, backbones, told(run, sha256="other"), 3)


def test_why_there_are_no_words() -> None:
    assert naming.lacks(settings(f"backbone={CLIP}")) == ""
    assert naming.lacks(settings(f"backbone=[{OTHER}, '{CLIP}']")) == ""
    assert naming.lacks(settings(f"backbone={OTHER}")).startswith(f"{OTHER} has no text tower")
    given = settings(f"backbone={CLIP}", embeddings="e.npy")
    assert naming.lacks(given) == "nothing is known of given embeddings"


def test_mistakes_are_seen_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def name(images): return 'x'\nTEXT = 'x'\n")
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    for good in ("answer.namer=mine:name", "answer.vocabulary=none", "answer.vocabulary=auto"):
        naming.preflight(settings(good, f"backbone={OTHER}"))
    naming.preflight(settings("answer.vocabulary=words.txt", f"backbone={CLIP}"))
    for wrong, message in {
        "answer.namer=mine": "must be MODULE:FUNCTION",
        "answer.namer=none.such:name": "cannot be imported: ModuleNotFoundError: No module",
        "answer.namer=broken:name": "cannot be imported: ModuleNotFoundError: .*no_such_module",
        "answer.namer=mine:other": "cannot be imported: AttributeError: .*other",
        "answer.namer=mine:TEXT": "is a str, not a function",
        "answer.vocabulary=none.txt": "cannot be read: No such file",
        "answer.vocabulary=words.txt": f"cannot be used: {OTHER} has no text tower",
    }.items():
        with pytest.raises(ConfigError, match=message):
            naming.preflight(settings(wrong, f"backbone={OTHER}"))
    with pytest.raises(ConfigError, match="needs images"):
        naming.preflight(settings("answer.namer=mine:name", embeddings="e.npy"))
    assert str(tmp_path) not in sys.path


def test_a_function_names_clusters_and_its_faults_cost_only_their_names() -> None:
    def name(images: list[str]) -> Any:
        if images == ["bad"]:
            raise ValueError("out of\nideas")
        return {"a": " two\nwords ", "b": None, "c": 7, "d": "x" * 500}[images[0]]

    wrong: list[tuple[int, str]] = []
    found = naming.by_function(
        name, [["a"], ["b"], ["c"], ["bad"], [], ["d"]], lambda *one: wrong.append(one)
    )
    assert [[word.text for word in one] for one in found[:5]] == [["two words"], [], [], [], []]
    assert len(found[5][0].text) == naming.LONGEST
    assert found[0][0].score is None
    assert wrong == [
        (2, "TypeError: it returned a int, not a text"),
        (3, "ValueError: out of ideas"),
    ]
