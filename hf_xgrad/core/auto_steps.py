"""`steps="auto"`: the number of steps predicted ahead, read off the updates while they are realised."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.diagnostics import Observer
from hf_xgrad.core.moves import Move
from hf_xgrad.core.rules import Group
from hf_xgrad.core.weights import Weights

# How far the prediction aims: at the weights K steps ahead, K geometric with mean 1 / (1 - gamma), here two steps. One
# step (gamma = 0) keeps s below 1 and leaves a gain lying; five (gamma = 0.8) make s = 3 of Adam's momentum, which is
# too much for high learning rates. Measured on two language models; see docs/choosing_s.md.
_DISCOUNT = 0.5
# Averages over some 50 steps: s must not follow the noise of single batches, and has to settle in short runs too.
_SMOOTHING = 0.98
# And over some 5 steps, for what they repeat of late.
_RECENT = 0.8
# A smaller s is none under the last-update rule: of an optimizer without momentum the little that its updates repeat
# while it warms up soon turns into its opposite, and to predict by it until then made Adafactor worse at every seed.
_LEAST = 0.25
# Tensors looked at in a group, and weights in each, few enough to cost nothing. Beyond this size all tensors count
# alike, whatever their number of weights: s is that of the common tensor, not that of the largest.
_TENSORS = 32
_ELEMENTS = 512
_SHAPE = attrgetter("shape")

_Identity = tuple[int, ...]


class AutoSteps(Observer):
    r"""Chooses `s`, the number of steps predicted ahead, for each parameter group.

        u_t = (w_{t+1} - w_t) / lr_t
        e_t = u_{t-1} + gamma * e_{t-1}
        s   = E[<u_t, e_t>] / E[|u_{t-1}|^2], bounded to [0, 1 / (1 - gamma)]

    `u_t` is the realised update in units of its learning rate, `e_t` the discounted trace of those before it, `E` an
    exponential moving average over steps. With `gamma = 0` this is the step that would have fitted the next update
    best, in the sense of least squares: `<u_t, u_{t-1}> / |u_{t-1}|^2`. In general it is the one that fits the
    discounted sum of all coming updates, `sum_j gamma^j u_{t+j}`, which is the expected move to the weights `K` steps
    ahead for a geometric `K` of mean `1 / (1 - gamma)`. Updates that repeat themselves give the upper bound, updates
    that turn back and forth give 0. A closed form that is not the last update (that of NAdam, of Lion) still gets
    the s that suits the last update.

    Only weights before and after a step are looked at, on a fixed sample of each group, so that it works with every
    optimizer and rule, costs next to nothing, and is the same on all processes that hold the same weights. A step
    that moves nothing, or to infinity or NaN, changes nothing. On an accelerator nothing waits for the device.

    Until two updates are known, s is 1 for a group with a closed form. Under the last-update rule it is 0 then, and
    wherever it would be below 1/4, also by an average over some 5 steps: where the last updates hardly say where the
    next ones go, nothing is to be repeated.

    Where weights are sharded, each process samples the parts that it holds, and the products are summed over all
    processes (two numbers per group and step), so that all have the same `s`.

    Args:
        weights: gives the groups of the optimizer whose steps are realised; groups may be added to it, and weights
            frozen, at any time.
        config: tells for which groups `s` is to be chosen; may be set anew.

    Source: the trace is that of TD(lambda), Sutton, "Learning to predict by the methods of temporal differences",
    Machine Learning 3, 1988, which sums a discounted future backwards.
    """

    def __init__(self, weights: Weights, config: XGradConfig) -> None:
        self._weights = weights
        self.config = config
        self._estimates: dict[_Identity, _GroupEstimate] = {}  # by the parameters of the group

    def before_step(self, window: Sequence[Move] = ()) -> None:
        if not isinstance(self.config.steps, float):  # else no group chooses
            for group, estimate in self._follow_groups():
                estimate.before_step(group.get("lr"))

    def after_step(self, window: Sequence[Move] = ()) -> None:
        if self._estimates:
            self._take_step()

    @torch.no_grad()
    def _take_step(self) -> None:
        estimates = list(self._estimates.values())
        updates = [estimate.update() for estimate in estimates]
        products = [estimate.products(update) for estimate, update in zip(estimates, updates, strict=True)]
        if self._weights.process is not None:
            on = products[0].device
            products = list(self._weights.total(torch.stack([p.to(on) for p in products])))
        for estimate, update, sums in zip(estimates, updates, products, strict=True):
            estimate.take(update, sums)

    def steps(self, group: Group) -> float | Tensor:
        """`s` for the coming prediction of a group: a number on the CPU, else a tensor without dimensions."""
        cautious = self._weights.form(group) is None
        estimate = self._estimates.get(_identity(group["params"]))
        if estimate is None:
            return 0.0 if cautious else 1.0
        s = estimate.steps(cautious=cautious)
        return float(s) if s.device.type == "cpu" else s

    def values(self) -> list[float]:
        """`s` of each group whose `s` is chosen; waits for the device."""
        return [float(self.steps(group)) for _, group in self._chosen()]

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs, on the CPU: `"<group>.trace"` and `"<group>.sums"`.

        Empty before the first step.
        """
        if not self._estimates:
            return {}
        self._follow_groups()
        return {name: tensor.cpu() for name, tensor in self._named(self._estimates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave; an empty one starts anew.

        Raises:
            ValueError: as `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self._estimates = self._new_estimates() if state else {}
        for name, tensor in self._named(self._estimates) if state else ():
            tensor.copy_(state[name])

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Refuses what `state_dict` cannot have given.

        Raises:
            ValueError: the state belongs to other parameter groups, is incomplete, or holds NaN or infinity.
        """
        if not state:
            return
        needed = dict(self._named(self._new_estimates()))
        unknown = sorted(set(state) - set(needed))
        if unknown:
            raise ValueError(f"AutoSteps: the state has {unknown[:3]}, which no group that chooses its s needs")
        for name, tensor in needed.items():
            if name not in state:
                raise ValueError(f"AutoSteps: the state lacks {name}")
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"AutoSteps: {name} has shape {tuple(state[name].shape)}, the parameters of this optimizer need "
                    f"{tuple(tensor.shape)}"
                )
            if state[name].dtype != tensor.dtype:
                raise ValueError(f"AutoSteps: {name} is of type {state[name].dtype}, not {tensor.dtype}")
            if not torch.isfinite(state[name]).all():
                raise ValueError(f"AutoSteps: {name} holds NaN or infinity")

    def _chosen(self) -> list[tuple[int, Group]]:
        """The groups that choose their `s`, with their places in the optimizer."""
        places = enumerate(self._weights.groups())
        return [(g, group) for g, group in places if self.config.steps_under(self._weights.form(group)) is None]

    def _new_estimates(self) -> dict[_Identity, _GroupEstimate]:
        groups = (group for _, group in self._chosen())
        return {_identity(group["params"]): _GroupEstimate(self._weights, group["params"]) for group in groups}

    def _follow_groups(self) -> list[tuple[Group, _GroupEstimate]]:
        """Keeps one estimate per group, wherever the group stands now; one with other parameters starts afresh."""
        known, self._estimates = self._estimates, {}
        result = []
        for _, group in self._chosen():
            identity = _identity(group["params"])
            estimate = known.get(identity)
            if estimate is None or not estimate.fits():
                estimate = _GroupEstimate(self._weights, group["params"])
            self._estimates[identity] = estimate
            result.append((group, estimate))
        return result

    def _named(self, estimates: Mapping[_Identity, _GroupEstimate]) -> Iterator[tuple[str, Tensor]]:
        for g, group in self._chosen():
            estimate = estimates[_identity(group["params"])]
            yield f"{g}.trace", estimate.trace
            yield f"{g}.sums", estimate.sums


class _GroupEstimate:
    """`s` of one group."""

    def __init__(self, weights: Weights, params: Sequence[Tensor]) -> None:
        self._params = list(params)  # keeps them alive, so that their ids stay theirs
        self._sample = _Sample(weights, params)
        self._before: Tensor | None = None
        self._lr: Any = None
        zeros = torch.zeros_like(self._sample.read(), dtype=torch.float32)
        self.trace = zeros  # e_t
        self.sums = zeros.new_zeros(4)  # E[<u_t, e_t>], E[|u_{t-1}|^2], |u_{t-1}|^2, the first of these of late

    def fits(self) -> bool:
        """Whether the parameters are still those that were looked at, and of the same shapes."""
        return self._sample.fits()

    @torch.no_grad()
    def before_step(self, lr: Any) -> None:
        self._before = self._sample.read()
        if isinstance(lr, Tensor):
            # A copy, as some optimizers and schedulers change it in place. One on the CPU serves every device.
            lr = lr.detach().clone()
            self._lr = lr if lr.device.type == "cpu" else lr.to(self._before.device)
        else:
            # An optimizer without a learning rate sets the size of its steps itself.
            self._lr = 1.0 if lr is None else lr

    def update(self) -> Tensor:
        """`u_t`, right after the step."""
        before, self._before = self._before, None
        if before is None:
            return torch.zeros_like(self.trace)  # changes nothing
        return ((self._sample.read() - before) / self._lr).float()

    def products(self, update: Tensor) -> Tensor:
        """`<u_t, e_t>` and `|u_t|^2`."""
        return torch.stack([(update * self.trace.to(update.device)).sum(), update.square().sum()])

    def take(self, update: Tensor, products: Tensor) -> None:
        """Takes a step into account: `u_t`, and its products (over all processes)."""
        trace, sums = self.trace.to(update.device), self.sums.to(update.device)
        product, square = products.to(update.device).unbind()
        averages = torch.lerp(torch.stack([product, sums[2]]), sums[:2], _SMOOTHING)
        new_sums = torch.cat([averages, torch.stack([square, torch.lerp(product, sums[3], _RECENT)])])
        # A learning rate of 0 gives 0 / 0.
        counts = (square > 0) & torch.isfinite(new_sums).all()
        if counts.device.type != "cpu":
            # Decided on the device, as a Python `if` would wait for it.
            self.trace = torch.where(counts, update + _DISCOUNT * trace, trace)
            self.sums = torch.where(counts, new_sums, sums)
        elif counts:
            self.trace, self.sums = update + _DISCOUNT * trace, new_sums

    def steps(self, *, cautious: bool) -> Tensor:
        """`s`; 0 where an update hardly repeats the one before, if `cautious`."""
        product, square, _, recent = self.sums.unbind()
        s = torch.where(square > 0, (product / square).clamp(0.0, 1.0 / (1.0 - _DISCOUNT)), 0.0 if cautious else 1.0)
        return torch.where(torch.minimum(product, recent) >= _LEAST * square, s, 0.0) if cautious else s


class _Sample:
    """Some weights of a list of parameters, the same ones whenever and wherever it is made."""

    def __init__(self, weights: Weights, params: Sequence[Tensor]) -> None:
        ready = [p for p in params if not isinstance(p, UninitializedParameter)]
        usable = [p for p in ready if _is_usable(weights.part(p))]
        self._weights = weights
        self._params = [usable[i] for i in _spread(len(usable), _TENSORS)]
        self._shapes = list(map(_SHAPE, self._params))
        self._awaits_more = len(ready) < len(params)  # of lazy modules
        self._device = weights.part(ready[0]).device if ready else None
        self._memory: list[Any] = []
        self._views: list[Tensor | None] = []  # None where the memory is in no order that a view could follow

    def fits(self) -> bool:
        """Whether it would be made alike now."""
        return not self._awaits_more and self._shapes == list(map(_SHAPE, self._params))

    def read(self) -> Tensor:
        """A copy of them, in no less than single precision."""
        if not self._params:
            return torch.zeros(0, device=self._device)
        parts = [self._weights.part(p).detach() for p in self._params]
        # Weights that were given other memory (moved to a device, or converted) need other views.
        memory = [(p.data_ptr(), p.dtype, p.shape, p.stride()) for p in parts]
        if memory != self._memory:
            self._memory, self._views = memory, [_spread_out(p) if p.is_contiguous() else None for p in parts]
        some = [_spread_out(p) if view is None else view for p, view in zip(parts, self._views, strict=True)]
        device = some[0].device
        copy = torch.cat([v if v.device == device else v.to(device) for v in some])
        return copy.to(torch.promote_types(copy.dtype, torch.float32))


def _identity(params: Sequence[Tensor]) -> _Identity:
    return tuple(map(id, params))


def _is_usable(p: Tensor) -> bool:
    return p.numel() > 0 and (p.is_floating_point() or p.is_complex())


def _spread_out(p: Tensor) -> Tensor:
    """At most `_ELEMENTS` elements, spread evenly over all rows and columns; a view where `p` is contiguous."""
    if p.is_complex():
        p = torch.view_as_real(p)
    stride = math.ceil(p.numel() / _ELEMENTS)
    while p.dim() > 1 and math.gcd(stride, p.shape[-1]) > 1:  # else it would meet the same few columns in each row
        stride += 1
    if p.is_contiguous():
        return p.view(-1)[::stride]
    return p[torch.unravel_index(torch.arange(0, p.numel(), stride, device=p.device), p.shape)]


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, one of each stretch, at a place that falls in with no period."""
    if count <= limit:
        return list(range(count))
    golden = (math.sqrt(5) - 1) / 2
    return sorted({int((i + i * golden % 1) * count / limit) for i in range(limit)})
