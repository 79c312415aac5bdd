"""What a notebook displays of a run: images of a cluster, and the page of the report."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from icce_ray.errors import printable
from icce_ray.report.galleries import SIDE
from icce_ray.report.pages import FOLDER, PAGE, tail, template
from icce_ray.rundir.directory import RunDirectory

HEIGHT = 640  # of the report's page in a notebook, pixels


@dataclass(frozen=True, repr=False)
class Shown:
    """A notebook displays the HTML, a terminal the text."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def cluster(
    title: str, uris: Sequence[str], confidence: Sequence[float], sources: Sequence[str | None]
) -> Shown:
    """Images of a cluster. sources: thumbnails as data URIs; None: a name is shown."""
    images = [
        {"uri": uri, "name": tail(uri), "confidence": sure, "src": source}
        for uri, sure, source in zip(uris, confidence, sources, strict=True)
    ]
    page = template("cluster.html.j2").render(title=title, images=images, side=SIDE)
    lines = [f"  {sure:.2f}  {uri}" for uri, sure in zip(uris, confidence, strict=True)]
    return Shown(page, "\n".join(map(printable, [title, *lines])))


def report(files: RunDirectory) -> Shown:
    """The page of a run whose report is finished. In a notebook it cannot reach beyond its frame:
    what it shows are other people's images and names."""
    page = files.read_bytes(FOLDER, PAGE).decode()
    frame = (
        f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts allow-downloads" '
        f'style="width:100%;height:{HEIGHT}px;border:0"></iframe>'
    )
    return Shown(frame, printable(files.address(FOLDER, PAGE)))
