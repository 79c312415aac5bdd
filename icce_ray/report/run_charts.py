"""The charts on the page of a run: what each one shows, and the sentence below it."""

from __future__ import annotations

from typing import Any

import numpy as np

from icce_ray.core.evaluation import truth
from icce_ray.report import charts, run_numbers
from icce_ray.report.facts import RunFacts

FEW = 40  # classes up to which the confusion matrix is a table, above an image
SHORT = 3  # letters of the longest name up to which column heads stand upright
NUMBERED = 20  # clusters up to which its cells hold numbers


def draw(facts: RunFacts) -> list[dict[str, Any]]:
    """Title, drawing and sentence of each chart that this run has data for."""
    drawn = [_sizes(facts), _confidence(facts)]
    if "calibration" in facts.scores:
        drawn.append(_reliability(facts))
    if "acc" in facts.scores:
        drawn.append(_heads(facts))
    others = (_number(facts), _neighbors(facts), _loss(facts))
    return drawn + [chart for chart in others if chart]


def _chart(title: str, drawing: Any, text: str) -> dict[str, Any]:
    return {"title": title, "drawing": drawing, "text": text}


def _sizes(facts: RunFacts) -> dict[str, Any]:
    info = facts.scores["label_free"]["sizes"]
    text = (
        f"From {info['smallest']:,} to {info['largest']:,} images; evenness {info['entropy']:.3f} "
        "(entropy of the sizes, 1 = all equal)."
    )
    sizes = np.array(facts.table["size"])
    return _chart("Cluster sizes", charts.sorted_sizes(sizes, f"Cluster sizes. {text}"), text)


def _number(facts: RunFacts) -> dict[str, Any] | None:
    found = facts.estimate
    if found is None:
        return None
    text = (
        f"{found['best']:,} classes are an estimate; {found['low']:,} to {found['high']:,} fit "
        "almost as well. Where clusters are there in the data, clusterings of different parts of "
        "the images agree."
    )
    points = [
        (number, value, f"{number:,} clusters: agreement {value:.2f}", number == found["best"])
        for number, value in zip(found["tried"], found["agreement"], strict=True)
    ]
    drawing = charts.scatter(
        points,
        label=f"Agreement by number of clusters. {text}",
        x_title="number of clusters",
        x_log=True,
        x_whole=True,
    )
    return _chart("Number of classes", drawing, text)


def _confidence(facts: RunFacts) -> dict[str, Any]:
    counts, edges = np.histogram(np.clip(facts.confidence, 0, 1), bins=20, range=(0, 1))
    free = facts.scores["label_free"]
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


def _reliability(facts: RunFacts) -> dict[str, Any]:
    data = facts.scores["calibration"]
    text = (
        "On the dashed line, confidence equals accuracy. "
        f"Mean gap {100 * data['error']:.1f} points."
    )
    if data["ranking"] is not None:
        text += (
            f" In {data['ranking']:.0%} of pairs of a right and a wrong image, the right one has "
            "the higher confidence."
        )
    drawing = charts.reliability(
        data["confidence"], data["accuracy"], data["rows"], f"Accuracy by confidence. {text}"
    )
    return _chart("Accuracy by confidence", drawing, text)


def _heads(facts: RunFacts) -> dict[str, Any]:
    scores, heads = facts.scores, facts.scores["heads"]
    lines = [("consensus", scores["acc"], "main")]
    if "kmeans" in scores:
        lines.append(("k-means", scores["kmeans"]["acc"], "base"))
    text = (
        f"{len(heads['acc'])} merged heads, {heads['acc_min']:.1%} to {heads['acc_best']:.1%}; "
        f"mean NMI between them {scores['label_free']['head_agreement']:.2f}."
    )
    drawing = charts.heads(heads["acc"], lines, f"Accuracy of each merged head. {text}")
    return _chart("Accuracy of each head", drawing, text)


def _neighbors(facts: RunFacts) -> dict[str, Any] | None:
    selection = facts.manifests.get("selection")
    if selection is None or "histogram" not in selection.results:
        return None
    results = selection.results
    consistency = facts.scores["label_free"]["neighbor_consistency"]
    text = (
        f"{results['mean']:.0f} neighbors per image on average; {consistency:.0%} of them are in "
        "its cluster."
    )
    if results.get("threshold") is not None:
        text = f"Cosine similarity of at least {results['threshold']:.3f}. {text}"
    drawing = charts.histogram(
        np.array(results["histogram"]["counts"]),
        np.array(results["histogram"]["edges"]),
        label=f"Neighbors per image. {text}",
        x_title="neighbors kept per image",
        unit="images",
        x_whole=True,
    )
    return _chart("Neighbors", drawing, text)


def _loss(facts: RunFacts) -> dict[str, Any] | None:
    loss = np.array(facts.history.get("loss", ()), dtype=float)  # [S, H]
    if loss.ndim != 2 or not loss.size:
        return None
    first, last = loss.mean(axis=1)[[0, -1]]
    text = f"Bold: mean of {loss.shape[1]} heads, from {first:.3g} to {last:.3g}."
    drawing = charts.curves(facts.history["step"], loss, label=f"Training loss. {text}")
    return _chart("Training loss", drawing, text)


def confusion(facts: RunFacts) -> dict[str, Any] | None:
    """Confusion matrix (a table for few classes, else an image), confused pairs, hardest classes.

    None without labels.
    """
    table = facts.contingency
    if table is None:
        return None
    match = truth.match(table)
    cells = match.confusion / np.maximum(1, match.confusion.sum(axis=1, keepdims=True))
    fits = len(facts.names) <= FEW and facts.num_clusters <= 1.5 * FEW
    columns = [(int(k), facts.cluster_name(int(k))) for k in match.order]
    return {
        "table": [(n, r.tolist()) for n, r in zip(facts.names, cells, strict=True)] if fits else [],
        "columns": columns if fits else [],
        "upright": max(len(name) for _, name in columns) <= SHORT,
        "numbers": fits and facts.num_clusters <= NUMBERED,
        "image": "" if fits else charts.heat_image(match.confusion),
        "pairs": run_numbers.pairs(facts, table, match),
        "hardest": run_numbers.hardest(facts, table, match),
    }
