"""What a finished run found, for use in Python: read from its directory when asked for.

Shapes: N images, B new images, D features, K clusters.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from icce_ray.errors import ConfigError
from icce_ray.rundir import curated, results
from icce_ray.rundir.addresses import split_options
from icce_ray.rundir.directory import RunDirectory

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from icce_ray.report.notebook import Shown
    from icce_ray.stages.predict import Here


@dataclass(frozen=True)
class Result:
    """A run directory. Clusters are the curated ones, where there are any (`icce-ray curate`).

    `labels` and `table` have a row for every image of the listing, in its order. All else that has
    N rows leaves out the images that could not be read.

    Each attribute raises ArtifactError while the stage that makes it is not finished.
    """

    run_dir: str

    @cached_property
    def labels(self) -> pd.DataFrame:
        """A row for every image, with columns uri, cluster, name, confidence, ...: `table` as a
        data frame."""
        return self.table.to_pandas()

    @cached_property
    def table(self) -> pa.Table:
        """LABELS_SCHEMA, as in labels.parquet.

        Raises ArtifactError also where the clusters have changed since.
        """
        return results.read_labels(RunDirectory(self.run_dir))

    @cached_property
    def clusters(self) -> np.ndarray:
        """Cluster of each image: int32 [N], 0..K-1, by decreasing size; -1 where it was dropped."""
        return self._without_dropped(self._consensus["cluster"].to_numpy())

    @cached_property
    def names(self) -> list[str | None]:
        """What each cluster is called, [K], by a person or else in words that were suggested for
        it; None while it has no name."""
        known = curated.naming(self._directory)
        count = len(known.names[: known.dropped]) or int(self.clusters.max()) + 1
        return known.all(count)

    @cached_property
    def confidence(self) -> np.ndarray:
        """How sure that is: float32 [N], 0..1."""
        return self._consensus["confidence"].to_numpy()

    @cached_property
    def uris(self) -> list[str]:
        """Where each image is, [N]: a file, or FILE#ROW."""
        return self._places(self._consensus["image_id"].combine_chunks())["uri"].to_pylist()

    @cached_property
    def embeddings(self) -> np.ndarray:
        """Features of each image: float16 [N, D], rows of length 1, read-only and memory-mapped."""
        results.require(self._directory, "embeddings")
        return self._directory.matrix("embeddings", "embedding")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Scores: `acc`, `nmi` and `ari` where there is ground truth, and label-free ones."""
        results.require(self._directory, "evaluation")
        return dict(self._directory.read_json("evaluation", "metrics.json"))

    @cached_property
    def classifier(self) -> Any:
        """The classifier: a torch module that takes unit rows [B, D] (fine-tuned: images)."""
        from icce_ray.core.classifier import model

        results.require(self._directory, "classifier")
        weights = self._directory.read_bytes("classifier", "classifier.safetensors")
        return model.load(weights, self._directory.read_json("classifier", "classifier.json"))

    @property
    def report(self) -> Shown:
        """The report: in a notebook the page itself; as text, where it lies."""
        from icce_ray.report import notebook
        from icce_ray.report.pages import FOLDER

        results.require(self._directory, FOLDER)
        return notebook.report(self._directory)

    def show(self, cluster: int | str, n: int = 24) -> Shown:
        """The `n` images of a cluster that it is most sure of: in a notebook as thumbnails, as text
        by confidence and address.

        cluster: its number or its name.

        Raises:
            ConfigError: there is no such cluster, or n is below 1.
        """
        from icce_ray import config as configs
        from icce_ray.distributed.inference import levels_of_run
        from icce_ray.report import galleries, notebook
        from icce_ray.report.thumbnails import thumbnails

        if n < 1:
            raise ConfigError(f"n={n} must be at least 1")
        config = configs.validate(dict(self._directory.read_settings()))
        number = self._number(cluster)
        picks = galleries.choose(self.clusters, self.confidence, len(self.names), n, config.seed)
        rows, _ = picks[number]
        places = self._places(self._consensus["image_id"].take(rows)).to_pylist()
        levels = levels_of_run(self._directory)
        sources = thumbnails(config, places, galleries.SIDE, levels)
        name, size = self.names[number], int((self.clusters == number).sum())
        title = f"cluster {number}{f' ({name})' if name else ''}: {size:,} images"
        uris = [place["uri"] for place in places]
        return notebook.cluster(title, uris, self.confidence[rows].tolist(), sources)

    def predict(self, new: Any) -> pd.DataFrame:
        """Classify new images, or new embeddings, in this process, without Ray and without files.
        Further calls are faster: the first loads the backbone.

        Args:
            new: images: a path or an address, as `icce_ray.predict` takes them, or several of them;
                or embeddings [B, D], of the same backbones as the run's.

        Returns: a row for each, with `cluster`, `name` and `confidence`; of images also `uri`,
            `novelty` and `reason`, as `icce_ray.predict` writes them.

        Raises:
            ConfigError: embeddings where the classifier was fine-tuned, and takes images.
            DataError: what is not there or cannot be used, or has another number of features.
        """
        images = _addresses(new)
        if images is None:
            return self._predict_rows(new)
        return self._here.predict(images).to_pandas()

    def _predict_rows(self, embeddings: Any) -> pd.DataFrame:
        import pandas as pd

        from icce_ray.core import method
        from icce_ray.core.classifier.model import Classifier

        if not isinstance(self.classifier, Classifier):
            raise ConfigError(
                f"the classifier of {self.run_dir} was fine-tuned and takes images, not "
                "embeddings; give predict the images"
            )
        clusters, confidence = method.predict(self.classifier, embeddings)
        clusters = self._without_dropped(clusters)
        names = map(curated.naming(self._directory).of, clusters.tolist())
        return pd.DataFrame({"cluster": clusters, "name": list(names), "confidence": confidence})

    def _number(self, cluster: int | str) -> int:
        """The number of a cluster, given that or its name."""
        if isinstance(cluster, str):
            if cluster in self.names:
                return self.names.index(cluster)
            known = ", ".join(filter(None, self.names)) or "none has a name"
            raise ConfigError(f"there is no cluster {cluster!r}: {known}")
        if hasattr(cluster, "__index__") and 0 <= operator.index(cluster) < len(self.names):
            return operator.index(cluster)
        last = len(self.names) - 1
        raise ConfigError(f"there is no cluster {cluster}: they go from 0 to {last}")

    def _without_dropped(self, clusters: np.ndarray) -> np.ndarray:
        """Clusters, with -1 in place of the one of the images that were dropped."""
        dropped = curated.naming(self._directory).dropped
        return clusters if dropped is None else np.where(clusters == dropped, -1, clusters)

    @cached_property
    def _here(self) -> Here:
        from icce_ray.stages import predict

        return predict.Here(self.run_dir)

    @cached_property
    def _directory(self) -> RunDirectory:
        return curated.current(RunDirectory(self.run_dir))

    @cached_property
    def _consensus(self) -> pa.Table:
        return self._read("consensus", "image_id", "cluster", "confidence")

    @cached_property
    def _index(self) -> pa.Table:
        return self._read("index", "uri", "offset", "size")

    def _places(self, image_ids: Any) -> pa.Table:
        """Where images are: uri, offset, size."""
        return self._index.take(image_ids)

    def _read(self, folder: str, *columns: str) -> pa.Table:
        results.require(self._directory, folder)
        return self._directory.read_table(folder, columns=columns)


def _addresses(new: Any) -> list[str] | None:
    """Paths or addresses, given one or several; None where it is something else."""
    if isinstance(new, str | os.PathLike):
        return [os.fspath(new)]
    if getattr(new, "ndim", 1) != 1 or not isinstance(new, Iterable):
        return None
    several = list(new)
    if several and all(isinstance(one, str | os.PathLike) for one in several):
        return [os.fspath(one) for one in several]
    return None


@dataclass(frozen=True)
class Predictions:
    """Labels of new images. Rows are images in the order of their listing."""

    folder: str  # with the Parquet files
    scores: dict[str, float]  # acc, nmi, ari where the images have labels

    @cached_property
    def labels(self) -> pd.DataFrame:
        """A row for each image, with columns uri, cluster, name, confidence, novelty, reason:
        `table` as a data frame."""
        return self.table.to_pandas()

    @cached_property
    def table(self) -> pa.Table:
        """PREDICTIONS_SCHEMA."""
        uri, options = split_options(self.folder)
        parent, _, name = uri.rstrip("/").rpartition("/")
        return RunDirectory(parent + options).read_table(name)

    @cached_property
    def clusters(self) -> np.ndarray:
        """Cluster of each image: int32 [B]; -1 where it could not be decoded, or was less sure than
        asked for."""
        return self.table["cluster"].to_numpy()

    @cached_property
    def confidence(self) -> np.ndarray:
        """Its probability: float32 [B]."""
        return self.table["confidence"].to_numpy()

    @cached_property
    def novelty(self) -> np.ndarray:
        """Share of the run's images that lie nearer to the others: float32 [B], NaN where it could
        not be decoded, or the classifier is fine-tuned."""
        return self.table["novelty"].to_numpy()

    @cached_property
    def uris(self) -> list[str]:
        """Where each image is, [B]."""
        return self.table["uri"].to_pylist()
