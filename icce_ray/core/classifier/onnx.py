"""The classifier as one ONNX file: prepared images in, probabilities out, without torch and timm.

    inputs     images (of several preparations images0, images1, ...): uint8 [B, 3, S, S], resized
               and cropped as the file's metadata say; scaling and standardization are in the graph
    output     probability: float32 [B, K]
    metadata   icce_ray: JSON with `transform`, one for each input, and `num_clusters`

Shapes: B batch, D features, K clusters, S image side.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icce_ray.core import backbone as backbones_
from icce_ray.core.classifier.model import Classifier, FineTuned, backbones_of
from icce_ray.core.preprocess import Preprocess, distinct
from icce_ray.errors import ConfigError, StageError, one_line

NEEDS = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
TRIED = 3  # images of noise on which the file is compared with torch
MOST_OFF = 1e-3  # of a probability
METADATA = "icce_ray"


class OfImages(nn.Module):
    """Prepared images uint8 [B, 3, S, S], one tensor for each preparation -> probabilities [B, K].

    Args:
        model: a Classifier, or a FineTuned, which brings its own backbone.
        backbones: those whose joined features a Classifier takes.
        slots: which of the preparations each backbone takes.
    """

    def __init__(
        self,
        model: Classifier | FineTuned,
        backbones: Sequence[backbones_.Backbone],
        slots: Sequence[int],
    ) -> None:
        super().__init__()
        self.model, self.slots = model, list(slots)
        self.backbones = nn.ModuleList([] if isinstance(model, FineTuned) else backbones)

    def forward(self, *images: Tensor) -> Tensor:
        if isinstance(self.model, FineTuned):
            return self.model(images[0]).softmax(1)
        pairs = zip(self.backbones, self.slots, strict=True)
        features = backbones_.join([one(images[slot]) for one, slot in pairs])
        return self.model(features).softmax(1)


def export(model: Classifier | FineTuned, description: Mapping[str, Any], path: Path) -> None:
    """Write a run's classifier with its backbones as an ONNX file, compared with torch on noise.

    Args:
        model: what classifier.safetensors holds, on the CPU.
        description: classifier.json.
        path: the file. Weights of more than 2 GB go to a second one beside it, PATH.data.

    Raises:
        ConfigError: packages that are not installed, or a classifier of given embeddings.
        StageError: weights other than the run's, or a backbone that cannot be exported.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX export needs {', '.join(missing)}: pip install '.[onnx]'")
    whole, preparations, transforms = _whole(model, description)
    about = {"transform": transforms, "num_clusters": description["num_clusters"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _write(whole, preparations, about, made)
        _compare(whole, preparations, made)
        for file in sorted(Path(folder).iterdir(), key=lambda one: one == made):  # the model last
            file.replace(path.parent / file.name)


def _whole(
    model: Classifier | FineTuned, description: Mapping[str, Any]
) -> tuple[OfImages, tuple[Preprocess, ...], list[Any]]:
    """The module to export, its preparations, and the description of each."""
    configs = backbones_of(description)
    loaded: list[Any]
    if isinstance(model, FineTuned):
        loaded = [model.backbone]
    else:
        loaded = [backbones_.load(config) for config in configs]
        for one, as_made in zip(loaded, description["backbone"], strict=True):
            _check_weights(one, as_made)
    preparations, slots = distinct([one.transform for one in loaded])
    transforms = [description["transform"][slots.index(n)] for n in range(len(preparations))]
    return OfImages(model, loaded, slots).eval(), preparations, transforms


def _check_weights(backbone: backbones_.Backbone, as_made: Mapping[str, Any]) -> None:
    found = backbones_.state_hash(backbone.model.state_dict())
    if as_made.get("sha256", found) != found:
        raise StageError(
            f"the weights of {backbone.config.name} differ from those that the run had "
            f"({found[:12]} from {backbone.source}, not {as_made['sha256'][:12]}); give the same "
            "file"
        )


def _names(preparations: Sequence[Preprocess]) -> list[str]:
    several = len(preparations) > 1
    return [f"images{number}" if several else "images" for number in range(len(preparations))]


def _noise(preparations: Sequence[Preprocess]) -> list[np.ndarray]:
    """uint8 [B, 3, S, S] for each preparation."""
    rng = np.random.default_rng(0)
    shapes = [(TRIED, 3, one.size, one.size) for one in preparations]
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


def _write(
    whole: OfImages,
    preparations: Sequence[Preprocess],
    about: Mapping[str, Any],
    path: Path,
) -> None:
    batch = {0: torch.export.Dim.DYNAMIC}
    try:
        program = torch.onnx.export(
            whole,
            tuple(torch.from_numpy(one) for one in _noise(preparations)),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=_names(preparations),
            output_names=["probability"],
            dynamic_shapes=(tuple(batch for _ in preparations),),
        )
    except Exception as error:  # the exporter raises almost anything
        raise StageError(f"the classifier cannot be exported to ONNX: {one_line(error)}") from None
    assert program is not None
    program.model.metadata_props[METADATA] = json.dumps(about)
    program.save(str(path))


def _compare(whole: OfImages, preparations: Sequence[Preprocess], path: Path) -> None:
    """Raise StageError where the file does not compute what torch does."""
    import onnxruntime

    noise = _noise(preparations)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, dict(zip(_names(preparations), noise, strict=True)))
    with torch.inference_mode():
        exact = whole(*map(torch.from_numpy, noise)).numpy()
    off = float(np.abs(found - exact).max())
    if not off <= MOST_OFF:
        raise StageError(f"the ONNX file is not used: its probabilities are off by {off:.1g}")
