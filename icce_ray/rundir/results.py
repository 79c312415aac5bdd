"""What a finished run found, for use in Python: read from its directory when asked for.

Shapes: N images, B new images, D features, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from icce_ray.errors import ArtifactError, ConfigError
from icce_ray.rundir import curated
from icce_ray.rundir.addresses import split_options
from icce_ray.rundir.directory import RunDirectory

if TYPE_CHECKING:
    import pyarrow as pa

LABELS, LABELS_CSV = "labels.parquet", "labels.csv"  # the answer, at the top of a run


@dataclass(frozen=True)
class Result:
    """A run directory. Rows are images in the order of the listing; images that could not be read
    have none. Clusters are the curated ones, where there are any (`icce-ray curate`).

    Each attribute raises ArtifactError while the stage that makes it is not finished.
    """

    run_dir: str

    @cached_property
    def labels(self) -> np.ndarray:
        """Cluster of each image: int32 [N], 0..K-1, by decreasing size; -1 where it was dropped."""
        return self._without_dropped(self._consensus["cluster"].to_numpy())

    @cached_property
    def names(self) -> list[str | None]:
        """What each cluster is called, [K], by a person or else in words that were suggested for
        it; None while it has no name."""
        known = curated.naming(self._directory)
        count = len(known.names[: known.dropped]) or int(self.labels.max()) + 1
        return known.all(count)

    @cached_property
    def confidence(self) -> np.ndarray:
        """How sure that is: float32 [N], 0..1."""
        return self._consensus["confidence"].to_numpy()

    @cached_property
    def uris(self) -> list[str]:
        """Where each image is, [N]: a file, or FILE#ROW."""
        index = self._table("index", "image_id", "uri")
        return index["uri"].take(self._consensus["image_id"].combine_chunks()).to_pylist()

    @cached_property
    def table(self) -> pa.Table:
        """A row for every image of the index, in its order, also for those that could not be read:
        LABELS_SCHEMA, as in labels.parquet. `table.to_pandas()` is a data frame.

        Raises ArtifactError also where the clusters have changed since.
        """
        self.require("answer")
        made, of = self._directory.manifest("answer"), self._directory.manifest("consensus")
        if made is None or of is None or made.inputs["consensus"] != of.id:
            raise ArtifactError(
                f"{self._directory.path(LABELS)} is of an earlier consensus; finish the run by "
                "icce-ray run"
            )
        return self._directory.read_table(LABELS)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Scores: `acc`, `nmi` and `ari` where there is ground truth, and label-free ones."""
        self.require("evaluation")
        return dict(self._directory.read_json("evaluation", "metrics.json"))

    @cached_property
    def classifier(self) -> Any:
        """The classifier: a torch module that takes unit rows [B, D] (fine-tuned: images)."""
        from icce_ray.core.classifier import model

        self.require("classifier")
        weights = self._directory.read_bytes("classifier", "classifier.safetensors")
        return model.load(weights, self._directory.read_json("classifier", "classifier.json"))

    def predict(self, embeddings: Any) -> tuple[np.ndarray, np.ndarray]:
        """Labels int32 [B] and confidence float32 [B] of new embeddings [B, D].

        They must be of the same backbones as the run's. For images, see `icce_ray.predict`.

        Raises:
            ConfigError: the classifier was fine-tuned, and takes images.
            DataError: embeddings that cannot be used, or have another number of features.
        """
        from icce_ray.core import method
        from icce_ray.core.classifier.model import Classifier

        if not isinstance(self.classifier, Classifier):
            raise ConfigError(
                f"the classifier of {self.run_dir} was fine-tuned and takes images, not "
                "embeddings; use icce_ray.predict(run_dir, images)"
            )
        labels, confidence = method.predict(self.classifier, embeddings)
        return self._without_dropped(labels), confidence

    def _without_dropped(self, clusters: np.ndarray) -> np.ndarray:
        """Clusters, with -1 in place of the one of the images that were dropped."""
        dropped = curated.naming(self._directory).dropped
        return clusters if dropped is None else np.where(clusters == dropped, -1, clusters)

    @cached_property
    def _directory(self) -> RunDirectory:
        return curated.current(RunDirectory(self.run_dir))

    @cached_property
    def _consensus(self) -> pa.Table:
        return self._table("consensus", "image_id", "cluster", "confidence")

    def _table(self, folder: str, *columns: str) -> pa.Table:
        self.require(folder)
        return self._directory.read_table(folder, columns=columns)

    def require(self, folder: str) -> None:
        """Raise ArtifactError where the stage of a folder is not finished."""
        if self._directory.manifest(folder) is None:
            raise ArtifactError(
                f"{self.run_dir} has no finished {folder}/; finish it by icce-ray run"
            )


@dataclass(frozen=True)
class Predictions:
    """Labels of new images. Rows are images in the order of their listing."""

    folder: str  # with the Parquet files
    scores: dict[str, float]  # acc, nmi, ari where the images have labels

    @cached_property
    def labels(self) -> np.ndarray:
        """Cluster of each image: int32 [B]; -1 where it could not be decoded, or was less sure than
        asked for."""
        return self._table["cluster"].to_numpy()

    @cached_property
    def confidence(self) -> np.ndarray:
        """Its probability: float32 [B]."""
        return self._table["confidence"].to_numpy()

    @cached_property
    def novelty(self) -> np.ndarray:
        """Share of the run's images that lie nearer to the others: float32 [B], NaN where it could
        not be decoded, or the classifier is fine-tuned."""
        return self._table["novelty"].to_numpy()

    @cached_property
    def uris(self) -> list[str]:
        """Where each image is, [B]."""
        return self._table["uri"].to_pylist()

    @cached_property
    def _table(self) -> pa.Table:
        uri, options = split_options(self.folder)
        parent, _, name = uri.rstrip("/").rpartition("/")
        directory = RunDirectory(parent + options)
        return directory.read_table(name, columns=("uri", "cluster", "confidence", "novelty"))
