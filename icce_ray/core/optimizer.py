"""AdamW (Loshchilov & Hutter, ICLR 2019) on torch's functional update.

Not torch.optim.AdamW: the first use of any torch.optim.Optimizer imports torch's compiler, five
seconds of CPU time in every worker and trial. That is more than many a training here takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class AdamW:
    """Updates parameters in place, with torch.optim.AdamW's numbers.

    Args:
        groups: mappings with `params`, and `lr` and `weight_decay` where they differ from the
            defaults; or parameters.
        lr: default learning rate. Set `param_groups[i]["lr"]` to follow a schedule.
        weight_decay: default decay, relative to the learning rate.
    """

    def __init__(self, groups: Iterable[Any], lr: float = 1e-3, weight_decay: float = 1e-2) -> None:
        each = list(groups)
        if not isinstance(each[0], Mapping):
            each = [{"params": each}]
        defaults = {"lr": lr, "weight_decay": weight_decay}
        self.param_groups: list[dict[str, Any]] = [
            {**defaults, **group, "params": list(group["params"])} for group in each
        ]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None]
            if not ready:
                continue
            slots = [self._slots(parameter) for parameter in ready]
            adamw(
                ready,
                [p.grad for p in ready],
                [slot["exp_avg"] for slot in slots],
                [slot["exp_avg_sq"] for slot in slots],
                [],  # amsgrad's maxima
                [slot["step"] for slot in slots],
                amsgrad=False,
                beta1=BETAS[0],
                beta2=BETAS[1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=EPSILON,
                maximize=False,
                fused=ready[0].is_cuda,  # one pass over memory instead of ten
            )

    def _slots(self, parameter: Tensor) -> dict[str, Tensor]:
        """Step number and moments of a parameter."""
        if parameter not in self.state:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[parameter]
