"""The labels of a run in the form that other tools read: folders, CSV, or their import formats.

    folders         LABEL/NAME, a folder per cluster
    csv             labels.csv, as that of the run
    imagefolder-hf  train/LABEL/NAME and train/metadata.csv, for Hugging Face's datasets
    coco            images/NAME and annotations.json, a box around the whole of each image
    fiftyone        data/NAME and labels.json: FiftyOneImageClassificationDataset
    label-studio    tasks.json with predictions, labels.xml; images stay where they are

Images are links where they are files of this machine, else copies. None of these tools is needed.
Shapes: N images.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
import pyarrow as pa

from icce_ray.core.preprocess import BadImage
from icce_ray.data.formats import IMAGES, suffix_of
from icce_ray.data.places import Names, Place, safe_name
from icce_ray.data.reading import is_row, read_many, tar_of
from icce_ray.errors import ConfigError, DataError, printable
from icce_ray.rundir import curated, storage
from icce_ray.rundir.addresses import is_remote, split_options
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.results import read_labels
from icce_ray.rundir.schemas import as_csv

BLOCK = 512  # images whose bytes are in memory at once
ENDINGS = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}  # of what PIL calls by another name
STUDIO = """<View>
  <Image name="image" value="$image"/>
  <Choices name="cluster" toName="image" choice="single">
{choices}  </Choices>
</View>
"""


@dataclass
class Exported:
    """What an export has made."""

    folder: str
    images: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)  # uri and reason of those left out


@dataclass(frozen=True)
class _Image:
    uri: str
    offset: int | None  # in a tar
    size: int | None
    label: str
    cluster: int
    confidence: float

    @property
    def is_file(self) -> bool:
        """Whether it is a file of this machine, of its own."""
        return self.offset is None and not is_remote(self.uri) and not is_row(self.uri)


def export(
    run_uri: str,
    kind: str,
    out: str | None = None,
    *,
    clusters: Sequence[int] | None = None,
    min_confidence: float = 0.0,
    copy: bool = False,
) -> Exported:
    """Write the labels of a run to a local folder, with their images.

    Args:
        run_uri: a run with a finished answer.
        kind: one of `KINDS`.
        out: default: `exports/KIND` in the run directory. May hold an earlier export of the run.
        clusters: only these. min_confidence: only images as sure. Default: all.
        copy: copy images instead of linking to them.

    Raises:
        ConfigError: an unknown kind, cluster or folder; images of a run that has none.
        ArtifactError: no finished answer, or `out` holds something else.
        DataError: an image is damaged that was none when it was classified.
        StageError: the disk is full, or cannot be written.
    """
    if kind not in KINDS:
        raise ConfigError(f"no export to {kind!r}; there are {', '.join(KINDS)}")
    if not 0 <= min_confidence <= 1:
        raise ConfigError(f"min_confidence={min_confidence:g} must lie between 0 and 1")
    storage.check(run_uri)
    run = curated.current(RunDirectory(run_uri))
    settings, table = run.read_settings(), read_labels(run)
    given = (settings.get("data") or {}).get("embeddings")
    if given and kind != "csv":
        raise ConfigError("this run was made from given embeddings: it has no images, only csv")
    every = _every_label(curated.naming(run), int(settings["num_classes"]))
    chosen = _chosen(table, len(every), clusters, min_confidence)
    if out is None and not run.is_local:
        raise ConfigError("this run is not on this machine: say where to, by out=FOLDER")
    place = Place(out or run.address("exports", kind), run.uri)
    place.clear()
    result = Exported(str(place.folder))
    if kind == "csv":
        _write(place, "labels.csv", as_csv(table.take(pa.array(chosen))))
        result.images = len(chosen)
        return result
    _Export(run, table, every, place, result, copy).write(kind, chosen)
    return result


def _every_label(known: curated.Naming, num_clusters: int) -> list[str]:
    """What each cluster is called: its name where it has one, else its number, [K]. num_clusters:
    of a run that was not curated."""
    names = [*known.names[: known.dropped]] if known.names else [None] * num_clusters
    width = len(str(len(names) - 1))
    return [name or f"{k:0{width}d}" for k, name in enumerate(names)]


def _chosen(
    table: pa.Table, num_clusters: int, clusters: Sequence[int] | None, min_confidence: float
) -> np.ndarray:
    """Rows of the table that are asked for."""
    unknown = [k for k in clusters or () if not 0 <= k < num_clusters]
    if unknown:
        raise ConfigError(f"there is no cluster {unknown[0]}: they go from 0 to {num_clusters - 1}")
    cluster = table["cluster"].to_numpy()
    confidence = table["confidence"].to_numpy()
    keep = np.ones(len(cluster), bool) if clusters is None else np.isin(cluster, list(clusters))
    if min_confidence:
        keep &= confidence >= min_confidence  # False for the NaN of an image without a class
    return np.flatnonzero(keep)


def _write(place: Place, name: str, data: bytes | memoryview) -> None:
    place.announce([name])
    place.write(name, data)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


class _Export:
    """One export of images."""

    def __init__(
        self,
        run: RunDirectory,
        table: pa.Table,
        labels: list[str],
        place: Place,
        result: Exported,
        copy: bool,
    ) -> None:
        index = run.read_table("index", columns=["offset", "size"])
        self.table = table.append_column("offset", index["offset"])
        self.table = self.table.append_column("size", index["size"])
        self.labels, self.place, self.result, self.copy = labels, place, result, copy
        folders = Names()
        self.folders = [folders.give("", safe_name(one.replace("/", "_"))) for one in labels]
        self.names = Names()

    def write(self, kind: str, rows: np.ndarray) -> None:
        """Write the images of these rows, and what the tool wants beside them."""
        readable = self.table["cluster"].to_numpy()[rows] >= 0
        _WRITERS[kind](self, rows[readable])

    # images

    def _images(self, rows: np.ndarray) -> Iterator[list[_Image]]:
        for start in range(0, len(rows), BLOCK):
            part = self.table.take(pa.array(rows[start : start + BLOCK])).to_pylist()
            yield [
                _Image(
                    one["uri"],
                    one["offset"],
                    one["size"],
                    self.labels[one["cluster"]],
                    one["cluster"],
                    round(one["confidence"], 4),
                )
                for one in part
            ]

    def placed(
        self, rows: np.ndarray, folder: Callable[[_Image], str]
    ) -> Iterator[tuple[_Image, str]]:
        """Put images into their folders. Yields each with its name, relative to the export."""
        for block in self._images(rows):
            read = [one for one in block if not one.is_file]
            columns = ([getattr(one, name) for one in read] for name in ("uri", "offset", "size"))
            data = iter(read_many(*columns)) if read else iter(())
            found: list[tuple[_Image, str, bytes | None]] = []
            for one in block:
                content = None if one.is_file else next(data)
                if isinstance(content, BadImage):
                    self.result.missing.append((one.uri, str(content)))
                elif one.is_file and not Path(one.uri).is_file():
                    self.result.missing.append((one.uri, "not found"))
                else:
                    inside = folder(one)
                    name = self.names.give(inside, _file_name(one, content))
                    found.append((one, f"{inside}/{name}", content))
            self.place.announce([name for _, name, _ in found])
            for one, name, content in found:
                self._put(one, name, content)
                yield one, name
            self.result.images += len(found)

    def _put(self, one: _Image, name: str, content: bytes | None) -> None:
        if content is not None:
            self.place.put(name, content)
        elif self.copy:
            self.place.copy(name, one.uri)
        else:
            self.place.link(name, one.uri)

    # formats

    def folders_(self, rows: np.ndarray) -> None:
        for _ in self.placed(rows, lambda one: self.folders[one.cluster]):
            pass

    def imagefolder(self, rows: np.ndarray) -> None:
        made = list(self.placed(rows, lambda one: f"train/{self.folders[one.cluster]}"))
        columns = {
            "file_name": [name.removeprefix("train/") for _, name in made],
            "label": [one.label for one, _ in made],
            "confidence": [one.confidence for one, _ in made],
        }
        _write(self.place, "train/metadata.csv", as_csv(pa.table(columns)))

    def coco(self, rows: np.ndarray) -> None:
        images, annotations = [], []
        for number, (one, name) in enumerate(self.placed(rows, lambda _: "images"), start=1):
            width, height = _size(self.place.folder / name)
            file_name = name.removeprefix("images/")
            images.append({"id": number, "file_name": file_name, "width": width, "height": height})
            annotations.append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": one.cluster + 1,  # some readers keep 0 for the background
                    "bbox": [0, 0, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "score": one.confidence,
                }
            )
        categories = [{"id": k + 1, "name": label} for k, label in enumerate(self.labels)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        _write(self.place, "annotations.json", _json(content))

    def fiftyone(self, rows: np.ndarray) -> None:
        made = self.placed(rows, lambda _: "data")
        labels = {Path(name).stem: one.cluster for one, name in made}
        content = {"classes": self.labels, "labels": labels}
        _write(self.place, "labels.json", _json(content))

    def label_studio(self, rows: np.ndarray) -> None:
        tasks = []
        for one, address in self._addressed(rows):
            choice = {
                "from_name": "cluster",
                "to_name": "image",
                "type": "choices",
                "value": {"choices": [one.label]},
            }
            guess = {"model_version": "icce_ray", "score": one.confidence, "result": [choice]}
            tasks.append({"data": {"image": address}, "predictions": [guess]})
        choices = "".join(f"    <Choice value={quoteattr(label)}/>\n" for label in self.labels)
        _write(self.place, "labels.xml", STUDIO.format(choices=choices).encode())
        _write(self.place, "tasks.json", _json(tasks))

    def _addressed(self, rows: np.ndarray) -> Iterator[tuple[_Image, str]]:
        """Images with the addresses by which Label Studio asks for them. Files of this machine are
        served below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=/; objects by its cloud storage."""
        whole = self.table["offset"].is_null().to_numpy()
        kept = [not (self.copy or is_row(uri)) for uri in self.table["uri"].to_pylist()]
        stay = (whole & kept)[rows]
        for block in self._images(rows[stay]):
            for one in block:
                if is_remote(one.uri):
                    yield one, split_options(one.uri)[0]
                elif Path(one.uri).is_file():
                    yield one, _local_address(Path(one.uri))
                else:
                    self.result.missing.append((one.uri, "not found"))
                    continue
                self.result.images += 1
        for one, name in self.placed(rows[~stay], lambda _: "images"):
            yield one, _local_address(self.place.folder / name)


def _local_address(path: Path) -> str:
    return f"/data/local-files/?d={quote(path.as_posix().lstrip('/'))}"


def _file_name(one: _Image, content: bytes | None) -> str:
    """The name of an image's file in an export."""
    if one.offset is not None:
        name = one.uri[len(tar_of(one.uri)) + 1 :]
    elif is_row(one.uri):
        file, _, row = one.uri.rpartition("#")
        stem = split_options(file)[0].rpartition("/")[2].rpartition(".")[0]
        name = f"{stem}-{row.rpartition('/')[2]}"
    else:
        name = split_options(one.uri)[0]
    name = safe_name(name)
    if content is None or suffix_of(name) in IMAGES:
        return name
    return f"{name}.{_ending(content)}"


def _ending(content: bytes) -> str:
    """The usual ending of encoded bytes' format."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = str(image.format).lower()
    except Exception:  # PIL's readers raise almost anything on damaged input
        return "bin"
    return ENDINGS.get(kind, kind)


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise DataError(f"{printable(str(path))} has changed since the run: {error}") from None


_WRITERS: dict[str, Callable[[_Export, np.ndarray], None]] = {
    "folders": _Export.folders_,
    "fiftyone": _Export.fiftyone,
    "label-studio": _Export.label_studio,
    "imagefolder-hf": _Export.imagefolder,
    "coco": _Export.coco,
}
KINDS = ("folders", "csv", *list(_WRITERS)[1:])
