"""TODO"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.core.evaluation import truth as metrics
from icce_ray.report import charts
from icce_ray.report.facts import PARTS, RunFacts, read_facts
from icce_ray.report.galleries import Galleries, _tail
from icce_ray.rundir import storage
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import duration

SMALL = 40  # clusters or classes up to which the page shows everything open


PER_CLUSTER = 1_600  # bytes of markup around a cluster's images, generously


FIXED = 350_000  # bytes of the page without any cluster


def render(config: Config, files: RunDirectory) -> tuple[bytes, int]:
    """The page, and how many thumbnails it holds."""
    found = read_facts(config, files)
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


def _listed(found: RunFacts, limit: int) -> list[int]:
    """Clusters the page lists, largest first: all, unless their list alone would fill the page."""
    order = np.argsort(-np.array(found.table["size"]), kind="stable")
    return order[: max(1, int(0.8 * limit / PER_CLUSTER))].tolist()


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icce_ray.report", "templates"),
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


def _card(found: RunFacts, galleries: Galleries, cluster: int) -> dict[str, Any]:
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


def _mix(found: RunFacts, cluster: int, most: int = 5) -> list[dict[str, Any]]:
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


def _content(found: RunFacts) -> dict[str, Any]:
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


def _notes(found: RunFacts) -> list[tuple[str, str]]:
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


def _mixed(found: RunFacts, most: int = 3) -> list[tuple[str, str]]:
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


def _charts(found: RunFacts) -> list[dict[str, Any]]:
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


def _size_chart(found: RunFacts) -> dict[str, Any]:
    info = found.scores["label_free"]["sizes"]
    text = (
        f"From {info['smallest']:,} to {info['largest']:,} images; evenness {info['entropy']:.3f} "
        "(entropy of the sizes, 1 = all equal)."
    )
    sizes = np.array(found.table["size"])
    return _chart("Cluster sizes", charts.sorted_sizes(sizes, f"Cluster sizes. {text}"), text)


def _confidence_chart(found: RunFacts) -> dict[str, Any]:
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


def _reliability_chart(found: RunFacts) -> dict[str, Any]:
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


def _heads_chart(found: RunFacts) -> dict[str, Any]:
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


def _neighbor_chart(found: RunFacts) -> dict[str, Any] | None:
    manifest = found.manifests.get("selection")
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


def _history_charts(found: RunFacts) -> list[dict[str, Any]]:
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


def _confusion(found: RunFacts) -> dict[str, Any] | None:
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


def _pairs(found: RunFacts, match: metrics.Matching, most: int = 12) -> list[dict[str, Any]]:
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


def _hardest(found: RunFacts, match: metrics.Matching, most: int = 12) -> list[dict[str, Any]]:
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


def _stage_rows(found: RunFacts) -> list[dict[str, Any]]:
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


def _quarantine(found: RunFacts) -> dict[str, Any]:
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


def _versions(found: RunFacts) -> list[tuple[str, str]]:
    """Library versions; several where stages ran with different ones."""
    seen: dict[str, list[str]] = {}
    for manifest in found.manifests.values():
        for name, version in manifest.versions.items():
            if version not in seen.setdefault(name, []):
                seen[name].append(version)
    return [(name, ", ".join(versions)) for name, versions in seen.items()]
