"""Closed form of lion-pytorch."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from hf_xgrad.closed_forms.formulas import decoupled_decay, lion_direction
from hf_xgrad.core.rules import register_rule


def _rescaled_decay(optimizer: Optimizer) -> str | None:
    settings: Any = optimizer
    return (
        "Lion with decoupled_weight_decay=True divides its decay by the first rate" if settings.decoupled_wd else None
    )


register_rule("lion_pytorch.lion_pytorch.Lion", decay=decoupled_decay, unless_optimizer=_rescaled_decay)(
    lion_direction
)
