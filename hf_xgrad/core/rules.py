"""Prediction rules: where an optimizer is heading, as pure functions on lists of tensors.

With `w` the weights, `s` the steps ahead, `lr_t` the learning rate of the coming step and `k` the number of steps
realised so far, a rule gives the move from `w_t` to the predicted weights `w_hat_t`:

    closed form    w_hat_t - w_t = - s * lr_t * delta(state after step k)
    last update    w_hat_t - w_t = s * (lr_t / lr_{t-1}) * (w_t - w_{t-1})

Both are a scale times a `Direction`.

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


class Direction(NamedTuple):
    """`factor * numerator / denominator` for each parameter, not worked out: a kernel then does it all in one pass.

    Attributes:
        numerators: one tensor per parameter, never written to: they may be the optimizer's own.
        denominators: tensors of the same shapes that are this object's own; None stands for 1.
        factors: a number, one for each parameter, or a 1-d tensor of them on the device; None stands for 1.
    """

    numerators: Sequence[Tensor]
    denominators: list[Tensor] | None = None
    factors: float | list[float] | Tensor | None = None

    def moves(self, scale: float | Tensor) -> list[Tensor]:
        """`scale * direction` as new tensors."""
        if self.denominators is None:
            moves = torch._foreach_mul(list(self.numerators), 1.0)
        else:
            moves = torch._foreach_div(list(self.numerators), self.denominators)
        if self.factors is not None:
            torch._foreach_mul_(moves, scalars(self.factors))
        torch._foreach_mul_(moves, scale)
        return list(moves)

    def add_to_(self, weights: list[Tensor], scale: float | Tensor) -> None:
        """Adds `scale * direction` to `weights`; uses the denominators up."""
        on_host = not isinstance(self.factors, Tensor) and not isinstance(scale, Tensor)
        if self.denominators is None and self.factors is None and not isinstance(scale, Tensor):
            torch._foreach_add_(weights, list(self.numerators), alpha=scale)
        elif self.denominators is None or self.factors is None or (not on_host and weights[0].dtype is torch.float16):
            # float16 cannot hold a denominator that has been divided by a learning rate.
            torch._foreach_add_(weights, self.moves(scale))
        elif isinstance(self.factors, Tensor):
            # A factor or scale of 0 makes the denominator infinite, and the move 0.
            torch._foreach_div_(self.denominators, scalars(scale * self.factors))
            torch._foreach_addcdiv_(weights, list(self.numerators), self.denominators)
        elif isinstance(scale, Tensor):
            # Numbers of the host and one of the device: two passes, but nothing to copy over or to wait for.
            torch._foreach_div_(self.denominators, self.factors)
            torch._foreach_div_(self.denominators, scale)
            torch._foreach_addcdiv_(weights, list(self.numerators), self.denominators)
        elif isinstance(self.factors, list):
            scales = [scale * factor for factor in self.factors]
            torch._foreach_addcdiv_(weights, list(self.numerators), self.denominators, scales)
        else:
            torch._foreach_addcdiv_(weights, list(self.numerators), self.denominators, scale * self.factors)


DirectionFunction = Callable[[Sequence[Tensor], Sequence[State], Group], Sequence[Tensor] | Direction]
DirectionT = TypeVar("DirectionT", bound=DirectionFunction)


class ClosedForm(NamedTuple):
    """How one optimizer class moves, read from its state.

    Attributes:
        function: `(params, states, group) -> delta`, one tensor per parameter or a `Direction`.
        decay: `group -> share` of the weights that decoupled weight decay removes in the coming step, or None.
        unless: `group -> reason` why this group's state does not determine its direction, or None where it does.
        unless_optimizer: the same of a whole optimizer, for settings that are not in its groups.
        elementwise: whether `delta` of a part of the weights follows from the state of that part.
        needs: entries of a state without which (or with None in them) its parameter is not predicted.
    """

    function: DirectionFunction
    decay: Callable[[Group], float | Tensor] | None = None
    unless: Callable[[Group], str | None] | None = None
    unless_optimizer: Callable[[Optimizer], str | None] | None = None
    elementwise: bool = True
    needs: tuple[str, ...] = ()

    def direction(self, params: Sequence[Tensor], states: Sequence[State], group: Group) -> Direction:
        """`delta` of some parameters of `group`."""
        delta = self.function(params, states, group)
        return delta if isinstance(delta, Direction) else Direction(delta)

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


def form_or_obstacle(
    optimizer: Optimizer, group: Group, rule: str, in_parts: str | None = None
) -> tuple[ClosedForm | None, str]:
    """The closed form that `rule` gives a group of `optimizer`, by its exact class; or None, and why.

    Args:
        optimizer: the optimizer.
        group: one of its parameter groups.
        rule: of `XGradConfig`.
        in_parts: what cuts the weights up, so that only elementwise forms hold; None where they are whole.

    Raises:
        ValueError: `rule="closed_form"`, and there is none.
    """
    if rule == "last_update":
        return None, "as xgrad_rule='last_update' asks"
    name = type(optimizer).__name__
    form = closed_form_of(type(optimizer))
    if form is None:
        obstacle: str | None = f"{name} has no closed form"
    elif any(map(Tensor.is_complex, group["params"])):
        obstacle = "complex parameters have no closed form"
    elif in_parts is not None and not form.elementwise:
        obstacle = f"the closed form of {name} needs whole weights, and {in_parts}"
    else:
        obstacle = form.obstacle(optimizer, group)
    if obstacle is None:
        return form, ""
    if rule == "closed_form":
        raise no_closed_form(obstacle)
    return None, obstacle


def form_of_group(optimizer: Optimizer, group: Group, rule: str, in_parts: str | None = None) -> ClosedForm | None:
    """The closed form of a group, as `form_or_obstacle` has it; None: the last-update rule."""
    return form_or_obstacle(optimizer, group, rule, in_parts)[0]


def no_closed_form(obstacle: str) -> ValueError:
    """The error for `rule="closed_form"` where there is none, with the way out."""
    return ValueError(
        f"XGrad: xgrad_rule='closed_form' asks for a closed form, but {obstacle}. Use 'auto' or 'last_update'."
    )


def register_rule(
    optimizer_class: type | str,
    *,
    decay: Callable[[Group], float | Tensor] | None = None,
    unless: Callable[[Group], str | None] | None = None,
    unless_optimizer: Callable[[Optimizer], str | None] | None = None,
    elementwise: bool = True,
    needs: tuple[str, ...] = (),
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
        needs: names of entries that a state may lack, or have None in, before they are first used: such a parameter is
            not predicted.

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

    def register(function: DirectionT) -> DirectionT:
        _CLOSED_FORMS[optimizer_class] = ClosedForm(function, decay, unless, unless_optimizer, elementwise, needs)
        return function

    return register


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


def scalars(values: float | list[float] | Tensor) -> Any:
    """For multi-tensor kernels: numbers as they are, the elements of a 1-d tensor without dimensions."""
    return list(values.unbind()) if isinstance(values, Tensor) else values
