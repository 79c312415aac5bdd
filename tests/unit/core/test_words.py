"""Names in words. N images, K clusters, V words, D features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from icce_ray.core import words
from icce_ray.errors import ConfigError


def test_the_nouns_of_the_package() -> None:
    nouns = words.vocabulary(None)
    assert 2000 < len(nouns) == len(set(nouns)) < 5000
    assert {"cat", "airplane", "ice cream", "digit", "zebra"} <= set(nouns)
    assert all(word == word.strip().lower() for word in nouns)
    text = words.NOUNS.read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in text[: text.index("\nabbey")]


def test_the_setting_says_how_many_nouns_there_are() -> None:
    from icce_ray.config.schema import AnswerConfig

    text = AnswerConfig.model_fields["vocabulary"].description or ""
    assert f"{len(words.vocabulary(None)):,} common nouns" in text


def test_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# mine\ncat\n\n  ice cream \ncat\nKatze\n", encoding="utf-8")
    assert words.vocabulary(str(path)) == ["cat", "ice cream", "Katze"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "words.txt cannot be read: No such file"),
        (b"# only\n\none\n", "fewer than 2 words"),
        (b"\xff\xfe\x00\xd8", "cannot be read"),
        (b"one\ntwo\n" + b"x" * 300, "no list of words: a line begins 'xxx"),
    ],
)
def test_no_vocabulary(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        words.vocabulary(str(tmp_path / "words.txt"))


def test_the_unsure_images_of_a_cluster_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "ROWS", 2)
    features = np.eye(4, dtype=np.float16)[[0, 0, 1, 2, 2, 3]]
    clusters = np.array([0, 0, 0, 2, 2, 2], np.int32)
    confidence = np.array([0.9, 0.8, 0.1, 0.7, 0.7, 0.7], np.float32)
    found = words.means(features, clusters, confidence, 3)
    assert found[0].tolist() == [1, 0, 0, 0]  # its third image is less sure than the mean
    assert found[1].tolist() == [0, 0, 0, 0]  # no image
    torch.testing.assert_close(found[2], F.normalize(torch.tensor([0.0, 0, 2, 1]), dim=0))


def test_the_right_word_comes_first_and_a_hub_does_not() -> None:
    """Word 3 is nearer to the first two clusters than their own words, as it is to all."""
    centers = torch.eye(4)[:3]
    hub = F.normalize(torch.tensor([1.0, 1.0, 0.4, 0.0]), dim=0)
    own = F.normalize(torch.eye(4)[:3] * 0.6 + torch.eye(4)[3] * 0.8, dim=1)
    texts = torch.cat([own, hub[None]])
    assert (centers @ texts.T).argmax(1).tolist() == [3, 3, 2]
    found = words.suggest(centers, texts, 100.0, ["a", "b", "c", "hub"])
    assert [one[0].text for one in found] == ["a", "b", "c"]
    for one in found:
        scores = [word.score for word in one]
        assert len(one) == words.BEST and scores == sorted(scores, reverse=True)
        assert 0.5 < scores[0] <= sum(scores) <= 1.001


def test_a_word_that_is_hardly_better_than_others_is_none() -> None:
    """As with random weights: the best of many is then still one of many."""
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(2000, 64, generator=generator), dim=1)
    names = [f"word-{v}" for v in range(2000)]
    found = words.suggest(texts[:3], texts, 2.0, names)
    assert found == [[], [], []]
    assert [one[0].text for one in words.suggest(texts[:3], texts, 50.0, names)] == names[:3]
    few = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.0, 1.0]]), dim=1)
    assert words.suggest(few[:1], few, 1.0, names[:3]) == [[]]  # a third is what each would get


def test_an_empty_cluster_gets_no_word_and_changes_no_other() -> None:
    centers = torch.cat([torch.eye(3)[:2], torch.zeros(1, 3)])
    texts = torch.eye(3)
    found = words.suggest(centers, texts, 10.0, ["a", "b", "c"])
    assert found[2] == []
    assert found[:2] == words.suggest(centers[:2], texts, 10.0, ["a", "b", "c"])
