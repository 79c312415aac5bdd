"""What the report of a run is made from: artifacts of all stages, read once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import Config
from icce_ray.errors import ArtifactError
from icce_ray.rundir.directory import Manifest, RunDirectory
from icce_ray.stages import evaluate

# Folder and plain name of what the page tells about, in the order of the chain.
PARTS = (
    ("index", "Listing images"),
    ("embeddings", "Embedding"),
    ("neighbors", "Searching neighbors"),
    ("selection", "Selecting neighbors"),
    ("heads", "Training heads"),
    ("consensus", "Consensus"),
    ("classifier", "Classifier"),
    ("evaluation", "Evaluation"),
)


@dataclass
class RunFacts:
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


def read_facts(config: Config, files: RunDirectory) -> RunFacts:
    """Read what the page needs. Raises ArtifactError where a stage has not finished."""
    manifests = {name: done for name, _ in PARTS if (done := files.manifest(name))}
    if "evaluation" not in manifests:
        raise ArtifactError(f"{files.path('evaluation')} is not finished; run that stage first")
    image_ids = np.asarray(files.matrix("embeddings", "image_id"))
    rows = len(image_ids)
    found = RunFacts(
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
        found.contingency = contingency_of(found)
    if "index" in manifests and files.list("index", ".parquet"):
        found.index = files.read_table("index", columns=["uri", "offset", "size"])
    return found


def contingency_of(found: RunFacts) -> np.ndarray:
    cells = found.files.read_table("evaluation", "contingency.parquet")
    out = np.zeros((len(found.names), found.num_clusters), dtype=np.int64)
    out[cells["class"].to_numpy(), cells["cluster"].to_numpy()] = cells["count"].to_numpy()
    return out
