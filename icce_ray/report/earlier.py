"""Thumbnails of the report as it was, for images that were moved or deleted since.

The page itself is where they are kept: each of its images says where its file was.
"""

from __future__ import annotations

import html
import re

from icce_ray.report.pages import FOLDER, PAGE
from icce_ray.rundir.directory import RunDirectory

# As report.html.j2 writes them. Only what a report of ours may hold is taken: another text in their
# place, in a run directory of others, must not get into the page.
_ROOT = re.compile(r'<main data-root="([^"]*)">')
_IMAGE = re.compile(
    r'<img src="(data:image/(?:webp|jpeg);base64,[A-Za-z0-9+/]+=*)" data-u="([^"]*)"'
)


def thumbnails(page: str) -> dict[str, str]:
    """Data URI of each image of a page, by its address."""
    root = _ROOT.search(page)
    if root is None:  # of an earlier version
        return {}
    return {html.unescape(root[1] + rest): source for source, rest in _IMAGE.findall(page)}


def shown(files: RunDirectory) -> dict[str, str]:
    """Thumbnails of the run's page and, where its clusters were curated, of that page as well."""
    found: dict[str, str] = {}
    for run in (RunDirectory(files.uri), files):
        if run.exists(FOLDER, PAGE):
            found |= thumbnails(run.read_bytes(FOLDER, PAGE).decode(errors="replace"))
    return found
