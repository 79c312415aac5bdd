"""Classify: train the classifier that labels new images, on the consensus as pseudo-labels.

A probe reads the embeddings and trains in one Ray task, or by data on Ray Train workers.
Fine-tuning starts from such a probe and trains it together with the backbone: Ray Data decodes
images on CPU cores and feeds Ray Train workers. Both write the same artifact:

    classifier/classifier.safetensors + classifier.json   see core/classifier.py; loads without Ray
    classifier/novelty.safetensors                        see core/outliers.py; not of finetune
    classifier/_history.json                              per epoch: loss, agreement with consensus
    classifier/part-00000.parquet                         the classifier's own opinion of each row

Rows are those of embeddings/: an image in quarantine is never fed.
Shapes: N rows, B batch, D features, K clusters, S image side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import torch as safetensors

from icce_ray.core.tensors import below
from icce_ray.distributed.checkpoints import TRAIN
from icce_ray.distributed.finetune import finetune
from icce_ray.distributed.inference import (
    NOVELTY,
    Embedder,
    Inference,
    Predictor,
    levels_of_run,
    preparations,
)
from icce_ray.distributed.probe import (
    HISTORY,
    as_module,
    describe_backbones,
    probe_in_group,
    probe_in_task,
    task_of,
    unpack_history,
    write_classifier,
)
from icce_ray.distributed.shards import Arrays
from icce_ray.distributed.stream import ADDRESS, Columns, Job
from icce_ray.errors import ArtifactError, StageError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import CONSENSUS_SCHEMA
from icce_ray.stages.base import Context, Outcome

FOLDER = "classifier"
OPINIONS = "part-00000.parquet"


def _run_probe(context: Context, task: Mapping[str, Any]) -> dict[str, Any]:
    chosen, run = context.config.classifier, context.run
    if chosen.num_workers:
        result = probe_in_group(context, task, chosen.num_workers)
    else:
        result = probe_in_task(context, task)
    history = unpack_history(result["history"])
    write_classifier(run, as_module(result, chosen), _origin(context), history)
    run.write_bytes(safetensors.save(below(result, "novelty.")), FOLDER, NOVELTY)
    _write_opinions(run, result["clusters"].numpy(), result["confidence"].numpy())
    return {"workers": chosen.num_workers or 0}


def _origin(context: Context) -> dict[str, Any]:
    """What the features came from, so that new images get the same ones."""
    if context.config.data.embeddings:
        return {"backbone": [], "transform": []}
    done = context.run.manifest("embeddings")
    described = list(done.results.get("backbones", [])) if done else []
    return describe_backbones(context.config.backbone, described)


def _write_opinions(run: RunDirectory, clusters: np.ndarray, confidence: np.ndarray) -> None:
    table = pa.table(
        {
            "image_id": np.asarray(run.matrix("embeddings", "image_id")),
            "cluster": clusters,
            "confidence": confidence,
        }
    )
    run.write_table(table.cast(CONSENSUS_SCHEMA), FOLDER, OPINIONS)


def _addresses(run: RunDirectory) -> pa.Table:
    """Where each embedded image is: the columns that decoding needs, [N]."""
    index = run.read_table("index", columns=list(ADDRESS))
    image_ids = np.asarray(run.matrix("embeddings", "image_id"))
    table = index.take(pa.array(image_ids))  # image_id is the position in the index
    if not np.array_equal(table["image_id"].to_numpy(), image_ids):
        raise ArtifactError(f"{run.path('index')} is not in the order of image_id")
    return table


def _run_finetune(context: Context, task: Mapping[str, Any]) -> dict[str, Any]:
    table = _addresses(context.run)
    results = finetune(context, task, table)
    _write_opinions(context.run, *_ask(context, table))
    return results


def _ask(context: Context, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Cluster int32 [N] and confidence float32 [N] of every row by the fine-tuned model."""
    config = context.config
    preprocess, slots = preparations(config.backbone)
    embedder = Embedder(config.backbone, slots, config.embed.precision)  # only for its precision
    model = Predictor(context.run, embedder, finetuned=True)
    job = Job(model, preprocess, config.embed, levels_of_run(context.run))
    answers = Arrays(len(table))
    place = table.schema.get_field_index("image_id")
    numbered = table.set_column(place, "image_id", pa.array(np.arange(len(table))))  # from 0

    def accept(batch: Columns) -> tuple[Columns, np.ndarray]:
        kept = {name: batch[name] for name in ("image_id", "cluster", "confidence")}
        return kept, ~batch["reason"].astype(bool)

    inference = Inference(context.cluster, context.reporter, numbered, answers, accept)
    inference.run(job, "classifying the training images")
    _check_answers(answers, table)
    return answers.columns["cluster"], answers.columns["confidence"]


def _check_answers(answers: Arrays, table: pa.Table) -> None:
    """Raises StageError where an image that was embedded can no longer be read."""
    missing = np.flatnonzero(~answers.kept)
    if len(missing):
        raise StageError(
            f"{len(missing)} images that were embedded can no longer be read, the first is "
            f"{table['uri'][int(missing[0])].as_py()}. Restore them and run the same command "
            "again: the trained classifier is kept."
        )


def run(context: Context) -> Outcome:
    """Train the classifier on the consensus. Raises DataError, StageError."""
    config, run = context.config, context.run
    task = task_of(config)
    finetune = config.classifier.kind == "finetune"
    results = _run_finetune(context, task) if finetune else _run_probe(context, task)
    history = run.read_json(FOLDER, HISTORY)
    opinions = run.read_table(FOLDER, OPINIONS, columns=["cluster"])["cluster"].to_numpy()
    agreement = float((opinions == run.matrix("consensus", "cluster")).mean())
    run.delete(f"{FOLDER}/{TRAIN}")
    return Outcome(
        len(opinions),
        {
            "kind": config.classifier.kind,
            "agreement": agreement,
            "final_loss": history[-1]["loss"],
            "epochs": len(history),
            **results,
        },
    )
