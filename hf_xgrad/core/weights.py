"""Which weights of an optimizer can be predicted now, in chunks; and what an engine that keeps weights elsewhere adds.

The plan (chunks, lists of tensors, forms) is made once, and kept while nothing that it was made from has changed:
groups, parameters, their memory and type, the optimizer's state, the settings that decide on a form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from hf_xgrad.core.realised_steps import OwnerT, watch_steps
from hf_xgrad.core.rules import ClosedForm, Group, State, closed_form_of, form_or_obstacle

# Elements worked on at a time: bounds the temporaries beside the kept weights.
CHUNK_ELEMENTS = 2**24

# Read by map(), in C: a steady step has no Python for each parameter.
_PARAMS = itemgetter("params")
_FACTS = attrgetter("dtype"), attrgetter("shape"), attrgetter("requires_grad")


@dataclass(eq=False, slots=True)
class Chunk:
    """Weights of one group, on one device and of one type, that one sequence of kernels serves.

    Attributes:
        group: the parameter group.
        form: its closed form; None under the last-update rule.
        owners: the parameters.
        params: `w_t`, what the optimizer steps: the parameters, or the parts of them that are here.
        targets: what forward reads, and predictions are written to: `params` themselves, but for ZeRO.
        kept: a copy of `w_t` while `params` are predicted; under the last-update rule also what that remembers.
        states: the optimizer's state of each parameter; empty under the last-update rule.
        copies: how many processes hold these weights.
    """

    group: Group
    form: ClosedForm | None
    owners: list[Tensor]
    params: list[Tensor]
    targets: list[Tensor]
    kept: list[Tensor]
    states: list[State]
    copies: int

    @property
    def in_place(self) -> bool:
        """Whether forward reads the very weights that the optimizer steps."""
        return self.targets is self.params

    @property
    def true(self) -> list[Tensor]:
        """Where `w_t` is while the chunk is predicted."""
        return self.kept if self.in_place else self.params


class Weights:
    """Whole weights, in one process or the same in each; what an engine changes, it overrides.

    Args:
        optimizer: the optimizer that steps them.
        rule: of `XGradConfig`.
        model: the model, for the names of its weights.
    """

    in_parts: str | None = None  # what cuts the weights up, so that forms of whole weights do not hold
    process: list[int] | None = None  # [rank, processes] where each process has weights of its own
    steps_inside = False  # whether a step may be taken while weights are predicted

    def __init__(self, optimizer: Optimizer, rule: str, model: nn.Module | None = None) -> None:
        self.optimizer = optimizer
        self.rule = rule
        self.model = model
        self.ignores_steps = False
        self._registered = None if rule == "last_update" else closed_form_of(type(optimizer))
        self._chunks: list[Chunk] = []
        self._facts: list[Any] | None = None  # what the chunks were made from
        self._awaits_state = False  # whether a state lacks what it will get in place, which no fact tells
        self._forms: dict[int, ClosedForm | None] = {}  # by the id of the group
        self.kept: dict[Tensor, Tensor] = {}  # of each parameter in the chunks

    # ---- the plan ----

    def groups(self) -> Sequence[Group]:
        """The optimizer's groups, with the parameters that it steps."""
        return self.optimizer.param_groups

    def form_or_obstacle(self, group: Group) -> tuple[ClosedForm | None, str]:
        """The closed form of a group; or None, for the last-update rule, and why."""
        return form_or_obstacle(self.optimizer, group, self.rule, self.in_parts)

    def form(self, group: Group) -> ClosedForm | None:
        """The closed form of a group, as the plan has it; None under the last-update rule."""
        return self._forms[id(group)] if id(group) in self._forms else self.form_or_obstacle(group)[0]

    def chunks(self) -> list[Chunk]:
        """All weights that can be predicted; the same list as before while nothing has changed."""
        facts = self._look()
        if facts is None or facts != self._facts:
            self._facts, self._awaits_state = None, False
            self._plan()
            # Last: should an interrupt end the planning, it is done again.
            self._facts = None if self._awaits_state else facts
        return self._chunks

    def _look(self) -> list[Any] | None:
        """What the plan depends on; None where it cannot be kept, as something is still to come."""
        groups, form, state = self.groups(), self._registered, self.optimizer.state
        params = list(chain.from_iterable(map(_PARAMS, groups)))
        if UninitializedParameter in map(type, params):
            return None
        # Only closed forms read them. Some optimizers keep numbers beside the states of their parameters.
        states = list(filter(partial(type.__instancecheck__, dict), state.values() if form is not None else ()))
        return [
            list(map(id, groups)),
            list(map(len, map(_PARAMS, groups))),
            list(map(id, params)),
            self.addresses(params),
            *(list(map(fact, params)) for fact in _FACTS),
            [] if form is None else [form.obstacle(self.optimizer, group) for group in groups],
            list(map(id, states)),
            list(map(len, states)),
        ]

    def _plan(self) -> None:
        chunks: list[Chunk] = []
        kept: dict[Tensor, Tensor] = {}
        seen: set[Tensor] = set()
        self._forms = {id(group): self.form_or_obstacle(group)[0] for group in self.groups()}
        for group in self.groups():
            form = self._forms[id(group)]
            by_kind: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                # A parameter may be listed twice, and still has one set of true weights.
                if p not in seen and self._is_under_way(p, form):
                    seen.add(p)
                    part = self.part(p)
                    by_kind.setdefault((part.device, part.dtype, self.copies(p)), []).append(p)
            for owners in by_kind.values():
                for some in _split(owners, [self.part(p) for p in owners]):
                    chunk = self._chunk(group, form, some)
                    kept.update(zip(chunk.owners, chunk.kept, strict=True))
                    chunks += self._pieces(chunk)
        self._chunks, self.kept = chunks, kept

    def _is_under_way(self, p: Tensor, form: ClosedForm | None) -> bool:
        # The optimizer's state tells, never the gradient: that is None when a step begins. A frozen weight may still
        # have a state from before it was frozen.
        if not p.requires_grad or isinstance(p, UninitializedParameter) or self.part(p).numel() == 0:
            return False
        if form is None:
            return True
        state = self.optimizer.state.get(p)
        if not state:
            return False
        if any(state.get(name) is None for name in form.needs):
            self._awaits_state = True
            return False
        return True

    def _chunk(self, group: Group, form: ClosedForm | None, owners: list[Tensor]) -> Chunk:
        params = [self.part(p) for p in owners]
        states = [self.state(p) for p in owners] if form is not None else []
        kept = [self._keep(p, part, form) for p, part in zip(owners, params, strict=True)]
        return Chunk(group, form, owners, params, params, kept, states, self.copies(owners[0]))

    def _pieces(self, chunk: Chunk) -> Iterable[Chunk]:
        """A chunk in smaller ones, where an engine can cut weights."""
        return [chunk]

    def _keep(self, p: Tensor, part: Tensor, form: ClosedForm | None) -> Tensor:
        kept = self.kept.get(p)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (part.shape, part.dtype, part.device):
            with torch.inference_mode(False):
                kept = torch.empty_like(part, requires_grad=False)
        return kept

    # ---- where the weights are ----

    def addresses(self, params: list[Tensor]) -> list[int]:
        """Where the memory of each parameter is."""
        return list(map(Tensor.data_ptr, params))

    def part(self, p: Tensor) -> Tensor:
        """The part of `p` that this process holds, in the memory of `p`."""
        return p

    def state(self, p: Tensor) -> State:
        """The optimizer's state of that part."""
        return self.optimizer.state[p]

    def copies(self, p: Tensor) -> int:
        """How many processes hold the same part of `p`, of those whose sums `total` gives."""
        return 1

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes that hold other weights; every process has to call it."""
        return values

    # ---- what others hold copies of ----

    def begin(self) -> None:
        """To be called before weights are predicted."""
        self.forget_copies()

    def publish(self) -> None:
        """To be called when predicted weights are written; brings them to where they are read."""

    def finish(self, *, failed: bool) -> None:
        """To be called when true weights are back; without communication where forward or backward `failed`."""
        self.forget_copies(failed=failed)

    def forget_copies(self, *, failed: bool = False) -> None:
        """Autocast keeps low-precision copies of the weights that it has seen."""
        torch.clear_autocast_cache()

    def explain(self, error: BaseException) -> None:
        """Adds a note to an error that has ended a prediction, if that has left something wrong."""

    # ---- realised steps ----

    def watch_steps(self, owner: OwnerT, before: Callable[[OwnerT], None], after: Callable[[OwnerT], None]) -> None:
        """Calls `before(owner)` and `after(owner)` around each realised step, as long as `owner` lives."""
        watch_steps(self.optimizer, owner, before, after, lambda: self.ignores_steps)

    @contextmanager
    def ignoring_steps(self) -> Iterator[None]:
        """Steps in here count as none."""
        self.ignores_steps = True
        try:
            yield
        finally:
            self.ignores_steps = False

    def settle(self) -> None:
        """Looks at a step that was taken since, where no hook tells its end."""


def _split(owners: list[Tensor], parts: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts a list of parameters where `CHUNK_ELEMENTS` would be passed; a larger one stands alone."""
    some: list[Tensor] = []
    elements = 0
    for p, part in zip(owners, parts, strict=True):
        if some and elements + part.numel() > CHUNK_ELEMENTS:
            yield some
            some, elements = [], 0
        some.append(p)
        elements += part.numel()
    if some:
        yield some
