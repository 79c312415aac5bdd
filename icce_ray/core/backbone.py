"""timm models as feature extractors: uint8 images in, one vector per image out.

Shapes: B images, S side of the input, D features, T tokens, C channels.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from icce_ray.config import backbones
from icce_ray.config.schema import BackboneConfig
from icce_ray.core import hub, importing, weights
from icce_ray.core.preprocess import Preprocess, preprocess_from
from icce_ray.errors import ConfigError, DataError, one_line

TRIED = 4  # images of noise on which bfloat16 is tried
LEAST_ERROR = 1e-4  # of a cosine, which does not matter
SMALL = 3e8  # parameters of a model that is quickly tried with an image size
Precision = Literal["float32", "bfloat16"]


def arithmetic(precision: str, device: torch.device) -> Precision:
    """`precision`, or for auto: bfloat16 where the device computes in it, else float32.

    Without instructions of their own, bfloat16 products are emulated: on a CPU with AVX2 alone, 400
    times slower than float32.
    """
    if precision == "auto":
        return "bfloat16" if _has_bfloat16(device) else "float32"
    return "bfloat16" if precision == "bfloat16" else "float32"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # No public function tells. oneDNN's own answer counts AVX-512 without bfloat16 in.
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def normalize(features: Tensor) -> Tensor:
    """Rows [B, D] of unit length, float32. A zero row stays zero."""
    return F.normalize(features.float(), dim=-1)


def join(spaces: Sequence[Tensor]) -> Tensor:
    """Features of several backbones as one unit vector per image.

    Each space [B, D_i] is L2-normalized and divided by sqrt(number of spaces), so that the cosine
    of two joined vectors is the mean of their cosines in the single spaces.
    """
    scale = len(spaces) ** -0.5
    return torch.cat([normalize(space) * scale for space in spaces], dim=-1)


# --- the model -----------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A timm model with its own preparation of images.

    Attributes:
        model: the timm model, without a classification layer.
        transform: RGB image -> uint8 array [3, S, S]; needs no torch and can be pickled.
        features: D.
        source: where the weights came from.
    """

    mean: Tensor
    std: Tensor
    dtype = torch.float32  # of the weights

    def __init__(
        self, model: nn.Module, config: BackboneConfig, data_config: Mapping[str, Any], source: str
    ) -> None:
        super().__init__()
        self.model, self.config, self.source = model, config, source
        self.transform: Preprocess = _preprocess(config, data_config)
        for name in ("mean", "std"):
            value = torch.tensor(data_config[name], dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self._pool = _pooling(model, config)
        self.eval()
        self.features = self._width()

    @property
    def input_size(self) -> int:
        """S, pixels."""
        return self.transform.size

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] on the model's device -> float32 [B, D], not normalized.

        Scales to [0, 1] and standardizes as timm's ToTensor and Normalize do.
        """
        x = (images.float() / 255 - self.mean) / self.std
        x = x.to(memory_format=torch.channels_last, dtype=self.dtype)
        return self._pool(x).float()

    def on(self, device: torch.device, precision: Precision) -> Backbone:
        """This backbone on a device, ready to `embed` in the given arithmetic."""
        self.to(device)
        if precision == "bfloat16" and device.type == "cuda":
            self.halve()
        return self

    def halve(self) -> bool:
        """Make all of the model bfloat16, where it stays as exact as under autocast.

        Autocast goes back to float32 between layers, and so reads twice as much memory. But not all
        models bear bfloat16 in their tables (angles of positions, masks): both ways are tried on
        noise, beside float32. Returns whether the model is bfloat16 now.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (TRIED, 3, self.input_size, self.input_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        images = images.to(self.mean.device)
        exact, auto = self.embed(images), self.embed(images, "bfloat16")
        whole = self.model
        try:
            self._take(_halved(whole), torch.bfloat16)
            found = self.embed(images, "bfloat16")
        except RuntimeError:  # types that do not go together
            found = torch.zeros_like(exact)
        if _error(found, exact) > 2 * _error(auto, exact) + LEAST_ERROR:
            self._take(whole, torch.float32)
        return self.dtype == torch.bfloat16

    def _take(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._pool = _pooling(model, self.config)

    def embed(self, images: Tensor, precision: Precision = "float32") -> Tensor:
        """`forward` without gradients, in the given arithmetic."""
        half = precision == "bfloat16" and self.dtype == torch.float32
        with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, half):
            return self(images)

    def _width(self) -> int:
        size = self.input_size
        try:
            with torch.inference_mode():
                return self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[-1]
        except ConfigError:
            raise
        except Exception as error:  # models raise almost anything for a size that does not suit
            own = _own_size(self.model)
            raise ConfigError(
                f"backbone {self.config.name} does not take {size} x {size} pixels: "
                f"{one_line(error)}. Set backbone.image_size to a size it takes, such as {own}."
            ) from None

    def describe(self) -> dict[str, Any]:
        """The settings, and what they came to: source and hash of the weights, D, S, transform.

        `model_args` are those of timm.create_model that rebuild the model.
        """
        transform = {
            **self.transform.describe(),
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }
        return {
            **self.config.model_dump(mode="json"),
            "source": self.source,
            "sha256": state_hash(self.model.state_dict()),
            "features": self.features,
            "input_size": self.input_size,
            "model_args": dict(getattr(self.model, "icce_args", {})),
            "transform": transform,
        }


def _halved(model: nn.Module) -> nn.Module:
    """A copy in bfloat16. Batch normalization keeps its float32 statistics."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    for module in half.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.float()
    return half


def _error(found: Tensor, exact: Tensor) -> float:
    """1 - the least cosine between rows of both, [B, D]; infinite where it is not a number."""
    cosine = float(F.cosine_similarity(found, exact).min())
    return 1 - cosine if math.isfinite(cosine) else math.inf


def _own_size(model: Any) -> int:
    """Side of the images a model was trained with, pixels."""
    return int(model.pretrained_cfg["input_size"][-1])


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the bytes of a state dict's tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- pooling -------------------------------------------------------------------------------------


def _pooling(model: Any, config: BackboneConfig) -> Callable[[Tensor], Tensor]:
    """The function from a normalized batch [B, 3, S, S] to features [B, D]."""

    def auto(x: Tensor) -> Tensor:
        return model.forward_head(model.forward_features(x), pre_logits=True)

    def features(x: Tensor) -> Tensor:
        found = model.forward_features(x)
        if isinstance(found, Tensor) and found.dim() in (3, 4):
            return found
        raise ConfigError(
            f"backbone.pooling={config.pooling} needs one map or sequence of features, which "
            f"{config.name} does not have; use pooling=auto"
        )

    def cls(x: Tensor) -> Tensor:
        return _class_token(model, features(x))

    def mean(x: Tensor) -> Tensor:
        return _mean(model, features(x))

    def both(x: Tensor) -> Tensor:
        tokens = features(x)
        return torch.cat(
            [normalize(_class_token(model, tokens)), normalize(_mean(model, tokens))], -1
        )

    needs_token = config.pooling in ("cls", "both")
    if needs_token and getattr(model, "cls_token", None) is None:
        raise ConfigError(
            f"backbone.pooling={config.pooling} needs a class token, which {config.name} does not "
            "have; use pooling=mean or auto"
        )
    return {"auto": auto, "cls": cls, "mean": mean, "both": both}[config.pooling]


def _class_token(model: Any, tokens: Tensor) -> Tensor:
    return _final_norm(model, tokens[:, 0])


def _mean(model: Any, features: Tensor) -> Tensor:
    """Mean of the patch tokens [B, T, C], or of the map [B, C, h, w] or [B, h, w, C] -> [B, C]."""
    if features.dim() == 3:
        patches = features[:, getattr(model, "num_prefix_tokens", 0) :]
        return _final_norm(model, patches.mean(1))
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return features.mean((1, 2) if last else (2, 3))


def _final_norm(model: Any, pooled: Tensor) -> Tensor:
    """Models that average tokens by default normalize after the average, not before."""
    norm = getattr(model, "fc_norm", None)
    return norm(pooled) if isinstance(norm, nn.Module) else pooled


# --- building ------------------------------------------------------------------------------------


def _timm() -> Any:
    timm = importing.whole("timm")
    for name in ("timm", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return timm


def check(config: BackboneConfig, download: bool = False) -> None:
    """What can be seen without weights and images: before anything expensive is done.

    download: whether weights that are to be downloaded must be within reach of this machine.

    Raises:
        ConfigError: an unknown model (naming near ones), weights that are not there, an image size
            or a pooling that the model does not support.
    """
    wanted = download and config.pretrained and not config.weights
    if wanted and config.name in backbones.HUB:
        hub.check(config.name, backbones.HUB[config.name])  # before timm's import, which takes long
    cfg = _pretrained_cfg(config.name)
    weights.check(config, cfg.has_weights)
    if wanted and cfg.hf_hub_id and config.name not in backbones.HUB:
        hub.check(config.name, cfg.hf_hub_id)
    preprocess(config)
    if not _suits(config):
        load(config.model_copy(update={"pretrained": False, "weights": None}))  # which says why


@lru_cache(maxsize=16)
def _suits(config: BackboneConfig) -> bool:
    """Whether images pass through the model. False may be wrong, since it has no weights here.

    Shapes alone need neither memory nor arithmetic. For another size than its own, a model may look
    positions up in tables, whose ends shapes do not show: so a small one is tried with zeros.
    """
    try:
        model, size = _shapes(config), preprocess(config).size
        _pass(model, config, torch.empty(1, 3, size, size, device="meta"))
        small = sum(one.numel() for one in model.parameters()) <= SMALL
        if size != _own_size(model) and small:
            real = copy.deepcopy(model).to_empty(device="cpu")
            for tensor in (*real.parameters(), *real.buffers()):
                tensor.data.zero_()
            _pass(real, config, torch.zeros(1, 3, size, size))
    except Exception:
        return False
    return True


def _pass(model: nn.Module, config: BackboneConfig, images: Tensor) -> None:
    with torch.inference_mode():
        _pooling(model, config)(images)


@lru_cache(maxsize=16)
def _shapes(config: BackboneConfig) -> Any:
    """The model without memory for its weights. Raises almost anything: some cannot be built so."""
    with torch.device("meta"):
        return _build(config, pretrained=False).eval()


def preprocess(config: BackboneConfig) -> Preprocess:
    """The model's preparation of images, without building the model.

    Raises:
        ConfigError: an unknown model, or one whose input is not square.
    """
    return _preprocess(config, _data_config(config, _pretrained_cfg(config.name)))


def load(config: BackboneConfig, file: str | None = None) -> Backbone:
    """Build the model and load its weights, on the CPU, in evaluation mode.

    file: the copy of `config.weights` on this node, where these are elsewhere.

    Raises:
        ConfigError: an unknown model; weights that cannot be had or do not fit the model; an image
            size or pooling it does not support. Never leaves a weight at random unless
            `pretrained` is false.
    """
    cfg = _pretrained_cfg(config.name)
    weights.check(config, cfg.has_weights)
    if not config.pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights in every process
            model, source = _build(config, pretrained=False), "random weights"
    elif config.weights:
        with NoRandomWeights():
            model = _build(config, pretrained=False)
        source = weights.load(model, config, file)
    else:
        with NoRandomWeights():
            model = _download(config)
        source = f"timm hub {cfg.hf_hub_id or cfg.url}"
    model = model.eval().to(memory_format=torch.channels_last)
    return Backbone(model, config, _data_config(config, cfg), source)


class NoRandomWeights(TorchFunctionMode):
    """Meanwhile models get NaN where they would draw weights that are loaded from a file later.

    To draw them takes longer than all else of loading a large model. A weight that a file does not
    hold shows by features that are not finite.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_):
            return args[0].fill_(math.nan)
        return func(*args, **(kwargs or {}))


def _pretrained_cfg(name: str) -> Any:
    timm = _timm()
    if name.startswith(hub.PREFIX):
        return hub.pretrained_cfg(name)
    try:
        if timm.is_model(name):
            return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except (RuntimeError, KeyError):
        pass  # a known architecture with an unknown tag
    known = [*backbones.SHORT, *timm.list_models(), *timm.list_models(pretrained=True)]
    near = backbones.near(name, known)
    hint = f" Near ones: {', '.join(near)}." if near else ""
    raise ConfigError(f"timm knows no model {name!r} (backbone.name).{hint}")


def _data_config(config: BackboneConfig, cfg: Any) -> dict[str, Any]:
    from timm.data import resolve_data_config

    size = config.image_size
    args: dict[str, Any] = {"input_size": (3, size, size)} if size else {}
    if config.crop:
        args["crop_pct"] = config.crop
    return resolve_data_config(args, pretrained_cfg=cfg.to_dict())


def _preprocess(config: BackboneConfig, data_config: Mapping[str, Any]) -> Preprocess:
    try:
        return preprocess_from(dict(data_config))
    except DataError as error:
        raise ConfigError(f"backbone {config.name}: {error}") from None


def _build(config: BackboneConfig, pretrained: bool) -> nn.Module:
    """timm's model without a classifier; transformers get image_size as their own size.

    The arguments are kept as `icce_args`.
    """
    timm = _timm()
    tries: list[dict[str, Any]] = [{"img_size": config.image_size}] if config.image_size else []
    for args in [*tries, {}]:
        try:
            model = timm.create_model(config.name, pretrained=pretrained, num_classes=0, **args)
        except TypeError as error:
            if args and "img_size" in str(error):  # convolutional models take any size
                continue
            raise
        except (AssertionError, ValueError) as error:
            if not args:
                raise
            raise ConfigError(
                f"backbone.image_size={config.image_size} does not suit {config.name}: "
                f"{one_line(error)}"
            ) from None
        model.icce_args = args
        return model
    raise AssertionError("unreachable: the last try has no arguments")


# --- from the hub --------------------------------------------------------------------------------


def _download(config: BackboneConfig) -> nn.Module:
    try:
        with _hub_errors():
            return _build(config, pretrained=True)
    except _HubError as error:
        raise ConfigError(
            f"download of the weights of {config.name} failed ({error}). {hub.remedies()}"
        ) from None


class _HubError(Exception):
    pass


@contextlib.contextmanager
def _hub_errors() -> Iterator[None]:
    """The hub's client raises errors of many libraries: all but ours mean that it did not work."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise _HubError(f"{type(error).__name__}: {one_line(error)}") from None


@lru_cache(maxsize=16)
def width(config: BackboneConfig) -> int | None:
    """D as far as timm says it without building the model; None where it does not."""
    try:
        model = _shapes(config)
    except Exception:  # the estimate does without
        return None
    pooled = getattr(model, "head_hidden_size", None) or model.num_features
    plain = int(model.num_features)
    return {"auto": int(pooled), "cls": plain, "mean": plain, "both": 2 * plain}[config.pooling]
