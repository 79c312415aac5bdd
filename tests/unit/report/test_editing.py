"""The page that writes edits.yaml, clicked through in a real browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess

import pytest

from icce_ray.pipeline import edits
from icce_ray.stages import evaluate, report

# What a person does: both kinds of proposals, a name, a drop, then the download, which is caught.
CLICKS = """<pre id="made"></pre><script>
const made = document.getElementById("made");
const links = document.querySelectorAll(".proposals li");
const of = kind => [...links].find(li => li.dataset.kind === kind);
of("merge").querySelector("button").click();
of("split").querySelector("button").click();
const inputs = k => document.querySelectorAll(`#c${k} .edit input`);
const touch = input => input.dispatchEvent(new Event("input", { bubbles: true }));
const name = inputs(%(named)d)[0];
name.value = 'say "ü": #1';
touch(name);
const drop = inputs(%(dropped)d)[3];
drop.click();
made.dataset.shown = getComputedStyle(name).display !== "none" && name.offsetWidth > 0;
made.dataset.wide = document.documentElement.scrollWidth;
URL.createObjectURL = blob => {
  blob.text().then(text => { made.textContent = text; });
  return "#";
};
HTMLAnchorElement.prototype.click = function () { made.dataset.file = this.download; };
document.getElementById("save").click();
</script>"""


@pytest.fixture
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("NOT TESTED: the page's buttons need Chromium (apt-get install chromium)")
    return found


def test_the_buttons_write_a_file_that_curate_takes(make_run, make_context, browser, tmp_path):
    made = make_run(240, 8, names=None, errors=0.3)
    context = make_context(made)
    for stage in (evaluate, report):
        made.finish(stage.FOLDER, stage.run(context).rows)
    page = made.run.read_bytes("report", "index.html").decode()
    proposed = re.findall(r'<li data-kind="(\w+)" data-clusters="([\d ]+)"', page)
    pair = next(list(map(int, k.split())) for kind, k in proposed if kind == "merge")
    cut = next(int(k) for kind, k in proposed if kind == "split")
    free = [k for k in range(8) if k not in (*pair, cut)]
    clicks = CLICKS % {"named": free[0], "dropped": free[1]}
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{clicks}</body>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    match = re.search(r'<pre id="made"([^>]*)>(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr
    assert 'data-file="edits.yaml"' in match[1] and 'data-shown="true"' in match[1]
    path = tmp_path / "edits.yaml"
    path.write_text(html.unescape(match[2]), encoding="utf-8")
    given, _ = edits.read(path)
    assert given.of == made.run.manifest("consensus").id
    assert given.names == {str(free[0]): 'say "ü": #1'} and given.drop == [str(free[1])]
    assert given.split == {cut: 2} and [list(map(int, g)) for g in given.merge] == [pair]
    if cut not in pair:
        assert len(edits.plan(given, made.run, "edits.yaml").groups) == 7
