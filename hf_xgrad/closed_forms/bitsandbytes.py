"""Closed forms of bitsandbytes, where it keeps the state in 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_xgrad.closed_forms.formulas import adaptive_direction, decoupled_decay, mix, slow_shares, state_steps
from hf_xgrad.core.rules import Direction, DirectionT, Group, State, register_rule


def _bitsandbytes_variant(optimizer: Optimizer) -> str | None:
    settings: Any = optimizer
    if settings.args.optim_bits != 32:
        return f"bitsandbytes keeps this state in {settings.args.optim_bits} bits"
    if settings.is_paged and any(p.is_cuda for group in optimizer.param_groups for p in group["params"]):
        return "bitsandbytes pages this state, which lies in the host's memory"
    if settings.args.max_unorm > 0 or settings.args.skip_zeros:
        return "bitsandbytes with max_unorm or skip_zeros needs the coming gradient"
    manager = settings.mng
    overrides = [*manager.pid2config.values(), *manager.index2config.values()]
    overrides += [config for _, _, config in manager.module_weight_config_triple]
    if any(config != {"optim_bits": 32} for config in overrides):
        return "bitsandbytes overrides the settings of single parameters"
    return None


def _bitsandbytes(module: str, *classes: str) -> Callable[[DirectionT], DirectionT]:
    """Registers a direction for classes that differ only in the defaults of their settings."""

    def register(direction: DirectionT) -> DirectionT:
        for name in classes:
            register_rule(
                f"bitsandbytes.optim.{module}.{name}", decay=decoupled_decay, unless_optimizer=_bitsandbytes_variant
            )(direction)
        return direction

    return register


@_bitsandbytes("adam", "Adam", "Adam32bit", "PagedAdam", "PagedAdam32bit")
@_bitsandbytes("adamw", "AdamW", "AdamW32bit", "PagedAdamW", "PagedAdamW32bit")
def bitsandbytes_adamw_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """Adam and AdamW of bitsandbytes with `optim_bits=32`, exact: as `torch_optim.adam_direction`.

    State read: `state1` (m), `state2` (v), `step` (k). State that is paged to the host of a GPU is not read.
    """
    return adaptive_direction(
        [state["state1"] for state in states],
        [state["state2"] for state in states],
        state_steps(states),
        (group["betas"][0], group["betas"][1]),
        group["eps"],
    )


@_bitsandbytes("ademamix", "AdEMAMix", "PagedAdEMAMix")
def bitsandbytes_ademamix_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """AdEMAMix of bitsandbytes with `optim_bits=32`, exact: as `ademamix_direction`.

    `alpha_k` grows over `t_alpha` steps. State read: `state1` (m1 and m2, stacked), `state2` (v), `step` (k).
    """
    (beta1, beta2, _), steps = group["betas"], [float(state["step"]) for state in states]
    averages = [state["state1"] for state in states]
    mixed = mix(
        [both[0] for both in averages],
        [both[1] for both in averages],
        slow_shares(steps, beta1, group["alpha"], group["t_alpha"]),
    )
    return adaptive_direction(mixed, [state["state2"] for state in states], steps, (beta1, beta2), group["eps"])


@_bitsandbytes("lion", "Lion", "Lion32bit", "PagedLion", "PagedLion32bit")
def bitsandbytes_lion_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """Lion of bitsandbytes with `optim_bits=32`, at rest: as `lion_direction`. State read: `state1`."""
    return list(torch._foreach_sign([state["state1"] for state in states]))
