"""The prediction in paper notation: slow, plain, one weight tensor at a time, in double precision.

Written from the equations and not from `hf_xgrad.rules`, so that both can be wrong only independently. The further
optimizers are followed from their gradients on, so that a state which is read wrongly shows too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sgd_delta(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """delta_t = buf"""
    return state["momentum_buffer"].double()


def adam_delta(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """delta_t = m_hat / (sqrt(v_hat) + eps)"""
    b1, b2 = (float(b) for b in group["betas"])
    k = float(state["step"])
    v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    m_hat = state["exp_avg"].double() / (1 - b1**k)
    v_hat = v.double() / (1 - b2**k)
    return m_hat / (v_hat.sqrt() + group["eps"])


def adabelief_delta(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """delta_t = m_hat / (sqrt(v_hat) + eps), v the average of (g - m)^2 with eps in it"""
    b1, b2 = group["betas"]
    k = group["step"]
    v = state["max_exp_avg_var"] if group["ams_bound"] else state["exp_avg_var"]
    return state["exp_avg"].double() / (1 - b1**k) / ((v.double() / (1 - b2**k)).sqrt() + group["eps"])


def adam3_delta(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """delta_t = m_hat / sqrt((v + eps) / (1 - b2^k))"""
    b1, b2 = group["betas"]
    k = float(state["step"])
    v_hat = (state["exp_avg_var"].double() + group["eps"]) / (1 - b2**k)
    return state["exp_avg"].double() / (1 - b1**k) / v_hat.sqrt()


DELTAS = {
    "SGD": sgd_delta,
    "Adam": adam_delta,
    "AdamW": adam_delta,
    "AdaBelief": adabelief_delta,
    "AdaM3": adam3_delta,
}


def predicted_weights(optimizer: torch.optim.Optimizer, s: float) -> list[Tensor]:
    """w_hat_t = w_t - s * lr_t * delta_t for every parameter, in double precision; w_t where there is no state."""
    result = []
    for group in optimizer.param_groups:
        for w in group["params"]:
            state = optimizer.state.get(w, {})
            if not state or float(state.get("step", 1)) == 0:
                result.append(w.detach().double().clone())
                continue
            delta = DELTAS[type(optimizer).__name__](state, group)
            result.append(w.detach().double() - s * float(group["lr"]) * delta)
    return result


def adam3_trajectory(
    w: Tensor, gradients: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Tensor:
    """AdaM3 from its equations:

    m_t = b1 m_{t-1} + (1 - b1) g_t,  v_t = b2 v_{t-1} + (1 - b2) m_t^2,
    w_t = (1 - lr wd) w_{t-1} - lr m_hat_t / sqrt((v_t + eps) / (1 - b2^t))
    """
    b1, b2 = betas
    w, m, v = w.clone(), torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * m * m
        w = (1 - lr * weight_decay) * w
        w = w - lr * (m / (1 - b1**t)) / torch.sqrt((v + eps) / (1 - b2**t))
    return w


# ---- further optimizers: delta_t after the gradients g_1 ... g_k, from the papers ----


def average(values: Sequence[Tensor], beta: float) -> Tensor:
    """m_k = beta m_{k-1} + (1 - beta) x_k, from m_0 = 0"""
    m = torch.zeros_like(values[0])
    for x in values:
        m = beta * m + (1 - beta) * x
    return m


def unbiased(values: Sequence[Tensor], beta: float) -> Tensor:
    """The weighted mean of all values, the latest weighing most: m_k / (1 - beta^k)"""
    weights = [beta ** (len(values) - j) for j in range(1, len(values) + 1)]
    return sum((w * x for w, x in zip(weights, values, strict=True)), torch.zeros_like(values[0])) / sum(weights)


def squares(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [g * g for g in gradients]


def adamw_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    b1, b2 = group["betas"]
    return unbiased(gradients, b1) / (unbiased(squares(gradients), b2).sqrt() + group["eps"])


def stable_adamw_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """AdamW, each step unclipped; one of the libraries has its betas apart."""
    b1, b2 = group["betas"] if "betas" in group else (group["beta1"], group["beta2"])
    return adamw_from_gradients(gradients, {"betas": (b1, b2), "eps": group["eps"]})


def radam_from_gradients(gradients: list[Tensor], group: dict[str, Any], early: float = 1.0) -> Tensor:
    """r m_hat l, l = sqrt(1 - b2^k) / (sqrt(v) + eps), or `early` times m_hat while the variance is intractable"""
    b1, b2 = group["betas"]
    k = len(gradients)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * k * b2**k / (1 - b2**k)
    m_hat = unbiased(gradients, b1)
    if rho <= 5:
        return early * m_hat
    r = (((rho - 4) * (rho - 2) * rho_inf) / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    return r * m_hat * (1 - b2**k) ** 0.5 / (average(squares(gradients), b2).sqrt() + group["eps"])


def library_radam_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """No step at all while the variance is intractable"""
    return radam_from_gradients(gradients, group, early=0.0)


def adamax_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """m_hat / u, u_k = max(b2 u_{k-1}, |g_k| + eps)"""
    b1, b2 = group["betas"]
    u = torch.zeros_like(gradients[0])
    for g in gradients:
        u = torch.maximum(b2 * u, g.abs() + group["eps"])
    return unbiased(gradients, b1) / u


def rmsprop_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """b_k = mu b_{k-1} + g_k / (sqrt(v_k) + eps); centred, v_k is less the square of the average gradient"""
    b = torch.zeros_like(gradients[0])
    for k in range(1, len(gradients) + 1):
        v = average(squares(gradients[:k]), group["alpha"])
        if group["centered"]:
            v = v - average(gradients[:k], group["alpha"]) ** 2
        b = group["momentum"] * b + gradients[k - 1] / (v.sqrt() + group["eps"])
    return b


def nadam_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """Step k + 1 whose gradient is m_hat_k, over sqrt(v_hat_k) + eps"""
    b1, b2 = group["betas"]
    mu = [b1 * (1 - 0.5 * 0.96 ** (j * group["momentum_decay"])) for j in range(1, len(gradients) + 3)]
    products = torch.tensor(mu, dtype=torch.float64).cumprod(0).tolist()
    g = unbiased(gradients, b1)
    m = average([*gradients, g], b1)
    numerator = mu[-1] * m / (1 - products[-1]) + (1 - mu[-2]) * g / (1 - products[-2])
    return numerator / (unbiased(squares(gradients), b2).sqrt() + group["eps"])


def sgdw_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    buf = gradients[0]
    for g in gradients[1:]:
        buf = group["momentum"] * buf + (1 - group["dampening"]) * g
    return buf


def adan_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """(m_hat + b2 d_hat) / (sqrt(n_hat) + eps), with differences of gradients in d and n, the first of them 0"""
    b1, b2, b3 = group["betas"]
    changes = [g - before for g, before in zip(gradients, [gradients[0], *gradients], strict=False)]
    looked_ahead = [g + b2 * c for g, c in zip(gradients, changes, strict=True)]
    n_hat = unbiased(squares(looked_ahead), b3)
    return (unbiased(gradients, b1) + b2 * unbiased(changes, b2)) / (n_hat.sqrt() + group["eps"])


def adopt_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """m_k = b1 m_{k-1} + (1 - b1) clip(g_k / max(sqrt(v_{k-1}), eps), k^0.25), v_1 = g_1^2, m_1 = 0"""
    b1, b2 = group["betas"]
    m, v = torch.zeros_like(gradients[0]), gradients[0] ** 2
    for k, g in enumerate(gradients[1:], start=2):
        normed = (g / v.sqrt().clamp(min=group["eps"])).clamp(-(k**0.25), k**0.25)
        m = b1 * m + (1 - b1) * normed
        v = b2 * v + (1 - b2) * g * g
    return m


def ademamix_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """(m1_hat + alpha_k m2) / (sqrt(v_hat) + eps); alpha and b3 are warmed up over T steps, if T is given"""
    b1, b2, b3 = group["betas"]
    if "t_alpha_beta3" in group:
        t_alpha = t_beta3 = group["t_alpha_beta3"]
    else:
        t_alpha, t_beta3 = group["t_alpha"], group["t_beta3"]
    alpha, m2 = group["alpha"], torch.zeros_like(gradients[0])
    for k, g in enumerate(gradients, start=1):
        b3_k = b3
        if t_beta3:
            # Linear in the half-life: 1 / log(b3_k) goes from 1 / log(b1) to 1 / log(b3).
            x = k / t_beta3
            ends = [torch.tensor(b, dtype=torch.float64).log() for b in (b1, b3)]
            b3_k = min(float(torch.exp(1 / ((1 - x) / ends[0] + x / ends[1]))), b3)
        m2 = b3_k * m2 + (1 - b3_k) * g
    if t_alpha:
        alpha = min(len(gradients) / t_alpha, 1.0) * alpha
    return (unbiased(gradients, b1) + alpha * m2) / (unbiased(squares(gradients), b2).sqrt() + group["eps"])


def lion_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """sign(m), m with b2"""
    return average(gradients, group["betas"][1]).sign()


def galore_from_gradients(gradients: list[Tensor], group: dict[str, Any]) -> Tensor:
    """alpha P N, N Adam's direction of the projected gradients P^T g, P the leading singular vectors of g_1"""
    b1, b2 = group["betas"]
    k, r = len(gradients), group.get("rank")
    tall = gradients[0].ndim == 2 and gradients[0].shape[0] >= gradients[0].shape[1]
    if r is None:
        low = gradients
    else:
        u, _, vh = torch.linalg.svd(gradients[0], full_matrices=False)
        low = [g @ vh[:r].T for g in gradients] if tall else [u[:, :r].T @ g for g in gradients]
    n = average(low, b1) / (average(squares(low), b2).sqrt() + group["eps"])
    if group["correct_bias"]:
        n = n * (1 - b2**k) ** 0.5 / (1 - b1**k)
    if r is None:
        return n
    return group["scale"] * (n @ vh[:r] if tall else u[:, :r] @ n)
