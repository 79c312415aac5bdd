"""How good the clusters are, where there is ground truth: whole runs, and one setting at a time.

Labels are looked at when all clusterings are made. Shapes: H heads, K clusters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import markdown, open_labeled
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


def score_truth(run_dir: str) -> dict[str, dict[str, float]]:
    """The label-free scores of the true classes, of the consensus and of k-means, on the images
    that have a label: where the truth scores lower, better search cannot find it."""
    from icce_ray.core.evaluation import kmeans as kmeans_
    from icce_ray.core.evaluation import labelfree as scores
    from icce_ray.core.evaluation import truth as metrics

    run, config, known = open_labeled(run_dir)
    ids, features = run.matrix("neighbors", "ids"), run.matrix("embeddings", "embedding")
    if not known.known.all():
        raise DataError(f"{run_dir}: {np.sum(~known.known)} images have no label; all need one")
    kmeans = kmeans_.kmeans_baseline(features, config.num_classes, config.seed)
    found = {"truth": known.codes, "consensus": run.matrix("consensus", "cluster")}
    out = {}
    for name, clusters in {**found, "k-means": kmeans}.items():
        out[name] = scores.score(
            OF_A_CLUSTERING,
            clusters=np.asarray(clusters),
            num_clusters=config.num_classes,
            assignments=np.asarray(clusters)[:, None],
            ids=ids,
            features=features,
            seed=config.seed,
        )
        out[name]["accuracy"] = metrics.accuracy(known.codes, np.asarray(clusters))
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


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation, for a table."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


# --- ablation: one setting at a time -------------------------------------------------------------


def by_settings(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Finished trials of a sweep by what they change, in the order of the space, seeds together.

    The first group is the config as it is, "defaults".
    """
    from icce_ray.sweeps import space

    own = {key: space.lookup(results["config"], key) for key in results["space"] if key != "seed"}
    order = {"defaults": -1}
    for key, described in results["space"].items():
        for value in described["choices"] if key != "seed" else ():
            order.setdefault(space.show({key: value}), len(order))
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in results["trials"]:
        if trial["state"] == "done":
            changed = {k: v for k, v in trial["settings"].items() if k != "seed" and v != own[k]}
            groups.setdefault(space.show(changed) or "defaults", []).append(trial)
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))


def ablation_table(results: Mapping[str, Any]) -> str:
    """A line for each setting: mean and deviation over seeds. Percent and seconds."""
    head = ["setting", "consensus", "single heads", "best head", "NMI between heads"]
    head += [results["objective"].replace("_", " "), "s"]
    lines = []
    for name, trials in by_settings(results).items():
        true = [trial["accuracy"] for trial in trials]
        free = [trial["scores"] for trial in trials]
        lines.append(
            [
                name,
                spread([100 * one["acc"] for one in true]),
                spread([100 * one["acc_mean"] for one in true]),
                spread([100 * one["acc_best"] for one in true]),
                spread([one["head_agreement"] for one in free], 3),
                spread([one[results["objective"]] for one in free], 3),
                f"{statistics.mean(trial['seconds'] for trial in trials):.0f}",
            ]
        )
    return markdown(head, lines)


def correlation_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each score with accuracy: over settings (means of the seeds),
    and over settings that change the heads or the ensemble alone."""
    from icce_ray.report.sweep_numbers import spearman

    groups = by_settings(results)
    rows = []
    for score in results["trials"][0]["scores"]:
        points = {
            name: (
                statistics.mean(trial["scores"][score] for trial in trials),
                statistics.mean(trial["accuracy"]["acc"] for trial in trials),
            )
            for name, trials in groups.items()
        }
        row: dict[str, Any] = {"score": score, "all": spearman(list(points.values()))}
        for part in ("neighbors", "heads", "consensus"):
            chosen = [p for name, p in points.items() if name.startswith((part, "defaults"))]
            row[part] = spearman(chosen)
        rows.append({**row, "settings": len(points)})
    return sorted(rows, key=lambda row: -(row["all"] or 0))


def correlation_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each score."""
    parts = ("all", "neighbors", "heads", "consensus")
    lines = [
        [
            row["score"].replace("_", " "),
            *("-" if row[part] is None else f"{row[part]:+.2f}" for part in parts),
        ]
        for row in rows
    ]
    head = [f"all {rows[0]['settings']} settings", *(f"of {part}" for part in parts[1:])]
    return markdown(["score", *head], lines)


# --- imbalance: a long tail cut from a balanced data set -----------------------------------------


def long_tail(codes: np.ndarray, ratio: float, seed: int) -> np.ndarray:
    """Sorted rows of a subset whose class sizes fall geometrically, the last 1 / ratio of the
    first. codes: int [N], -1 for no label. Which class is large is drawn by the seed."""
    generator = np.random.default_rng(seed)
    classes = generator.permutation(int(codes.max()) + 1)
    full = int(np.bincount(codes[codes >= 0]).min())
    kept = []
    for place, one in enumerate(classes):
        size = round(full * ratio ** (-place / max(1, len(classes) - 1)))
        kept.append(generator.choice(np.flatnonzero(codes == one), size, replace=False))
    return np.sort(np.concatenate(kept))


def measure_imbalance(
    run_dir: str,
    folder: Path,
    ratios: Sequence[float],
    seeds: Sequence[int],
    overrides: Sequence[str],
) -> list[dict[str, Any]]:
    """Sweeps over `heads.balance` and the true `heads.prior` on long tails of a finished run's
    embeddings. Returns, for each ratio: ratio, sizes, the sweep's results, accuracies of kmeans."""
    run, _, known = open_labeled(run_dir)
    made = run.manifest("embeddings").id[:8]  # other embeddings are other work
    return [
        _measure_tail(run, known.codes, folder / f"{made}-{ratio:g}", ratio, seeds, overrides)
        for ratio in ratios
    ]


def _measure_tail(
    run: Any,
    codes: np.ndarray,
    folder: Path,
    ratio: float,
    seeds: Sequence[int],
    overrides: Sequence[str],
) -> dict[str, Any]:
    import yaml

    from icce_ray import config as configs
    from icce_ray.core.evaluation import kmeans as kmeans_
    from icce_ray.core.evaluation import truth as metrics
    from icce_ray.sweeps import running as sweep

    rows = long_tail(codes, ratio, seed=0)
    x, y = np.asarray(run.matrix("embeddings", "embedding")[rows]), codes[rows]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    sizes = np.bincount(y).tolist()
    choices = {"seed": list(seeds), "heads.balance": [0.5, 0.25, 0.0], "heads.prior": [sizes]}
    space = {"search": "each", "early_stop": False, "space": choices}
    (folder / "imbalance.yaml").write_text(yaml.safe_dump(space))
    tree = {
        "num_classes": len(sizes),
        "run_dir": str(folder / "run"),
        "data": {"embeddings": str(folder / "x.npy"), "labels": str(folder / "y.npy")},
    }
    results = sweep.run(configs.load(tree, overrides), str(folder / "imbalance.yaml"))
    kmeans = [metrics.scores(y, kmeans_.kmeans_baseline(x, len(sizes), seed)) for seed in seeds]
    return {"ratio": ratio, "sizes": sizes, "results": results, "kmeans": kmeans}


def imbalance_table(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each setting, and one for k-means; accuracy (percent), and the evidence that the
    balance is chosen by, at each ratio."""
    head, lines = ["setting"], {}
    for one in found:
        head += [f"1:{one['ratio']:g}, ACC", "evidence"]
        for name, trials in by_settings(one["results"]).items():
            evidence = spread([trial["scores"]["neighbor_evidence"] for trial in trials], 3)
            cells = [spread([100 * trial["accuracy"]["acc"] for trial in trials]), evidence]
            lines.setdefault("heads.prior" if "prior" in name else name, []).extend(cells)
        kmeans = spread([100 * scores["acc"] for scores in one["kmeans"]])
        lines.setdefault("k-means", []).extend([kmeans, "-"])
    return markdown(head, [[name, *cells] for name, cells in lines.items()])
