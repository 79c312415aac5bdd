"""One self-contained HTML page about a run: what was found, how good it is, what it cost.

Reads every other stage's artifacts and the images of the galleries; writes report/index.html, which
loads nothing from anywhere (styles, script, charts and thumbnails are inside) and stays below
report.max_megabytes.
Shapes: N rows, C classes, K clusters, H heads.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from icce_ray import charts, storage
from icce_ray import config as configs
from icce_ray.artifacts import Manifest, RunDirectory
from icce_ray.cluster import Cluster
from icce_ray.config import Config
from icce_ray.core import metrics
from icce_ray.errors import ArtifactError
from icce_ray.progress import duration
from icce_ray.stages import Context, Need, Outcome, Size, Stage, evaluate

FOLDER = "report"
PAGE = "index.html"
# Folder and plain name of what the page tells about, in the order of the chain.
PARTS = (
    ("index", "Listing images"),
    ("embeddings", "Embedding"),
    ("neighbors", "Neighbors"),
    ("heads", "Training heads"),
    ("consensus", "Consensus"),
    ("classifier", "Classifier"),
    ("evaluation", "Evaluation"),
)
SMALL = 40  # clusters or classes up to which the page shows everything open
SIDE_MIN = 44  # pixels; smaller thumbnails show nothing
PER_CLUSTER = 1_600  # bytes of markup around a cluster's images, generously
FIXED = 350_000  # bytes of the page without any cluster
PER_IMAGE = 190  # bytes of markup around a thumbnail, generously
QUALITY = 72  # of the thumbnails
READ = 512  # images whose encoded bytes are in memory at once


def settings(config: Config) -> dict[str, Any]:
    """The slice of the config that the page depends on."""
    return {**evaluate.settings(config), "report": configs.settings(config.report)}


def estimate(config: Config, size: Size, cluster: Cluster) -> Need:
    """Columns of a few bytes per image, the page twice (pieces and text)."""
    page = config.report.max_megabytes * 1e6
    return Need(memory=120.0 * (size.images or 0) + 3 * page, disk=page)


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


def render(config: Config, files: RunDirectory) -> tuple[bytes, int]:
    """The page, and how many thumbnails it holds."""
    found = load(config, files)
    template = _template()
    content = _content(found)
    limit = config.report.max_megabytes * 10**6
    content["listed"] = listed = _listed(found, limit)
    galleries = Galleries(found, listed, limit - FIXED - PER_CLUSTER * len(listed))
    galleries.fill()
    while True:
        cards = [_card(found, galleries, k) for k in listed]
        page = template.render(**content, clusters=cards, side=galleries.side).encode()
        if len(page) <= limit or not galleries.drop():
            return page, galleries.count


def _listed(found: Run, limit: int) -> list[int]:
    """Clusters the page lists, largest first: all, unless their list alone would fill the page."""
    order = np.argsort(-np.array(found.table["size"]), kind="stable")
    return order[: max(1, int(0.8 * limit / PER_CLUSTER))].tolist()


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icce_ray", "templates"),
        autoescape=True,  # file and class names are not ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "n": _count,
        "pct": _percent,
        "duration": duration,
    }
    return environment.get_template("report.html.j2")


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


# --- what the run directory says -----------------------------------------------------------------


@dataclass
class Run:
    """Everything the page is made from, in the row order of the embeddings."""

    config: Config
    files: RunDirectory
    manifests: dict[str, Manifest]  # by folder
    scores: dict[str, Any]  # metrics.json
    image_ids: np.ndarray  # int64 [N]
    clusters: np.ndarray  # int32 [N]
    confidence: np.ndarray  # float32 [N]
    table: dict[str, list[Any]]  # clusters.parquet, by column
    truth: evaluate.Truth | None
    contingency: np.ndarray | None = None  # int64 [C, K]
    index: pa.Table | None = None
    names: list[str] = field(default_factory=list)  # of the classes

    @property
    def num_clusters(self) -> int:
        return len(self.table["cluster"])

    def class_name(self, code: int | None) -> str:
        return "" if code is None or code < 0 else self.names[code]

    def cluster_name(self, cluster: int) -> str:
        """A cluster's matched class, else its number."""
        return self.class_name(self.table["matched"][cluster]) or f"cluster {cluster}"


def load(config: Config, files: RunDirectory) -> Run:
    """Read what the page needs. Raises ArtifactError where a stage has not finished."""
    manifests = {name: done for name, _ in PARTS if (done := files.manifest(name))}
    if "evaluation" not in manifests:
        raise ArtifactError(f"{files.path('evaluation')} is not finished; run that stage first")
    image_ids = np.asarray(files.matrix("embeddings", "image_id"))
    rows = len(image_ids)
    found = Run(
        config=config,
        files=files,
        manifests=manifests,
        scores=files.read_json("evaluation", "metrics.json"),
        image_ids=image_ids,
        clusters=np.asarray(evaluate.column(files, "consensus", "cluster", rows)),
        confidence=np.asarray(evaluate.column(files, "consensus", "confidence", rows)),
        table=files.read_table("evaluation", "clusters.parquet").to_pydict(),
        truth=None,
    )
    if "acc" in found.scores:
        found.truth = evaluate.truth(config, files, image_ids)
        found.names = files.read_json("evaluation", "classes.json")["names"]
        found.contingency = _contingency(found)
    if "index" in manifests and files.list("index", ".parquet"):
        found.index = files.read_table("index", columns=["uri", "offset", "size"])
    return found


def _contingency(found: Run) -> np.ndarray:
    cells = found.files.read_table("evaluation", "contingency.parquet")
    out = np.zeros((len(found.names), found.num_clusters), dtype=np.int64)
    out[cells["class"].to_numpy(), cells["cluster"].to_numpy()] = cells["count"].to_numpy()
    return out


# --- galleries -----------------------------------------------------------------------------------


def choose(
    clusters: np.ndarray, confidence: np.ndarray, num_clusters: int, sure: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of each cluster's `sure` surest images, and half as many of its least sure, worst first.

    clusters: int [N]. confidence: float [N]. Ties are broken at random, not by file name; no row is
    in both.
    """
    ties = np.random.default_rng(seed).random(len(clusters))
    order = np.lexsort((ties, -confidence, clusters))
    bounds = np.searchsorted(clusters[order], np.arange(num_clusters + 1))
    picks = []
    for start, stop in itertools.pairwise(bounds):
        rows = order[start:stop]
        rest = rows[sure:]
        picks.append((rows[:sure], rest[len(rest) - min(len(rest), sure // 2) :][::-1]))
    return picks


@dataclass
class Galleries:
    """Thumbnails, given out rank by rank over all clusters until the page's budget is spent.

    So every cluster shows equally many, whatever the number of clusters.
    """

    found: Run
    listed: Sequence[int]  # clusters
    budget: float  # bytes
    images: dict[int, dict[str, Any]] = field(default_factory=dict)  # shown ones, by row
    ranks: list[np.ndarray] = field(default_factory=list)  # rows shown, one array per rank
    side: int = 0

    def __post_init__(self) -> None:
        report, found = self.found.config.report, self.found
        self.side = report.thumbnail
        picks = choose(
            found.clusters,
            found.confidence,
            found.num_clusters,
            report.images_per_cluster,
            found.config.seed,
        )
        self.picks = {cluster: picks[cluster] for cluster in self.listed}

    @property
    def count(self) -> int:
        return sum(image["src"] is not None for image in self.images.values())

    def fill(self) -> None:
        """Read, shrink and add images while they fit."""
        waiting = self._expected(list(self._by_rank()))
        if not waiting:
            return
        made = self._read(np.sort(np.concatenate(waiting)))
        for rows in waiting:
            batch = {int(row): made[int(row)] for row in rows}
            cost = sum(_weight(image) for image in batch.values())
            if cost > self.budget:
                return
            self.budget -= cost
            self.images |= batch
            self.ranks.append(rows)

    def drop(self) -> bool:
        """Give up the last rank. False where there is none left."""
        if not self.ranks:
            return False
        for row in self.ranks.pop():
            del self.images[int(row)]
        return True

    def of(self, cluster: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Shown images of a cluster: surest, least sure."""
        sure, unsure = (
            [self.images[int(row)] for row in rows if int(row) in self.images]
            for rows in self.picks[cluster]
        )
        return sure, unsure

    def _by_rank(self) -> Iterator[np.ndarray]:
        """The first image of all clusters, then the second, ...: two sure ones, one unsure one."""
        most = self.found.config.report.images_per_cluster
        for rank in range(most):
            turns = [(0, rank)] + ([(1, rank // 2)] if rank % 2 else [])
            for kind, place in turns:
                rows = [
                    pick[kind][place] for pick in self.picks.values() if len(pick[kind]) > place
                ]
                if rows:
                    yield np.array(rows)

    def _expected(self, waiting: list[np.ndarray]) -> list[np.ndarray]:
        """The ranks that should fit, judged by a sample; with smaller thumbnails where full ones
        would leave fewer than 9 per cluster."""
        if not waiting or self.budget <= 0:
            return []
        sample = waiting[0][:: max(1, len(waiting[0]) // 32)]
        each = float(np.mean([_weight(image) for image in self._read(np.sort(sample)).values()]))
        share = self.budget / (each * sum(len(rows) for rows in waiting[:9]))
        full = self.side
        self.side = int(np.clip(full * min(1.0, share**0.7), min(SIDE_MIN, full), full))
        each *= (self.side / full) ** 1.3
        total = np.cumsum([len(rows) for rows in waiting])
        return waiting[: int(np.searchsorted(total, 1.15 * self.budget / each, side="right"))]

    def _read(self, rows: np.ndarray) -> dict[int, dict[str, Any]]:
        """Thumbnails of these rows. In ascending order, so that a tar or a Parquet row group, which
        holds neighboring images, is read once."""
        made: dict[int, dict[str, Any]] = {}
        for start in range(0, len(rows), READ):
            part = rows[start : start + READ]
            places = self._places(self.found.image_ids[part])
            sources = thumbnails(self.found.config, places, self.side)
            for row, place, source in zip(part, places, sources, strict=True):
                made[int(row)] = self._image(int(row), place, source)
        return made

    def _places(self, image_ids: np.ndarray) -> list[dict[str, Any]]:
        """Where images are: uri, offset, size."""
        if self.found.index is None:
            return [{"uri": f"row {i}", "offset": None, "size": None} for i in image_ids]
        return self.found.index.take(pa.array(image_ids)).to_pylist()

    def _image(self, row: int, place: dict[str, Any], source: str | None) -> dict[str, Any]:
        found = self.found
        code = int(found.truth.codes[row]) if found.truth else -1
        label = found.class_name(code)
        expected = found.table["matched"][int(found.clusters[row])]
        return {
            "src": source,
            "name": _tail(place["uri"]),
            "confidence": float(found.confidence[row]),
            "label": label,
            "wrong": code >= 0 and code != expected,
        }


def _weight(image: dict[str, Any]) -> int:
    """Bytes an image takes in the page: its name appears twice, and may grow when escaped."""
    return PER_IMAGE + len(image["src"] or "") + 2 * len(image["name"]) + 2 * len(image["label"])


def _tail(uri: str, length: int = 60) -> str:
    """The end of an address: what tells one image from another."""
    short = "/".join(str(uri).rsplit("/", 2)[-2:])
    return short if len(short) <= length else "…" + short[-length:]


def thumbnails(config: Config, places: Sequence[dict[str, Any]], side: int) -> list[str | None]:
    """Square thumbnails as data URIs; None where there is no image, or it cannot be read.

    A moved or deleted image must not cost the report: its name stands in its place.
    """
    if config.data.embeddings:
        return [None] * len(places)
    from icce_ray import images

    data = images.read_many(
        *([place[key] for place in places] for key in ("uri", "offset", "size"))
    )
    shrink = partial(_thumbnail, side=side, max_pixels=config.embed.max_pixels)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(shrink, data))


def _thumbnail(data: Any, side: int, max_pixels: int) -> str | None:
    from icce_ray import images

    if not isinstance(data, bytes):
        return None
    try:
        return data_uri(images.decode(data, max_pixels), side)
    except images.BadImage:
        return None


def data_uri(picture: Any, side: int) -> str:
    """A PIL image cut to its central square, at most `side` pixels, as WebP (or JPEG) text."""
    from PIL import ImageOps, features

    side = min(side, *picture.size)  # a smaller image is scaled up by the browser
    small = ImageOps.fit(picture.convert("RGB"), (side, side))
    kind = "webp" if features.check("webp") else "jpeg"
    stream = io.BytesIO()
    small.save(stream, kind, quality=QUALITY)
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()


# --- the clusters --------------------------------------------------------------------------------


def _card(found: Run, galleries: Galleries, cluster: int) -> dict[str, Any]:
    """What the page says of one cluster."""
    row = {name: values[cluster] for name, values in found.table.items()}
    sure, unsure = galleries.of(cluster)
    mix = _mix(found, cluster)
    matched, majority = found.class_name(row["matched"]), found.class_name(row["majority"])
    return {
        "id": cluster,
        "name": matched or f"Cluster {cluster}",
        "named": bool(matched),
        "size": row["size"],
        "share": row["size"] / max(1, len(found.clusters)),
        "confidence": row["confidence"],
        "purity": row["purity"],
        "majority": majority if majority != matched else "",
        "mix": mix,
        "sure": sure,
        "unsure": unsure,
        "search": " ".join([str(cluster), matched, *(m["name"] for m in mix)]).lower(),
    }


def _mix(found: Run, cluster: int, most: int = 5) -> list[dict[str, Any]]:
    """The most frequent classes of a cluster."""
    if found.contingency is None:
        return []
    column = found.contingency[:, cluster]
    total = max(1, int(column.sum()))
    order = np.argsort(-column, kind="stable")[:most]
    return [
        {"name": found.class_name(int(code)), "share": column[code] / total}
        for code in order
        if column[code] / total >= 0.01
    ]


# --- the rest of the page ------------------------------------------------------------------------


def _content(found: Run) -> dict[str, Any]:
    """All variables of the template but the clusters."""
    rows = _stage_rows(found)
    return {
        "title": f"{found.config.num_classes:,} clusters in {len(found.clusters):,} images",
        "run": storage.split_options(found.files.uri)[0].rstrip("/").rsplit("/", 1)[-1],
        "uri": found.files.uri,
        "source": found.config.data.path or found.config.data.embeddings,
        "backbones": [] if found.config.data.embeddings else _backbones(found.config),
        "finished": found.manifests["evaluation"].finished[:16].replace("T", " "),
        "images": len(found.clusters),
        "scores": found.scores,
        "free": found.scores["label_free"],
        "methods": _methods(found.scores),
        "small": found.num_clusters <= SMALL,
        "labeled": found.contingency is not None,
        "notes": _notes(found),
        "charts": _charts(found),
        "confusion": _confusion(found),
        "stages": rows,
        "seconds": sum(row["seconds"] for row in rows),
        "price": found.config.report.cost_per_hour,
        "cost": _sum(row["cost"] for row in rows),
        "events": [(row["name"], text) for row in rows for text in row["events"]],
        "quarantine": _quarantine(found),
        "versions": _versions(found),
        "settings": configs.to_yaml(found.config),
    }


def _backbones(config: Config) -> list[str]:
    return [b.name if b.pretrained else f"{b.name} (random weights)" for b in config.backbone]


def _sum(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _methods(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Accuracies side by side, the consensus first."""
    if "acc" not in scores:
        return []
    heads = scores["heads"]
    bars = [{"name": "Consensus", "value": scores["acc"], "kind": "main"}]
    if "classifier" in scores:
        bars.append({"name": "Classifier", "value": scores["classifier"]["acc"], "kind": "main"})
    bars.append({"name": "Single heads, mean", "value": heads["acc_mean"], "kind": ""})
    if "kmeans" in scores:
        value = scores["kmeans"]["acc"]
        bars.append({"name": "k-means, same features", "value": value, "kind": "base"})
    return bars


def _notes(found: Run) -> list[tuple[str, str]]:
    """What deserves a look before the result is used: (kind, text), worst first."""
    scores, sizes = found.scores, found.scores["label_free"]["sizes"]
    notes: list[tuple[str, str]] = []
    if "kmeans" in scores and scores["acc"] < scores["kmeans"]["acc"]:
        behind = 100 * (scores["kmeans"]["acc"] - scores["acc"])
        text = f"k-means on the same features is {behind:.1f} points more accurate."
        notes.append(("bad", text))
    if sizes["empty"]:
        notes.append(("bad", f"{sizes['empty']:,} of {found.num_clusters:,} clusters are empty."))
    usual = scores["label_free"]["confidence"]
    unsure = sum(value is not None and value < usual / 2 for value in found.table["confidence"])
    if unsure:
        text = f"{unsure:,} clusters are less than half as sure as usual: sort by confidence."
        notes.append(("warn", text))
    notes += _mixed(found)
    if sizes["ratio"] > 20:
        notes.append(
            (
                "warn",
                f"The largest cluster ({sizes['largest']:,} images) is {sizes['ratio']:,.0f} times "
                f"the smallest ({sizes['smallest']:,}).",
            )
        )
    lost = _quarantine(found)["count"]
    if lost:
        notes.append(("warn", f"{lost:,} images could not be read and are left out."))
    events = sum(len(manifest.events) for manifest in found.manifests.values())
    if events:
        what = "1 event" if events == 1 else f"{events:,} events"
        notes.append(("info", f"{what} while it ran (lost workers, resumed stages): see below."))
    return notes


def _mixed(found: Run, most: int = 3) -> list[tuple[str, str]]:
    """Clusters that join two classes, the largest first."""
    if found.contingency is None or len(found.names) < 2:
        return []
    table = found.contingency
    second = np.sort(table, axis=0)[-2]
    mixed = np.flatnonzero(second > 0.3 * np.maximum(1, table.sum(axis=0)))
    notes = []
    for cluster in mixed[np.argsort(-second[mixed], kind="stable")][:most]:
        names = [found.class_name(int(c)) for c in np.argsort(-table[:, cluster])[:2]]
        notes.append(("warn", f"Cluster {cluster} joins two classes: {names[0]} and {names[1]}."))
    if len(mixed) > most:
        notes.append(("warn", f"{len(mixed) - most:,} more clusters join two classes."))
    return notes


# charts


def _charts(found: Run) -> list[dict[str, Any]]:
    """Title, drawing and a sentence for each chart."""
    made = [_size_chart(found), _confidence_chart(found)]
    if "calibration" in found.scores:
        made.append(_reliability_chart(found))
    if "acc" in found.scores:
        made.append(_heads_chart(found))
    made += [chart for chart in (_neighbor_chart(found), *_history_charts(found)) if chart]
    return made


def _chart(title: str, drawing: Any, text: str) -> dict[str, Any]:
    return {"title": title, "drawing": drawing, "text": text}


def _size_chart(found: Run) -> dict[str, Any]:
    info = found.scores["label_free"]["sizes"]
    text = (
        f"From {info['smallest']:,} to {info['largest']:,} images; evenness {info['entropy']:.3f} "
        "(entropy of the sizes, 1 = all equal)."
    )
    sizes = np.array(found.table["size"])
    return _chart("Cluster sizes", charts.sorted_sizes(sizes, f"Cluster sizes. {text}"), text)


def _confidence_chart(found: Run) -> dict[str, Any]:
    counts, edges = np.histogram(np.clip(found.confidence, 0, 1), bins=20, range=(0, 1))
    free = found.scores["label_free"]
    text = (
        f"{free['confident']:.0%} of the images are at 90% or more; mean {free['confidence']:.0%}."
    )
    drawing = charts.histogram(
        counts,
        edges,
        label=f"Histogram of confidence. {text}",
        x_title="consensus confidence",
        unit="images",
        x_format=charts.percent,
    )
    return _chart("Confidence", drawing, text)


def _reliability_chart(found: Run) -> dict[str, Any]:
    data = found.scores["calibration"]
    text = (
        "Dots on the dashed line: confidence means what it says. "
        f"Mean gap {100 * data['error']:.1f} points."
    )
    if data["ranking"] is not None:
        text += f" A right image is surer than a wrong one in {data['ranking']:.0%} of such pairs."
    drawing = charts.reliability(
        data["confidence"], data["accuracy"], data["rows"], f"Accuracy by confidence. {text}"
    )
    return _chart("Is the confidence right?", drawing, text)


def _heads_chart(found: Run) -> dict[str, Any]:
    scores = found.scores
    lines = [("consensus", scores["acc"], "main")]
    if "kmeans" in scores:
        lines.append(("k-means", scores["kmeans"]["acc"], "base"))
    agreement = scores["label_free"]["head_agreement"]
    heads = scores["heads"]
    text = (
        f"Single heads {heads['acc_min']:.1%} to {heads['acc_best']:.1%}; "
        f"they agree with a mean NMI of {agreement:.2f}."
    )
    drawing = charts.heads(heads["acc"], lines, f"Accuracy of each head. {text}")
    return _chart("Accuracy of each head", drawing, text)


def _neighbor_chart(found: Run) -> dict[str, Any] | None:
    manifest = found.manifests.get("neighbors")
    data = dict(manifest.results) if manifest else {}
    if "histogram" not in data:
        return None
    consistency = found.scores["label_free"]["neighbor_consistency"]
    text = f"Mean {data['mean']:.0f} per image; {consistency:.0%} of them share its cluster."
    if data.get("threshold") is not None:
        text = f"Cosine of {data['threshold']:.3f} or more. " + text
    drawing = charts.histogram(
        np.array(data["histogram"]["counts"]),
        np.array(data["histogram"]["edges"]),
        label=f"Neighbors per image. {text}",
        x_title="neighbors kept per image",
        unit="images",
        x_whole=True,
    )
    return _chart("Neighbors", drawing, text)


def _history_charts(found: Run) -> list[dict[str, Any]]:
    if not found.files.exists("heads", "history.json"):
        return []
    history = found.files.read_json("heads", "history.json")
    loss = np.array(history["loss"], dtype=float)
    if loss.ndim != 2 or not loss.size:
        return []
    first, last = loss.mean(axis=1)[[0, -1]]
    text = f"Bold: mean of {loss.shape[1]} heads, from {first:.3g} to {last:.3g}."
    drawing = charts.curves(history["step"], loss, label=f"Training loss. {text}")
    made = [_chart("Training loss", drawing, text)]
    if history.get("lr"):
        rate = np.array(history["lr"], dtype=float)[:, None]
        text = f"Peak {rate.max():.2g}."
        drawing = charts.curves(history["step"], rate, label=f"Learning rate. {text}")
        made.append(_chart("Learning rate", drawing, text))
    return made


# against the labels


def _confusion(found: Run) -> dict[str, Any] | None:
    """Heat map (few classes) or image (many), confused pairs, hardest classes."""
    if found.contingency is None:
        return None
    match = metrics.match(found.contingency)
    cells = match.confusion / np.maximum(1, match.confusion.sum(axis=1, keepdims=True))
    fits = len(found.names) <= SMALL and found.num_clusters <= 1.5 * SMALL
    columns = [(int(k), found.cluster_name(int(k))) for k in match.order]
    return {
        "table": [(n, r.tolist()) for n, r in zip(found.names, cells, strict=True)] if fits else [],
        "columns": columns if fits else [],
        "numbers": fits and found.num_clusters <= 20,
        "image": "" if fits else charts.heat_image(match.confusion),
        "pairs": _pairs(found, match),
        "hardest": _hardest(found, match),
    }


def _pairs(found: Run, match: metrics.Matching, most: int = 12) -> list[dict[str, Any]]:
    """The cells that cost most images: class, where they went, count, share of the class."""
    wrong = found.contingency.copy() if found.contingency is not None else np.zeros((0, 0))
    per_class = np.maximum(1, wrong.sum(axis=1))
    own = np.flatnonzero(match.cluster_class >= 0)
    wrong[match.cluster_class[own], own] = 0
    cells = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = zip(*np.unravel_index(cells, wrong.shape), strict=True)
    return [
        {
            "true": found.class_name(int(code)),
            "found": found.cluster_name(int(cluster)),
            "cluster": int(cluster),
            "count": int(wrong[code, cluster]),
            "share": float(wrong[code, cluster] / per_class[code]),
        }
        for code, cluster in places
        if wrong[code, cluster] > 0
    ]


def _hardest(found: Run, match: metrics.Matching, most: int = 12) -> list[dict[str, Any]]:
    """Classes whose images are found least often."""
    assert found.contingency is not None
    table = found.contingency
    right = np.zeros(len(found.names), dtype=np.int64)
    own = np.flatnonzero(match.cluster_class >= 0)
    right[match.cluster_class[own]] = table[match.cluster_class[own], own]
    total = table.sum(axis=1)
    recall = np.where(total > 0, right / np.maximum(1, total), 2.0)
    order = np.argsort(recall, kind="stable")[:most]
    return [
        {"name": found.class_name(int(c)), "recall": float(recall[c]), "count": int(total[c])}
        for c in order
        if recall[c] < 1
    ]


# how it was made


def _stage_rows(found: Run) -> list[dict[str, Any]]:
    price = found.config.report.cost_per_hour
    rows = []
    for folder, name in PARTS:
        manifest = found.manifests.get(folder)
        if manifest is None:
            continue
        rows.append(
            {
                "name": name,
                "seconds": manifest.seconds,
                "rows": manifest.rows,
                "machines": _machines(manifest.resources),
                "cost": None if price is None else manifest.seconds / 3600 * price,
                "finished": manifest.finished[:16].replace("T", " "),
                "events": list(manifest.events),
            }
        )
    return rows


def _machines(resources: Any) -> str:
    names = {"nodes": "node", "cpus": "CPU", "gpus": "GPU"}
    parts = [
        f"{resources[key]:g} {name}{'' if resources[key] == 1 else 's'}"
        for key, name in names.items()
        if resources.get(key)
    ]
    return ", ".join(parts)


def _quarantine(found: Run) -> dict[str, Any]:
    """Images that could not be read: how many, why, and some of them."""
    names = [n for n in found.files.list("embeddings", ".parquet") if n.startswith("quarantine")]
    if not names:
        return {"count": 0, "reasons": [], "examples": []}
    table = pa.concat_tables([found.files.read_table("embeddings", name) for name in names])
    counted = pc.value_counts(table["reason"]).to_pylist()
    counted.sort(key=lambda entry: -entry["counts"])
    examples = table.slice(0, 20).to_pylist()
    return {
        "count": table.num_rows,
        "reasons": [(entry["values"], entry["counts"]) for entry in counted[:10]],
        "examples": [(_tail(row["uri"]), row["reason"]) for row in examples],
    }


def _versions(found: Run) -> list[tuple[str, str]]:
    """Library versions; several where stages ran with different ones."""
    seen: dict[str, list[str]] = {}
    for manifest in found.manifests.values():
        for name, version in manifest.versions.items():
            if version not in seen.setdefault(name, []):
                seen[name].append(version)
    return [(name, ", ".join(versions)) for name, versions in seen.items()]


STAGE = Stage(
    name="report",
    folder=FOLDER,
    needs=("index", "embed", "neighbors", "heads", "consensus", "classifier", "evaluate"),
    settings=settings,
    run=run,
    estimate=estimate,
)
