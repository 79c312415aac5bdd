"""Named tensors: what checkpoints and safetensors files hold."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses views and tensors that share memory."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
