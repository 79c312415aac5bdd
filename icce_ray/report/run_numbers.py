"""The numbers and sentences on the page of a run, prepared from its facts. Nothing is drawn here.

Shapes: C classes, K clusters.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from icce_ray.config.schema import Config
from icce_ray.core.evaluation.truth import Matching
from icce_ray.report.facts import PARTS, RunFacts
from icce_ray.report.pages import tail

MIXED = 0.3  # share of its second class from which a cluster joins two classes
UNEVEN = 20  # largest over smallest cluster from which the page warns


def backbones(config: Config) -> list[str]:
    """Names of the backbones; none where the embeddings were given."""
    if config.data.embeddings:
        return []
    return [b.name if b.pretrained else f"{b.name} (random weights)" for b in config.backbone]


def methods(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracies side by side, the consensus first; none without labels."""
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


def words(facts: RunFacts) -> list[tuple[str, str, str]]:
    """The run in words: what was found, how far to trust it, what to do next. (heading, text, a
    command that ends it)"""
    free, sizes = facts.scores["label_free"], facts.scores["label_free"]["sizes"]
    filled = facts.num_clusters - sizes["empty"]
    found = (
        f"{len(facts.clusters):,} images fell into {filled:,} clusters "
        f"of {sizes['smallest']:,} to {sizes['largest']:,} images."
    )
    repeats = 0 if facts.first is None else int((facts.first != np.arange(len(facts.first))).sum())
    if repeats:
        found += f" {repeats:,} of the images repeat another one."
    scores, trust = facts.scores, ""
    if "acc" in scores:
        trust = (
            f"Of the {scores['labeled']:,} images with a label, {scores['acc']:.0%} are in the "
            "cluster that matches their class. "
        )
    trust += (
        f"{free['confident']:.0%} of the images have a confidence of 90% or more; trust these "
        "first. Confidence ranks images. It is not the probability of being right."
    )
    known = [(sure, k) for k, sure in enumerate(facts.table["confidence"]) if sure is not None]
    if len(known) > 1:
        sure, cluster = min(known)
        trust += (
            f" The least sure cluster is {facts.cluster_name(cluster)} (#{cluster}, {sure:.0%})."
        )
    where, kind = shlex.quote(facts.uri), "csv" if facts.config.data.embeddings else "folders"
    if facts.naming.names:
        todo = "Look whether the clusters are what you want; then"
    else:
        todo = "Look at each cluster, name it, and mend what is wrong, under “Change it”; then"
    return [
        ("What was found", found, ""),
        ("How far to trust it", trust, ""),
        ("What to do next", todo, f"icce-ray export {where} --to {kind}"),
    ]


def notes(facts: RunFacts) -> list[tuple[str, str]]:
    """What deserves a look before the result is used: (kind, text), worst first."""
    scores, sizes = facts.scores, facts.scores["label_free"]["sizes"]
    listed: list[tuple[str, str]] = []
    if "kmeans" in scores and scores["acc"] < scores["kmeans"]["acc"]:
        behind = 100 * (scores["kmeans"]["acc"] - scores["acc"])
        text = f"k-means on the same features is {behind:.1f} points more accurate."
        listed.append(("bad", text))
    if sizes["empty"]:
        text = f"{sizes['empty']:,} of {facts.num_clusters:,} clusters are empty."
        listed.append(("bad", text))
    usual = scores["label_free"]["confidence"]
    unsure = sum(value is not None and value < usual / 2 for value in facts.table["confidence"])
    if unsure:
        text = f"{_clusters(unsure)} less than half the mean confidence: sort by confidence."
        listed.append(("warn", text))
    listed += _mixed(facts)
    if sizes["ratio"] > UNEVEN:
        text = (
            f"The largest cluster ({sizes['largest']:,} images) is {sizes['ratio']:,.0f} times "
            f"the smallest ({sizes['smallest']:,})."
        )
        listed.append(("warn", text))
    return listed + _troubles(facts)


def lost(count: int, kept: int) -> str:
    """What to say of shown images whose files are gone; empty where there are none."""
    if not count:
        return ""
    text = (
        "1 image that the report shows can no longer be read: it was"
        if count == 1
        else f"{count:,} images that the report shows can no longer be read: they were"
    )
    text += " moved, deleted or replaced since the run."
    if kept:
        return f"{text} Thumbnails of the earlier report stand for {kept:,} of them."
    return f"{text} Restore them and run icce-ray report again."


def _clusters(number: int) -> str:
    return "1 cluster has" if number == 1 else f"{number:,} clusters have"


def _mixed(facts: RunFacts, most: int = 3) -> list[tuple[str, str]]:
    """Clusters that join two classes, the largest first."""
    if facts.contingency is None or len(facts.names) < 2:
        return []
    table = facts.contingency
    second = np.sort(table, axis=0)[-2]
    mixed = np.flatnonzero(second > MIXED * np.maximum(1, table.sum(axis=0)))
    listed = []
    for cluster in mixed[np.argsort(-second[mixed], kind="stable")][:most]:
        names = [facts.class_name(int(c)) for c in np.argsort(-table[:, cluster])[:2]]
        listed.append(("warn", f"Cluster {cluster} joins two classes: {names[0]} and {names[1]}."))
    rest = len(mixed) - most
    if rest > 0:
        text = "1 more cluster joins" if rest == 1 else f"{rest:,} more clusters join"
        listed.append(("warn", f"{text} two classes."))
    return listed


def _troubles(facts: RunFacts) -> list[tuple[str, str]]:
    """Images and files that were left out, and events while the run worked."""
    listed = []
    lost = quarantine(facts)["count"]
    if lost:
        text = (
            "1 image could not be read and is"
            if lost == 1
            else (f"{lost:,} images could not be read and are")
        )
        listed.append(("warn", f"{text} left out."))
    others = sum(one["count"] for one in left_out(facts))
    if others:
        listed.append(("info", f"The listing left out {others:,} files or folders: see below."))
    events = sum(len(manifest.events) for manifest in facts.manifests.values())
    if events:
        text = "1 event" if events == 1 else f"{events:,} events"
        listed.append(("info", f"{text} during the run (lost workers, resumed stages): see below."))
    return listed


def mix(facts: RunFacts, cluster: int, most: int = 5) -> list[dict[str, Any]]:
    """The most frequent classes of a cluster and their shares of its labeled images."""
    if facts.contingency is None:
        return []
    column = facts.contingency[:, cluster]
    total = max(1, int(column.sum()))
    order = np.argsort(-column, kind="stable")[:most]
    return [
        {"name": facts.class_name(int(code)), "share": column[code] / total}
        for code in order
        if column[code] / total >= 0.01
    ]


def confused(table: np.ndarray, match: Matching, most: int = 12) -> list[tuple[int, int]]:
    """The cells (class, cluster) that cost most images, worst first. table: int [C, K]."""
    wrong = table.copy()
    own = np.flatnonzero(match.cluster_class >= 0)
    wrong[match.cluster_class[own], own] = 0
    cells = np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = zip(*np.unravel_index(cells, wrong.shape), strict=True)
    return [(int(code), int(k)) for code, k in places if wrong[code, k] > 0]


def pairs(facts: RunFacts, table: np.ndarray, match: Matching) -> list[dict[str, Any]]:
    """Rows of "where most images go wrong": class, cluster, images, share of the class."""
    per_class = np.maximum(1, table.sum(axis=1))
    return [
        {
            "true": facts.class_name(code),
            "found": facts.cluster_name(cluster),
            "cluster": cluster,
            "count": int(table[code, cluster]),
            "share": float(table[code, cluster] / per_class[code]),
        }
        for code, cluster in confused(table, match)
    ]


def hardest(
    facts: RunFacts, table: np.ndarray, match: Matching, most: int = 12
) -> list[dict[str, Any]]:
    """Classes with the lowest recall, worst first; perfect ones are left out. table: int [C, K]."""
    right = np.zeros(len(facts.names), dtype=np.int64)
    own = np.flatnonzero(match.cluster_class >= 0)
    right[match.cluster_class[own]] = table[match.cluster_class[own], own]
    total = table.sum(axis=1)
    recall = np.where(total > 0, right / np.maximum(1, total), 2.0)  # 2: no image, never listed
    order = np.argsort(recall, kind="stable")[:most]
    return [
        {"name": facts.class_name(int(c)), "recall": float(recall[c]), "count": int(total[c])}
        for c in order
        if recall[c] < 1
    ]


def stage_rows(facts: RunFacts) -> list[dict[str, Any]]:
    """A row per finished stage: time in seconds, rows, machines, cost, events."""
    price = facts.config.report.cost_per_hour
    return [
        {
            "name": name,
            "seconds": manifest.seconds,
            "rows": manifest.rows,
            "machines": machines(manifest.resources),
            "cost": None if price is None else manifest.seconds / 3600 * price,
            "finished": moment(manifest.finished),
            "events": list(manifest.events),
        }
        for folder, name in PARTS
        if (manifest := facts.manifests.get(folder)) is not None
    ]


def moment(finished: str) -> str:
    """A manifest's time without seconds and zone: 2026-11-24 10:15."""
    return finished[:16].replace("T", " ")


def machines(resources: Mapping[str, Any]) -> str:
    """What a stage ran on: 2 nodes, 8 CPUs, 1 GPU."""
    names = {"nodes": "node", "cpus": "CPU", "gpus": "GPU"}
    parts = [
        f"{resources[key]:g} {name}{'' if resources[key] == 1 else 's'}"
        for key, name in names.items()
        if resources.get(key)
    ]
    return ", ".join(parts)


def quarantine(facts: RunFacts) -> dict[str, Any]:
    """Images that could not be read: how many, the most frequent reasons, and examples."""
    table = facts.quarantine
    if table is None:
        return {"count": 0, "reasons": [], "examples": []}
    counted = pc.value_counts(table["reason"]).to_pylist()
    counted.sort(key=lambda entry: -entry["counts"])
    examples = table.slice(0, 20).to_pylist()
    return {
        "count": table.num_rows,
        "reasons": [(entry["values"], entry["counts"]) for entry in counted[:10]],
        "examples": [(tail(row["uri"]), row["reason"]) for row in examples],
    }


def left_out(facts: RunFacts) -> list[dict[str, Any]]:
    """What the listing did not take: reason, count, example; nothing from earlier versions."""
    index = facts.manifests.get("index")
    return list(index.results.get("left_out", ())) if index else []


def versions(facts: RunFacts) -> list[tuple[str, str]]:
    """Library versions; several where stages ran with different ones."""
    seen: dict[str, list[str]] = {}
    for manifest in facts.manifests.values():
        for name, version in manifest.versions.items():
            if version not in seen.setdefault(name, []):
                seen[name].append(version)
    return [(name, ", ".join(several)) for name, several in seen.items()]
