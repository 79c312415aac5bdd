"""The few collective operations the trainers need, so that they know nothing of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Collective(Protocol):
    """A group of equal workers."""

    rank: int
    world: int

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every worker's tensor, in rank order; shapes must be equal."""

    def all_reduce_sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over workers."""

    def all_reduce_mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its mean over workers."""


class Alone:
    """One worker: every operation is the identity."""

    rank = 0
    world = 1

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor itself."""
        return [tensor]

    def all_reduce_sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        return None

    def all_reduce_mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        return None


class Distributed:
    """The default process group of torch.distributed (gloo on CPU, NCCL on GPUs)."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._dist = dist
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.empty_like(tensor) for _ in range(self.world)]
        self._dist.all_gather(out, tensor.contiguous())
        return out

    def all_reduce_sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """One message for all tensors: their number would otherwise cost more than their size."""
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_reduce_mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        self.all_reduce_sum_(tensors)
        for tensor in tensors:
            tensor.div_(self.world)


class Counted:
    """Another group's operations, and the bytes that they make this worker send.

    Counted as rings send them, which gloo and NCCL do for tensors that matter: of a tensor of n
    bytes, W - 1 times n for a gather, 2 (W - 1) / W times n for a sum.
    """

    def __init__(self, inner: Collective) -> None:
        self.inner, self.rank, self.world = inner, inner.rank, inner.world
        self.bytes = {"all_gather": 0.0, "all_reduce": 0.0}

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.bytes["all_gather"] += (self.world - 1) * tensor.nbytes
        return self.inner.all_gather(tensor)

    def all_reduce_sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        self._reduced(tensors)
        self.inner.all_reduce_sum_(tensors)

    def all_reduce_mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        self._reduced(tensors)
        self.inner.all_reduce_mean_(tensors)

    def _reduced(self, tensors: Sequence[torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors)
        self.bytes["all_reduce"] += 2 * (self.world - 1) / self.world * size
