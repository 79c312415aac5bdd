"""The classifier that labels new images: a probe on frozen features, or a fine-tuned backbone.

Shapes: N rows, B batch, D features, K clusters, S image side, W width of a probe's hidden layer.

A classifier is two files: `classifier.safetensors` (tensors) and `classifier.json` (a plain
description). Neither Ray nor this package is needed to use them.

    linear     weight [K, D], bias [K], applied to the L2-normalized embedding
    mlp        hidden.weight [W, D], hidden.bias [W], GELU, weight [K, W], bias [K]
    finetune   backbone.* (the timm model's own names), head.weight [K, D], head.bias [K]

A fine-tuned file with plain torch and timm, for pooling=auto (`images` prepared as
`description["transform"]` says):

    tensors = safetensors.torch.load_file("classifier.safetensors")
    description = json.loads(Path("classifier.json").read_text())
    backbone = description["backbone"][0]
    model = timm.create_model(backbone["name"], num_classes=0, **backbone["model_args"]).eval()
    model.load_state_dict(
        {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    )
    features = torch.nn.functional.normalize(model(images), dim=1)
    logits = features @ tensors["head.weight"].T + tensors["head.bias"]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

from icce_ray.config import BackboneConfig, ClassifierConfig
from icce_ray.core.collective import Alone, Collective
from icce_ray.core.optimizer import AdamW
from icce_ray.errors import ArtifactError, DataError, StageError

FORMAT = 1  # of classifier.json
WARMUP = 0.05  # share of the steps over which the learning rate rises
STATISTICS_ROWS = 50_000  # rows that the input's mean and deviation are taken from
PREDICT_ROWS = 8192  # rows per forward pass of a probe
SMALL_EPOCH = 50  # with few rows, batches shrink until an epoch has this many steps
CHECK_EVERY = 50  # steps at most between looks at the loss: each look waits for the device
CHECK_SECONDS = 2.0  # ... and seconds at most
CALIBRATED_ROWS = 10_000  # that calibration looks at
TEMPERATURES = (math.log(0.05), math.log(50.0))  # between which calibration looks
CLIP = 1.0  # fine-tuning: largest norm of the gradient
CROP = (0.6, 1.0)  # fine-tuning: share of the image's area that a random crop keeps

OnStep = Callable[[int, int, float], None]  # (steps done, steps in all, loss of the last one)
Matrix = np.ndarray | Tensor


# --- modules -------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Unit-norm embeddings float32 [B, D] -> logits [B, K].

    The coordinates of a unit vector are about 1 / sqrt(D): inputs are standardized by `shift` and
    `scale`, so that one learning rate suits every backbone. `folded` takes both into the weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        kind: Literal["linear", "mlp"],
        features: int,
        num_clusters: int,
        hidden: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.features, self.num_clusters = kind, features, num_clusters
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.hidden = nn.Linear(features, hidden) if kind == "mlp" else None
        self.out = nn.Linear(hidden if kind == "mlp" else features, num_clusters)
        self._initialize(seed)

    @torch.no_grad()
    def _initialize(self, seed: int) -> None:
        """He's uniform rule for the hidden layer; zeros, that is equal odds, for the last one."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        if self.hidden is not None:
            generator = torch.Generator().manual_seed(seed)
            nn.init.kaiming_uniform_(self.hidden.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(self.hidden.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        x = (embeddings - self.shift) * self.scale
        return self.out(x) if self.hidden is None else self.out(F.gelu(self.hidden(x)))

    @torch.no_grad()
    def folded(self) -> Classifier:
        """The same function without standardization: W (x - m) s + b = (W s) x + (b - (W s) m)."""
        width = self.hidden.out_features if self.hidden is not None else 1
        new = Classifier(self.kind, self.features, self.num_clusters, width)
        new.load_state_dict({key: value.cpu() for key, value in self.state_dict().items()})
        first = new.hidden if new.hidden is not None else new.out
        weight = first.weight.double() * new.scale.double()
        first.bias.copy_(first.bias.double() - weight @ new.shift.double())
        first.weight.copy_(weight)
        new.shift.zero_()
        new.scale.fill_(1.0)
        return new.to(self.out.weight.device)


class FineTuned(nn.Module):
    """Images uint8 [B, 3, S, S] -> logits [B, K]: backbone, L2 normalization, linear head."""

    def __init__(self, backbone: nn.Module, head: Classifier) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):  # the head is small, and exact
            return self.head(F.normalize(features.float(), dim=1))


# --- rows of a matrix ----------------------------------------------------------------------------


class _Rows:
    """Rows of a float16 matrix [N, D] as float32 batches on the device.

    The matrix is copied to a GPU that has room for it; elsewhere only the rows asked for are read.
    """

    def __init__(self, features: Matrix, device: torch.device) -> None:
        self.device = device
        self.source = _on_device(features, device)
        self.shape = tuple(features.shape)

    def take(self, rows: Tensor) -> Tensor:
        if isinstance(self.source, Tensor):
            return self.source[rows.to(self.source.device)].to(self.device).float()
        picked = torch.from_numpy(self.source[rows.numpy()])
        return picked.to(self.device).float()


def _on_device(features: Matrix, device: torch.device) -> Matrix:
    if device.type != "cuda" or isinstance(features, Tensor):
        return features
    if features.nbytes > 0.5 * torch.cuda.mem_get_info(device)[0]:
        return features
    out = torch.empty(features.shape, dtype=torch.float16, device=device)
    for start in range(0, len(features), PREDICT_ROWS):
        part = np.array(features[start : start + PREDICT_ROWS])
        out[start : start + len(part)] = torch.from_numpy(part).to(device)
    return out


def default_device() -> torch.device:
    """The GPU given to this process, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _standardize(model: Classifier, rows: _Rows) -> None:
    """Set shift and scale from evenly spaced rows. Coordinates that hardly vary are not blown up:
    their deviation counts as at least a hundredth of the root mean square of all of them."""
    total = rows.shape[0]
    index = torch.linspace(0, total - 1, min(total, STATISTICS_ROWS), dtype=torch.float64).long()
    mean = torch.zeros(rows.shape[1], dtype=torch.float64)
    square = torch.zeros_like(mean)
    for part in index.split(1024):  # float32 sums of few rows, added up in float64
        x = rows.take(part)
        mean += x.sum(0).double().cpu() / len(index)
        square += x.square().sum(0).double().cpu() / len(index)
    deviation = (square - mean.square()).clamp_min(0).sqrt()
    floor = 0.01 * deviation.square().mean().sqrt()
    model.shift.copy_(mean)
    model.scale.copy_(1 / deviation.clamp_min(floor if floor > 0 else 1.0))


# --- training of both kinds ----------------------------------------------------------------------


def lr_factor(step: int, total: int, warmup: float = WARMUP) -> float:
    """Linear warm-up, then a cosine to 0; `step` counts from 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return (step + 1) / rise
    return (math.cos(math.pi * min(1.0, (step - rise) / max(1, total - rise))) + 1) / 2


def _set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _groups(named: Iterable[tuple[str, nn.Parameter]], peak: float) -> list[dict[str, Any]]:
    """Parameter groups of one peak learning rate; biases and gains are not decayed."""
    parameters = [parameter for _, parameter in named if parameter.requires_grad]
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return [
        {"params": matrices, "lr": peak, "peak": peak},
        {"params": vectors, "lr": peak, "peak": peak, "weight_decay": 0.0},
    ]


class _Meter:
    """Sums over an epoch. Reads losses back from the device only now and then."""

    def __init__(self, done: int, total: int, on_step: OnStep | None) -> None:
        self.done, self.total, self.on_step = done, total, on_step
        self.loss_sum = self.hits = self.rows = 0.0
        self._losses: list[Tensor] = []
        self._hits: list[Tensor] = []
        self._looked = time.monotonic()

    def add(self, loss: Tensor, hits: Tensor, rows: int) -> None:
        """loss: mean over the `rows` rows of a step; hits: how many of them agree."""
        self._losses.append(loss.detach() * rows)
        self._hits.append(hits)
        self.rows += rows
        self.done += 1
        waited = time.monotonic() - self._looked
        if len(self._losses) >= CHECK_EVERY or waited > CHECK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Raises StageError that names the first step whose loss is not finite."""
        if not self._losses:
            return
        self._looked = time.monotonic()
        losses = torch.stack(self._losses).double().cpu()
        bad = (~torch.isfinite(losses)).nonzero().flatten()
        if len(bad):
            step = self.done - len(losses) + int(bad[0])
            raise StageError(
                f"the classifier's loss is not finite at step {step} of {self.total}. Lower "
                "classifier.lr (and backbone_lr), and check that the embeddings are finite."
            )
        self.loss_sum += float(losses.sum())
        self.hits += float(torch.stack(self._hits).sum())
        self._losses, self._hits = [], []
        if self.on_step:
            self.on_step(self.done, self.total, self.loss_sum / max(1.0, self.rows))

    def summary(self) -> dict[str, float]:
        self.flush()
        rows = max(1.0, self.rows)
        return {"loss": self.loss_sum / rows, "agreement": self.hits / rows}


# --- probes --------------------------------------------------------------------------------------


def probe_batch(rows: int, wanted: int) -> int:
    """Rows per step: as wanted, but fewer for small data, which would get too few steps."""
    return min(wanted, math.ceil(rows / SMALL_EPOCH))


def probe_steps(rows: int, settings: ClassifierConfig) -> int:
    """Steps that train_probe takes in all."""
    return settings.epochs * math.ceil(rows / probe_batch(rows, settings.batch_size))


def train_probe(
    features: Matrix,
    labels: np.ndarray,
    weights: np.ndarray,
    settings: ClassifierConfig,
    num_clusters: int,
    seed: int,
    collective: Collective | None = None,
    on_step: OnStep | None = None,
    device: torch.device | None = None,
) -> tuple[Classifier, list[dict[str, float]]]:
    """Fit a probe to pseudo-labels by weighted cross-entropy (AdamW, warm-up, cosine).

    Args:
        features: unit rows, float16 or float32 [N, D]; may be memory-mapped.
        labels: pseudo-label of each row, integers in 0..K-1 [N]; clusters may have no row.
        weights: confidence of each label, >= 0 [N]; only their ratios matter.
        settings: kind (finetune: a linear probe, to start from), hidden, epochs, batch_size, lr,
            weight_decay.
        seed: of the initial weights and of the order of the rows.
        collective: workers that share every batch. All pass the same data and seed, and get the
            same classifier as one worker alone would, up to the order of float sums.
        on_step: called every few steps, and at each epoch's end.
        device: default: the GPU of this process, else the CPU.

    Returns:
        The classifier, and per epoch its mean loss and the share of rows it agrees with.

    Raises:
        DataError: labels or weights do not fit.
        StageError: a loss that is not finite, naming the step.
    """
    device = device or default_device()
    _check_labels(features, labels, weights, num_clusters)
    rows = _Rows(features, device)
    kind: Literal["linear", "mlp"] = "mlp" if settings.kind == "mlp" else "linear"
    model = Classifier(kind, rows.shape[1], num_clusters, settings.hidden, seed)
    _standardize(model, rows)
    trainer = _ProbeTrainer(model.to(device), rows, labels, weights, settings, seed)
    trainer.group = collective or Alone()
    history = [trainer.epoch(number, on_step) for number in range(settings.epochs)]
    return model.eval(), history


def _check_labels(
    features: Matrix, labels: np.ndarray, weights: np.ndarray, num_clusters: int
) -> None:
    if len(features) == 0:
        raise DataError("there are no rows to train the classifier on")
    if not len(features) == len(labels) == len(weights):
        raise DataError(
            f"{len(features)} embeddings, {len(labels)} pseudo-labels and {len(weights)} weights: "
            "their numbers must be equal"
        )
    if labels.min() < 0 or labels.max() >= num_clusters:
        raise DataError(
            f"pseudo-labels must lie in 0..{num_clusters - 1}; found {labels.min()}..{labels.max()}"
        )
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.max() <= 0:
        raise DataError("the pseudo-labels' weights must be finite, >= 0, and not all 0")


def normalized_weights(weights: np.ndarray) -> np.ndarray:
    """Weights of mean 1, float32 [N], so that the learning rate means the same for all runs."""
    return (weights / weights.mean(dtype=np.float64)).astype(np.float32)


class _ProbeTrainer:
    """Epochs over the rows of a matrix."""

    group: Collective = Alone()

    def __init__(
        self,
        model: Classifier,
        rows: _Rows,
        labels: np.ndarray,
        weights: np.ndarray,
        settings: ClassifierConfig,
        seed: int,
    ) -> None:
        self.model, self.rows, self.seed = model, rows, seed
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.weights = torch.from_numpy(normalized_weights(weights))
        self.batch = probe_batch(rows.shape[0], settings.batch_size)
        self.steps = math.ceil(rows.shape[0] / self.batch)  # per epoch
        self.total = self.steps * settings.epochs
        self.optimizer = AdamW(
            _groups(model.named_parameters(), settings.lr), weight_decay=settings.weight_decay
        )

    def epoch(self, number: int, on_step: OnStep | None) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(self.rows.shape[0], generator=generator)
        meter = _Meter(number * self.steps, self.total, on_step)
        for batch in order.split(self.batch):
            _set_lr(self.optimizer, lr_factor(meter.done, self.total))
            meter.add(*self._step(batch), rows=len(batch))
        return {"epoch": number + 1, **meter.summary()}

    def _step(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """One update on this worker's slice of a batch. Returns the whole batch's loss and hits."""
        mine = batch[self.group.rank :: self.group.world]
        labels = self.labels[mine].to(self.rows.device)
        logits = self.model(self.rows.take(mine))
        each = F.cross_entropy(logits, labels, reduction="none")
        weighted = each * self.weights[mine].to(self.rows.device)
        loss = weighted.sum() * (self.group.world / len(batch))  # the mean over workers is exact
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        hits = (logits.argmax(1) == labels).sum().float() * self.group.world
        loss = loss.detach()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.group.all_reduce_mean_([*grads, loss, hits])
        self.optimizer.step()
        return loss, hits


@torch.no_grad()
def calibrate(classifier: Classifier, features: Matrix, confidence: np.ndarray) -> float:
    """Divide the logits by the temperature at which probabilities are as sure as the consensus.

    A probe of pseudo-labels is as good as certain of nearly every one, right or wrong. Temperature
    scaling (Guo et al., ICML 2017) changes no prediction; for want of labels, the most probable
    cluster counts as right as often as the consensus is confident. Returns the temperature.

    Args:
        features: unit rows [N, D] that it was trained on.
        confidence: of the consensus, [N], 0..1.
    """
    rows = np.linspace(0, len(features) - 1, min(len(features), CALIBRATED_ROWS)).astype(np.int64)
    x = torch.as_tensor(features[rows]).to(classifier.out.weight.device).float()
    logits = classifier(x).cpu()
    wanted = float(np.mean(confidence[rows], dtype=np.float64))

    def excess(log_temperature: float) -> float:
        scaled = logits * math.exp(-log_temperature)
        return float(scaled.softmax(1).amax(1).mean()) - wanted

    low, high = TEMPERATURES
    if excess(low) <= 0:  # one cluster, or confidence in all
        return 1.0
    reached = excess(high) < 0  # not with a confidence of 1 / K or less
    temperature = math.exp(brentq(excess, low, high, xtol=1e-3) if reached else high)
    for parameter in (classifier.out.weight, classifier.out.bias):
        parameter.div_(temperature)
    return temperature


# --- prediction ----------------------------------------------------------------------------------


@torch.inference_mode()
def predict_proba(
    classifier: Classifier, features: Matrix, device: torch.device | None = None
) -> Iterator[Tensor]:
    """Probabilities of consecutive chunks of rows, float32 [B, K] on the CPU."""
    device = device or default_device()
    model = classifier.to(device).eval()
    for start in range(0, len(features), PREDICT_ROWS):
        part = features[start : start + PREDICT_ROWS]
        x = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        yield model(x.to(device).float()).softmax(1).cpu()


def predict(
    classifier: Classifier, features: Matrix, device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Most probable cluster int32 [N] and its probability float32 [N]."""
    clusters = np.empty(len(features), np.int32)
    confidence = np.empty(len(features), np.float32)
    start = 0
    for probabilities in predict_proba(classifier, features, device):
        value, index = probabilities.max(1)
        clusters[start : start + len(value)] = index.numpy()
        confidence[start : start + len(value)] = value.numpy()
        start += len(value)
    return clusters, confidence


# --- fine-tuning ---------------------------------------------------------------------------------


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop, resized back, and a random mirror image of each. uint8 [B, 3, S, S] -> same.

    Both are one affine map per image, applied to the whole batch on its device.
    """
    count, device = len(images), images.device
    u = torch.rand(4, count, generator=generator, device=generator.device).to(device)
    side = (CROP[0] + (CROP[1] - CROP[0]) * u[0]).sqrt()
    mirror = torch.where(u[1] < 0.5, -1.0, 1.0)
    offset = (2 * u[2:] - 1) * (1 - side)  # keeps the crop inside the image
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = offset.T
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return out.round().clamp(0, 255).to(torch.uint8)


def finetune_optimizer(model: FineTuned, settings: ClassifierConfig) -> AdamW:
    """AdamW with backbone_lr for the backbone and lr for the head."""
    groups = _groups(model.backbone.named_parameters(), settings.backbone_lr)
    groups += _groups(model.head.named_parameters(), settings.lr)
    return AdamW(groups, weight_decay=settings.weight_decay)


def finetune_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, Tensor],
    generator: torch.Generator,
    bfloat16: bool = True,
) -> tuple[Tensor, Tensor]:
    """One update. Returns the weighted mean cross-entropy and the number of rows that agree.

    Args:
        model: a FineTuned, or one wrapped for data-parallel training.
        batch: image uint8 [B, 3, S, S], label int64 [B], weight float32 [B] (mean 1 over all rows).
    """
    images, labels, weights = batch["image"], batch["label"], batch["weight"]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(augment(images, generator)).float()
    each = F.cross_entropy(logits, labels, reduction="none")
    loss = (each * weights).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return loss.detach(), (logits.argmax(1) == labels).sum().float()


@dataclass(frozen=True)
class Position:
    """Where an epoch stands in the whole training."""

    epoch: int  # from 0
    steps: int  # per epoch
    epochs: int


def finetune_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Mapping[str, Tensor]],
    position: Position,
    seed: int,
    bfloat16: bool = True,
    collective: Collective | None = None,
    on_step: OnStep | None = None,
) -> dict[str, float]:
    """One pass over this worker's batches. Returns loss and agreement over all workers.

    The model stays in evaluation mode: batch normalization keeps its pretrained statistics (small
    batches would spoil them, and workers would differ), and dropout is off.

    Raises:
        StageError: a loss that is not finite, naming the step.
    """
    group = collective or Alone()
    generator = torch.Generator().manual_seed(
        (seed * 1_000_003 + position.epoch) * 4099 + group.rank
    )
    model.eval()
    meter = _Meter(position.epoch * position.steps, position.steps * position.epochs, on_step)
    for batch in batches:
        _set_lr(optimizer, lr_factor(meter.done, meter.total))
        loss, hits = finetune_step(model, optimizer, batch, generator, bfloat16)
        meter.add(loss, hits, rows=len(batch["label"]))
    meter.flush()
    values = [meter.loss_sum, meter.hits, meter.rows]
    sums = torch.tensor(values, dtype=torch.float64, device=_device_of(model))
    group.all_reduce_sum_([sums])
    loss_sum, all_hits, all_rows = sums.tolist()
    return {
        "epoch": position.epoch + 1,
        "loss": loss_sum / max(1.0, all_rows),
        "agreement": all_hits / max(1.0, all_rows),
    }


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


# --- checkpoints ---------------------------------------------------------------------------------


def pack_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and the optimizer's moments as named tensors on the CPU, ready for safetensors."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for number, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in slots.items()}
    return _plain_tensors(tensors)


def unpack_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put a packed state back. Raises ArtifactError where it does not fit."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in below(tensors, "optimizer.").items():
        number, key = name.split(".")
        state.setdefault(int(number), {})[key] = value
    _load_weights(model, below(tensors, "model."))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses views and tensors that share memory."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(
            f"the classifier's weights do not fit its description: {reason}"
        ) from None


# --- files ---------------------------------------------------------------------------------------


def save(
    classifier: Classifier | FineTuned, extra: Mapping[str, Any] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Contents of classifier.safetensors and classifier.json, standardization folded in.

    `extra` is added to the description; for a FineTuned it must hold `backbone`: a list with the
    one BackboneConfig (as a mapping) that the model was made from.
    """
    head = classifier.head if isinstance(classifier, FineTuned) else classifier
    description: dict[str, Any] = {
        "format": FORMAT,
        "kind": "finetune" if isinstance(classifier, FineTuned) else head.kind,
        "num_clusters": head.num_clusters,
        "features": head.features,
        "backbone": [],
        "transform": [],
        **(extra or {}),
    }
    tensors = _named(head.folded())
    if isinstance(classifier, FineTuned):
        model = classifier.backbone.model
        assert isinstance(model, nn.Module)
        tensors = {f"head.{key}": value for key, value in tensors.items()}
        tensors |= {f"backbone.{key}": value for key, value in model.state_dict().items()}
    return safetensors.save(_plain_tensors(tensors)), description


def _named(folded: Classifier) -> dict[str, Tensor]:
    """Tensors of a folded classifier under the names of the file format."""
    state = folded.state_dict()
    return {k.removeprefix("out."): v for k, v in state.items() if k not in ("shift", "scale")}


def load(weights: bytes, description: Mapping[str, Any]) -> Classifier | FineTuned:
    """The classifier of two files, in evaluation mode on the CPU.

    A Classifier takes unit-norm embeddings, a FineTuned takes uint8 images (its
    `backbone.transform` makes them).

    Raises:
        ArtifactError: for damaged files, an unknown format, or files that do not fit each other.
    """
    if description.get("format") != FORMAT:
        raise ArtifactError(
            f"the classifier has format {description.get('format')!r}; this version reads {FORMAT}"
        )
    try:
        tensors = safetensors.load(weights)
        kind, features = description["kind"], description["features"]
        clusters = description["num_clusters"]
        if kind != "finetune":
            return _load_head(kind, features, clusters, tensors)
        head = _load_head("linear", features, clusters, below(tensors, "head."))
        return _load_finetuned(head, description["backbone"][0], below(tensors, "backbone."))
    except SafetensorError as error:
        raise ArtifactError(f"the classifier's weights are damaged: {error}") from None
    except (KeyError, IndexError) as error:
        raise ArtifactError(f"the classifier's description lacks {error}") from None


def _load_head(
    kind: Literal["linear", "mlp"], features: int, clusters: int, tensors: Mapping[str, Tensor]
) -> Classifier:
    width = len(tensors["hidden.bias"]) if kind == "mlp" else 1
    model = Classifier(kind, features, clusters, width)
    state = {"shift": model.shift, "scale": model.scale}
    state |= {k if k.startswith("hidden.") else f"out.{k}": v for k, v in tensors.items()}
    _load_weights(model, state)
    return model.eval()


def _load_finetuned(
    head: Classifier, backbone: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> FineTuned:
    from icce_ray.core import backbone as backbones

    known = {k: v for k, v in backbone.items() if k in BackboneConfig.model_fields}
    config = BackboneConfig.model_validate({**known, "pretrained": False, "weights": None})
    loaded = backbones.load(config)
    _load_weights(loaded.model, tensors)
    return FineTuned(loaded, head).eval()
