"""What the page of a run and the page of a sweep share: templates, and how values are written."""

from __future__ import annotations

from typing import Any

import jinja2

from icce_ray.rundir.progress import duration

FOLDER = "report"
PAGE = "index.html"


def template(name: str) -> jinja2.Template:
    """A template of this package. Its filters: `n` (a count), `pct` (a share), `duration`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icce_ray.report", "templates"),
        autoescape=True,  # file names, class names, settings and errors are not ours
        undefined=jinja2.StrictUndefined,  # a missing value must not become an empty cell
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"n": count, "pct": percent, "duration": duration}
    return environment.get_template(name)


def count(value: float) -> str:
    """A whole number with separators: 1,281,167."""
    return f"{value:,.0f}"


def percent(value: float, digits: int = 1) -> str:
    """A share in 0..1 as a percentage: 76.1%."""
    return f"{100 * value:.{digits}f}%"


def cut(text: str, longest: int) -> str:
    """The beginning of a text, with an ellipsis where something is missing."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def tail(uri: Any, longest: int = 60) -> str:
    """The end of an address, which tells one image from another: its folder and its name."""
    short = "/".join(str(uri).rsplit("/", 2)[-2:])
    return short if len(short) <= longest else "…" + short[-longest:]
