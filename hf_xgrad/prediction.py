"""WeightPredictor: writes the predicted weights, keeps the true ones, and brings them back."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import chain, repeat
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import hf_xgrad.closed_forms  # noqa: F401, registers them
from hf_xgrad.auto_steps import AutoSteps
from hf_xgrad.rules import ClosedForm, Delta, Group, State, closed_form_of, last_update, last_update_scale
from hf_xgrad.sharding import (
    GatheredWeights,
    copies,
    is_sharded,
    local_part,
    local_state,
    process_of_group,
    sum_over_processes,
)

if TYPE_CHECKING:
    from hf_xgrad.arguments import XGradConfig

# Elements worked on at a time: bounds the temporaries beside the backup.
_CHUNK_ELEMENTS = 2**24

IN_BACKWARD = (
    "it updates the weights inside backward, so that the predicted weights would be updated instead of the true ones"
)
CLOSURE = "its step needs a closure, which would run forward and backward on the true weights"
HESSIAN = (
    "its step differentiates once more through backward's graph, which belongs to the predicted weights that are gone "
    "by then"
)
# What cannot be right under any rule, told by what the optimizer (or its class) offers, not by its name.
_REFUSALS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fused_backward",), IN_BACKWARD),
    (("optimizer_dict",), f"it is layer-wise: {IN_BACKWARD}"),
    (
        ("train", "eval"),
        "it switches its weights between training and evaluation, as Schedule-Free does, which already trains at an "
        "extrapolated point",
    ),
    (
        ("first_step", "second_step"),
        "it moves the weights to a point of its own between two backward passes, as SAM does, and takes the gradient "
        "there",
    ),
    (("perturb_weights",), CLOSURE),
)
# By a setting of its groups, where that is on.
_REFUSED_SETTINGS = {
    "differentiable": "differentiable=True has autograd follow the steps, which cannot follow the prediction",
    "gradient_release": IN_BACKWARD,  # of the optimi library
}
# And what shows nothing of it from outside, by "module.qualname".
_REFUSED_CLASSES = {
    "pytorch_optimizer.optimizer.adahessian.AdaHessian": HESSIAN,
    "pytorch_optimizer.optimizer.alig.AliG": CLOSURE,
    "pytorch_optimizer.optimizer.sophia.SophiaH": HESSIAN,
}


def refusal(optimizer: Optimizer | Callable[..., Any]) -> str | None:
    """Why weights cannot be predicted for `optimizer` (an instance, a class or a factory); None where they can."""
    for attributes, reason in _REFUSALS:
        if all(hasattr(optimizer, attribute) for attribute in attributes):
            return reason
    optimizer_class = optimizer if isinstance(optimizer, type) else type(optimizer)
    if _needs_closure(optimizer_class):
        return CLOSURE
    reasons = [_REFUSED_CLASSES.get(f"{base.__module__}.{base.__qualname__}") for base in optimizer_class.__mro__]
    if isinstance(optimizer, Optimizer):
        reasons += [refused_setting(group) for group in getattr(optimizer, "param_groups", ())]
        # What is wrong with the optimizer inside is not mended by one around it.
        reasons += [refusal(inner) for inner in _inner_optimizers(optimizer)]
    return next(filter(None, reasons), None)


def refused_setting(settings: Mapping[str, Any]) -> str | None:
    """Why weights cannot be predicted under these settings of an optimizer; None where they can."""
    return next((reason for name, reason in _REFUSED_SETTINGS.items() if settings.get(name)), None)


def _needs_closure(optimizer_class: type) -> bool:
    """Whether `step` asks for a closure, as that of LBFGS does."""
    step = getattr(optimizer_class, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step is not None else None
    return closure is not None and closure.default is inspect.Parameter.empty


def refused(name: str, reason: str) -> ValueError:
    """The error for an optimizer that cannot be right, with the way out."""
    return ValueError(
        f"XGrad: {name} is refused: {reason}. Choose another optimizer, or switch XGrad off (xgrad=False)."
    )


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer behind wrappers that only pass through, such as Accelerate's.

    A wrapper passes through if its state and its groups *are* those of the optimizer inside, and its steps run no
    hooks of their own; any other steps by a rule of its own.
    """
    inner = getattr(optimizer, "optimizer", None)
    if (
        isinstance(inner, Optimizer)
        and not hasattr(optimizer, "_optimizer_step_pre_hooks")
        and inner.state is getattr(optimizer, "state", None)
        and inner.param_groups is getattr(optimizer, "param_groups", None)
    ):
        return unwrap_optimizer(inner)
    return optimizer


def check_optimizer(optimizer: Optimizer, config: XGradConfig) -> None:
    """Raises ValueError, with the cause and the way out, where `optimizer` cannot be predicted under `config`."""
    optimizer = unwrap_optimizer(optimizer)
    reason = refusal(optimizer) or _unreachable(optimizer)
    if reason is not None:
        raise refused(type(optimizer).__name__, reason)
    for group in optimizer.param_groups:
        form_of_group(optimizer, group, config.rule)


def _unreachable(optimizer: Optimizer) -> str | None:
    """Why the weights that `optimizer` steps, or its steps, cannot be seen from outside; None where they can.

    Optimizers around others are the ones to look at: nothing makes them show the groups of those inside, nor their
    steps.
    """
    if not hasattr(optimizer, "param_groups"):
        return "it has no param_groups, where the weights that it steps could be found"
    shown = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for inner in _inner_optimizers(optimizer):
        if any(id(p) not in shown for group in inner.param_groups for p in group["params"]):
            return f"it steps weights of a {type(inner).__name__} inside that its own param_groups do not have"
    if not hasattr(optimizer, "_optimizer_step_pre_hooks") or not getattr(type(optimizer).step, "hooked", False):
        return (
            "its step runs no step hooks, as it never called torch.optim.Optimizer.__init__, so that no step would be "
            "noticed"
        )
    return None


def _inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    for value in vars(optimizer).values():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        yield from (item for item in inner if isinstance(item, Optimizer))


def form_of_group(optimizer: Optimizer, group: Group, rule: str) -> ClosedForm | None:
    """The closed form that `rule` gives a group of `optimizer`, by its exact class; None for the universal rule."""
    if rule == "last_update":
        return None
    form = closed_form_of(type(optimizer))
    if form is None:
        obstacle: str | None = f"{type(optimizer).__name__} has none"
    elif any(p.is_complex() for p in group["params"]):
        obstacle = "complex parameters have none"
    elif not form.elementwise and any(is_sharded(p) for p in group["params"]):
        obstacle = f"that of {type(optimizer).__name__} needs whole weights, and these are sharded"
    else:
        obstacle = form.obstacle(optimizer, group)
    if obstacle is None:
        return form
    if rule == "closed_form":
        raise no_closed_form(obstacle)
    return None


def no_closed_form(obstacle: str) -> ValueError:
    """The error for `rule="closed_form"` where there is none, with the way out."""
    return ValueError(
        f"XGrad: xgrad_rule='closed_form' asks for a closed form, but {obstacle}. Use 'auto' or 'last_update'."
    )


_UNIVERSAL_STATE = {"holds", "lrs", "weights"}


class _Holds(Enum):
    """What the backup tensors of parameters under the universal rule hold."""

    NOTHING = "nothing"  # nothing that a prediction could start from
    PREVIOUS = "previous"  # w_{t-1}: a step was realised since
    PREDICTED = "predicted"  # w_hat_t: the window of w_t is still open


class _Chunk(NamedTuple):
    """Parameters of one group, on one device and of one dtype, that one sequence of kernels serves."""

    params: list[Tensor]  # of sharded ones the local parts
    backups: list[Tensor]
    states: list[State]
    group: Group
    form: ClosedForm | None
    scale: float | Tensor  # of the delta that its rule gives
    decay: float | Tensor | None  # share of the weights to add to that
    copies: int  # how many processes hold these parameters


class WeightPredictor:
    r"""Runs forward and backward on the weights that an optimizer is heading for.

        w_hat_t = w_t - s * lr_t * delta_t                              (closed form)
        w_hat_t = w_t + s * (lr_t / lr_{t-1}) * (w_t - w_{t-1})         (last update)

    `predict` writes `w_hat_t` into the parameters, `restore` brings `w_t` back bit for bit, by copying. Between two
    realised steps every `predict` writes the same weights, so that all micro-batches of one accumulation window see
    them. Parameters keep their storage; the optimizer's state and groups are only read. Beside the temporaries of one
    chunk, the predictor holds one copy of the weights that it moves, allocated once.

    Args:
        optimizer: the optimizer `w` is stepped by: any `torch.optim.Optimizer`, bare or prepared by Accelerate.
        config: `s` is `config.steps`, the rule `config.rule`.
        model: the model as prepared; needed where its parameters are sharded (FSDP, tensor parallelism), as whole
            weights that FSDP has gathered have to be dropped then. Each process predicts the part that it holds.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: an optimizer for which no prediction can be right, `rule="closed_form"` where there is none, or
            sharded parameters without `model`.

    Example:
        >>> import torch
        >>> from hf_xgrad import WeightPredictor, XGradConfig
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
        >>> for batch in torch.ones(3, 4, 2):
        ...     with predictor.predicted():
        ...         loss = model(batch).square().mean()
        ...         loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Source: Guan et al., "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction", arXiv 2305.18240.
    """

    def __init__(self, optimizer: Optimizer, config: XGradConfig, model: nn.Module | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"WeightPredictor: `optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self.optimizer = unwrap_optimizer(optimizer)
        self.config = config
        self._active = config.active
        self._inside = False
        self._step: FrameType | None = None  # the step that is being realised, or that raised
        self._backups: dict[Tensor, Tensor] = {}
        self._moved: list[_Chunk] = []  # chunks that hold predicted weights right now
        self._copied = False  # whether others (autocast, FSDP) may hold copies of predicted weights
        self._window: list[_Chunk] = []  # chunks that were predicted since the last realised step
        self._holds = _Holds.NOTHING
        self._previous_lrs: list[Any] = []
        self._auto_steps: AutoSteps | None = None
        self._fixed_steps = 0.0
        self._predictions = 0
        self._warned = False
        self._measuring = False
        self._moves: list[list[Tensor]] = []
        self._steps_used: list[float] = []
        self._measured: list[Tensor] | None = None
        self._ignores_steps = False
        self._sharded = False
        self._gathered = GatheredWeights(None)
        if not self._active:
            return
        check_optimizer(self.optimizer, config)
        self._sharded = any(is_sharded(p) for group in self._groups() for p in group["params"])
        if self._sharded and model is None:
            raise ValueError(
                "WeightPredictor: the parameters are sharded; give it the prepared model too: "
                "WeightPredictor(optimizer, config, model)"
            )
        self._gathered = GatheredWeights(model)
        if isinstance(config.steps, str):
            self._auto_steps = AutoSteps(self._groups, sharded=self._sharded)
        else:
            self._fixed_steps = config.steps
        self._warn_of_rounding()
        self._attach()

    def _warn_of_rounding(self) -> None:
        low = {p.dtype for group in self._universal_groups() for p in group["params"] if _is_low_precision(p)}
        if low:
            names = ", ".join(sorted(str(dtype) for dtype in low))
            warnings.warn(
                f"XGrad: the last update of weights kept in {names} is mostly rounding, and a prediction from it says "
                "little. Load the model in float32 (dtype=torch.float32) and train with --bf16 or --fp16 instead.",
                stacklevel=3,
            )

    def _attach(self) -> None:
        """Listens for realised steps.

        Only the optimizer itself knows them: a GradScaler skips some, an accumulating loop calls `step` on a wrapper
        that does nothing, and neither leaves a trace in a gradient.
        """
        reference = weakref.ref(self)

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            predictor = reference()
            if predictor is None or predictor._ignores_steps:
                return
            if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
                raise RuntimeError(
                    "WeightPredictor: optimizer.step(closure) would run forward and backward on the true weights; run "
                    "them in predicted() and call optimizer.step() without a closure"
                )
            if predictor._step is not None and _is_running(predictor._step):
                return  # within a step: a subclass that calls the step of its base runs the hooks of both
            predictor._before_step()
            predictor._step = sys._getframe(1)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            predictor = reference()
            if predictor is not None and predictor._step is sys._getframe(1):
                predictor._step = None
                predictor._after_step()

        handles = (
            self.optimizer.register_step_pre_hook(before),
            self.optimizer.register_step_post_hook(after),
        )
        weakref.finalize(self, _remove_all, handles)

    # ---- predict and restore ----

    @property
    def is_predicted(self) -> bool:
        """True between `predict` and `restore`."""
        return self._inside

    def predicted(self) -> _Predicted:
        """Context manager: predicted weights inside, the true ones again on every way out.

        Raises:
            RuntimeError: on entering it twice (predicting from predicted weights).
        """
        return _Predicted(self)

    @torch.no_grad()
    def predict(self) -> None:
        """Writes the predicted weights into the parameters.

        Does nothing to a parameter for which the optimizer has no state yet, nor with `steps=0` or `enabled=False`.

        Raises:
            RuntimeError: the weights are predicted already.
        """
        if self._inside:
            raise RuntimeError(
                "WeightPredictor: the weights are predicted already; call restore() (or leave predicted()) first"
            )
        try:
            self._inside = True
            if self._active:
                self._write()
        except BaseException:
            self.restore()
            raise

    def _write(self) -> None:
        # Until the window is complete the universal rule's memory is neither the one thing nor the other: should an
        # interrupt end this half way, nothing is predicted from it.
        held, self._holds = self._holds, _Holds.NOTHING
        self._gathered.drop()
        self._copied = True
        lost = _LostShare() if self._checks_precision() else None
        self._window = []
        for chunk in self._chunks(universal=held is not _Holds.NOTHING):
            if chunk.form is None and held is _Holds.PREDICTED:
                # The window is still open: the weights predicted for its first micro-batch serve the others too.
                predicted = torch._foreach_mul(chunk.backups, 1)
                torch._foreach_copy_(chunk.backups, chunk.params)
                self._moved.append(chunk)
                torch._foreach_copy_(chunk.params, predicted)
            else:
                delta = self._delta(chunk)
                torch._foreach_copy_(chunk.backups, chunk.params)
                self._moved.append(chunk)
                delta.add_to_(chunk.params, chunk.scale)
                if chunk.decay is not None:
                    torch._foreach_add_(chunk.params, torch._foreach_mul(chunk.backups, chunk.decay))
                if lost is not None:
                    lost.add(chunk, delta)
            self._window.append(chunk)
        self._holds = held
        if self._moved:
            self._predictions += 1
            # Autocast keeps low-precision copies of the weights it has seen; they are of the true ones.
            torch.clear_autocast_cache()
        if lost is not None:
            self._warn_if_lost(lost)

    def restore(self) -> None:
        """Brings the true weights back, bit for bit; does nothing where they are already there."""
        self._restore(failed=False)

    @torch.no_grad()
    def _restore(self, *, failed: bool) -> None:
        """`restore`, told whether forward or backward `failed`; without communication, as others may not follow."""
        held, self._holds = self._holds, _Holds.NOTHING
        complete = held is not _Holds.NOTHING
        while self._moved:
            chunk = self._moved[-1]
            keeps_prediction = chunk.form is None and complete
            predicted = torch._foreach_mul(chunk.params, 1) if keeps_prediction else None
            torch._foreach_copy_(chunk.params, chunk.backups)
            # From here on the chunk's backup may be overwritten: should an interrupt come now, a second restore must
            # not copy from it.
            self._moved.pop()
            if predicted is not None:
                torch._foreach_copy_(chunk.backups, predicted)
                held = _Holds.PREDICTED
        if self._copied:
            torch.clear_autocast_cache()
            self._gathered.drop(failed=failed)
            self._copied = False
        self._inside = False
        self._holds = held

    def _chunks(self, *, universal: bool) -> Iterator[_Chunk]:
        """Parameters that a prediction can be made for, with their backups, a chunk at a time."""
        # A group that was added since the last step has no learning rate of it: nothing to repeat.
        previous_lrs = chain(self._previous_lrs, repeat(0.0))
        for g, (group, previous_lr) in enumerate(zip(self._groups(), previous_lrs, strict=False)):
            form = self._form(group)
            steps = self._steps(g)
            if form is None:
                scale = last_update_scale(steps, group.get("lr"), previous_lr) if universal else 0.0
                if not isinstance(scale, Tensor) and scale == 0.0:
                    continue
            else:
                scale = -steps * _scalar(group["lr"])
            by_kind: dict[tuple[torch.device, torch.dtype, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                local = local_part(p)
                if local.numel() > 0 and self._is_under_way(p, form):
                    kind = (local.device, local.dtype, copies(p) if self._sharded else 1)
                    by_kind.setdefault(kind, []).append((p, local))
            decay = self._decay(group, form, steps)
            for (device, _, held), params in by_kind.items():
                scale_here, decay_here = _on(scale, device), _on(decay, device)
                for part in _split(params):
                    states = [local_state(self.optimizer.state[p], p) for p, _ in part] if form is not None else []
                    backups = [self._backup(p) for p, _ in part]
                    yield _Chunk([w for _, w in part], backups, states, group, form, scale_here, decay_here, held)

    def _groups(self) -> Sequence[Group]:
        """The optimizer's groups, with the parameters that it steps."""
        return self.optimizer.param_groups

    def _steps(self, group_index: int) -> float | Tensor:
        """`s` of the coming prediction."""
        return self._fixed_steps if self._auto_steps is None else self._auto_steps.steps(group_index)

    def _is_under_way(self, p: Tensor, form: ClosedForm | None) -> bool:
        # The optimizer's state tells, never the gradient: that is None when a step begins. A frozen weight may still
        # have a state from before it was frozen.
        if not p.requires_grad:
            return False
        return bool(self.optimizer.state.get(p)) if form is not None else p in self._backups

    def _delta(self, chunk: _Chunk) -> Delta:
        """What `chunk.scale` turns into the move of a chunk whose parameters are `w_t`."""
        if chunk.form is None:
            return last_update(chunk.params, chunk.backups)
        delta = chunk.form.direction(chunk.params, chunk.states, chunk.group)
        return delta if isinstance(delta, Delta) else Delta(delta)

    def _decay(self, group: Group, form: ClosedForm | None, steps: float | Tensor) -> float | Tensor | None:
        if form is None or form.decay is None or not self.config.weight_decay:
            return None
        return -steps * _scalar(form.decay(group))

    def _form(self, group: Group) -> ClosedForm | None:
        """The closed form that `group` is predicted by; None for the universal rule."""
        return form_of_group(self.optimizer, group, self.config.rule)

    def _universal_groups(self) -> list[Group]:
        return [group for group in self._groups() if self._form(group) is None]

    def _backup(self, p: Tensor) -> Tensor:
        backup = self._backups.get(p)
        if backup is None:
            backup = self._backups[p] = torch.empty_like(local_part(p), requires_grad=False)
        return backup

    # ---- realised steps ----

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._moved:
            raise RuntimeError(
                "WeightPredictor: optimizer.step() on predicted weights; leave predicted() (or call restore()) first"
            )
        if self._measuring:
            self._moves = [self._move_once_more(chunk) for chunk in self._window]
            self._steps_used = self._auto_steps.values() if self._auto_steps is not None else []
        self._holds = _Holds.NOTHING
        if self._auto_steps is not None:
            self._auto_steps.before_step()
        groups = self._universal_groups()
        for group in groups:
            # Not a weight that was never trained; but one frozen since stands still, and its backup must say so.
            params = [p for p in group["params"] if p.requires_grad or p in self._backups]
            if params:
                torch._foreach_copy_([self._backup(p) for p in params], [local_part(p) for p in params])
        self._previous_lrs = [_value(group.get("lr")) for group in self._groups()] if groups else []

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._measuring:
            measured = [
                _compare(moves, list(torch._foreach_sub(chunk.params, chunk.backups)), chunk.backups) / chunk.copies
                for moves, chunk in zip(self._moves, self._window, strict=True)
            ]
            if self._sharded:
                device = local_part(next(p for group in self._groups() for p in group["params"])).device
                none = torch.zeros(4, device=device)
                measured = [sum_over_processes(sum((m.to(device) for m in measured), none))]
            self._measured = measured
            self._moves, self._measuring = [], False
        if self._auto_steps is not None:
            self._auto_steps.after_step()
        self._window = []
        self._holds = _Holds.PREVIOUS if self._previous_lrs else _Holds.NOTHING

    @contextmanager
    def ignoring_steps(self) -> Iterator[None]:
        """Steps in here count as none: saving the state of an optimizer under FSDP2 may step, with lr = 0."""
        self._ignores_steps = True
        try:
            yield
        finally:
            self._ignores_steps = False

    # ---- diagnostics ----

    def measure(self, enabled: bool = True) -> None:
        """Whether to compare the prediction of the coming step with the step; `diagnostics` then has the result."""
        self._measuring, self._measured = enabled and self._active, None

    def diagnostics(self) -> dict[str, float]:
        """Result of the last measured step, once; empty where none was measured since.

        `relative_norm` is `|w_hat_t - w_t| / |w_t|` over all predicted weights, `cosine` that of the angle between
        `w_hat_t - w_t` and `w_{t+1} - w_t` (missing where either is zero), `active` 1.0 where weights were moved.
        With `steps="auto"`, `steps` is the mean of `s` over the parameter groups, and `steps_<i>` that of group i.
        """
        measured, self._measured = self._measured, None
        if measured is None:
            return {}
        sums = torch.stack([m.cpu() for m in measured]).sum(0).tolist() if measured else [0.0] * 4
        dot, move, update, weight = sums
        result = {"active": float(move > 0), "relative_norm": (move / weight) ** 0.5 if weight > 0 else 0.0}
        if move > 0 and update > 0:
            result["cosine"] = dot / (move * update) ** 0.5
        if self._steps_used:
            result["steps"] = sum(self._steps_used) / len(self._steps_used)
            if len(self._steps_used) > 1:
                result |= {f"steps_{g}": steps for g, steps in enumerate(self._steps_used)}
        return result

    def _move_once_more(self, chunk: _Chunk) -> list[Tensor]:
        """The move of this window, from weights that are true again."""
        if chunk.form is None:
            return list(torch._foreach_sub(chunk.backups, chunk.params))
        moves = self._delta(chunk).moves(chunk.scale)
        if chunk.decay is not None:
            torch._foreach_add_(moves, torch._foreach_mul(chunk.params, chunk.decay))
        return moves

    def _checks_precision(self) -> bool:
        """True at the 1st, 2nd, 4th, 8th... prediction: warm-up moves too little to judge by the first alone."""
        return not self._warned and self._predictions & (self._predictions + 1) == 0

    def _warn_if_lost(self, lost: _LostShare) -> None:
        share = lost.share()
        if share > 0.5:
            self._warned = True
            warnings.warn(
                f"XGrad: {share:.0%} of the predicted moves are smaller than the resolution of the {lost.dtypes} "
                "weights and are lost. Load the model in float32 (dtype=torch.float32) and train with --bf16 or "
                "--fp16 instead.",
                stacklevel=4,
            )

    # ---- checkpoints ----

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the optimizer's state; empty where that is all (closed forms, a fixed s).

        Returns:
            of the universal rule `{"holds": "previous" | "predicted", "lrs": [lr_{t-1} per group],
            "weights": {"<group>.<index>": tensor}}`, and with `steps="auto"` also `{"steps": {name: tensor}}`. Of
            sharded weights the local parts, and `{"process": [rank, number of processes]}`: each process saves and
            loads its own.

        Raises:
            RuntimeError: inside a prediction.
        """
        if self._moved:
            raise RuntimeError("WeightPredictor: state_dict() inside a prediction; leave predicted() first")
        state: dict[str, Any] = {}
        if self._holds is not _Holds.NOTHING:
            state["holds"] = self._holds.value
            # A group that was added since the last step has none of it.
            lrs = [*self._previous_lrs, *[0.0] * (len(self._groups()) - len(self._previous_lrs))]
            state["lrs"] = [float(lr) if isinstance(lr, Tensor) else lr for lr in lrs]
            # A weight that was never stepped stood still: it is its own last value.
            state["weights"] = {
                name: self._backups[p] if p in self._backups else local_part(p).detach()
                for name, p in self._remembered().items()
                if p.requires_grad or p in self._backups
            }
        steps = self._auto_steps.state_dict() if self._auto_steps is not None else {}
        if steps:
            state["steps"] = steps
        if state and self._sharded:
            state["process"] = self.process
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; what is not in it starts anew.

        To be called after the weights and the optimizer's state have been loaded.

        Raises:
            ValueError: the state belongs to other parameters or to another process, is incomplete, or holds what it
                cannot have been; nothing is changed then.
        """
        if self._moved:
            raise RuntimeError("WeightPredictor: load_state_dict() inside a prediction; leave predicted() first")
        if not self._active:
            return
        if state_dict and state_dict.get("process") != self.process:
            raise ValueError(
                f"WeightPredictor: state_dict is that of {_process(state_dict.get('process'))}, and is needed by "
                f"{_process(self.process)}: of sharded weights each process has to save and load its own"
            )
        if self._auto_steps is not None:
            self._auto_steps.check_state_dict(state_dict.get("steps", {}))
        missing = _UNIVERSAL_STATE - set(state_dict)
        holds_weights = missing != _UNIVERSAL_STATE and "weights" in self.remembers
        if holds_weights and missing:
            raise ValueError(f"WeightPredictor: state_dict lacks {sorted(missing)}")
        weights = self._check_weights(state_dict) if holds_weights else {}
        # All of it has been checked: from here on nothing is refused.
        self._gathered.drop()
        if self._auto_steps is not None:
            self._auto_steps.load_state_dict(state_dict.get("steps", {}))
        self._holds = _Holds.NOTHING
        if not holds_weights:
            return
        remembered = self._remembered()
        for name, tensor in weights.items():
            self._backup(remembered[name]).copy_(tensor)
        self._previous_lrs = [
            torch.as_tensor(lr, dtype=group["lr"].dtype, device=group["lr"].device)
            if isinstance(group.get("lr"), Tensor)
            else lr
            for lr, group in zip(state_dict["lrs"], self._groups(), strict=True)
        ]
        self._holds = _Holds(state_dict["holds"])

    def _check_weights(self, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
        """Refuses what `state_dict` cannot have given of the universal rule, and returns the weights to take up."""
        if state_dict["holds"] not in (_Holds.PREVIOUS.value, _Holds.PREDICTED.value):
            raise ValueError(f"WeightPredictor: state_dict has {state_dict['holds']!r} in `holds`")
        lrs, weights, remembered = state_dict["lrs"], state_dict["weights"], self._remembered()
        if not isinstance(lrs, list) or not all(map(_is_learning_rate, lrs)):
            raise ValueError(f"WeightPredictor: state_dict has no learning rates in `lrs`, but {lrs!r:.80}")
        if len(lrs) != len(self._groups()):
            raise ValueError(
                f"WeightPredictor: state_dict has {len(lrs)} parameter groups, the optimizer {len(self._groups())}"
            )
        if any(lr is None and group.get("lr") is not None for lr, group in zip(lrs, self._groups(), strict=True)):
            raise ValueError(f"WeightPredictor: state_dict lacks learning rates that the optimizer has: {lrs!r:.80}")
        unknown = sorted(set(weights) - set(self._places()))
        if unknown:
            raise ValueError(
                f"WeightPredictor: state_dict names parameters that the optimizer does not have: {unknown[:3]}"
            )
        # Those that have a closed form now need no last update.
        weights = {name: tensor for name, tensor in weights.items() if name in remembered}
        lacking = [name for name, p in remembered.items() if p.requires_grad and name not in weights]
        if lacking:
            raise ValueError(f"WeightPredictor: state_dict lacks the weights {lacking[:3]}")
        for name, tensor in weights.items():
            local = local_part(remembered[name])
            if tensor.shape != local.shape:
                raise ValueError(
                    f"WeightPredictor: weight {name} of state_dict has shape {tuple(tensor.shape)}, the parameter "
                    f"{tuple(local.shape)}"
                )
            if tensor.dtype != local.dtype:
                raise ValueError(
                    f"WeightPredictor: weight {name} of state_dict is of type {tensor.dtype}, the parameter of "
                    f"{local.dtype}"
                )
            # What has diverged goes on as it was; but a weight is not finite again that was not so before.
            infinite = ~torch.isfinite(tensor)
            if infinite.any() and (infinite & torch.isfinite(local).to(infinite.device)).any():
                raise ValueError(f"WeightPredictor: weight {name} of state_dict holds NaN or infinity")
        return weights

    @property
    def process(self) -> list[int] | None:
        """`[rank, number of processes]` that `state_dict` belongs to; None where it is the same on all."""
        return list(process_of_group()) if self._sharded else None

    @property
    def remembers(self) -> set[str]:
        """What of `state_dict` a prediction needs beside the optimizer's state: `"weights"`, `"steps"`, or neither."""
        needed = set()
        if self._active and self._universal_groups():
            needed.add("weights")
        if self._auto_steps is not None:
            needed.add("steps")
        return needed

    def _remembered(self) -> dict[str, Tensor]:
        """Parameters under the universal rule, by their places."""
        universal = {id(group) for group in self._universal_groups()}
        return {name: p for name, (group, p) in self._places().items() if id(group) in universal}

    def _places(self) -> dict[str, tuple[Group, Tensor]]:
        """Groups and parameters by their places in the optimizer, `"<group>.<index>"`, as its state_dict has them."""
        return {
            f"{g}.{i}": (group, p) for g, group in enumerate(self._groups()) for i, p in enumerate(group["params"])
        }


class _Predicted:
    """`with predictor.predicted()`.

    A class, not a generator: where a Ctrl-C comes between `__enter__` and the body, a suspended generator would keep
    the predicted weights until it is collected.
    """

    def __init__(self, predictor: WeightPredictor) -> None:
        self._predictor = predictor

    def __enter__(self) -> WeightPredictor:
        nested = self._predictor.is_predicted
        try:
            self._predictor.predict()
        except BaseException:
            if not nested:
                self._predictor._restore(failed=True)
            raise
        return self._predictor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = error is not None
        try:
            self._predictor._restore(failed=failed)
        finally:
            self._predictor._restore(failed=failed)  # only has work to do where an interrupt ended the first


class _LostShare:
    """Share of the predicted moves that vanish in the resolution of low-precision weights."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._dtypes: set[str] = set()

    def add(self, chunk: _Chunk, delta: Delta) -> None:
        """A weight is to be moved where neither the numerator of its delta is 0, nor what that is multiplied by."""
        if not _is_low_precision(chunk.params[0]):
            return
        self._dtypes.add(str(chunk.params[0].dtype))
        factors = repeat(1.0) if delta.factors is None else delta.factors
        for param, backup, numerator, factor in zip(
            chunk.params, chunk.backups, delta.numerators, factors, strict=False
        ):
            intended = (numerator != 0) & torch.as_tensor(chunk.scale * factor != 0, device=numerator.device)
            self._counts.append(torch.stack([(intended & (param == backup)).sum(), intended.sum()]))

    def share(self) -> float:
        if not self._counts:
            return 0.0
        lost, intended = torch.stack([count.cpu() for count in self._counts]).sum(0).tolist()
        return lost / intended if intended else 0.0

    @property
    def dtypes(self) -> str:
        return ", ".join(sorted(self._dtypes))


def _compare(moves: list[Tensor], updates: list[Tensor], weights: list[Tensor]) -> Tensor:
    """`[<move, update>, |move|^2, |update|^2, |weight|^2]` over lists of tensors, left on their device."""

    def total(a: list[Tensor], b: list[Tensor]) -> Tensor:
        products = [(x.float() * y.float()).real.sum() for x, y in zip(a, b, strict=True)]
        return torch.stack(products).sum()

    return torch.stack([total(moves, updates), total(moves, moves), total(updates, updates), total(weights, weights)])


def _split(params: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cuts a list of (parameter, local part) where `_CHUNK_ELEMENTS` would be passed; a larger one stands alone."""
    part: list[tuple[Tensor, Tensor]] = []
    elements = 0
    for p, local in params:
        if part and elements + local.numel() > _CHUNK_ELEMENTS:
            yield part
            part, elements = [], 0
        part.append((p, local))
        elements += local.numel()
    if part:
        yield part


def _process(process: list[int] | None) -> str:
    return "whole weights" if process is None else f"process {process[0]} of {process[1]}"


def _is_low_precision(p: Tensor) -> bool:
    return p.dtype in (torch.bfloat16, torch.float16)


def _is_running(frame: FrameType) -> bool:
    """Whether a call has not ended yet; Python refuses to clear the frame of one."""
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


def _scalar(value: float | Tensor) -> float | Tensor:
    """Tensors of one element as multi-tensor kernels want them: without dimensions."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def _on(value: Any, device: torch.device) -> Any:
    """A number (or None) for kernels on `device`; they take one from the host, but not from another accelerator."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.to(device)
    return value


def _is_learning_rate(lr: Any) -> bool:
    """Whether a state may have it: a finite number, or None where an optimizer has none."""
    return lr is None or (type(lr) in (int, float) and abs(lr) <= sys.float_info.max)


def _value(lr: Any) -> Any:
    """`lr` as it is now: some optimizers and schedulers change a tensor in place."""
    return lr.detach().clone() if isinstance(lr, Tensor) else lr


def _remove_all(handles: tuple[Any, ...]) -> None:
    for handle in handles:
        handle.remove()
