"""Closed form of our own AdaM3."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_xgrad.closed_forms.formulas import adaptive_direction, decoupled_decay, state_steps
from hf_xgrad.core.rules import Direction, Group, State, register_rule


@register_rule("hf_xgrad.optim.AdaM3", decay=decoupled_decay)
def adam3_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """AdaM3: `delta = (m / (1 - b1^k)) / sqrt((v + eps) / (1 - b2^k))`, `v` being the moving average of `m^2`."""
    return adaptive_direction(
        [state["exp_avg"] for state in states],
        [state["exp_avg_var"] for state in states],
        state_steps(states),
        group["betas"],
        group["eps"],
        eps_in_root=True,
    )
