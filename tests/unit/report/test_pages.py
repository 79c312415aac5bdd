"""How the pages write values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from icce_ray.report import pages


def test_a_text_is_cut_at_its_end_and_an_address_at_its_beginning():
    assert pages.cut("abcdef", 6) == "abcdef"
    assert pages.cut("abcdefg", 6) == "abcde…"
    assert pages.tail("s3://bucket/photos/cats/1.png") == "cats/1.png"
    assert pages.tail("x" * 100, 5) == "…xxxxx"


@pytest.mark.parametrize(("value", "text"), [(0.761, "76.1%"), (1.0, "100.0%")])
def test_percent(value, text):
    assert pages.percent(value) == text


def test_both_templates_are_found():
    for name in ("report.html.j2", "sweep.html.j2"):
        assert pages.template(name).name == name


def test_escaping_is_never_switched_off():
    """Charts alone make markup, and escape what they are given."""
    folder = Path(pages.__file__).parent
    for path in (folder / "templates").iterdir():
        assert not re.search(
            r"\|\s*safe\b|autoescape|innerHTML|document\.write", path.read_text()
        ), path
    makers = {path.name for path in folder.glob("*.py") if "Markup(" in path.read_text()}
    assert makers == {"charts.py"}
    assert pages.template("report.html.j2").environment.autoescape is True
