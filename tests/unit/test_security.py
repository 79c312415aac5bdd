"""jobs/SECURITY.md names tests that exist, one or more for every line on what prevents harm."""

from __future__ import annotations

import re
from pathlib import Path


def test_every_line_names_tests_that_exist(repository: Path) -> None:
    page = (repository / "jobs" / "SECURITY.md").read_text()
    sources = [path.read_text() for path in (repository / "tests").rglob("test_*.py")]
    there = {
        name for text in sources for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    }
    tables = re.findall(r"^\|.*\| test \|\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [line for table in tables for line in table.splitlines()]
    assert len(rows) > 15
    for row in rows:
        assert re.findall(r"`(test_\w+)`", row.strip("|").rpartition("|")[2]), row
    assert set(re.findall(r"`(test_\w+)`", page)) <= there
