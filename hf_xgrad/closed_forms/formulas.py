"""Formulas that closed forms of several libraries share; notation as in `hf_xgrad.core.rules`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_xgrad.core.rules import Direction, Group, State, scalars

# Effective length of the second moment's average from which on RAdam trusts it.
RECTIFIED_FROM = 5


def state_steps(states: Sequence[State]) -> float | list[float] | Tensor:
    """Realised steps `k`: one number where all have the same, else a list; a 1-d tensor where they are on a device."""
    steps = [state["step"] for state in states]
    if isinstance(steps[0], Tensor):
        if steps[0].device.type != "cpu":
            return torch.stack(steps).flatten()
        steps = list(map(Tensor.item, steps))
    return float(steps[0]) if steps.count(steps[0]) == len(steps) else list(map(float, steps))


def bias_corrections(beta: float | Tensor, steps: Tensor) -> Tensor:
    """`1 - beta^k` for each `k` of `steps`, in their precision: in single, 1 - 0.999^k loses four digits."""
    return 1 - (beta.to(steps.device, steps.dtype).reshape(()) if isinstance(beta, Tensor) else beta) ** steps


def adaptive_direction(
    exp_avgs: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: float | list[float] | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    *,
    eps_in_root: bool = False,
) -> Direction:
    """Direction of the Adam family.

        delta = (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)
        delta = (m / (1 - b1^k)) / sqrt((v + eps) / (1 - b2^k))        with `eps_in_root`

    and 0 for a parameter whose `k` is 0 (a state that a skipped first step has left empty). Worked out with
    `r = sqrt(1 - b2^k)`, which spares two passes over the weights:

        delta = (r / (1 - b1^k)) * m / (sqrt(v) + r * eps)
        delta = (r / (1 - b1^k)) * m / sqrt(v + eps)

    Args:
        exp_avgs: `m`, one tensor per parameter.
        second_moments: `v`, shapes as `exp_avgs`.
        steps: `k` of each parameter, as `state_steps` gives them.
        betas: `(b1, b2)`.
        eps: `eps`.
        eps_in_root: whether eps stands under the square root.
    """
    beta1, beta2 = betas
    floor = negligible(exp_avgs[0].dtype)
    factors: float | list[float] | Tensor
    offsets: float | list[float] | Tensor
    if isinstance(steps, Tensor) or isinstance(beta1, Tensor) or isinstance(beta2, Tensor):
        device = next(value.device for value in (steps, beta1, beta2) if isinstance(value, Tensor))
        k = as_vector(steps, device).expand(len(exp_avgs))
        c1, root = bias_corrections(beta1, k), bias_corrections(beta2, k).sqrt()
        factors = torch.where(c1 > 0, root / torch.where(c1 > 0, c1, 1.0), 0.0)
        offsets = (root * eps).clamp_min(floor)
    elif isinstance(steps, list):
        each = [_factor_and_offset(k, beta1, beta2, eps, floor) for k in steps]
        factors, offsets = [factor for factor, _ in each], [offset for _, offset in each]
    else:
        factors, offsets = _factor_and_offset(steps, beta1, beta2, eps, floor)
    if eps_in_root:
        denominators = torch._foreach_add(list(second_moments), max(eps, floor))
        torch._foreach_sqrt_(denominators)
    else:
        denominators = torch._foreach_sqrt(list(second_moments))
        add_numbers_(list(denominators), offsets)
    return Direction(exp_avgs, list(denominators), factors)


def add_numbers_(tensors: list[Tensor], numbers: float | list[float] | Tensor) -> None:
    """Adds a number to each tensor, or one to all."""
    first = tensors[0]
    if isinstance(numbers, float) and first.device.type == "cpu" and first.dtype in (torch.float32, torch.float64):
        # On the host a Python number is made a tensor for each sum, which takes longer than a small sum.
        torch._foreach_add_(tensors, [torch.scalar_tensor(numbers, dtype=first.dtype)] * len(tensors))
    else:
        torch._foreach_add_(tensors, scalars(numbers))


def _factor_and_offset(k: float, beta1: float, beta2: float, eps: float, floor: float) -> tuple[float, float]:
    """`r / (1 - b1^k)` and `r * eps`, of numbers that the host knows."""
    root, correction1 = (1 - beta2**k) ** 0.5, 1 - beta1**k
    return root / correction1 if correction1 > 0 else 0.0, max(root * eps, floor)


def as_vector(values: float | list[float] | Tensor, device: torch.device | None) -> Tensor:
    """Numbers in the best precision that the device has; MPS has no doubles."""
    single = device is not None and device.type == "mps"
    return torch.as_tensor(values, dtype=torch.float32 if single else torch.float64, device=device)


def negligible(dtype: torch.dtype) -> float:
    """A number that vanishes beside any other of `dtype`, for denominators that would be 0.

    Such an element never had a gradient, or its parameter never had a step: it is not heading anywhere.
    """
    limits = torch.finfo(dtype)
    # float16 has too few exponents to spare its subnormal numbers.
    return limits.tiny * limits.eps if dtype is torch.float16 else limits.tiny


def decoupled_decay(group: Group) -> float | Tensor:
    return group["lr"] * group["weight_decay"]


def column(values: Sequence[Any]) -> Tensor:
    """One number per parameter as a 1-d tensor, on the device where they are."""
    if isinstance(values[0], Tensor):
        stacked = torch.stack(list(values)).flatten()
        return as_vector(stacked, stacked.device)
    return as_vector([float(value) for value in values], None)


def readable(numbers: Tensor) -> list[float] | Tensor:
    """Numbers where the host knows them, as `state_steps` has it."""
    return numbers.tolist() if numbers.device.type == "cpu" else numbers


def scaled_direction(
    exp_avgs: Sequence[Tensor], second_moments: Sequence[Tensor], eps: float | Tensor, factors: list[float] | Tensor
) -> Direction:
    """`factor * m / (sqrt(v) + eps)`; `eps` is one number, or a 1-d tensor with one per parameter."""
    denominators = list(torch._foreach_sqrt(list(second_moments)))
    floor = negligible(denominators[0].dtype)
    add_numbers_(denominators, readable(eps.clamp_min(floor)) if isinstance(eps, Tensor) else max(eps, floor))
    return Direction(exp_avgs, denominators, factors)


def mix(exp_avgs: Sequence[Tensor], others: Sequence[Tensor], shares: list[float]) -> list[Tensor]:
    """`m + share * other` as new tensors."""
    mixed = list(torch._foreach_mul(list(others), shares))
    torch._foreach_add_(mixed, list(exp_avgs))
    return mixed


def rectified_direction(
    exp_avgs: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    k: Tensor,
    betas: tuple[float, float],
    eps: float,
    unrectified: float,
) -> Direction:
    """RAdam's direction; `unrectified` scales `m / (1 - b1^k)` where the second moment is not trusted yet."""
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**k, 1 - beta2**k
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * k * beta2**k / correction2  # nan at k = 0, which no comparison takes for rectified
    rectified = length > RECTIFIED_FROM
    ratio = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    factors = torch.where(rectified, (ratio * correction2).sqrt(), unrectified) / correction1
    delta = scaled_direction(exp_avgs, second_moments, eps, readable(torch.where(k > 0, factors, 0.0)))
    trusted = readable(rectified.to(k.dtype))
    if delta.denominators is not None and (isinstance(trusted, Tensor) or not all(trusted)):
        # The others are to be divided by 1; each parameter may have its own number of steps.
        torch._foreach_mul_(delta.denominators, scalars(trusted))
        torch._foreach_add_(delta.denominators, scalars(readable(1 - rectified.to(k.dtype))))
    return delta


def infinity_direction(states: Sequence[State], k: Tensor, beta1: float) -> Direction:
    norms = [state["exp_inf"] for state in states]
    denominators = list(torch._foreach_clamp_min(norms, negligible(norms[0].dtype)))
    factors = torch.where(k > 0, 1 / (1 - beta1**k), 0.0)
    return Direction([state["exp_avg"] for state in states], denominators, readable(factors))


def slow_shares(steps: list[float], beta1: float, alpha: float, warmup: float | None) -> list[float]:
    """What `m` is to be mixed with for AdEMAMix: `(1 - b1^k) alpha_k`, alpha growing over `warmup` steps."""
    alphas = [min(k * alpha / warmup, alpha) if warmup else alpha for k in steps]
    return [(1 - beta1**k) * a for k, a in zip(steps, alphas, strict=True)]


def stable_adamw_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
    """StableAdamW, exact but for the clipping: `delta = m / (sqrt(v) + eps)`.

    Bias correction is in the averages, as both libraries correct the betas. Each step is divided by
    `max(1, rms(g / sqrt(v)))` of its tensor, which depends on the coming gradient; delta is the step that is not
    clipped. State read: `exp_avg` (m), `exp_avg_sq` (v).

    Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023,
    arXiv 2304.13013, algorithm 2.
    """
    return scaled_direction(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        group["eps"],
        [1.0] * len(states),
    )


def lion_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """Lion, at rest: `delta = sign(m)`.

    The coming step is `sign(b1 m + (1 - b1) g)`, which is `sign(m)` if the coming gradient is its running mean. State
    read: `exp_avg` (m).

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, arXiv 2302.06675.
    """
    return list(torch._foreach_sign([state["exp_avg"] for state in states]))


def no_momentum(group: Group) -> str | None:
    if group["momentum"] == 0:
        return "SGD without momentum keeps no state to predict from"
    if group["nesterov"]:
        return "Nesterov's step needs the last gradient, which is no part of the state"
    return None
