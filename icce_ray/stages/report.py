"""Stage 9: one self-contained HTML page about a run: what it found, how good it is, what it cost.

Reads the artifacts of every other stage and the images of the galleries. Writes report/index.html,
which loads nothing from anywhere (styles, script, charts and thumbnails are inside) and stays below
report.max_megabytes. Images that can no longer be read keep the thumbnails of the page before it.
With report.browse, pages of all images lie beside it.
"""

from __future__ import annotations

import contextlib

from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.errors import ArtifactError
from icce_ray.report import browse, run_numbers
from icce_ray.report.facts import read_facts
from icce_ray.report.pages import FOLDER, PAGE
from icce_ray.report.run_page import Page, render
from icce_ray.rundir import curated, storage
from icce_ray.rundir.directory import RunDirectory, stored
from icce_ray.rundir.progress import Reporter
from icce_ray.stages import evaluate
from icce_ray.stages.base import Context, Outcome


def run(context: Context) -> Outcome:
    """Write the page. Raises ArtifactError where something it reads is missing."""
    page = _write(context.config, context.run, context.reporter)
    size = len(page.content)
    context.reporter.say(f"Report: {context.run.address(FOLDER, PAGE)} ({size / 1e6:.1f} MB)")
    results = {"bytes": size, "images_shown": page.shown}
    return Outcome(rows=context.config.num_classes, results=results)


def build(run_uri: str) -> str:
    """Write the page of a finished run again, with the run's own config. Returns the page's path.

    Raises:
        ArtifactError: `run_uri` is no run directory, or its evaluation is not finished.
    """
    storage.check(run_uri)
    files = curated.current(RunDirectory(run_uri))
    config = curated.config_of(configs.validate(dict(files.read_settings())), files)
    reporter = Reporter(files, silent=True)  # the log and the status are of the run itself
    from jinja2 import UndefinedError

    with stored(f"an artifact of {run_uri}"):
        try:
            _write(config, files, reporter)
        except UndefinedError as error:  # the page needs a value that an artifact lacks
            raise KeyError(str(error)) from error
    return files.address(FOLDER, PAGE)


def _write(config: Config, files: RunDirectory, reporter: Reporter) -> Page:
    """Write the page, after the pages of all images that it leads to, and return it."""
    if files.manifest(evaluate.FOLDER) is None:
        raise ArtifactError(f"{files.path(evaluate.FOLDER)} is not finished; run that stage first")
    image_ids = files.matrix("embeddings", "image_id")
    known = evaluate.truth(config, files, image_ids)
    facts = read_facts(config, files, None if known is None else known.codes)
    asked = config.report.browse and not config.data.embeddings
    bar = reporter.bar("Pages of all images", len(image_ids), "images")
    with bar if asked else contextlib.nullcontext() as shown:
        pages = browse.write(facts, files, shown.update if shown else lambda _: None)
    page = render(facts, files, pages)
    files.write_bytes(page.content, FOLDER, PAGE)
    browse.clean(files, pages)
    if page.lost[0]:
        reporter.event(run_numbers.lost(*page.lost))
    return page
