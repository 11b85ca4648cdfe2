"""Closed form of optimi."""

from __future__ import annotations

from torch import Tensor

from hf_xgrad.closed_forms.formulas import decoupled_decay, stable_adamw_direction
from hf_xgrad.core.rules import Group, register_rule


def _optimi_decay(group: Group) -> float | Tensor:
    share = decoupled_decay(group)
    return share / group["max_lr"] if group["decouple_lr"] else share


register_rule("optimi.stableadamw.StableAdamW", decay=_optimi_decay)(stable_adamw_direction)
