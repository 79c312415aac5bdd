"""One self-contained HTML page about a run: what was found, how good it is, what it cost.

Reads every other stage's artifacts and the images of the galleries; writes report/index.html, which
loads nothing from anywhere (styles, script, charts and thumbnails are inside) and stays below
report.max_megabytes.
Shapes: N rows, C classes, K clusters, H heads.
"""

from __future__ import annotations

import yaml

from icce_ray import config as configs
from icce_ray.errors import ArtifactError
from icce_ray.report.run_page import render
from icce_ray.rundir import storage
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages.base import Context, Outcome

FOLDER = "report"


PAGE = "index.html"


def run(context: Context) -> Outcome:
    """Write the page. Raises ArtifactError where something it reads is missing."""
    page, shown = render(context.config, context.run)
    context.run.write_bytes(page, FOLDER, PAGE)
    context.reporter.say(f"Report: {context.run.address(FOLDER, PAGE)} ({len(page) / 1e6:.1f} MB)")
    results = {"bytes": len(page), "images_shown": shown}
    return Outcome(rows=context.config.num_classes, results=results)


def build(run_uri: str) -> str:
    """Write the page of a finished run again, from its own config. Returns the page's path.

    Raises:
        ArtifactError: where `run_uri` is no run directory, or its evaluation is not finished.
    """
    storage.check(run_uri)
    files = RunDirectory(run_uri)
    if not files.exists("config.yaml"):
        raise ArtifactError(f"{run_uri} is not a run directory: it has no config.yaml")
    config = configs.validate(yaml.safe_load(files.read_bytes("config.yaml")))
    page, _ = render(config, files)
    files.write_bytes(page, FOLDER, PAGE)
    return files.address(FOLDER, PAGE)
