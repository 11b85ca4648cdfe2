"""Prediction rules: where an optimizer is heading, as pure functions on lists of tensors.

With `w` the weights, `s` the number of steps predicted ahead, `lr_t` the learning rate of the coming step and `k` the
number of steps realised so far, a rule gives the move from `w_t` to the predicted weights `w_hat_t`:

    closed form    w_hat_t - w_t = - s * lr_t * delta(state after step k)
    last update    w_hat_t - w_t = s * (lr_t / lr_{t-1}) * (w_t - w_{t-1})

Both are a scale times a `Delta`.

Nothing here reads a gradient, changes a tensor that it was given, or waits for a device.

Source: Guan, Li, Shi, Meng, "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction", IEEE TPAMI 46(10),
2024, arXiv 2305.18240.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = Mapping[str, Any]
State = Mapping[str, Any]

RULES = ("auto", "closed_form", "last_update")


class Delta(NamedTuple):
    """`factor * numerator / denominator` for each parameter, not worked out: a kernel then does it all in one pass.

    Attributes:
        numerators: one tensor per parameter, never written to: they may be the optimizer's own.
        denominators: tensors of the same shapes that are this object's own; None stands for 1.
        factors: a number for each parameter, or a 1-d tensor of them on the device; None stands for 1.
    """

    numerators: Sequence[Tensor]
    denominators: list[Tensor] | None = None
    factors: list[float] | Tensor | None = None

    def moves(self, scale: float | Tensor) -> list[Tensor]:
        """`scale * delta` as new tensors."""
        if self.denominators is None:
            moves = torch._foreach_mul(list(self.numerators), 1.0)
        else:
            moves = torch._foreach_div(list(self.numerators), self.denominators)
        if self.factors is not None:
            torch._foreach_mul_(moves, scalars(self.factors))
        torch._foreach_mul_(moves, scale)
        return list(moves)

    def add_to_(self, params: list[Tensor], scale: float | Tensor) -> None:
        """Adds `scale * delta` to `params`; uses the denominators up."""
        if self.denominators is None and self.factors is None and not isinstance(scale, Tensor):
            torch._foreach_add_(params, list(self.numerators), alpha=scale)
        elif self.denominators is None or self.factors is None:
            torch._foreach_add_(params, self.moves(scale))
        elif isinstance(self.factors, Tensor):
            # A factor or scale of 0 makes the denominator infinite, and the move 0.
            torch._foreach_div_(self.denominators, scalars(scale * self.factors))
            torch._foreach_addcdiv_(params, list(self.numerators), self.denominators)
        elif isinstance(scale, Tensor):
            # Numbers of the host and one of the device: two passes, but nothing to copy over or to wait for.
            torch._foreach_div_(self.denominators, self.factors)
            torch._foreach_div_(self.denominators, scale)
            torch._foreach_addcdiv_(params, list(self.numerators), self.denominators)
        else:
            scales = [scale * factor for factor in self.factors]
            torch._foreach_addcdiv_(params, list(self.numerators), self.denominators, scales)


Direction = Callable[[Sequence[Tensor], Sequence[State], Group], Sequence[Tensor] | Delta]
DirectionT = TypeVar("DirectionT", bound=Direction)


class ClosedForm(NamedTuple):
    """How one optimizer class moves, read from its state.

    Attributes:
        direction: `(params, states, group) -> delta`, one tensor per parameter or a `Delta`.
        decay: `group -> share` of the weights that decoupled weight decay removes in the coming step, or None.
        unless: `group -> reason` why this group's state does not determine its direction, or None where it does.
        unless_optimizer: the same of a whole optimizer, for settings that are not in its groups.
        elementwise: whether `delta` of a part of the weights follows from the state of that part.
    """

    direction: Direction
    decay: Callable[[Group], float | Tensor] | None = None
    unless: Callable[[Group], str | None] | None = None
    unless_optimizer: Callable[[Optimizer], str | None] | None = None
    elementwise: bool = True

    def obstacle(self, optimizer: Optimizer, group: Group) -> str | None:
        """Why the closed form does not hold for `group` of `optimizer`; None where it does."""
        reason = self.unless_optimizer(optimizer) if self.unless_optimizer is not None else None
        if reason is None and self.unless is not None:
            reason = self.unless(group)
        return reason


# Keyed by the exact class, or by "module.qualname" for classes of libraries that need not be installed.
_CLOSED_FORMS: dict[type | str, ClosedForm] = {}


def closed_form_of(optimizer_class: type) -> ClosedForm | None:
    """The closed form registered for exactly `optimizer_class` (not for its bases), or None."""
    name = f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"
    return _CLOSED_FORMS.get(optimizer_class) or _CLOSED_FORMS.get(name)


def register_rule(
    optimizer_class: type | str,
    *,
    decay: Callable[[Group], float | Tensor] | None = None,
    unless: Callable[[Group], str | None] | None = None,
    unless_optimizer: Callable[[Optimizer], str | None] | None = None,
    elementwise: bool = True,
) -> Callable[[DirectionT], DirectionT]:
    """Decorator that gives an optimizer class its closed form.

    The decorated function computes `delta_t` of

        w_hat_t = w_t - s * lr_t * delta_t

    from the optimizer's state as the last realised step left it.

    Args:
        optimizer_class: the class, matched exactly: a subclass may step differently and needs its own rule. A string
            `"module.qualname"` names a class without importing it.
        decay: `group -> float`, the share of the weights that decoupled weight decay removes in the coming step
            (`lr * weight_decay` in AdamW). Only read with `XGradConfig(weight_decay=True)`.
        unless: `group -> reason`, a short text where the form does not hold for the settings of a group, else None.
            Such a group follows the last update instead (or is refused with `rule="closed_form"`).
        unless_optimizer: `optimizer -> reason`, the same where the setting is not in the groups.
        elementwise: whether each element of `delta` follows from the same element of the state. If so, sharded weights
            (FSDP, tensor parallelism) are predicted by the form too, the function being given the local part of each
            parameter and state; else they follow the last update.

    The function takes `(params, states, group)`: the parameters of one group on one device and of one dtype, the
    optimizer's state of each (never empty), and the group's settings. It returns one tensor per parameter, of the
    parameter's shape; they are not written to. A later registration for the same class replaces the earlier.

    Raises:
        TypeError: `optimizer_class` is neither a class nor a string.

    Example:
        An optimizer that steps along the sign of its momentum:

        >>> import torch
        >>> from hf_xgrad import WeightPredictor, XGradConfig, register_rule
        >>> class SignMomentum(torch.optim.Optimizer):
        ...     def __init__(self, params, lr=0.1, beta=0.5):
        ...         super().__init__(params, {"lr": lr, "beta": beta})
        ...     @torch.no_grad()
        ...     def step(self, closure=None):
        ...         for group in self.param_groups:
        ...             for p in group["params"]:
        ...                 m = self.state[p].setdefault("momentum", torch.zeros_like(p))
        ...                 m.lerp_(p.grad, 1 - group["beta"])
        ...                 p.sub_(group["lr"] * m.sign())
        >>> @register_rule(SignMomentum)
        ... def sign_momentum(params, states, group):
        ...     return [state["momentum"].sign() for state in states]
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = SignMomentum([w])
        >>> predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
        >>> (w**2).sum().backward()
        >>> optimizer.step()
        >>> with predictor.predicted():
        ...     print([round(x, 2) for x in w.tolist()])
        [0.8, -0.8]
        >>> [round(x, 2) for x in w.tolist()]
        [0.9, -0.9]
    """
    if not isinstance(optimizer_class, (type, str)):
        raise TypeError(
            f"register_rule: `optimizer_class` must be a class or a 'module.qualname' string, got {optimizer_class!r}"
        )

    def register(direction: DirectionT) -> DirectionT:
        _CLOSED_FORMS[optimizer_class] = ClosedForm(direction, decay, unless, unless_optimizer, elementwise)
        return direction

    return register


def last_update(params: Sequence[Tensor], previous: Sequence[Tensor]) -> Delta:
    """Universal rule: the last realised update, `w_t - w_{t-1}`; its scale is `last_update_scale`.

    Args:
        params: `w_t`.
        previous: `w_{t-1}`, shapes as `params`.
    """
    return Delta(torch._foreach_sub(list(params), list(previous)))


def last_update_scale(steps: float | Tensor, lr: Any, previous_lr: Any) -> float | Tensor:
    """`s * lr_t / lr_{t-1}`, and 0 where `lr_{t-1}` is 0: no update was realised then, so nothing can be repeated.

    Optimizers that set their own step size have no learning rate (None): the update is repeated as it was.
    """
    if lr is None or previous_lr is None:
        return steps
    if isinstance(lr, Tensor) or isinstance(previous_lr, Tensor):
        # Chosen on the device: a Python `if` would wait for it.
        lr, previous_lr = torch.as_tensor(lr), torch.as_tensor(previous_lr)
        ratio = torch.where(previous_lr == 0, 0.0, lr / torch.where(previous_lr == 0, 1.0, previous_lr))
        return steps * ratio.reshape(())
    return steps * lr / previous_lr if previous_lr != 0 else 0.0


def state_steps(states: Sequence[State]) -> list[float] | Tensor:
    """Realised steps `k` of each parameter: numbers where the host knows them, else one 1-d tensor on the device."""
    steps = [state["step"] for state in states]
    if not isinstance(steps[0], Tensor):
        return [float(step) for step in steps]
    stacked = torch.stack(steps).flatten()
    return stacked.tolist() if stacked.device.type == "cpu" else stacked


def bias_corrections(beta: float | Tensor, steps: list[float] | Tensor) -> list[float] | Tensor:
    """`1 - beta^k` for each `k` of `steps`; 1-d where `beta` or `steps` is a tensor."""
    if isinstance(steps, list) and not isinstance(beta, Tensor):
        return [1 - beta**k for k in steps]
    device = steps.device if isinstance(steps, Tensor) else beta.device if isinstance(beta, Tensor) else None
    # In double precision, as the fused kernels have it: 1 - 0.999^k loses four digits in single.
    k = as_vector(steps, device)
    return 1 - (beta.to(device, k.dtype).reshape(()) if isinstance(beta, Tensor) else beta) ** k


def adaptive_delta(
    exp_avgs: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    steps: list[float] | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float,
    *,
    eps_in_root: bool = False,
) -> Delta:
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
    correction1, correction2 = bias_corrections(beta1, steps), bias_corrections(beta2, steps)
    floor = negligible(exp_avgs[0].dtype)
    factors: list[float] | Tensor
    offsets: list[float] | Tensor
    if isinstance(correction1, Tensor) or isinstance(correction2, Tensor):
        device = next(c.device for c in (correction1, correction2) if isinstance(c, Tensor))
        c1, c2 = as_vector(correction1, device), as_vector(correction2, device)
        root = c2.sqrt()
        factors = torch.where(c1 > 0, root / torch.where(c1 > 0, c1, 1.0), 0.0)
        offsets = (root * eps).clamp_min(floor)
    else:
        roots = [c**0.5 for c in correction2]
        factors = [r / c if c > 0 else 0.0 for r, c in zip(roots, correction1, strict=True)]
        offsets = [max(r * eps, floor) for r in roots]
    if eps_in_root:
        denominators = torch._foreach_add(list(second_moments), max(eps, floor))
        torch._foreach_sqrt_(denominators)
    else:
        denominators = torch._foreach_sqrt(list(second_moments))
        torch._foreach_add_(denominators, scalars(offsets))
    return Delta(exp_avgs, list(denominators), factors)


def as_vector(values: list[float] | Tensor, device: torch.device | None) -> Tensor:
    """Numbers in the best precision that the device has; MPS has no doubles."""
    single = device is not None and device.type == "mps"
    return torch.as_tensor(values, dtype=torch.float32 if single else torch.float64, device=device)


def scalars(values: list[float] | Tensor) -> list[float] | list[Tensor]:
    """A list for multi-tensor kernels: numbers as they are, the elements of a 1-d tensor without dimensions."""
    return list(values.unbind()) if isinstance(values, Tensor) else values


def negligible(dtype: torch.dtype) -> float:
    """A number that vanishes beside any other of `dtype`, for denominators that would be 0.

    Such an element never had a gradient, or its parameter never had a step: it is not heading anywhere.
    """
    limits = torch.finfo(dtype)
    # float16 has too few exponents to spare its subnormal numbers.
    return limits.tiny * limits.eps if dtype is torch.float16 else limits.tiny


def decoupled_decay(group: Group) -> float | Tensor:
    return group["lr"] * group["weight_decay"]


def no_momentum(group: Group) -> str | None:
    if group["momentum"] == 0:
        return "SGD without momentum keeps no state to predict from"
    if group["nesterov"]:
        return "Nesterov's step needs the last gradient, which is no part of the state"
    return None


@register_rule(torch.optim.SGD, unless=no_momentum)
def sgd_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """SGD with momentum: `delta = buf`.

    The buffer already holds weight decay, dampening and the sign of `maximize`, as torch.optim applies them to the
    gradient before it enters the buffer.
    """
    return [state["momentum_buffer"] for state in states]


@register_rule(torch.optim.AdamW, decay=decoupled_decay)
@register_rule(
    torch.optim.Adam, decay=lambda group: decoupled_decay(group) if group.get("decoupled_weight_decay") else 0.0
)
def adam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """Adam and AdamW: `delta = (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)`.

    With `amsgrad`, `v` is the running maximum. `m` already has the sign of `maximize`, as torch.optim negates the
    gradient before it enters the moments.
    """
    second_moment = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    return adaptive_delta(
        [state["exp_avg"] for state in states],
        [state[second_moment] for state in states],
        state_steps(states),
        group["betas"],
        group["eps"],
    )


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


@register_rule(
    "pytorch_optimizer.optimizer.adabelief.AdaBelief",
    decay=library_decay,
    unless=without("AdaBelief", "rectify", "adanorm", "adam_debias"),
)
def adabelief_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """AdaBelief of the pytorch-optimizer library: `delta = (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)`.

    `v` is the moving average of `(g - m)^2`, to which that library adds eps at every step; with `ams_bound`, its
    running maximum. The number of steps is kept per group.

    Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", NeurIPS 2020,
    arXiv 2010.07468.
    """
    second_moment = "max_exp_avg_var" if group["ams_bound"] else "exp_avg_var"
    return adaptive_delta(
        [state["exp_avg"] for state in states],
        [state[second_moment] for state in states],
        [float(group["step"])] * len(states),
        group["betas"],
        group["eps"],
    )


@register_rule("hf_xgrad.optim.AdaM3", decay=decoupled_decay)
def adam3_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """AdaM3: `delta = (m / (1 - b1^k)) / sqrt((v + eps) / (1 - b2^k))`, `v` being the moving average of `m^2`."""
    return adaptive_delta(
        [state["exp_avg"] for state in states],
        [state["exp_avg_var"] for state in states],
        state_steps(states),
        group["betas"],
        group["eps"],
        eps_in_root=True,
    )
