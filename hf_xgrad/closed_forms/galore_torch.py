"""Closed form of galore-torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_xgrad.closed_forms.formulas import column, decoupled_decay, readable, scaled_direction
from hf_xgrad.core.rules import Group, State, register_rule


@register_rule("galore_torch.adamw.AdamW", decay=decoupled_decay, elementwise=False)
def galore_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """AdamW of galore-torch, exact: Adam's direction in the subspace, carried back to the weights' space.

        delta = scale * back(sqrt(1 - b2^k) / (1 - b1^k) * m / (sqrt(v) + eps))

    Without the bias corrections if `correct_bias` is off; in a group without `rank` nothing is projected. Where the
    coming step draws a new subspace (every `update_proj_gap` steps), delta still lies in the old one. State read:
    `exp_avg` (m), `exp_avg_sq` (v), `step` (k), `projector`.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024,
    arXiv 2403.03507.
    """
    k = column([state["step"] for state in states])
    beta1, beta2 = group["betas"]
    corrected = torch.where(k > 0, (1 - beta2**k).sqrt() / (1 - beta1**k), 0.0)
    moves = scaled_direction(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        group["eps"],
        readable(corrected if group["correct_bias"] else torch.ones_like(k)),
    ).moves(1.0)
    if "rank" not in group:
        return moves
    return [state["projector"].project_back(move) for state, move in zip(states, moves, strict=True)]
