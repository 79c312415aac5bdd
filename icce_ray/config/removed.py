"""Settings of earlier versions, and what to do instead: for a YAML that still has them."""

from __future__ import annotations

from collections.abc import Mapping

NO_GAIN = "It did not help in any measurement. Delete it"
ONE_GPU_SETTING = "Use ray.num_gpus, for all stages"

REMOVED: Mapping[str, str] = {
    "neighbors.mutual": f"{NO_GAIN}; neighbors are always in order of similarity.",
    "neighbors.query_rows": "Shards of the search have a fixed size. Delete it.",
    "neighbors.num_gpus": f"{ONE_GPU_SETTING}.",
    "embed.num_gpus": f"{ONE_GPU_SETTING}.",
    "embed.min_actors": "Embedding starts with one actor and adds others. Delete it.",
    "heads.num_gpus": f"{ONE_GPU_SETTING}.",
    "heads.min_workers": "Use ray.min_workers, for all trainings.",
    "heads.feature_share": f"{NO_GAIN}; each head sees all components.",
    "heads.image_share": f"{NO_GAIN}; each head is trained on all images.",
    "heads.neighbor_share": f"{NO_GAIN}; each head is trained on all kept neighbors.",
    "heads.split": "Workers share the heads. Delete it.",
    "heads.warmup": "The learning rate rises over a fixed share of the steps. Delete it.",
    "heads.weight_decay": "It is a constant. Delete it.",
    "heads.pmi_weight": "The pointwise mutual information always has weight 1; see heads.beta and "
    "heads.cross_entropy.",
    "heads.sinkhorn": "Use heads.sinkhorn_iterations=0 to switch it off.",
    "consensus.weights": f"{NO_GAIN}; each kept head counts the same.",
    "consensus.keep_by": f"{NO_GAIN}; heads are always kept by what their clusters say about their "
    "neighbors'.",
    "consensus.max_rows": "It is a constant. Delete it.",
    "consensus.iterations": "It is a constant. Delete it.",
    "consensus.method=hgpa": "Use mcla, hbgf or dawid-skene.",
    "classifier.hidden": "The hidden layer of an mlp has 512 units. Delete it.",
    "classifier.weight_decay": "It is a constant. Delete it.",
    "classifier.num_gpus": f"{ONE_GPU_SETTING}.",
    "classifier.min_workers": "Use ray.min_workers, for all trainings.",
    "evaluate.kmeans_restarts": "k-means is restarted 10 times. Delete it.",
    "evaluate.require_labels": "`icce-ray run` says where it finds no ground truth. Delete it.",
    "report.thumbnail": "Thumbnails have a fixed size. Delete it.",
}
