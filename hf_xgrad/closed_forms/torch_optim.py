"""Closed forms of torch.optim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_xgrad.closed_forms.formulas import (
    adaptive_direction,
    column,
    decoupled_decay,
    infinity_direction,
    no_momentum,
    readable,
    rectified_direction,
    scaled_direction,
    state_steps,
)
from hf_xgrad.core.rules import Direction, Group, State, register_rule


def _optional_decay(group: Group) -> float | Tensor:
    return decoupled_decay(group) if group.get("decoupled_weight_decay") else 0.0


@register_rule(torch.optim.SGD, unless=no_momentum, needs=("momentum_buffer",))
def sgd_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """SGD with momentum: `delta = buf`.

    The buffer already holds weight decay, dampening and the sign of `maximize`, as torch.optim applies them to the
    gradient before it enters the buffer.
    """
    return [state["momentum_buffer"] for state in states]


@register_rule(torch.optim.AdamW, decay=decoupled_decay)
@register_rule(torch.optim.Adam, decay=_optional_decay)
def adam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """Adam and AdamW: `delta = (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)`.

    With `amsgrad`, `v` is the running maximum. `m` already has the sign of `maximize`, as torch.optim negates the
    gradient before it enters the moments.
    """
    second_moment = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    return adaptive_direction(
        [state["exp_avg"] for state in states],
        [state[second_moment] for state in states],
        state_steps(states),
        group["betas"],
        group["eps"],
    )


@register_rule(torch.optim.RAdam, decay=_optional_decay)
def radam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """RAdam, exact: Adam's direction times r where the second moment is trusted, else the first moment alone.

        rho_inf = 2 / (1 - b2) - 1,   rho = rho_inf - 2 k b2^k / (1 - b2^k)
        r       = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
        delta   = r * m / (1 - b1^k) * sqrt(1 - b2^k) / (sqrt(v) + eps)        where rho > 5
        delta   = m / (1 - b1^k)                                               else

    State read: `exp_avg` (m), `exp_avg_sq` (v), `step` (k).

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, arXiv 1908.03265.
    """
    return rectified_direction(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        column([state["step"] for state in states]),
        group["betas"],
        group["eps"],
        unrectified=1.0,
    )


@register_rule(torch.optim.NAdam, decay=_optional_decay)
def nadam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
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
    k = column([state["step"] for state in states])

    def momentum(step: Tensor) -> Tensor:
        return beta1 * (1 - 0.5 * 0.96 ** (step * decay))

    product = column([state["mu_product"] for state in states]) * momentum(k + 1)
    own = (1 - momentum(k + 1)) / (1 - product)
    averaged = momentum(k + 2) * (1 - beta1 ** (k + 1)) / (1 - product * momentum(k + 2))
    root = (1 - beta2**k).sqrt()
    factors = torch.where(k > 0, root * (own + averaged) / (1 - beta1**k), 0.0)
    return scaled_direction(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        root * group["eps"],
        readable(factors),
    )


@register_rule(torch.optim.Adamax)
def adamax_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """Adamax, exact: `delta = m / ((1 - b1^k) u)`, `u` being the decaying maximum of `|g| + eps`.

    State read: `exp_avg` (m), `exp_inf` (u), `step` (k).

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv 1412.6980, section 7.1.
    """
    return infinity_direction(states, column([state["step"] for state in states]), group["betas"][0])


def _rmsprop_without_momentum(group: Group) -> str | None:
    return "RMSprop without momentum needs the last gradient" if group["momentum"] == 0 else None


@register_rule(torch.optim.RMSprop, unless=_rmsprop_without_momentum, needs=("momentum_buffer",))
def rmsprop_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """RMSprop with momentum, exact: `delta = buf`, where `buf = momentum * buf + g / (sqrt(v) + eps)`.

    The buffer holds all settings already, `centered` too. State read: `momentum_buffer` (buf).

    Source: Graves, "Generating Sequences With Recurrent Neural Networks", arXiv 1308.0850, equations 38 to 45.
    """
    return [state["momentum_buffer"] for state in states]
