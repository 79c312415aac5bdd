"""torch's AdamW, without the five seconds of CPU time that its first use takes.

torch.optim imports torch._dynamo, only to keep some of an optimizer's methods out of compilation:
more than many a training here takes, in every worker and trial. Nothing here is compiled. Where
torch comes to do this in another way, the import is back, and no more than that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.adamw import adamw


class AdamW(torch.optim.AdamW):
    """As torch.optim.AdamW, with its state and numbers; without amsgrad and maximize."""

    def __init__(self, parameters: Iterable[Any], **options: Any) -> None:
        if "torch._dynamo" not in sys.modules:
            for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
                plain = getattr(getattr(Optimizer, name), "__wrapped__", None)
                if plain is not None:
                    vars(plain).setdefault("__dynamo_disable", plain)  # call it as it is
        super().__init__(parameters, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. No closure."""
        for group in self.param_groups:
            there = [p for p in group["params"] if p.grad is not None]
            slots = [self._slots(parameter) for parameter in there]
            adamw(
                there,
                [p.grad for p in there],
                [slot["exp_avg"] for slot in slots],
                [slot["exp_avg_sq"] for slot in slots],
                [],  # of amsgrad
                [slot["step"] for slot in slots],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _slots(self, parameter: Any) -> dict[str, Any]:
        slots = self.state[parameter]
        if not slots:
            slots["step"] = torch.tensor(0.0)
            for key in ("exp_avg", "exp_avg_sq"):
                slots[key] = torch.zeros_like(parameter)
        return slots
