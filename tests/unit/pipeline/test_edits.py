"""A file of edits: what is read from it, and the one line for each thing that is wrong in it."""

from __future__ import annotations

import pytest

from icce_ray.errors import ConfigError
from icce_ray.pipeline import edits


@pytest.fixture
def plan_of(make_run, tmp_path):
    """plan_of(text) -> the plan, for a run of 60 images in 4 clusters, the first 2 unreadable."""
    made = make_run(60, 4, bad=2)

    def plan(text):
        path = tmp_path / "edits.yaml"
        path.write_text(text.format(**{"uri": made.uris[5], "bad": made.uris[0]}))
        given, data = edits.read(path)
        assert data == path.read_bytes()
        return edits.plan(given, made.run, str(path))

    plan.made = made
    return plan


def test_every_piece_is_in_one_group_or_dropped(plan_of):
    plan = plan_of(
        "names: {{0: cats, 3b: ' dogs '}}\nmerge: [[0, 3a]]\nsplit: {{3: 2}}\ndrop: [1]\n"
        "images: {{'{uri}': dogs}}\n"
    )
    assert plan.groups == [["0", "3a"], ["2"], ["3b"]]
    assert plan.names == ["cats", None, "dogs"]
    assert plan.dropped == ["1"] and plan.split == {3: 2}
    assert plan.moved == {3: "3b"}  # row 3 is image 5


def test_an_empty_file_and_missing_parts_change_nothing(plan_of):
    for text in ("", "# nothing yet\nnames:\nmerge: []\n"):
        plan = plan_of(text)
        assert plan.groups == [["0"], ["1"], ["2"], ["3"]] and plan.names == [None] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmaes: {{0: cats}}", r"nmaes: no such key.*Did you mean 'names'"),
        ("names: [cats]", "names: must be KEY: VALUE"),
        ("merge: {{0: 1}}", "merge: must be a list"),
        ("names: {{0: yes}}", r"names\.0: must be text"),
        ("names: {{0: ''}}", r"names\.0: must be text"),
        ('names: {{0: "a\\nb"}}', r"names\.0: must be one line"),
        ("merge: [[2]]", r"merge\[0\]: must be a list of two or more"),
        ("merge: [[2, '2']]", r"merge\[0\]: must be a list of two or more"),
        ("merge: [3, 4]", r"merge\[0\]: must be a list of two or more"),
        ("split: {{2: 1}}", r"split\.2: the number of parts must be 2 to 26, not 1"),
        ("split: {{2: many}}", r"split\.2: the number of parts"),
        ("split: {{2a: 2}}", r"split\.2a: must be the number of a cluster"),
        ("split: {{4: 2}}", r"split\.4: there is no such cluster; they go from 0 to 3"),
        ("split: {{2: 26}}", r"split\.2: it has only 1\d images"),
        ("names: {{4: cats}}", r"names\.4: there is no cluster 4; they go from 0 to 3"),
        ("merge: [[0, 9]]", r"merge\[0\]: there is no cluster 9"),
        ("drop: [-1]", "drop: no cluster has the name '-1'"),
        ("drop: [2a]", "drop: cluster 2 is not split, so it has no part 2a"),
        ("split: {{2: 2}}\ndrop: [2]", "drop: cluster 2 is split; say 2a or 2b"),
        ("split: {{2: 2}}\ndrop: [2c]", "drop: cluster 2 is split; say 2a or 2b"),
        ("merge: [[0, 1], [1, 2]]", r"merge\[1\]: cluster 1 is also in merge\[0\]"),
        ("merge: [[0, 1]]\ndrop: [1]", r"merge\[0\]: cluster 1 is also in drop"),
        ("names: {{1: cats}}\ndrop: [1]", r"names\.1: the cluster is dropped"),
        ("names: {{0: a, 1: b}}\nmerge: [[0, 1]]", r"merge: 0 \+ 1 has several names: a, b"),
        ("names: {{0: a, 1: a}}", "names: 0, 1 have the same name 'a'; merge them"),
        ("merge: [[0, 1, 2, 3]]", "1 clusters would be left"),
        ("drop: [0, 1, 2]", "1 clusters would be left"),
        ("images: {{nowhere.jpg: 1}}", r"images\.nowhere\.jpg: no such image"),
        ("images: {{'{bad}': 1}}", "it could not be read"),
        ("images: {{'{uri}': 7}}", "there is no cluster 7"),
        (
            "names: {{0: cats}}\nimages: {{'{uri}': cat}}",
            "no cluster has the name 'cat'. Did you mean 'cats'",
        ),
        ("of: abc", "of: these edits are about another consensus"),
        ("[1, 2]", "must hold settings"),
        ("names: {{", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(plan_of, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        plan_of(text)
    assert "edits.yaml" in str(error.value)


def test_all_problems_are_listed_at_once(plan_of):
    with pytest.raises(ConfigError, match=r"2 problems in .*edits\.yaml"):
        plan_of("names: {{8: cats}}\ndrop: [9]")


def test_edits_of_this_consensus_are_taken(plan_of):
    of = plan_of.made.run.manifest("consensus").id
    assert plan_of(f"of: '{of}'\nnames: {{{{0: cats}}}}").names[0] == "cats"


def test_a_file_that_is_not_there_gives_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml cannot be read: No such file"):
        edits.read(tmp_path / "no.yaml")
