"""The classifier that labels new images: a probe on frozen features, or a fine-tuned backbone.

Shapes: N rows, B batch, D features, K clusters, S image side, W width of a probe's hidden layer.

A classifier is two files: `classifier.safetensors` (tensors) and `classifier.json` (a plain
description). Neither Ray nor this package is needed to use them.

    linear     weight [K, D], bias [K], applied to the L2-normalized embedding
    mlp        hidden.weight [W, D], hidden.bias [W], GELU, weight [K, W], bias [K]
    finetune   backbone.* (the timm model's own names), head.weight [K, D], head.bias [K]

Where the training images had more than 8 bits per sample, `levels` in the transform names the
values that became black and white.

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

from collections.abc import Mapping
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from icce_ray.config.schema import BackboneConfig
from icce_ray.core.constants import HIDDEN
from icce_ray.core.tensors import below, plain
from icce_ray.errors import ArtifactError, ConfigError, one_line

FORMAT = 1  # of classifier.json


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
        hidden: int = HIDDEN,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.kind, self.features, self.num_clusters = kind, features, num_clusters
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        width = hidden if kind == "mlp" else features
        self.hidden = _linear(features, hidden) if kind == "mlp" else None
        self.out = _linear(width, num_clusters)
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


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer without values: torch's own would draw from the process's random numbers."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    return layer


class FineTuned(nn.Module):
    """Images uint8 [B, 3, S, S] -> logits [B, K]: backbone, L2 normalization, linear head."""

    def __init__(self, backbone: nn.Module, head: Classifier) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):  # the head is small, and exact
            return self.head(F.normalize(features.float(), dim=1))


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
    return safetensors.save(plain(tensors)), description


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
    load_weights(model, state)
    return model.eval()


def _load_finetuned(
    head: Classifier, backbone: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> FineTuned:
    from icce_ray.core import backbone as backbones

    loaded = backbones.load(_without_weights(_settings_of(backbone)))
    load_weights(loaded.model, tensors)
    return FineTuned(loaded, head).eval()


def backbones_of(description: Mapping[str, Any]) -> tuple[BackboneConfig, ...]:
    """The backbones whose features a described classifier takes. Those of a fine-tuned one have no
    weights of their own: they are the classifier's.

    Raises:
        ConfigError: it was made from given embeddings, and knows no backbone.
        LookupError, TypeError, ValueError: a damaged description.
    """
    described = description.get("backbone") or []
    if not described:
        raise ConfigError(
            "this run was made from given embeddings: it knows no backbone for new images. "
            "Classify their embeddings with classifier.safetensors (see core/classifier/model.py)."
        )
    each = tuple(_settings_of(one) for one in described)
    return tuple(map(_without_weights, each)) if description["kind"] == "finetune" else each


def _settings_of(backbone: Mapping[str, Any]) -> BackboneConfig:
    known = {k: v for k, v in backbone.items() if k in BackboneConfig.model_fields}
    return BackboneConfig.model_validate(known)


def _without_weights(backbone: BackboneConfig) -> BackboneConfig:
    return backbone.model_copy(update={"pretrained": False, "weights": None})


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a module. Raises ArtifactError where they do not fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"the classifier's weights do not fit its description: {one_line(error)}"
        ) from None
