"""Closed forms of further optimizers; those of the paper's five are in `hf_xgrad.rules`, with notation and contract.

A form is one of two kinds, as its docstring says:

    exact      `- lr * delta` is the last realised update, weight decay apart: the state alone determines it.
    at rest    The coming step weighs the coming gradient on its own, which is no part of the state; delta is the step
               that follows if that gradient is its running mean.

Classes of libraries are named by strings: none of these libraries need be installed, and none is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_xgrad.rules import (
    Delta,
    DirectionT,
    Group,
    State,
    adaptive_delta,
    as_vector,
    bias_corrections,
    decoupled_decay,
    library_decay,
    negligible,
    no_momentum,
    register_rule,
    scalars,
    sgd_direction,
    state_steps,
    without,
)

# Effective length of the second moment's average from which on RAdam trusts it.
_RECTIFIED_FROM = 5


def _column(values: Sequence[Any]) -> Tensor:
    """One number per parameter as a 1-d tensor, on the device where they are."""
    if isinstance(values[0], Tensor):
        stacked = torch.stack(list(values)).flatten()
        return as_vector(stacked, stacked.device)
    return as_vector([float(value) for value in values], None)


def _readable(column: Tensor) -> list[float] | Tensor:
    """Numbers where the host knows them, as `state_steps` has it."""
    return column.tolist() if column.device.type == "cpu" else column


def _scaled_delta(
    exp_avgs: Sequence[Tensor], second_moments: Sequence[Tensor], eps: float | Tensor, factors: list[float] | Tensor
) -> Delta:
    """`factor * m / (sqrt(v) + eps)`; `eps` is one number, or a 1-d tensor with one per parameter."""
    denominators = list(torch._foreach_sqrt(list(second_moments)))
    floor = negligible(denominators[0].dtype)
    if isinstance(eps, Tensor):
        torch._foreach_add_(denominators, scalars(_readable(eps.clamp_min(floor))))
    else:
        torch._foreach_add_(denominators, max(eps, floor))
    return Delta(exp_avgs, denominators, factors)


def _mixed(exp_avgs: Sequence[Tensor], others: Sequence[Tensor], shares: list[float]) -> list[Tensor]:
    """`m + share * other` as new tensors."""
    mixed = list(torch._foreach_mul(list(others), shares))
    torch._foreach_add_(mixed, list(exp_avgs))
    return mixed


# ---- torch.optim ----


def _optional_decay(group: Group) -> float | Tensor:
    return decoupled_decay(group) if group.get("decoupled_weight_decay") else 0.0


def _rectified_delta(
    exp_avgs: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    k: Tensor,
    betas: tuple[float, float],
    eps: float,
    unrectified: float,
) -> Delta:
    """RAdam's direction; `unrectified` scales `m / (1 - b1^k)` where the second moment is not trusted yet."""
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**k, 1 - beta2**k
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * k * beta2**k / correction2  # nan at k = 0, which no comparison takes for rectified
    rectified = length > _RECTIFIED_FROM
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    factors = torch.where(rectified, (ratio * correction2).sqrt(), unrectified) / correction1
    delta = _scaled_delta(exp_avgs, second_moments, eps, _readable(torch.where(k > 0, factors, 0.0)))
    trusted = _readable(rectified.to(k.dtype))
    if delta.denominators is not None and (isinstance(trusted, Tensor) or not all(trusted)):
        # The others are to be divided by 1; each parameter may have its own number of steps.
        torch._foreach_mul_(delta.denominators, scalars(trusted))
        torch._foreach_add_(delta.denominators, scalars(_readable(1 - rectified.to(k.dtype))))
    return delta


@register_rule(torch.optim.RAdam, decay=_optional_decay)
def radam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """RAdam, exact: Adam's direction times r where the second moment is trusted, else the first moment alone.

        rho_inf = 2 / (1 - b2) - 1,   rho = rho_inf - 2 k b2^k / (1 - b2^k)
        r       = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
        delta   = r * m / (1 - b1^k) * sqrt(1 - b2^k) / (sqrt(v) + eps)        where rho > 5
        delta   = m / (1 - b1^k)                                               else

    State read: `exp_avg` (m), `exp_avg_sq` (v), `step` (k).

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, arXiv 1908.03265.
    """
    return _rectified_delta(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        _column([state["step"] for state in states]),
        group["betas"],
        group["eps"],
        unrectified=1.0,
    )


@register_rule(torch.optim.NAdam, decay=_optional_decay)
def nadam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """NAdam, at rest: the coming step k + 1, if its gradient is `m_hat = m / (1 - b1^k)`.

        mu_j  = b1 (1 - 0.5 * 0.96^(j psi)),   P_j = mu_1 mu_2 ... mu_j
        delta = m_hat / (sqrt(v / (1 - b2^k)) + eps)
                * ((1 - mu_{k+1}) / (1 - P_{k+1}) + mu_{k+2} (1 - b1^{k+1}) / (1 - P_{k+2}))

    The last bracket is how much of that gradient the step takes on its own, and how much by way of `m_{k+1}`, which
    then is `m_hat (1 - b1^{k+1})`. Under a lasting gradient delta becomes the last realised update.

    State read: `exp_avg` (m), `exp_avg_sq` (v), `step` (k), `mu_product` (P_k); psi is `momentum_decay`.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop, openreview OM0jvwB8jIp57ZJjtNEZ.
    """
    (beta1, beta2), decay = group["betas"], group["momentum_decay"]
    k = _column([state["step"] for state in states])

    def momentum(step: Tensor) -> Tensor:
        return beta1 * (1 - 0.5 * 0.96 ** (step * decay))

    product = _column([state["mu_product"] for state in states]) * momentum(k + 1)
    own = (1 - momentum(k + 1)) / (1 - product)
    averaged = momentum(k + 2) * (1 - beta1 ** (k + 1)) / (1 - product * momentum(k + 2))
    root = (1 - beta2**k).sqrt()
    factors = torch.where(k > 0, root * (own + averaged) / (1 - beta1**k), 0.0)
    return _scaled_delta(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        root * group["eps"],
        _readable(factors),
    )


def _infinity_delta(states: Sequence[State], k: Tensor, beta1: float) -> Delta:
    norms = [state["exp_inf"] for state in states]
    denominators = list(torch._foreach_clamp_min(norms, negligible(norms[0].dtype)))
    factors = torch.where(k > 0, 1 / (1 - beta1**k), 0.0)
    return Delta([state["exp_avg"] for state in states], denominators, _readable(factors))


@register_rule(torch.optim.Adamax)
def adamax_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """Adamax, exact: `delta = m / ((1 - b1^k) u)`, `u` being the decaying maximum of `|g| + eps`.

    State read: `exp_avg` (m), `exp_inf` (u), `step` (k).

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv 1412.6980, section 7.1.
    """
    return _infinity_delta(states, _column([state["step"] for state in states]), group["betas"][0])


def _rmsprop_without_momentum(group: Group) -> str | None:
    return "RMSprop without momentum needs the last gradient" if group["momentum"] == 0 else None


@register_rule(torch.optim.RMSprop, unless=_rmsprop_without_momentum)
def rmsprop_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """RMSprop with momentum, exact: `delta = buf`, where `buf = momentum * buf + g / (sqrt(v) + eps)`.

    The buffer holds all settings already, `centered` too. State read: `momentum_buffer` (buf).

    Source: Graves, "Generating Sequences With Recurrent Neural Networks", arXiv 1308.0850, equations 38 to 45.
    """
    return [state["momentum_buffer"] for state in states]


# ---- pytorch-optimizer; it counts steps per group ----


def _old_release(optimizer: Optimizer) -> str | None:
    """Before they had multi-tensor steps some classes stepped otherwise, or kept options out of their groups."""
    if hasattr(optimizer, "_step_foreach"):
        return None
    return f"{type(optimizer).__name__} of old releases of pytorch-optimizer steps by another equation"


def _group_steps(states: Sequence[State], group: Group) -> list[float]:
    return [float(group["step"])] * len(states)


def _unusual_rectification(optimizer: Optimizer) -> str | None:
    settings: Any = optimizer
    if settings.n_sma_threshold != _RECTIFIED_FROM or settings.degenerated_to_sgd:
        return "RAdam with another n_sma_threshold, or degenerated_to_sgd=True, steps by another equation"
    return None


register_rule("pytorch_optimizer.optimizer.sgd.SGDW", decay=library_decay, unless=no_momentum)(sgd_direction)


@register_rule(
    "pytorch_optimizer.optimizer.radam.RAdam",
    decay=library_decay,
    unless=without("RAdam", "adam_debias"),
    unless_optimizer=_unusual_rectification,
)
def library_radam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """RAdam of pytorch-optimizer, exact: as `radam_direction`, but delta is 0 where rho is small (the first steps).

    State read: `exp_avg` (m), `exp_avg_sq` (v), and `step` (k) of the group.
    """
    return _rectified_delta(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        _column(_group_steps(states, group)),
        group["betas"],
        group["eps"],
        unrectified=0.0,
    )


@register_rule(
    "pytorch_optimizer.optimizer.adamax.AdaMax", decay=library_decay, unless=without("AdaMax", "adam_debias")
)
def library_adamax_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """AdaMax of pytorch-optimizer, exact: as `adamax_direction`, with the `step` of the group."""
    return _infinity_delta(states, _column(_group_steps(states, group)), group["betas"][0])


def _adan_decay(group: Group) -> float | Tensor:
    share = decoupled_decay(group)
    # Not decoupled, it divides the weights by 1 + lr * wd.
    return share if group["weight_decouple"] else share / (1 + share)


@register_rule("pytorch_optimizer.optimizer.adan.Adan", decay=_adan_decay)
def adan_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
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
    mixed = _mixed(
        [state["exp_avg"] for state in states], [state["exp_avg_diff"] for state in states], [share] * len(states)
    )
    return adaptive_delta(mixed, [state["exp_avg_sq"] for state in states], steps, (beta1, beta3), group["eps"])


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


def _slow_shares(steps: list[float], beta1: float, alpha: float, warmup: float | None) -> list[float]:
    """What `m` is to be mixed with for AdEMAMix: `(1 - b1^k) alpha_k`, alpha growing over `warmup` steps."""
    alphas = [min(k * alpha / warmup, alpha) if warmup else alpha for k in steps]
    corrections = bias_corrections(beta1, steps)
    return [float(c) * a for c, a in zip(corrections, alphas, strict=True)]


@register_rule(
    "pytorch_optimizer.optimizer.ademamix.AdEMAMix",
    decay=library_decay,
    unless=without("AdEMAMix", "cautious", "stable_adamw"),
    unless_optimizer=_old_release,
)
def ademamix_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """AdEMAMix of pytorch-optimizer from 4.0 on, exact: Adam's direction with a slow average in the numerator.

        delta = (m1 / (1 - b1^k) + alpha_k m2) / (sqrt(v / (1 - b2^k)) + eps)

    `alpha_k` grows to `alpha` over `t_alpha_beta3` steps, if that is set. State read: `exp_avg` (m1), `exp_avg_slow`
    (m2), `exp_avg_sq` (v), and `step` (k) of the group.

    Source: Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older", ICLR 2025, arXiv 2409.03137.
    """
    (beta1, beta2, _), steps = group["betas"], _group_steps(states, group)
    mixed = _mixed(
        [state["exp_avg"] for state in states],
        [state["exp_avg_slow"] for state in states],
        _slow_shares(steps, beta1, group["alpha"], group["t_alpha_beta3"]),
    )
    return adaptive_delta(mixed, [state["exp_avg_sq"] for state in states], steps, (beta1, beta2), group["eps"])


# ---- StableAdamW: pytorch-optimizer and optimi ----


def _optimi_decay(group: Group) -> float | Tensor:
    share = decoupled_decay(group)
    return share / group["max_lr"] if group["decouple_lr"] else share


@register_rule("pytorch_optimizer.optimizer.adamw.StableAdamW", decay=library_decay)
@register_rule("optimi.stableadamw.StableAdamW", decay=_optimi_decay)
def stable_adamw_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """StableAdamW, exact but for the clipping: `delta = m / (sqrt(v) + eps)`.

    Bias correction is in the averages, as both libraries correct the betas. Each step is divided by
    `max(1, rms(g / sqrt(v)))` of its tensor, which depends on the coming gradient; delta is the step that is not
    clipped. State read: `exp_avg` (m), `exp_avg_sq` (v).

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023,
    arXiv 2304.13013, algorithm 2.
    """
    return _scaled_delta(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        group["eps"],
        [1.0] * len(states),
    )


# ---- bitsandbytes, where its state is kept in 32 bits ----


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
def bitsandbytes_adamw_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """Adam and AdamW of bitsandbytes with `optim_bits=32`, exact: as `rules.adam_direction`.

    State read: `state1` (m), `state2` (v), `step` (k). State that is paged to the host of a GPU is not read.
    """
    return adaptive_delta(
        [state["state1"] for state in states],
        [state["state2"] for state in states],
        state_steps(states),
        (group["betas"][0], group["betas"][1]),
        group["eps"],
    )


@_bitsandbytes("ademamix", "AdEMAMix", "PagedAdEMAMix")
def bitsandbytes_ademamix_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """AdEMAMix of bitsandbytes with `optim_bits=32`, exact: as `ademamix_direction`.

    `alpha_k` grows over `t_alpha` steps. State read: `state1` (m1 and m2, stacked), `state2` (v), `step` (k).
    """
    (beta1, beta2, _), steps = group["betas"], [float(state["step"]) for state in states]
    averages = [state["state1"] for state in states]
    mixed = _mixed(
        [both[0] for both in averages],
        [both[1] for both in averages],
        _slow_shares(steps, beta1, group["alpha"], group["t_alpha"]),
    )
    return adaptive_delta(mixed, [state["state2"] for state in states], steps, (beta1, beta2), group["eps"])


# ---- Lion ----


def _rescaled_decay(optimizer: Optimizer) -> str | None:
    settings: Any = optimizer
    return (
        "Lion with decoupled_weight_decay=True divides its decay by the first rate" if settings.decoupled_wd else None
    )


@register_rule(
    "pytorch_optimizer.optimizer.lion.Lion",
    decay=library_decay,
    unless=without("Lion", "cautious"),
    unless_optimizer=_old_release,
)
@register_rule("lion_pytorch.lion_pytorch.Lion", decay=decoupled_decay, unless_optimizer=_rescaled_decay)
def lion_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """Lion, at rest: `delta = sign(m)`.

    The coming step is `sign(b1 m + (1 - b1) g)`, which is `sign(m)` if the coming gradient is its running mean. State
    read: `exp_avg` (m).

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, arXiv 2302.06675.
    """
    return list(torch._foreach_sign([state["exp_avg"] for state in states]))


@_bitsandbytes("lion", "Lion", "Lion32bit", "PagedLion", "PagedLion32bit")
def bitsandbytes_lion_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """Lion of bitsandbytes with `optim_bits=32`, at rest: as `lion_direction`. State read: `state1`."""
    return list(torch._foreach_sign([state["state1"] for state in states]))


# ---- GaLore ----


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
    k = _column([state["step"] for state in states])
    beta1, beta2 = group["betas"]
    corrected = torch.where(k > 0, (1 - beta2**k).sqrt() / (1 - beta1**k), 0.0)
    moves = _scaled_delta(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        group["eps"],
        _readable(corrected if group["correct_bias"] else torch.ones_like(k)),
    ).moves(1.0)
    if "rank" not in group:
        return moves
    return [state["projector"].project_back(move) for state, move in zip(states, moves, strict=True)]
