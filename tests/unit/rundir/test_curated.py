"""What the clusters of a run are called: by a person, or in words that were suggested."""

from __future__ import annotations

from icce_ray.rundir.curated import Naming

WORDS = [[["cat", 0.6], ["kitten", 0.2]], [["dog", 0.9]], [], [["cat", 0.5]]]


def test_a_persons_name_counts_before_a_word() -> None:
    known = Naming([None, "hounds", None, None, None], 4, [*WORDS, [["bin", 0.9]]])
    assert known.all(5) == ["cat 0", "hounds", None, "cat 3", None]
    assert known.given(0) is None and known.given(1) == "hounds" and known.given(-1) is None
    assert known.suggested(1) == [["dog", 0.9]] and known.suggested(4) == ()


def test_a_word_that_a_person_uses_is_told_apart() -> None:
    assert Naming(["cat", None, None, None], None, WORDS).all(4) == ["cat", "dog", None, "cat 3"]


def test_without_any() -> None:
    assert Naming(()).all(2) == [None, None]
    assert Naming((), None, WORDS).of(7) is None
