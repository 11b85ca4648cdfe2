"""`steps="auto"`: the number of steps predicted ahead, read off the updates while they are realised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from hf_xgrad.rules import Group
from hf_xgrad.sharding import local_part, sum_over_processes

# How far the prediction aims: at the weights K steps ahead, K geometric with mean 1 / (1 - gamma), here two steps. One
# step (gamma = 0) keeps s below 1 and leaves a gain lying; five (gamma = 0.8) make s = 3 of Adam's momentum, which is
# too much for high learning rates. Measured on two language models; see docs/choosing_s.md.
_DISCOUNT = 0.5
# Averages over some 50 steps: s must not follow the noise of single batches, and has to settle in short runs too.
_SMOOTHING = 0.98
# Tensors looked at in a group, and weights in each, few enough to cost nothing. Beyond this size all tensors count
# alike, whatever their number of weights: s is that of the common tensor, not that of the largest.
_TENSORS = 32
_ELEMENTS = 512
_FIRST_STEPS = 1.0  # s until two updates are known


class AutoSteps:
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

    Where weights are sharded, each process samples the parts that it holds, and the products are summed over all
    processes (two numbers per group and step), so that all have the same `s`.

    Args:
        groups: gives the groups of the optimizer whose steps are realised; groups may be added to it, and weights
            frozen, at any time.
        sharded: whether other processes hold other parts of the weights. Every process then has to take every step.

    Source: the trace is that of TD(lambda), Sutton, "Learning to predict by the methods of temporal differences",
    Machine Learning 3, 1988, which sums a discounted future backwards.
    """

    def __init__(self, groups: Callable[[], Sequence[Group]], *, sharded: bool = False) -> None:
        self._groups_now = groups
        self._sharded = sharded
        self._groups: list[_GroupEstimate] = []

    @torch.no_grad()
    def before_step(self) -> None:
        """To be called right before the optimizer steps, on the true weights."""
        self._follow_groups()
        for estimate, group in zip(self._groups, self._groups_now(), strict=True):
            estimate.before_step(group.get("lr"))

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called right after the optimizer has stepped."""
        updates = [estimate.update() for estimate in self._groups]
        products = [estimate.products(update) for estimate, update in zip(self._groups, updates, strict=True)]
        if self._sharded and products:
            on = products[0].device
            products = list(sum_over_processes(torch.stack([p.to(on) for p in products])))
        for estimate, update, sums in zip(self._groups, updates, products, strict=True):
            estimate.take(update, sums)

    def steps(self, group_index: int) -> float | Tensor:
        """`s` for the coming prediction of a group: a number on the CPU, else a tensor without dimensions."""
        if group_index >= len(self._groups):
            return _FIRST_STEPS
        s = self._groups[group_index].steps()
        return float(s) if s.device.type == "cpu" else s

    def values(self) -> list[float]:
        """`s` of each group, for a log; waits for the device."""
        return [float(self.steps(i)) for i in range(len(self._groups_now()))]

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs, on the CPU: `"<group>.trace"` and `"<group>.sums"`.

        Empty before the first step.
        """
        if not self._groups:
            return {}
        self._follow_groups()
        return {name: tensor.cpu() for name, tensor in _named(self._groups)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state_dict` gave; an empty one starts anew.

        Raises:
            ValueError: as `check_state_dict`; nothing is changed then.
        """
        self.check_state_dict(state)
        self._groups = [_GroupEstimate(group["params"]) for group in self._groups_now()] if state else []
        for name, tensor in _named(self._groups):
            tensor.copy_(state[name])

    def check_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Refuses what `state_dict` cannot have given.

        Raises:
            ValueError: the state belongs to other parameter groups, is incomplete, or holds NaN or infinity.
        """
        if not state:
            return
        groups = [_GroupEstimate(group["params"]) for group in self._groups_now()]
        needed = dict(_named(groups))
        unknown = sorted(set(state) - set(needed))
        if unknown:
            raise ValueError(f"AutoSteps: the state has {unknown[:3]}, the optimizer only {len(groups)} groups")
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

    def _follow_groups(self) -> None:
        """Sees to one estimate for each group as it is now; one whose parameters are others starts anew."""
        groups = self._groups_now()
        known = self._groups
        self._groups = [
            known[i] if i < len(known) and known[i].is_of(group["params"]) else _GroupEstimate(group["params"])
            for i, group in enumerate(groups)
        ]


class _GroupEstimate:
    """`s` of one group."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._sample = _Sample(params)
        self._before: Tensor | None = None
        self._lr: Any = None
        zeros = torch.zeros_like(self._sample.read(), dtype=torch.float32)
        self.trace = zeros  # e_t
        self.sums = zeros.new_zeros(3)  # E[<u_t, e_t>], E[|u_{t-1}|^2], |u_{t-1}|^2

    def is_of(self, params: Sequence[Tensor]) -> bool:
        return len(params) == len(self._params) and all(map(is_, params, self._params))

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
        new_sums = torch.cat([averages, square.reshape(1)])
        # Decided on the device, as a Python `if` would wait for it. A learning rate of 0 gives 0 / 0.
        counts = (square > 0) & torch.isfinite(new_sums).all()
        self.trace = torch.where(counts, update + _DISCOUNT * trace, trace)
        self.sums = torch.where(counts, new_sums, sums)

    def steps(self) -> Tensor:
        product, square = self.sums[:2].unbind()
        return torch.where(square > 0, (product / square).clamp(0.0, 1.0 / (1.0 - _DISCOUNT)), _FIRST_STEPS)


class _Sample:
    """Some weights of a list of parameters, the same ones whenever and wherever it is made."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        usable = [p for p in params if _is_usable(local_part(p))]
        self._params = [usable[i] for i in _spread(len(usable), _TENSORS)]
        self._device = local_part(params[0]).device if params else None
        self._views: list[Tensor] = []

    def read(self) -> Tensor:
        """A copy of them, in no less than single precision."""
        if not self._params:
            return torch.zeros(0, device=self._device)
        # Weights that were given other memory (moved to a device, or converted) need other views.
        params = [local_part(p) for p in self._params]
        if not self._views or any(p.data_ptr() != v.data_ptr() for p, v in zip(params, self._views, strict=True)):
            self._views = [_strided(p.detach()) for p in params]
        device = self._views[0].device
        copy = torch.cat([v if v.device == device else v.to(device) for v in self._views])
        return copy.to(torch.promote_types(copy.dtype, torch.float32))


def _named(groups: Sequence[_GroupEstimate]) -> Iterator[tuple[str, Tensor]]:
    for i, group in enumerate(groups):
        yield f"{i}.trace", group.trace
        yield f"{i}.sums", group.sums


def _is_usable(p: Tensor) -> bool:
    """Whether there are numbers in it, which fill one stretch of memory, in whatever order."""
    if p.numel() == 0 or not (p.is_floating_point() or p.is_complex()):
        return False
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) == p.numel()


def _strided(p: Tensor) -> Tensor:
    """A view of at most `_ELEMENTS` elements, spread evenly over all rows and columns."""
    if p.is_complex():
        p = torch.view_as_real(p)
    stride = math.ceil(p.numel() / _ELEMENTS)
    while p.dim() > 1 and math.gcd(stride, p.shape[-1]) > 1:  # else it would meet the same few columns in each row
        stride += 1
    return p.as_strided((math.ceil(p.numel() / stride),), (stride,))


def _spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, one of each stretch, at a place that falls in with no period."""
    if count <= limit:
        return list(range(count))
    golden = (math.sqrt(5) - 1) / 2
    return sorted({int((i + i * golden % 1) * count / limit) for i in range(limit)})
