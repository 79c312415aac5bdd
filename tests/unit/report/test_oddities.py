"""Groups of duplicates and outliers on the page of a run."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from icce_ray.report import oddities


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_groups_are_the_largest_and_whole(draws):
    first = np.array([min(draw, row) for row, draw in enumerate(draws)])
    first = first[first]  # a first row is its own first
    while (first[first] != first).any():
        first = first[first]
    found = oddities.groups(first)
    whole = [np.flatnonzero(first == head).tolist() for head in range(len(first))]
    many = sorted((rows for rows in whole if len(rows) > 1), key=lambda rows: (-len(rows), rows[0]))
    assert [rows.tolist() for rows in found] == many[: oddities.GROUPS]


def test_page_shows_copies_side_by_side_and_the_farthest_first(make_run, report_of, parse):
    made = make_run(60, 2, bad=2, errors=0.3)
    features = np.array(made.features)
    features[[20, 31]] = features[5]
    made.write_embeddings(features)
    text = report_of(made)
    page = parse(text)
    assert "2 images repeat an earlier one" in page.text and "3 images" in page.text
    part = text[text.index('id="duplicates"') : text.index('id="outliers"')]
    names = [f"{row + 2:05d}.png" for row in (5, 20, 31)]
    places = [part.index(name) for name in names]
    assert places == sorted(places) and part.count("<img") == 3
    last = text[text.index('id="outliers"') : text.index('id="charts"')]
    assert last.count("<img") == oddities.OUTLIERS
    assert names[1] not in last and names[2] not in last  # a group of duplicates is there once
    inside = [load[1:] for load in page.loads if load.startswith("#")]
    assert set(inside) <= set(page.ids) and {"duplicates", "outliers"} <= set(page.ids)


def test_page_without_duplicates_has_no_such_section(make_run, report_of, parse):
    page = parse(report_of(make_run(40, 2)))
    assert "duplicates" not in page.ids and "outliers" in page.ids


def test_these_images_stay_within_their_share(make_run, report_of, parse, monkeypatch):
    monkeypatch.setattr(oddities, "SHARE", 0.0)
    page = parse(report_of(make_run(40, 2)))
    assert "outliers" not in page.ids and page.images
