"""Unsupervised image classification at ImageNet scale, distributed by Ray.

`cluster_images` sorts images into classes, `cluster` embeddings in memory. `run` takes images or
embeddings of any size through the whole chain, on this machine or a cluster, and keeps everything
in a run directory; `load` reads one, `predict` labels new images with it, and `sweep` tries
settings.

Importing this package loads neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icce_ray.core.method import Clustering
    from icce_ray.pipeline.results import Predictions, Result

__version__ = "0.1.0"
__all__ = ["__version__", "cluster", "cluster_images", "load", "predict", "run", "sweep"]


def cluster_images(images: str | Path, k: int | str, **settings: Any) -> Result:
    """Sort images into `k` classes, as `icce-ray run IMAGES -k K` does.

    >>> import icce_ray
    >>> found = icce_ray.cluster_images("photos", k=20)
    >>> found.labels                                # a data frame: uri, cluster, confidence, ...
    >>> found.show(3)                               # images of cluster 3, in a notebook
    >>> found.predict(["new/a.jpg", "new/b.jpg"])   # a data frame of the same form
    >>> found.embeddings, found.report              # float16 [N, D], the page

    The same call resumes what was interrupted, and reads what is finished.

    Args:
        images: a folder, a pattern, or another path or address, as data.path.
        k: the number of classes, a range such as "50-200", or "auto".
        settings: as of `run`, such as run_dir="runs/photos", backbone="dinov2-small", quiet=True.

    Returns: what `load` returns.

    Raises:
        icce_ray.errors.IcceError: settings, images or artifacts that do not fit, a failed stage.
    """
    return run(images, num_classes=k, **settings)


def cluster(
    embeddings: Any,
    num_classes: int | str,
    *,
    device: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Clustering:
    """Group embeddings into classes, in memory, without labels, files or Ray.

    >>> import icce_ray
    >>> found = icce_ray.cluster(embeddings, 10, seed=1, heads={"count": 8}, neighbors={"k": 20})
    >>> found.labels, found.confidence              # int32 [N], float32 [N]
    >>> found.scores["neighbor_information"]        # label-free, measured when asked for
    >>> labels, confidence = found.predict(new_embeddings)

    The same embeddings, settings and seed give the same labels as a run. Everything is held in
    memory, and the search is approximate only where exact search would take about an hour.

    Args:
        embeddings: numbers [N, D], one row per image: a numpy array of any number type (also a
            memory map) or a torch tensor on any device. Rows are normalized.
        num_classes: K, at least 2; or "auto", or a range such as "50-200", to have it estimated.
        device: of the heads and the classifier, such as "cuda:1". Default: a GPU if there is one.
        progress: called as progress(part, done, total), with part classes (where
            they are estimated), search, heads or classifier.
        settings: `seed`, and the groups `neighbors`, `heads`, `consensus` and `classifier`, each a
            dictionary with the names of the YAML (`icce-ray config imagenet` prints them all).

    Returns:
        `labels` int32 [N], by decreasing cluster size; `confidence` float32 [N], 0..1;
        `assignments` int [N, H], the cluster that each head gave; `neighbors` (ids, similarity,
        counts); `scores` by name; `classifier`, a torch module; `predict(new_embeddings)`.

    Raises:
        icce_ray.errors.ConfigError: a setting that is unknown or wrong.
        icce_ray.errors.DataError: embeddings that cannot be used: what, where, how to fix it.
    """
    from icce_ray.core import method

    return method.cluster(embeddings, num_classes, device=device, progress=progress, **settings)


def run(
    config: str | Path | Mapping[str, Any],
    *overrides: str,
    first: str | None = None,
    last: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> Result:
    """Run the chain: index, embed, search, select, heads, consensus, answer, classify, evaluate,
    report.

    >>> import icce_ray
    >>> found = icce_ray.run("photos", num_classes=20, backbone="dinov2-small")
    >>> found = icce_ray.run("quickstart", "heads.count=8", "run_dir=runs/eight")
    >>> found.labels, found.metrics, found.report

    Finished stages are skipped and half-done ones resumed, so the same call resumes a run that was
    interrupted.

    Args:
        config: a golden config's name, a YAML file, its content, or a path or address of images or
            embeddings.
        overrides: settings as KEY=VALUE, by the names of the YAML.
        settings: the same as Python values; groups are dictionaries. Overrides go before them.
        first, last: run only a part of the chain, by names of stages.
        overwrite: replace artifacts of other settings; with `first`, redo those stages.
        quiet: print only errors and the end.

    Returns: what `load` returns.

    Raises:
        icce_ray.errors.IcceError: settings, data or artifacts that do not fit, a failed stage.
    """
    from icce_ray import config as configs
    from icce_ray import pipeline
    from icce_ray.pipeline import num_classes
    from icce_ray.pipeline.results import Result

    given = [*configs.as_overrides(settings), *overrides]
    resolved = num_classes.resolve(config, given, overwrite=overwrite, quiet=quiet)
    assert resolved is not None  # which it is only for a plan
    pipeline.run(resolved, first=first, last=last, overwrite=overwrite, quiet=quiet)
    return Result(resolved.run_dir)


def load(run_dir: str | Path) -> Result:
    """What a finished run found.

    >>> import icce_ray
    >>> found = icce_ray.load("runs/quickstart")
    >>> found.labels                                # a data frame: labels.parquet
    >>> found.clusters, found.confidence            # int32 [N], float32 [N]
    >>> found.metrics["acc"]                        # where there was ground truth
    >>> found.predict("photos/new.jpg")             # or new embeddings

    Args:
        run_dir: a folder, s3:// or gs://.

    Raises:
        icce_ray.errors.ArtifactError: it has no finished consensus.
    """
    from icce_ray.pipeline.results import Result
    from icce_ray.rundir import results
    from icce_ray.rundir.directory import RunDirectory

    results.require(RunDirectory(str(run_dir)), "consensus")
    return Result(str(run_dir))


def predict(
    run_dir: str | Path,
    images: str | Path,
    *overrides: str,
    out: str | None = None,
    min_confidence: float = 0.0,
    quiet: bool = False,
) -> Predictions:
    """Label any number of new images with the classifier of a finished run, distributed by Ray.

    >>> import icce_ray
    >>> new = icce_ray.predict("runs/mine", "photos/new", out="runs/new-labels")
    >>> new.labels                                  # a data frame: uri, cluster, confidence, ...
    >>> new.clusters, new.confidence                # int32 [B], float32 [B]
    >>> new.novelty                                 # float32 [B], near 1: unlike the run's images

    Args:
        run_dir: a run with a classifier.
        images: a folder, Parquet or WebDataset tars, as data.path.
        overrides: embed.*, ray.* and data.* settings as KEY=VALUE.
        out: folder for the Parquet files. Default: `predictions` in the run directory.
        min_confidence: images that are less sure get label -1.
        quiet: print only errors and the end.

    Raises:
        icce_ray.errors.IcceError: settings, images or artifacts that do not fit, a failed stage.
    """
    from icce_ray.pipeline.results import Predictions
    from icce_ray.rundir.addresses import absolute
    from icce_ray.rundir.directory import RunDirectory
    from icce_ray.stages import predict as stage

    run_uri = str(run_dir)
    done = stage.predict(
        run_uri,
        str(images),
        out,
        overrides=overrides,
        min_confidence=min_confidence,
        quiet=quiet,
    )
    folder = absolute(out) if out else RunDirectory(run_uri).address("predictions")
    scores = {name: done.results[name] for name in ("acc", "nmi", "ari") if name in done.results}
    return Predictions(folder, scores)


def sweep(
    config: str | Path | Mapping[str, Any],
    space: str | Path,
    *overrides: str,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Try many settings, and rank the results by a label-free score.

    >>> import icce_ray
    >>> found = icce_ray.sweep("fashion-mnist", "ensemble")
    >>> found["trials"][0]["settings"]              # of the best
    >>> icce_ray.run("runs/fashion-mnist/sweeps/ensemble/best.yaml")

    Args:
        config: a golden config's name, a YAML file, or its content.
        space: what to vary: a golden space's name, or a YAML file.
        overrides: settings as KEY=VALUE, of all trials.
        overwrite: forget earlier results of this sweep.
        quiet: print only errors and the end.

    Returns: the content of the sweep's results.json: trials, best first.

    Raises:
        icce_ray.errors.IcceError: settings or data that do not fit, or no trial succeeded.
    """
    from icce_ray import config as configs
    from icce_ray.sweeps import running

    results = running.run(
        configs.load(config, overrides), str(space), overwrite=overwrite, quiet=quiet
    )
    assert results is not None  # which it is only for a plan
    return results
