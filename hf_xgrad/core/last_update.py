"""What the last-update rule remembers: the weights before the last step, and its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_xgrad.core.moves import LastUpdateMove, on_device
from hf_xgrad.core.rules import last_update_scale
from hf_xgrad.core.weights import Chunk, Weights


class Holds(Enum):
    """What the kept tensors hold."""

    NOTHING = "nothing"  # nothing that a prediction could start from
    PREVIOUS = "previous"  # w_{t-1}: a step was realised since
    TRUE = "true"  # w_t: weights are predicted now
    MOVE = "move"  # w_hat_t - w_t: the window's other micro-batches repeat it


class Memory(NamedTuple):
    """What the rule goes on from.

    Attributes:
        holds: `PREVIOUS` or `MOVE`.
        lrs: `lr_{t-1}` of each group of the optimizer.
        weights: `w_{t-1}`, or the move, of each parameter that moves.
    """

    holds: Holds
    lrs: list[Any]
    weights: dict[Tensor, Tensor]


class LastUpdate:
    r"""Last-update rule: `w_hat_t = w_t + s * (lr_t / lr_{t-1}) * (w_t - w_{t-1})`.

    One kept tensor for each parameter plays three parts in turn: `w_{t-1}` when a window begins, `w_t` while weights
    are predicted, and their move until the next step. Added once more, the move gives the same `w_hat_t` to the bit,
    and what the user has added to the weights within the window stays added.

    All is remembered by parameter. A parameter that is new, that was frozen, or whose type, shape or device is another
    now, is its own last value: it starts afresh, with a move of zero.

    Where forward reads other tensors than the optimizer steps (ZeRO), the kept ones hold `w_{t-1}` all the while.

    Args:
        weights: gives the groups and chunks; those with a closed form are passed over.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._holds = Holds.NOTHING
        self._in_doubt = False  # some kept tensors may hold w_t, others still w_{t-1}
        self._complete = True  # whether they were not in doubt when restoring began
        self._plan: list[Chunk] | None = None  # what the next two were taken from
        self._chunks: list[Chunk] = []
        self._kept: dict[Tensor, Tensor] = {}
        self._lrs: dict[int, Any] = {}  # lr_{t-1} by the id of the group
        self._still: set[Chunk] = set()  # chunks that do not move in this window

    # ---- predict and restore ----

    def predicting(self, chunks: list[Chunk]) -> None:
        """To be called before a prediction."""
        self._follow(chunks)
        self._in_doubt = True

    def move(self, chunk: Chunk, steps: float | Tensor) -> LastUpdateMove | None:
        """The move of a chunk for `s` steps ahead; None where it does not move."""
        if self._holds is Holds.NOTHING or chunk in self._still:
            return None
        if self._holds is Holds.MOVE:
            return LastUpdateMove(chunk, None)
        scale = last_update_scale(steps, chunk.group.get("lr"), self._lrs.get(id(chunk.group), 0.0))
        if not isinstance(scale, Tensor) and scale == 0.0:
            self._still.add(chunk)
            return None
        return LastUpdateMove(chunk, on_device(scale, chunk))

    def predicted(self) -> None:
        """To be called when all chunks are predicted."""
        if self._holds is not Holds.NOTHING and all(chunk.in_place for chunk in self._chunks):
            self._holds = Holds.TRUE
        self._in_doubt = False

    def restoring(self) -> None:
        """To be called before true weights are brought back."""
        self._complete, self._in_doubt = not self._in_doubt, True

    def keep(self, chunk: Chunk) -> Sequence[Tensor] | None:
        """What the kept tensors of a chunk, still predicted, are to hold when it is restored; None: what they do."""
        if chunk.form is not None or not self._complete:
            return None
        return torch._foreach_sub(chunk.params, chunk.kept)

    def restored(self, *, spoilt: bool) -> None:
        """To be called when all true weights are back; `spoilt` if others wrote the predicted ones."""
        if not self._complete or spoilt:
            self._holds = Holds.NOTHING
        elif self._holds is Holds.TRUE:
            self._holds = Holds.MOVE
        self._in_doubt = False

    # ---- realised steps ----

    def before_step(self) -> None:
        """To be called right before the optimizer steps the true weights."""
        if self._chunks or None in map(self._weights.form, self._weights.groups()):
            with torch.no_grad():
                self._keep_true()

    def _keep_true(self) -> None:
        self._follow(self._weights.chunks())
        self._holds = Holds.NOTHING
        self._still.clear()
        for chunk in self._chunks:
            torch._foreach_copy_(chunk.kept, chunk.params)
            self._lrs[id(chunk.group)] = _value(chunk.group.get("lr"))

    def after_step(self) -> None:
        """To be called right after the optimizer has stepped."""
        self._holds = Holds.PREVIOUS if self._chunks else Holds.NOTHING

    # ---- what changes between two steps ----

    def _follow(self, plan: list[Chunk]) -> None:
        """Takes up the chunks of a new plan."""
        if plan is self._plan:
            return
        holds, self._holds = self._holds, Holds.NOTHING
        # A chunk that does not move in an open window has no move to go on with.
        going_on = [chunk for chunk in self._chunks if holds is Holds.PREVIOUS or chunk not in self._still]
        known = {p: self._lrs.get(id(chunk.group), 0.0) for chunk in going_on for p in chunk.owners}
        before, self._kept = self._kept, self._weights.kept
        self._chunks = [chunk for chunk in plan if chunk.form is None]
        lrs_of_groups, self._lrs, self._still = self._lrs, {}, set()
        for group in {id(chunk.group): chunk.group for chunk in self._chunks}.values():
            owners = [p for chunk in self._chunks if chunk.group is group for p in chunk.owners]
            lrs = {p: known[p] for p in owners if p in known and before[p] is self._kept[p]}
            # The group's own, where there are weights that have come from other groups.
            lr = self._lrs[id(group)] = lrs_of_groups.get(id(group), next(iter(lrs.values()), 0.0))
            for p in owners:
                kept, param = self._kept[p], self._weights.part(p)
                if p not in lrs:
                    _start_afresh(kept, param, holds)
                elif holds is Holds.PREVIOUS and lrs[p] is not lr:
                    _change_rate(kept, param, lrs[p], lr)
        self._plan, self._holds = plan, holds if self._chunks else Holds.NOTHING

    # ---- checkpoints ----

    def memory(self) -> Memory | None:
        """What is remembered; None where nothing is."""
        self._follow(self._weights.chunks())
        if self._holds is Holds.NOTHING:
            return None
        moving = (p for chunk in self._chunks if chunk not in self._still for p in chunk.owners)
        lrs = [self._lrs.get(id(group), 0.0) for group in self._weights.groups()]
        return Memory(self._holds, lrs, {p: self._kept[p] for p in moving})

    def recall(self, memory: Memory | None) -> None:
        """Takes up what another `memory()` gave; None begins anew."""
        self._follow(self._weights.chunks())
        self._holds = Holds.NOTHING
        self._still.clear()
        if memory is None:
            return
        for p in {p for chunk in self._chunks for p in chunk.owners}:
            if p in memory.weights:
                self._kept[p].copy_(memory.weights[p])
            else:
                _start_afresh(self._kept[p], self._weights.part(p), memory.holds)
        for group, lr in zip(self._weights.groups(), memory.lrs, strict=True):
            self._lrs[id(group)] = _like(lr, group.get("lr"))
        self._holds = memory.holds


def _start_afresh(kept: Tensor, param: Tensor, holds: Holds) -> None:
    """Makes a parameter its own last value."""
    if holds is Holds.MOVE:
        kept.zero_()
    else:
        kept.copy_(param)


def _value(lr: Any) -> Any:
    """`lr` as it is now: some optimizers and schedulers change a tensor in place."""
    return lr.detach().clone() if isinstance(lr, Tensor) else lr


def _like(lr: Any, current: Any) -> Any:
    """A learning rate from a file, as a tensor where the optimizer has one."""
    return torch.as_tensor(lr, dtype=current.dtype, device=current.device) if isinstance(current, Tensor) else lr


def _change_rate(previous: Tensor, param: Tensor, own: Any, lr: Any) -> None:
    """Rescales the last update of a parameter that comes from another group, for `lr` to be its last learning rate."""
    if own is None or lr is None:
        previous.copy_(param)
    else:
        previous.copy_(param - (param - previous) * last_update_scale(1.0, lr, own))
