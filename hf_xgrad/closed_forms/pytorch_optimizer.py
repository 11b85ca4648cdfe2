"""Closed forms of the pytorch-optimizer library, which counts steps per group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hf_xgrad.closed_forms.formulas import (
    RECTIFIED_FROM,
    adaptive_direction,
    column,
    decoupled_decay,
    infinity_direction,
    lion_direction,
    mix,
    no_momentum,
    rectified_direction,
    slow_shares,
    stable_adamw_direction,
)
from hf_xgrad.closed_forms.torch_optim import sgd_direction
from hf_xgrad.core.rules import Direction, Group, State, register_rule


def without(name: str, *options: str) -> Callable[[Group], str | None]:
    """`unless` of an optimizer that steps by another equation with any of `options`."""

    def obstacle(group: Group) -> str | None:
        for option in options:
            if group.get(option):
                return f"{name} with {option}=True steps by another equation"
        return None

    return obstacle


def library_decay(group: Group) -> float | Tensor:
    """`decay` of pytorch-optimizer's classes, which couple it, decouple it, or do without the learning rate."""
    if not group["weight_decouple"]:
        return 0.0
    return group["weight_decay"] if group.get("fixed_decay") else decoupled_decay(group)


def _old_release(optimizer: Optimizer) -> str | None:
    """Before they had multi-tensor steps some classes stepped otherwise, or kept options out of their groups."""
    if hasattr(optimizer, "_step_foreach"):
        return None
    return f"{type(optimizer).__name__} of old releases of pytorch-optimizer steps by another equation"


def _group_steps(states: Sequence[State], group: Group) -> list[float]:
    return [float(group["step"])] * len(states)


def _unusual_rectification(optimizer: Optimizer) -> str | None:
    settings: Any = optimizer
    if settings.n_sma_threshold != RECTIFIED_FROM or settings.degenerated_to_sgd:
        return "RAdam with another n_sma_threshold, or degenerated_to_sgd=True, steps by another equation"
    return None


@register_rule(
    "pytorch_optimizer.optimizer.adabelief.AdaBelief",
    decay=library_decay,
    unless=without("AdaBelief", "rectify", "adanorm", "adam_debias"),
)
def adabelief_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """AdaBelief of the pytorch-optimizer library: `delta = (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)`.

    `v` is the moving average of `(g - m)^2`, to which that library adds eps at every step; with `ams_bound`, its
    running maximum. The number of steps is kept per group.

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", NeurIPS 2020,
    arXiv 2010.07468.
    """
    second_moment = "max_exp_avg_var" if group["ams_bound"] else "exp_avg_var"
    return adaptive_direction(
        [state["exp_avg"] for state in states],
        [state[second_moment] for state in states],
        [float(group["step"])] * len(states),
        group["betas"],
        group["eps"],
    )


register_rule(
    "pytorch_optimizer.optimizer.sgd.SGDW", decay=library_decay, unless=no_momentum, needs=("momentum_buffer",)
)(sgd_direction)


@register_rule(
    "pytorch_optimizer.optimizer.radam.RAdam",
    decay=library_decay,
    unless=without("RAdam", "adam_debias"),
    unless_optimizer=_unusual_rectification,
)
def library_radam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """RAdam of pytorch-optimizer, exact: as `radam_direction`, but delta is 0 where rho is small (the first steps).

    State read: `exp_avg` (m), `exp_avg_sq` (v), and `step` (k) of the group.
    """
    return rectified_direction(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        column(_group_steps(states, group)),
        group["betas"],
        group["eps"],
        unrectified=0.0,
    )


@register_rule(
    "pytorch_optimizer.optimizer.adamax.AdaMax", decay=library_decay, unless=without("AdaMax", "adam_debias")
)
def library_adamax_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """AdaMax of pytorch-optimizer, exact: as `adamax_direction`, with the `step` of the group."""
    return infinity_direction(states, column(_group_steps(states, group)), group["betas"][0])


def _adan_decay(group: Group) -> float | Tensor:
    share = decoupled_decay(group)
    # Not decoupled, it divides the weights by 1 + lr * wd.
    return share if group["weight_decouple"] else share / (1 + share)


@register_rule("pytorch_optimizer.optimizer.adan.Adan", decay=_adan_decay)
def adan_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """Adan, exact: Adam's direction with the average of the gradient's changes, `d`, in the numerator.

        delta = (m / (1 - b1^k) + b2 d / (1 - b2^k)) / (sqrt(n / (1 - b3^k)) + eps)

    `n` averages the square of `g + b2 (g - g_prev)`. State read: `exp_avg` (m), `exp_avg_diff` (d), `exp_avg_sq` (n),
    and `step` (k) of the group.

    Source: Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models", IEEE TPAMI
    2024, arXiv 2208.06677.
    """
    (beta1, beta2, beta3), steps = group["betas"], _group_steps(states, group)
    correction1, correction2 = 1 - beta1 ** steps[0], 1 - beta2 ** steps[0]
    share = beta2 * correction1 / correction2 if correction2 > 0 else 0.0
    mixed = mix(
        [state["exp_avg"] for state in states], [state["exp_avg_diff"] for state in states], [share] * len(states)
    )
    return adaptive_direction(mixed, [state["exp_avg_sq"] for state in states], steps, (beta1, beta3), group["eps"])


@register_rule(
    "pytorch_optimizer.optimizer.adopt.ADOPT",
    decay=library_decay,
    unless=without("ADOPT", "cautious", "stable_adamw"),
    unless_optimizer=_old_release,
)
def adopt_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """ADOPT, exact: `delta = m`, the average of gradients that were divided by the root of `v` before they entered it.

    Its first step moves nothing, and `m` is 0 after it. State read: `exp_avg` (m).

    Source: Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any b2 with the Optimal Rate", NeurIPS 2024,
    arXiv 2411.02853.
    """
    return [state["exp_avg"] for state in states]


@register_rule(
    "pytorch_optimizer.optimizer.ademamix.AdEMAMix",
    decay=library_decay,
    unless=without("AdEMAMix", "cautious", "stable_adamw"),
    unless_optimizer=_old_release,
)
def ademamix_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """AdEMAMix of pytorch-optimizer from 4.0 on, exact: Adam's direction with a slow average in the numerator.

        delta = (m1 / (1 - b1^k) + alpha_k m2) / (sqrt(v / (1 - b2^k)) + eps)

    `alpha_k` grows to `alpha` over `t_alpha_beta3` steps, if that is set. State read: `exp_avg` (m1), `exp_avg_slow`
    (m2), `exp_avg_sq` (v), and `step` (k) of the group.

    Source: Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older", ICLR 2025, arXiv 2409.03137.
    """
    (beta1, beta2, _), steps = group["betas"], _group_steps(states, group)
    mixed = mix(
        [state["exp_avg"] for state in states],
        [state["exp_avg_slow"] for state in states],
        slow_shares(steps, beta1, group["alpha"], group["t_alpha_beta3"]),
    )
    return adaptive_direction(mixed, [state["exp_avg_sq"] for state in states], steps, (beta1, beta2), group["eps"])


register_rule("pytorch_optimizer.optimizer.adamw.StableAdamW", decay=library_decay)(stable_adamw_direction)

register_rule(
    "pytorch_optimizer.optimizer.lion.Lion",
    decay=library_decay,
    unless=without("Lion", "cautious"),
    unless_optimizer=_old_release,
)(lion_direction)
