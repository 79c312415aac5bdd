"""The page that writes edits.yaml, clicked through in a real browser."""

from __future__ import annotations

import re

from icce_ray.pipeline import edits
from icce_ray.stages import evaluate, report

# What a person does: both kinds of proposals, a name, a drop, then the download, which is caught.
CLICKS = """
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
made.shown = getComputedStyle(name).display !== "none" && name.offsetWidth > 0;
const written = new Promise(done => {
  URL.createObjectURL = blob => {
    blob.text().then(done);
    return "#";
  };
});
HTMLAnchorElement.prototype.click = function () { made.file = this.download; };
document.getElementById("save").click();
made.text = await written;
"""


def test_the_buttons_write_a_file_that_curate_takes(make_run, make_context, in_browser, tmp_path):
    made = make_run(240, 8, names=None, errors=0.3)
    context = make_context(made)
    for stage in (evaluate, report):
        made.finish(stage.FOLDER, stage.run(context).rows)
    page = made.run.read_bytes("report", "index.html").decode()
    proposed = re.findall(r'<li data-kind="(\w+)" data-clusters="([\d ]+)"', page)
    pair = next(list(map(int, k.split())) for kind, k in proposed if kind == "merge")
    cut = next(int(k) for kind, k in proposed if kind == "split")
    free = [k for k in range(8) if k not in (*pair, cut)]
    found = in_browser(page, CLICKS % {"named": free[0], "dropped": free[1]})
    assert found["file"] == "edits.yaml" and found["shown"]
    path = tmp_path / "edits.yaml"
    path.write_text(found["text"], encoding="utf-8")
    given, _ = edits.read(path)
    assert given.of == made.run.manifest("consensus").id
    assert given.names == {str(free[0]): 'say "ü": #1'} and given.drop == [str(free[1])]
    assert given.split == {cut: 2} and [list(map(int, g)) for g in given.merge] == [pair]
    if cut not in pair:
        assert len(edits.plan(given, made.run, "edits.yaml").groups) == 7
