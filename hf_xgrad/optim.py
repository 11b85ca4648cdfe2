"""AdaM3, the optimizer of the XGrad paper that no maintained library offers, in torch.optim's style."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class AdaM3(Optimizer):
    r"""AdaM3: Adam whose second moment averages the squared *momentum* instead of the squared gradient.

        w_t   = w_{t-1} - lr * wd * w_{t-1}                     (decoupled weight decay)
        m_t   = b1 * m_{t-1} + (1 - b1) * g_t
        v_t   = b2 * v_{t-1} + (1 - b2) * m_t^2
        w_t  -= lr * (m_t / (1 - b1^t)) / sqrt((v_t + eps) / (1 - b2^t))

    `g` is the gradient (negated with `maximize`), `m` the state `exp_avg`, `v` the state `exp_avg_var`, `t` the state
    `step`.

    Where eps enters: under the square root, beside `v_t`, at every step. The authors' code adds eps *into* the running
    `v` in place, so that it piles up over the steps towards `eps / (1 - b2)`, a thousand times eps at the default
    betas. This class follows the equation and keeps `v` a pure moving average: the meaning of eps then depends neither
    on b2 nor on the step, and a checkpoint does not carry eps inside its state.

    Args:
        params: parameters, or parameter groups as dicts.
        lr: `lr`, >= 0; a float or a tensor of one element.
        betas: `(b1, b2)`, each in [0, 1).
        eps: `eps`, >= 0, in units of squared gradients.
        weight_decay: `wd`, >= 0.
        foreach: multi-tensor kernels; None takes them where all parameters are dense.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a setting outside its range.
        RuntimeError: a sparse gradient.

    Source: Wang et al., "Momentum is All You Need for Data-Driven Adaptive Optimization", ICDM 2023, arXiv 2106.11514.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = AdaM3([w], lr=0.1)
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> print(round(w.item(), 4))
        0.0
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"AdaM3: `lr` must be a float or a tensor of one element, got {lr.numel()} elements")
        if not lr >= 0.0:
            raise ValueError(f"AdaM3: `lr` must be >= 0, got {lr}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"AdaM3: `betas[{i}]` must lie in [0, 1), got {beta}")
        if not eps >= 0.0:
            raise ValueError(f"AdaM3: `eps` must be >= 0, got {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"AdaM3: `weight_decay` must be >= 0, got {weight_decay}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """One step; `closure`, if given, re-evaluates the model and returns the loss, which is passed on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("AdaM3 does not support sparse gradients; use torch.optim.SparseAdam for those")
            for p in params:
                state = self.state[p]
                if not state:
                    # Not in the default type: in bfloat16 a count stops at 256.
                    state["step"] = torch.tensor(0.0, dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["exp_avg_var"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            states = [self.state[p] for p in params]
            beta1, beta2 = group["betas"]
            adam3(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_var"] for state in states],
                [state["step"] for state in states],
                foreach=group["foreach"],
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
            )
        return loss


def adam3(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_vars: list[Tensor],
    state_steps: list[Tensor],
    *,
    foreach: bool | None = None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Functional AdaM3: updates `params`, `exp_avgs`, `exp_avg_vars` and `state_steps` in place; see `AdaM3`."""
    if not params:
        return

    def real(tensors: list[Tensor]) -> list[Tensor]:
        return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]

    update = _single_tensor_adam3 if foreach is False else _multi_tensor_adam3
    update(
        real(params),
        real(grads),
        real(exp_avgs),
        real(exp_avg_vars),
        state_steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )


def _single_tensor_adam3(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_vars: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    for param, grad, exp_avg, exp_avg_var, step in zip(
        params, grads, exp_avgs, exp_avg_vars, state_steps, strict=True
    ):
        step += 1
        t = step.item()
        if weight_decay != 0:
            param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(-grad if maximize else grad, 1 - beta1)
        exp_avg_var.mul_(beta2).addcmul_(exp_avg, exp_avg, value=1 - beta2)
        denominator = (exp_avg_var + eps).sqrt_().div_((1 - beta2**t) ** 0.5)
        param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**t))


def _multi_tensor_adam3(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_vars: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    torch._foreach_add_(state_steps, 1)
    steps = torch.stack(state_steps).tolist()
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        by_kind[param.device, param.dtype].append(i)
    for indices in by_kind.values():
        ps, gs, ms, vs = ([tensors[i] for i in indices] for tensors in (params, grads, exp_avgs, exp_avg_vars))
        if maximize:
            gs = list(torch._foreach_neg(gs))
        if weight_decay != 0:
            torch._foreach_mul_(ps, 1 - lr * weight_decay)
        torch._foreach_lerp_(ms, gs, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, ms, ms, 1 - beta2)
        denominators = torch._foreach_add(vs, eps)
        torch._foreach_sqrt_(denominators)
        torch._foreach_div_(denominators, [(1 - beta2 ** steps[i]) ** 0.5 for i in indices])
        torch._foreach_addcdiv_(ps, ms, denominators, [-lr / (1 - beta1 ** steps[i]) for i in indices])
