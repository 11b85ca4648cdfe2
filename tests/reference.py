"""The prediction in paper notation: slow, plain, one weight tensor at a time, in double precision.

Written from the equations and not from `hf_xgrad.rules`, so that both can be wrong only independently.
"""

from __future__ import annotations

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
