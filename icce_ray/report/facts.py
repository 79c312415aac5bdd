"""What the page of a run is made from: the artifacts of all stages, read once.

Shapes: N images, C classes, K clusters, S logged training steps, H heads.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.config.schema import Config
from icce_ray.core import proposals
from icce_ray.core.samples import Levels, levels_in
from icce_ray.rundir.curated import Naming, naming
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.rundir.results import read_estimate
from icce_ray.rundir.schemas import QUARANTINE

# Folder and plain name of each stage the page speaks of, in the order of the chain.
PARTS = (
    ("index", "Listing images"),
    ("embeddings", "Embedding"),
    ("neighbors", "Searching neighbors"),
    ("selection", "Selecting neighbors"),
    ("heads", "Training heads"),
    ("consensus", "Consensus"),
    ("answer", "Answer"),
    ("classifier", "Classifier"),
    ("evaluation", "Evaluation"),
)


@dataclass(frozen=True)
class RunFacts:
    """Everything the page is made from, in the row order of the embeddings."""

    config: Config
    uri: str  # of the run directory
    manifests: dict[str, Manifest]  # by folder
    scores: dict[str, Any]  # metrics.json
    image_ids: np.ndarray  # int64 [N]
    clusters: np.ndarray  # int32 [N]
    confidence: np.ndarray  # float32 [N]
    table: dict[str, list[Any]]  # clusters.parquet, by column
    history: dict[str, Any]  # of the heads: step [S], loss [S, H]; empty where there is none
    quarantine: pa.Table | None  # uri, reason of the images that could not be read
    index: pa.Table | None  # uri, offset, size by image_id
    root: str  # what all addresses begin with, up to a folder
    codes: np.ndarray | None = None  # true classes, int64 [N], -1 where there is no label
    names: list[str] = field(default_factory=list)  # of the classes, [C]
    contingency: np.ndarray | None = None  # images per class and cluster, int64 [C, K]
    outlier: np.ndarray | None = None  # float32 [N]; None in a run without an answer
    second: np.ndarray | None = None  # next likely cluster, -1: none, int32 [N]
    naming: Naming = field(default_factory=lambda: Naming(()))  # of curated clusters
    first: np.ndarray | None = None  # row of the first image that shows the same, int64 [N]
    links: np.ndarray | None = None  # see core.proposals.links, [K, K]
    merges: Sequence[proposals.Merge] = ()
    splits: Sequence[proposals.Split] = ()
    estimate: dict[str, Any] | None = None  # of the number of classes, where it was not given

    @property
    def num_clusters(self) -> int:
        """K, empty clusters included."""
        return len(self.table["cluster"])

    @property
    def levels(self) -> Levels:
        """The ranges of the run's images, as they were embedded."""
        done = self.manifests.get("embeddings")
        return levels_in(done.results.get("backbones") or () if done else ())

    def class_name(self, code: int | None) -> str:
        """The name of a class; empty where there is none (None or -1)."""
        return "" if code is None or code < 0 else self.names[code]

    def cluster_name(self, cluster: int) -> str:
        """What a person called a cluster, else the class matched to it, else what was suggested,
        else its number."""
        return self.given_name(cluster) or f"cluster {cluster}"

    def given_name(self, cluster: int) -> str:
        """The name of a cluster; empty where it has none."""
        if cluster == self.naming.dropped:
            return "(dropped)"
        matched = self.class_name(self.table["matched"][cluster])
        return self.naming.given(cluster) or matched or self.naming.of(cluster) or ""


def read_facts(config: Config, files: RunDirectory, codes: np.ndarray | None) -> RunFacts:
    """Read what the page needs from a run whose evaluation is finished.

    codes: true classes, int64 [N], in the row order of the embeddings, or None.

    Raises:
        ArtifactError: an artifact is missing.
    """
    scores = files.read_json("evaluation", "metrics.json")
    image_ids = np.asarray(files.matrix("embeddings", "image_id"))
    outlier, first, second = _answer(files, image_ids)
    table = files.read_table("evaluation", "clusters.parquet").to_pydict()
    clusters, count = np.asarray(files.matrix("consensus", "cluster")), len(table["cluster"])
    links = proposals.links(clusters, files.matrix("neighbors", "ids"), count)
    index = _index(files)
    names: list[str] = []
    contingency = None
    if codes is not None and "acc" in scores:
        names = files.read_json("evaluation", "classes.json")["names"]
        contingency = _contingency(files, len(names), len(table["cluster"]))
    return RunFacts(
        config=config,
        uri=files.uri,
        manifests={name: done for name, _ in PARTS if (done := files.manifest(name))},
        scores=scores,
        image_ids=image_ids,
        clusters=clusters,
        confidence=np.asarray(files.matrix("consensus", "confidence")),
        table=table,
        history=_history(files),
        quarantine=_quarantine(files),
        index=index,
        root=_root(index),
        codes=None if contingency is None else codes,
        names=names,
        contingency=contingency,
        outlier=outlier,
        first=first,
        second=second,
        naming=naming(files),
        links=links,
        merges=proposals.merges(links),
        splits=_splits(files, clusters, count),
        estimate=_estimate(config, files),
    )


def _splits(files: RunDirectory, clusters: np.ndarray, count: int) -> list[proposals.Split]:
    """By the heads that were merged."""
    done, heads = files.manifest("consensus"), files.matrix("heads", "assignments")
    kept = done.results.get("kept") if done else None
    chosen = heads if kept is None else heads[:, kept]
    return proposals.splits(clusters, chosen, count)


def _answer(
    files: RunDirectory, image_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | tuple[None, None, None]:
    """Outlier scores, the row of the first image that shows the same, second choices; None without
    them."""
    if files.manifest("answer") is None:
        return None, None, None
    copied = np.asarray(files.matrix("answer", "duplicate_of"))
    first = np.searchsorted(image_ids, np.where(copied < 0, image_ids, copied))
    outlier, second = (files.matrix("answer", name) for name in ("outlier", "second_choice"))
    return np.asarray(outlier), first, np.asarray(second)


def _contingency(files: RunDirectory, classes: int, clusters: int) -> np.ndarray:
    cells = files.read_table("evaluation", "contingency.parquet")
    dense = np.zeros((classes, clusters), dtype=np.int64)
    dense[cells["class"].to_numpy(), cells["cluster"].to_numpy()] = cells["count"].to_numpy()
    return dense


def _estimate(config: Config, files: RunDirectory) -> dict[str, Any] | None:
    """How the number of classes was found; None where the run's is another one."""
    found = read_estimate(RunDirectory(files.uri))
    return found if found is not None and found["best"] == config.num_classes else None


def _history(files: RunDirectory) -> dict[str, Any]:
    if not files.exists("heads", "_history.json"):
        return {}
    return dict(files.read_json("heads", "_history.json"))


def _quarantine(files: RunDirectory) -> pa.Table | None:
    if not files.exists("embeddings", QUARANTINE):
        return None
    return files.read_table("embeddings", QUARANTINE)


def _index(files: RunDirectory) -> pa.Table | None:
    if not files.list("index", ".parquet"):
        return None
    return files.read_table("index", columns=["uri", "offset", "size"])


def _root(index: pa.Table | None) -> str:
    """The folder that all images are below; empty where there is none. The first and the last
    address in order differ as early as any two."""
    if index is None:
        return ""
    ends = pc.min_max(index["uri"]).as_py()
    common = os.path.commonprefix([ends["min"] or "", ends["max"] or ""])  # noqa: RUF071
    return common[: common.rfind("/") + 1]
