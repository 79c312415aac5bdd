"""A parsed page, and one in a real browser, for the tests of both pages."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from icce_ray.stages import answer, evaluate, report

VOID = {"meta", "img", "input", "br", "link", "hr"}
LOADS = {"src", "href", "data", "action", "poster", "srcset", "xlink:href"}


class Page(HTMLParser):
    """Checks that tags match, and collects what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.images: list[dict[str, str]] = []
        self.rows: list[list[str]] = []  # of all tables
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute given twice: {attrs}"
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):  # <path/> of the charts
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        """All words, without markup, style and script."""
        return " ".join(" ".join(self.words).split())

    @property
    def ids(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name == "id"]

    @property
    def loads(self) -> list[str]:
        """Addresses the page names."""
        return [value or "" for name, value in self.attributes if name in LOADS]

    @property
    def handlers(self) -> list[str]:
        """Attributes that would run a script."""
        return [name for name, _ in self.attributes if name.startswith("on")]

    @property
    def trials(self) -> list[list[str]]:
        """Rows of a sweep's table of trials, without its head."""
        width = len(self.rows[0])
        return [[cell.strip() for cell in row] for row in self.rows[1:] if len(row) == width]


@pytest.fixture
def parse():
    """parse(text) -> Page."""
    return Page


@pytest.fixture
def report_of(make_context):
    """report_of(made) -> text of the page of a synthetic run, after the stages that it reads."""

    def make(made):
        for stage in (answer, evaluate, report):
            outcome = stage.run(make_context(made))
            made.finish(stage.FOLDER, outcome.rows, outcome.results)
        return made.run.read_bytes("report", "index.html").decode()

    return make


@pytest.fixture
def in_browser(tmp_path):
    """in_browser(page, script, width=500) -> what the script put into the object `made`.

    The script runs at the end of the page, as a file; its promises are waited for.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("NOT TESTED: the page's buttons need Chromium (apt-get install chromium)")

    def run(page, script, width=500):
        path = tmp_path / "page.html"
        told = "document.getElementById('made').textContent = JSON.stringify(made)"
        body = f"try {{ {script} }} catch (error) {{ made.error = String(error); }}"
        script = f"(async () => {{ const made = {{}}; {body} {told}; }})();"
        path.write_text(
            page.replace("</body>", f"<pre id=made></pre><script>{script}</script></body>")
        )
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu"]
        command += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        match = re.search(r'<pre id="made">(.+?)</pre>', done.stdout, re.DOTALL)
        assert match, done.stderr
        made = json.loads(html.unescape(match[1]))
        assert "error" not in made, made
        return made

    return run
