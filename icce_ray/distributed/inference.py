"""A model over all images: the models that actors hold, and what the driver does with results.

`embed`, `predict` and fine-tuning differ in the model, and in where the results go. All else is
`infer`: find what is missing, stream it, check it, hand it to the shards.
Shapes: N images, B batch, D features, K clusters, S side of the input.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from icce_ray.config.schema import BackboneConfig
from icce_ray.core.preprocess import Preprocess, distinct
from icce_ray.core.samples import AS_IS, Levels, levels_in, with_levels
from icce_ray.distributed import stream
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.stream import Columns, Job
from icce_ray.errors import ArtifactError, StageError
from icce_ray.rundir import copies
from icce_ray.rundir.curated import Naming, naming
from icce_ray.rundir.directory import Manifest, RunDirectory, stored
from icce_ray.rundir.progress import Reporter

if TYPE_CHECKING:
    import torch

UNIT = 1e-2  # largest deviation of a row's length from 1
CLASSIFIER = "classifier"  # the folder of a run's classifier
WEIGHTS, DESCRIPTION = "classifier.safetensors", "classifier.json"
NOVELTY = "novelty.safetensors"  # beside them: images of the run that new ones are compared with


# --- the models, in the actors -------------------------------------------------------------------


def preparations(backbones: Sequence[BackboneConfig]) -> tuple[tuple[Preprocess, ...], list[int]]:
    """The distinct preparations of several backbones, and which of them each one uses."""
    from icce_ray.core import backbone as core

    return distinct([core.preprocess(config) for config in backbones])


def levels_of_run(run: RunDirectory) -> Levels:
    """What the images of a run were embedded with."""
    done = run.manifest("embeddings")
    return levels_in(done.results.get("backbones") or () if done else ())


class Embedder:
    """Unit-norm features of one or several backbones (see core.backbone.join).

    Args:
        slots: which of the distinct preparations each backbone takes; see `preparations`.
        precision: embed.precision; once loaded, what the device computes in.
        levels: what the images were decoded with, for the descriptions.
    """

    product = "feature vectors"

    def __init__(
        self,
        configs: Sequence[BackboneConfig],
        slots: Sequence[int],
        precision: str,
        levels: Levels = AS_IS,
    ) -> None:
        self.configs, self.slots, self.levels = configs, slots, levels
        self.asked = precision
        self.precision: Any = precision
        self.backbones: list[Any] = []

    def load(self, device: torch.device) -> list[dict[str, Any]]:
        """Load the backbones onto the device; returns their descriptions."""
        from icce_ray.core import backbone as core

        loaded = [core.load(config, local_weights(config)) for config in self.configs]
        self.precision = core.arithmetic(self.asked, device)
        described = [
            {**with_levels(one.describe(), self.levels), "precision": self.precision}
            for one in loaded
        ]
        self.backbones = [one.on(device, self.precision) for one in loaded]
        return described

    def embed(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """uint8 [B, 3, S, S] per distinct preparation -> float32 [B, D], rows of length 1."""
        from icce_ray.core import backbone as core

        pairs = zip(self.backbones, self.slots, strict=True)
        return core.join([one.embed(pixels[slot], self.precision) for one, slot in pairs])

    def compute(self, pixels: Sequence[torch.Tensor]) -> Columns:
        """`embedding` float16 [B, D], and `valid`: finite and not zero."""
        features = self.embed(pixels)
        valid = (features.norm(dim=-1) - 1).abs() < UNIT  # False for NaN
        return {"embedding": features.half().cpu().numpy(), "valid": valid.cpu().numpy()}


def local_weights(config: BackboneConfig) -> str | None:
    """Where this node has a backbone's file of weights, fetched if they are elsewhere."""
    given = config.weights if config.pretrained else None
    return copies.local("backbone.weights", given) if given else None


class Predictor:
    """A run's classifier on top of its backbones; a fine-tuned one brings its own backbone."""

    product = "predictions"

    def __init__(self, run: RunDirectory, embedder: Embedder, finetuned: bool) -> None:
        self.run, self.embedder, self.finetuned = run, embedder, finetuned
        self.classifier: Any = None
        self.dropped: int | None = None  # the cluster of images that nobody wants
        self.reference: Any = None
        self._loaded: tuple[torch.device, list[dict[str, Any]]] | None = None

    def load(self, device: torch.device) -> list[dict[str, Any]]:
        """Have classifier and backbones on the device; returns the backbones' descriptions."""
        if self._loaded is None or self._loaded[0] != device:
            self._loaded = device, self._load(device)
        return self._loaded[1]

    def _load(self, device: torch.device) -> list[dict[str, Any]]:
        from icce_ray.core.backbone import arithmetic
        from icce_ray.core.classifier import model as core

        weights = self.run.read_bytes(CLASSIFIER, WEIGHTS)
        description = self.run.read_json(CLASSIFIER, DESCRIPTION)
        self.classifier, self.dropped = core.load(weights, description), description.get("dropped")
        self.classifier = self.classifier.to(device).eval()
        if not self.finetuned:
            self.reference = self._reference(device)
            return self.embedder.load(device)
        precision = self.embedder.precision = arithmetic(self.embedder.asked, device)
        return [{**self.classifier.backbone.describe(), "precision": precision}]

    def _reference(self, device: torch.device) -> Any:
        from safetensors import SafetensorError
        from safetensors import torch as safetensors

        from icce_ray.core.outliers import Reference

        data = self.run.read_bytes(CLASSIFIER, NOVELTY)
        with stored(self.run.path(CLASSIFIER, NOVELTY)):
            try:
                return Reference.of(safetensors.load(data), device)
            except SafetensorError as error:
                raise ValueError(str(error)) from None

    def compute(self, pixels: Sequence[torch.Tensor]) -> Columns:
        """`cluster` int32 [B], -1 for images like those that were dropped when the clusters were
        curated, `confidence` float32 [B], `novelty` float32 [B] (see core.outliers;
        NaN from a fine-tuned backbone, which has moved the images), and `valid`: finite."""
        import torch

        from icce_ray.core.outliers import novelty

        with torch.inference_mode():
            if self.finetuned:
                logits, new = self._finetuned_logits(pixels), None
            else:
                features = self.embedder.embed(pixels)
                logits, new = self.classifier(features), novelty(self.reference, features)
            largest, cluster = logits.float().softmax(dim=1).max(dim=1)
            named = cluster if self.dropped is None else cluster.where(cluster != self.dropped, -1)
        confidence = largest.cpu().numpy()
        return {
            "cluster": named.cpu().numpy().astype(np.int32),
            "confidence": confidence,
            "novelty": np.full_like(confidence, np.nan) if new is None else new.cpu().numpy(),
            "valid": np.isfinite(confidence),
        }

    def _finetuned_logits(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        half = self.embedder.precision == "bfloat16"
        with torch.autocast(pixels[0].device.type, torch.bfloat16, half):
            return self.classifier(pixels[0])


class Loaded:
    """What the actors say they loaded; all must have the same weights."""

    def __init__(self, expected: Sequence[Mapping[str, Any]] = ()) -> None:
        self.backbones = [dict(one) for one in expected]
        self._seen = False

    @property
    def precision(self) -> str:
        """Arithmetic of the actors so far; of several, joined by `and`."""
        return str(self.backbones[0].get("precision", "")) if self.backbones else ""

    @property
    def mixed(self) -> bool:
        """Whether machines computed in different precisions."""
        return " and " in self.precision

    @property
    def names(self) -> str:
        """The backbones, for messages."""
        return ", ".join(one["name"] for one in self.backbones)

    def see(self, notes: np.ndarray) -> bool:
        """Take in the notes of a batch. Returns True where they are the first of this process, or
        name another precision than those before.

        Raises:
            StageError: an actor with other weights than the first, or than an earlier run.
        """
        news = False
        for note in notes[notes.astype(bool)]:
            backbones = json.loads(note)["backbones"]
            news, self._seen = news or not self._seen, True
            self.backbones = self.backbones or backbones
            for one, other in zip(self.backbones, backbones, strict=True):
                if one["sha256"] != other["sha256"]:
                    raise StageError(
                        f"the weights of {one['name']} differ: {one['sha256'][:12]} from "
                        f"{one['source']} before, {other['sha256'][:12]} from {other['source']} "
                        "now. All workers need the same file; after a change of weights add "
                        "--overwrite, or choose another run_dir."
                    )
                known = one.setdefault("precision", other["precision"])
                if other["precision"] not in known:
                    one["precision"], news = f"{known} and {other['precision']}", True
        return news

    def describe(self) -> list[str]:
        """One line per backbone."""
        return [
            f"backbone {one['name']}: {one['source']}, sha256 {one['sha256'][:12]}, "
            f"D {one['features']}, {one['input_size']} x {one['input_size']} pixels, "
            f"{one['precision']}"
            for one in self.backbones
        ]


class Opened(NamedTuple):
    """The classifier of a run, to be sent to where it works: it is not loaded yet."""

    model: Predictor
    preprocess: tuple[Preprocess, ...]  # distinct ones, in the order that the model takes
    levels: Levels
    loaded: Loaded  # knows the backbones' weights, as the run had them
    naming: Naming  # of its clusters


def finished_classifier(run: RunDirectory) -> Manifest:
    """The manifest of a run's classifier. Raises ArtifactError: there is none."""
    trained = run.manifest(CLASSIFIER)
    if trained is None:
        raise ArtifactError(f"{run.uri} has no finished classifier; run it first: icce-ray run")
    return trained


def open_classifier(run: RunDirectory, precision: str) -> Opened:
    """A run's classifier, and how it wants its images. precision: embed.precision.

    Raises:
        ConfigError: it was made from given embeddings, or timm does not know its backbone.
        ArtifactError: a damaged description.
    """
    from icce_ray.core.classifier import model as core

    description = run.read_json(CLASSIFIER, DESCRIPTION)
    with stored(run.path(CLASSIFIER, DESCRIPTION)):
        backbones = core.backbones_of(description)
        levels, finetuned = levels_in(description["backbone"]), description["kind"] == "finetune"
    preprocess, slots = preparations(backbones)
    model = Predictor(run, Embedder(backbones, slots, precision, levels), finetuned)
    loaded = Loaded(() if finetuned else _as_made(description))
    suggested = naming(run).words  # not the classifier's: it may be older than they are
    known = Naming(description.get("names", ()), description.get("dropped"), suggested)
    return Opened(model, preprocess, levels, loaded, known)


def _as_made(description: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Backbones with the hash of their weights, as the run had them."""
    described = description["backbone"]
    if not all("sha256" in one for one in described):
        return []
    return [{k: v for k, v in one.items() if k != "precision"} for one in described]


# --- in the driver -------------------------------------------------------------------------------


class Results(Protocol):
    """Where results go: `shards.Shards` or `shards.Arrays`."""

    @property
    def missing(self) -> np.ndarray: ...
    def add(self, columns: Columns, keep: np.ndarray) -> int: ...
    def check(self) -> None: ...


Accept = Callable[[Columns], tuple[Columns, np.ndarray]]


class Inference:
    """One model over the images of a table, into `results`.

    Args:
        cluster: None for a few images: they are looked at in this process, without Ray.
        table: ADDRESS columns of all images; row i has image_id i.
        results: knows which rows are missing, and takes in what comes.
        accept: a batch with reason ("" where all is well) and the model's columns -> the columns to
            keep, and which rows get one. Called once for each batch, in the driver.
        loaded: what an earlier run of the same artifact had loaded.
        on_load: called when the actors say for the first time what they loaded, or something new.
    """

    def __init__(
        self,
        cluster: Cluster | None,
        reporter: Reporter,
        table: pa.Table,
        results: Results,
        accept: Accept,
        *,
        loaded: Loaded | None = None,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        self.cluster, self.reporter, self.table = cluster, reporter, table
        self.results, self.accept = results, accept
        self.loaded, self.on_load = loaded or Loaded(), on_load

    def run(self, job: Job, title: str) -> float:
        """Do what is missing. Returns images per second, without the time actors take to start.

        Raises:
            StageError: results that are not finite, weights that differ, images that never came
                back, or what `stream.stream` raises.
        """
        missing, total = self.results.missing, self.table.num_rows
        rate = 0.0
        if len(missing):
            if len(missing) < total:
                self.reporter.say(f"{total - len(missing):,} of {total:,} images were done before")
            rate = self._gather(job, missing, title)
        self.results.check()
        return rate

    def _gather(self, job: Job, missing: np.ndarray, title: str) -> float:
        total, done = self.table.num_rows, self.table.num_rows - len(missing)
        table = self.table if not done else self.table.take(pa.array(missing))
        if self.cluster is None:
            batches = stream.here(table, job)
        else:
            batches = stream.stream(self.cluster, table, job, self.reporter)
        first = next(batches, None)  # takes long: actors start and load the model
        if first is None:
            return 0.0
        done += self._take(first, job)
        started, counted = time.monotonic(), 0
        with self.reporter.bar(title, total, "images", done=done) as bar:
            for batch in batches:
                counted += (count := self._take(batch, job))
                done += count
                rate = counted / max(1e-9, time.monotonic() - started)
                bar.update(done, f"{rate:,.0f} images/s")
        return counted / max(1e-9, time.monotonic() - started)

    def _take(self, batch: Columns, job: Job) -> int:
        """How many images of the batch are new."""
        if self.loaded.see(batch["note"]):
            for line in self.loaded.describe():
                self.reporter.say(line)
            self.on_load()
        wrong = batch["image_id"][~batch["reason"].astype(bool) & ~batch["valid"]]
        if len(wrong):
            raise StageError(
                f"{self.loaded.names} gave {len(wrong)} {job.model.product} of one batch that are "
                f"zero or not finite, the first for {self.table['uri'][int(wrong[0])].as_py()}. "
                "Check the weights, or try embed.precision=float32."
            )
        columns, keep = self.accept(batch)
        return self.results.add(columns, keep)
