"""All images of all clusters, on plain pages beside the report: no script, nothing to be loaded.

    report/browse-KEY/  index.html                 the clusters; written last
                        3-1.html, 3-2.html, ...    images of cluster 3, the most confident first

KEY stands for the clusters and their names. The page of the run, which is written after all these,
leads to one folder; then folders of other keys go. So none is ever shown half written.
Shapes: N images, K clusters.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import jinja2
import numpy as np

from icce_ray.report import earlier
from icce_ray.report.facts import RunFacts
from icce_ray.report.pages import FOLDER, PAGE, template
from icce_ray.report.thumbnails import places_of, thumbnails
from icce_ray.rundir.directory import RunDirectory, fingerprint

PER_PAGE = 200  # images: a page of about 1 MB
SIDE = 160  # pixels of an image's longer side
READ = 64  # images whose encoded bytes are in memory at once; photos may have 10 MB each
WHOLE = b'data-lost="0"'  # in index.html
NAME = re.compile(r"browse-[0-9a-f]{16}")


@dataclass(frozen=True)
class Pages:
    """A folder of such pages."""

    folder: str
    rank: np.ndarray  # of each image in its cluster, from 0 on, int64 [N]

    def of(self, cluster: int) -> str:
        """The first page of a cluster, seen from the report."""
        return f"{self.folder}/{cluster}-1.html"

    def link(self, cluster: int, row: int) -> str:
        """An image of a cluster, seen from the report."""
        return f"{self.folder}/{cluster}-{self.rank[row] // PER_PAGE + 1}.html#i{row}"


def write(facts: RunFacts, files: RunDirectory, on_images: Callable[[int], object]) -> Pages | None:
    """Write the pages where report.browse asks for them and they are not there yet.

    Images are read in the order of the index, in which they lie in tars and Parquet files, and kept
    on this node's disk until their pages are written: memory does not grow with their number.

    on_images: called with the number of images that were read.

    Returns: the pages there are; None where there are none.
    Raises StageError: a full disk.
    """
    name = _folder(facts)
    whole = _is_whole(files, name)
    if not whole and (not facts.config.report.browse or facts.config.data.embeddings):
        return None
    order = np.lexsort((-facts.confidence, facts.clusters))
    sizes = np.bincount(facts.clusters, minlength=facts.num_clusters)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts[:-1], sizes)
    if not whole:
        _write(facts, files, name, order, starts, on_images)
    return Pages(name, rank)


def _write(
    facts: RunFacts,
    files: RunDirectory,
    name: str,
    order: np.ndarray,
    starts: np.ndarray,
    on_images: Callable[[int], object],
) -> None:
    """order: rows by cluster and confidence, int64 [N]. starts: of the clusters in it, [K + 1]."""
    sizes = np.diff(starts)
    folder = f"{FOLDER}/{name}"
    named = [facts.cluster_name(k) for k in range(facts.num_clusters)]
    images = _Spool(facts, files)
    with images.opened():
        images.fill(on_images)
        one = template("browse.html.j2")
        for cluster in np.flatnonzero(sizes).tolist():
            rows = order[starts[cluster] : starts[cluster + 1]]
            for file, text in _cluster_pages(one, images, named, cluster, rows):
                files.write_bytes(text.encode(), folder, file)
    listed = [(k, named[k], int(sizes[k])) for k in np.argsort(-sizes, kind="stable") if sizes[k]]
    lost = int((images.size == 0).sum())
    title = f"All {len(order):,} images"
    about = {"title": title, "clusters": listed, "lost": lost, "images": None}
    files.write_bytes(template("browse.html.j2").render(about).encode(), folder, PAGE)


def _is_whole(files: RunDirectory, folder: str) -> bool:
    """Whether all pages are there, with a picture of every image: those that were gone may be back.
    The file that says so is written last."""
    return files.exists(FOLDER, folder, PAGE) and WHOLE in files.read_bytes(FOLDER, folder, PAGE)


def clean(files: RunDirectory, pages: Pages | None) -> None:
    """Remove the folders of other clusters, and half-written ones."""
    for name in files.folders(FOLDER):
        if NAME.fullmatch(name) and (pages is None or name != pages.folder):
            files.delete(f"{FOLDER}/{name}")


def _folder(facts: RunFacts) -> str:
    """Named after what the pages show."""
    named = [facts.cluster_name(k) for k in range(facts.num_clusters)]
    shown = ("index", "consensus")
    inputs = {name: done.id for name, done in facts.manifests.items() if name in shown}
    return f"browse-{fingerprint('browse', {'names': named, 'side': SIDE}, inputs)}"


def _cluster_pages(
    page: jinja2.Template, images: _Spool, named: list[str], cluster: int, rows: np.ndarray
) -> Iterator[tuple[str, str]]:
    """Name and text of each page of a cluster. rows: its images in their order."""
    facts = images.facts
    count = -(-len(rows) // PER_PAGE)
    for number in range(count):
        some = rows[number * PER_PAGE : (number + 1) * PER_PAGE]
        places = places_of(facts, some)
        shown = [
            {
                "row": int(row),
                "src": images.source(int(row)),
                "rest": place["uri"][len(facts.root) :],
                "confidence": float(facts.confidence[row]),
                "second": _second(facts, named, int(row)),
            }
            for row, place in zip(some, places, strict=True)
        ]
        about: dict[str, Any] = {
            "title": named[cluster],
            "cluster": cluster,
            "size": len(rows),
            "number": number + 1,
            "count": count,
            "root": facts.root,
            "images": shown,
        }
        yield f"{cluster}-{number + 1}.html", page.render(about)


def _second(facts: RunFacts, named: list[str], row: int) -> str:
    code = -1 if facts.second is None else int(facts.second[row])
    return named[code] if code >= 0 else ""


class _Spool:
    """Thumbnails on this node's disk, in the order in which they were read."""

    _file: IO[bytes]  # while it is opened

    def __init__(self, facts: RunFacts, files: RunDirectory) -> None:
        self.facts, self.files = facts, files
        self.start = np.zeros(len(facts.clusters), np.int64)
        self.size = np.zeros(len(facts.clusters), np.int32)  # 0: none
        self._end = 0

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Meanwhile there is a file. Raises StageError: a full disk."""
        path = self.files.node_file("browse")
        with self.files.writing(path), tempfile.TemporaryFile(dir=path.parent) as self._file:
            yield

    def fill(self, on_images: Callable[[int], object]) -> None:
        """Read all images; for those that are gone, take what earlier pages hold."""
        facts, lost = self.facts, {}
        for start in range(0, len(self.start), READ):
            rows = np.arange(start, min(start + READ, len(self.start)))
            places = places_of(facts, rows)
            sources = thumbnails(facts.config, places, SIDE, facts.levels, whole=True)
            for row, place, source in zip(rows.tolist(), places, sources, strict=True):
                if source is None:
                    lost[place["uri"]] = row
                else:
                    self._add(row, source)
            on_images(int(rows[-1]) + 1)
        for page in _earlier(self.files) if lost else ():
            for uri, source in earlier.thumbnails(page).items():
                if (row := lost.pop(uri, None)) is not None:
                    self._add(row, source)

    def _add(self, row: int, source: str) -> None:
        data = source.encode()
        self.start[row], self.size[row] = self._end, len(data)
        self._end += self._file.write(data)

    def source(self, row: int) -> str | None:
        """The thumbnail of an image as a data URI; None where there is none."""
        if not self.size[row]:
            return None
        self._file.seek(int(self.start[row]))
        return self._file.read(int(self.size[row])).decode()


def _earlier(files: RunDirectory) -> Iterator[str]:
    """Texts of the pages that hold thumbnails: large ones of earlier folders, then the report."""
    both = {run.address(FOLDER): run for run in (files, RunDirectory(files.uri))}
    for run in both.values():
        for folder in filter(NAME.fullmatch, run.folders(FOLDER)):
            for name in run.list(f"{FOLDER}/{folder}", ".html"):
                yield run.read_bytes(FOLDER, folder, name).decode(errors="replace")
    for run in both.values():
        if run.exists(FOLDER, PAGE):
            yield run.read_bytes(FOLDER, PAGE).decode(errors="replace")
