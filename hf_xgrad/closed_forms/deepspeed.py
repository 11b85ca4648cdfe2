"""Closed forms of DeepSpeed's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from hf_xgrad.closed_forms.formulas import adaptive_direction, decoupled_decay, lion_direction, state_steps
from hf_xgrad.core.rules import Direction, Group, State, register_rule


def _counts_by_groups(optimizer: Optimizer) -> str | None:
    # Not so under ZeRO, which gives it one stretch of weights at a time.
    if any(len(group["params"]) > 1 for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} counts the steps of only one weight of each group"
    return None


@register_rule("deepspeed.ops.adam.fused_adam.FusedAdam", decay=decoupled_decay, unless_optimizer=_counts_by_groups)
@register_rule("deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam", decay=decoupled_decay)
def adam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """FusedAdam and DeepSpeedCPUAdam, exact: as Adam of torch.optim; with `bias_correction=False` as for large k.

    State read: `exp_avg` (m), `exp_avg_sq` (v), `step` (k).
    """
    return adaptive_direction(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        state_steps(states) if group["bias_correction"] else [math.inf] * len(states),
        group["betas"],
        group["eps"],
    )


for _name in ("fused_lion.FusedLion", "cpu_lion.DeepSpeedCPULion"):
    register_rule(f"deepspeed.ops.lion.{_name}", decay=decoupled_decay)(lion_direction)
