"""How good clusters are, and their number, where there is ground truth.

Labels are looked at when all clusterings are made. Shapes: N images, D features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.tables import markdown, spread
from icce_ray.errors import DataError

SCORED = (
    "search",
    "select",
    "heads",
    "consensus",
    "classify",
)  # stages that the peers' times include


# --- accuracy: whole runs ------------------------------------------------------------------------


def measure_accuracy(
    source: str, overrides: Sequence[str], seeds: Sequence[int], test: str | None
) -> list[dict[str, Any]]:
    """Run the chain once for each seed, on the same embeddings and neighbors, whatever of it was
    there before; classify `test` images with each.

    Returns, for each seed: seed, consensus, classifier, kmeans, heads_mean, heads_best, test
    (accuracies, 0..1), nmi and ari of the consensus, ranking and gap of its confidence
    (`metrics.calibration`), seconds (embeddings to classifier) and wall (of the command from the
    heads on, scoring included).

    Raises:
        DataError: there is no ground truth, of the config's images or of `test`.
    """
    from icce_ray import config as configs
    from icce_ray import pipeline
    from icce_ray.rundir.directory import RunDirectory
    from icce_ray.stages.predict import predict

    found = []
    for seed in seeds:
        config = configs.load(source, [*overrides, f"seed={seed}"])
        pipeline.run(config, overwrite=True, last="select")
        started = time.monotonic()
        manifests = pipeline.run(config, first="heads", overwrite=True)
        wall = time.monotonic() - started
        metrics = RunDirectory(config.run_dir).read_json("evaluation", "metrics.json")
        if "acc" not in metrics:
            raise DataError(f"{config.run_dir} has no ground truth to compare with")
        tested = None
        if test is not None:
            out = f"{config.run_dir}/test-{seed}-{manifests['classify'].id[:8]}"
            tested = predict(config.run_dir, test, out).results.get("acc")
            if tested is None:
                raise DataError(f"{test} has no labels to compare with; give class folders")
        found.append(
            {
                "seed": seed,
                "consensus": metrics["acc"],
                "classifier": metrics["classifier"]["acc"],
                "test": tested,
                "kmeans": metrics["kmeans"]["acc"] if "kmeans" in metrics else None,
                "heads_mean": metrics["heads"]["acc_mean"],
                "heads_best": metrics["heads"]["acc_best"],
                "nmi": metrics["nmi"],
                "ari": metrics["ari"],
                "ranking": metrics["calibration"]["ranking"],
                "gap": metrics["calibration"]["error"],
                "seconds": sum(manifests[name].seconds for name in SCORED),
                "wall": wall,
            }
        )
    return found


OF_A_CLUSTERING = (
    "neighbor_information",
    "neighbor_evidence",
    "neighbor_consistency",
    "neighbor_modularity",
    "generalization",
)


def score_truth(x: np.ndarray, codes: np.ndarray) -> dict[str, dict[str, float]]:
    """The label-free scores of the true classes, of the consensus and of k-means: where the truth
    scores lower, better search cannot find it. float16 [N, D], unit rows; int [N].

    Raises:
        DataError: an image without a label.
    """
    from icce_ray.core import method
    from icce_ray.core.evaluation import kmeans as kmeans_
    from icce_ray.core.evaluation import labelfree as scores
    from icce_ray.core.evaluation import truth as metrics

    if (codes < 0).any():
        raise DataError(f"{np.sum(codes < 0)} images have no label; all need one")
    count = int(codes.max()) + 1
    ours = method.cluster(x, count)
    kmeans = kmeans_.kmeans_baseline(x, count, seed=0)
    out = {}
    for name, clusters in {"truth": codes, "consensus": ours.labels, "k-means": kmeans}.items():
        out[name] = {"accuracy": metrics.accuracy(codes, clusters)}
        out[name] |= scores.score(
            OF_A_CLUSTERING,
            clusters=clusters,
            num_clusters=count,
            assignments=clusters[:, None],
            ids=ours.neighbors.ids,
            features=x,
            seed=0,
        )
    return out


def truth_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each clustering."""
    names = ["accuracy", *OF_A_CLUSTERING]
    lines = [[name, *(f"{one[score]:.3f}" for score in names)] for name, one in found.items()]
    return markdown(["clusters", *(name.replace("_", " ") for name in names)], lines)


CLUSTERS = ("consensus", "classifier", "test", "heads_mean", "heads_best", "kmeans", "nmi", "ari")
PERCENT = (*CLUSTERS, "ranking", "gap")


def accuracy_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each seed, then mean and standard deviation. Percent and seconds."""
    columns = [name for name in PERCENT if all(one[name] is not None for one in found)]
    head = ["seed", *(name.replace("_", ", ") for name in columns), "seconds", "wall"]
    lines = [
        [
            str(one["seed"]),
            *(f"{100 * one[name]:.1f}" for name in columns),
            *(f"{one[name]:.0f}" for name in ("seconds", "wall")),
        ]
        for one in found
    ]
    total = [spread([100 * one[name] for one in found]) for name in columns]
    total += [f"{statistics.mean(one[n] for one in found):.0f}" for n in ("seconds", "wall")]
    return markdown(head, [*lines, ["mean", *total]])


# --- the number of classes -----------------------------------------------------------------------


def count_classes(x: np.ndarray, codes: np.ndarray, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What `-k auto` finds for each seed. float16 [N, D], unit rows; int [N], -1 for no label."""
    from icce_ray.config.loading import check, parse_range
    from icce_ray.config.schema import MethodConfig
    from icce_ray.core import num_classes

    true, between, found = len(np.unique(codes[codes >= 0])), parse_range("auto"), []
    assert between is not None
    for seed in seeds:
        began = time.perf_counter()
        settings = check(MethodConfig, {"num_classes": 2, "seed": seed})
        one = num_classes.estimate(x, between, settings)
        seconds = time.perf_counter() - began
        found.append(
            {"seed": seed, "true": true, "found": one.best, "low": one.low, "high": one.high}
            | {"seconds": seconds}
        )
    return found


def classes_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each seed."""
    lines = []
    for one in found:
        between = f"{one['low']}-{one['high']}"
        cells = [str(one[name]) for name in ("seed", "true", "found")]
        lines.append([*cells, between, f"{one['seconds']:.0f}"])
    return markdown(["seed", "true", "found", "between", "s"], lines)
