"""The page of a run: what its template is given, and how it stays within its size."""

from __future__ import annotations

import shlex
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from icce_ray import config as configs
from icce_ray.core import proposals
from icce_ray.report import earlier, image_map, oddities, run_charts, run_numbers
from icce_ray.report.browse import Pages
from icce_ray.report.facts import RunFacts
from icce_ray.report.galleries import Galleries
from icce_ray.report.pages import template
from icce_ray.rundir import addresses
from icce_ray.rundir.directory import RunDirectory

OPEN = 40  # clusters up to which the page shows each one as an open card
PER_CLUSTER = 1_600  # bytes of markup around a cluster's images, generously
FIXED = 350_000  # bytes of the page without any cluster


class Page(NamedTuple):
    """The page of a run."""

    content: bytes
    shown: int  # thumbnails of clusters
    lost: tuple[int, int]  # see Galleries.lost


def render(facts: RunFacts, files: RunDirectory, pages: Pages | None) -> Page:
    """The page, at most report.max_megabytes large. pages: of all images, where there are any."""
    page = template("report.html.j2")
    limit = facts.config.report.max_megabytes * 10**6
    listed = _listed(facts, limit)
    budget = limit - FIXED - PER_CLUSTER * len(listed)
    galleries = Galleries(facts, listed, budget, partial(earlier.shown, files), pages)
    content = _content(facts) | {"listed": listed, "proposals": _proposals(facts, listed)}
    content |= oddities.sections(facts, galleries) | {"browse": pages}
    galleries.fill()
    content["points"] = image_map.points(facts, files, galleries)
    near = {k: _near(facts, k, listed) for k in listed}
    while True:  # the budget is an estimate: images go, rank by rank, until the page fits
        cards = [_card(facts, galleries, k) | {"near": near[k]} for k in listed]
        made = {
            "clusters": cards,
            "side": galleries.side,
            "lost": run_numbers.lost(*galleries.lost),
        }
        text = page.render(**content, **made).encode()
        if len(text) <= limit or not galleries.drop():
            return Page(text, galleries.count, galleries.lost)


def _listed(facts: RunFacts, limit: int) -> list[int]:
    """Clusters the page lists, largest first: all, unless their list alone would fill the page."""
    order = np.argsort(-np.array(facts.table["size"]), kind="stable")
    return order[: max(1, int(0.8 * limit / PER_CLUSTER))].tolist()


def _card(facts: RunFacts, galleries: Galleries, cluster: int) -> dict[str, Any]:
    """What the page says of one cluster."""
    row = {name: values[cluster] for name, values in facts.table.items()}
    sure, unsure = galleries.of(cluster)
    mix = run_numbers.mix(facts, cluster)
    matched, majority = facts.class_name(row["matched"]), facts.class_name(row["majority"])
    given, words = facts.given_name(cluster), facts.naming.suggested(cluster)
    found_by = [str(cluster), given, matched, *(m["name"] for m in mix), *(w for w, _ in words)]
    return {
        "id": cluster,
        "name": given or f"Cluster {cluster}",
        "named": bool(given),
        "size": row["size"],
        "confidence": row["confidence"],
        "purity": row["purity"],
        "majority": majority if majority != matched else "",
        "mix": mix,
        "words": words,
        "sure": sure,
        "unsure": unsure,
        "search": " ".join(found_by).lower(),
    }


def _near(facts: RunFacts, cluster: int, listed: list[int]) -> list[tuple[int, str]]:
    """Number and name of the clusters near one, of those that the page lists."""
    near = [] if facts.links is None else proposals.nearest(facts.links, cluster)
    return [(k, facts.cluster_name(k)) for k in near if k in listed]


def _proposals(facts: RunFacts, listed: list[int]) -> list[dict[str, Any]]:
    """Merges and splits with their evidence; `edit` is the line of edits.yaml."""
    name = facts.cluster_name
    pairs = [
        {
            "kind": "merge",
            "clusters": [one.first, one.second],
            "names": [name(one.first), name(one.second)],
            "why": f"{one.there:.0%} of the neighbors of #{one.first} are in #{one.second}, and "
            f"{one.back:.0%} of those of #{one.second} are in #{one.first}",
            "edit": f"merge: [[{one.first}, {one.second}]]",
        }
        for one in facts.merges
    ]
    cuts = [
        {
            "kind": "split",
            "clusters": [one.cluster],
            "names": [name(one.cluster)],
            "why": f"a head puts {one.share:.0%} of its images together elsewhere, on average",
            "edit": f"split: {{{one.cluster}: 2}}",
        }
        for one in facts.splits
    ]
    return [one for one in (*pairs, *cuts) if set(one["clusters"]) <= set(listed)]


def _content(facts: RunFacts) -> dict[str, Any]:
    """All variables of the template but the clusters."""
    rows = run_numbers.stage_rows(facts)
    price = facts.config.report.cost_per_hour
    return {
        "title": f"{facts.config.num_classes:,} clusters in {len(facts.clusters):,} images",
        "run": addresses.split_options(facts.uri)[0].rstrip("/").rsplit("/", 1)[-1],
        "uri": facts.uri,
        "root": facts.root,
        "source": facts.config.data.path or facts.config.data.embeddings,
        "backbones": run_numbers.backbones(facts.config),
        "finished": run_numbers.moment(facts.manifests["evaluation"].finished),
        "images": len(facts.clusters),
        "scores": facts.scores,
        "free": facts.scores["label_free"],
        "methods": run_numbers.methods(facts.scores),
        "small": facts.num_clusters <= OPEN,
        "labeled": facts.contingency is not None,
        "worded": any(facts.naming.words),
        "of": None if facts.naming.names else facts.manifests["consensus"].id,
        "words": run_numbers.words(facts),
        "quoted": shlex.quote(facts.uri),
        "notes": run_numbers.notes(facts),
        "charts": run_charts.draw(facts),
        "confusion": run_charts.confusion(facts),
        "stages": rows,
        "seconds": sum(row["seconds"] for row in rows),
        "price": price,
        "cost": None if price is None else sum(row["cost"] for row in rows),
        "events": [(row["name"], text) for row in rows for text in row["events"]],
        "quarantine": run_numbers.quarantine(facts),
        "left_out": run_numbers.left_out(facts),
        "versions": run_numbers.versions(facts),
        "settings": configs.to_yaml(facts.config),
    }
