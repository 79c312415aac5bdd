"""The page of a sweep: best settings, all trials, what each setting does.

Trials are ranked by the label-free objective alone. Where there is ground truth, the page shows how
well that ranking agrees with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from icce_ray.errors import ArtifactError
from icce_ray.report import sweep_charts
from icce_ray.report.pages import FOLDER, PAGE, template
from icce_ray.report.sweep_numbers import Ranking, table
from icce_ray.rundir.directory import RunDirectory

KEYS = ("name", "objective", "space", "trials", "best", "seconds")  # of a results.json


def build(run: RunDirectory, folder: str) -> str:
    """Write folder/report/index.html from folder/results.json. Returns the page's address.

    Raises:
        ArtifactError: results.json is missing, or not a sweep's.
    """
    results = run.read_json(folder, "results.json")
    lacking = [key for key in KEYS if not isinstance(results, dict) or key not in results]
    if lacking:
        raise ArtifactError(
            f"{run.address(folder, 'results.json')} is not a sweep's result: it lacks {lacking[0]}"
        )
    page = render(results, run.address(folder, "best.yaml"))
    run.write_bytes(page.encode(), f"{folder}/{FOLDER}", PAGE)
    return run.address(folder, FOLDER, PAGE)


def render(results: Mapping[str, Any], best_config: str) -> str:
    """The page. best_config: path of the best trial's config."""
    ranking = Ranking.of(results)
    effects = (sweep_charts.effect(ranking, key) for key in ranking.varying())
    content = table(ranking) | {
        "effects": [chart for chart in effects if chart],
        "truth": sweep_charts.against_truth(ranking),
        "settings": yaml.safe_dump(results.get("config") or {}, sort_keys=False, width=110),
        "command": f"icce-ray run {shlex.quote(best_config)}",
    }
    return template("sweep.html.j2").render(**content)
