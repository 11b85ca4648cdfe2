"""What the last-update rule remembers: the weights before the last step, and its learning rates."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

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


_KEYS = {"holds", "lrs", "weights"}


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
        self._plan, self._chunks = plan, [chunk for chunk in plan if chunk.form is None]
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
        self._holds = holds if self._chunks else Holds.NOTHING

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """`holds`, `lrs`, `weights` and `still` of `WeightPredictor.state_dict`; empty where nothing is remembered."""
        self._follow(self._weights.chunks())
        if self._holds is Holds.NOTHING:
            return {}
        names = self._names()
        moving = [chunk for chunk in self._chunks if chunk not in self._still]
        weights = {names[id(p)]: self._kept[p] for chunk in moving for p in chunk.owners}
        lrs = [self._lrs.get(id(group), 0.0) for group in self._weights.groups()]
        return {
            "holds": self._holds.value,
            "lrs": [float(lr) if isinstance(lr, Tensor) else lr for lr in lrs],
            "weights": weights,
            "still": sorted(set(names.values()) - set(weights)),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuses what `state_dict` cannot have given.

        Raises:
            ValueError: the state is incomplete, belongs to other parameters, or holds what it cannot have been.
        """
        if not self.takes(state):
            return
        missing = sorted(_KEYS - set(state))
        if missing:
            raise ValueError(f"WeightPredictor: state_dict lacks {missing}")
        if state["holds"] not in (Holds.PREVIOUS.value, Holds.MOVE.value):
            raise ValueError(f"WeightPredictor: state_dict has {state['holds']!r} in `holds`")
        groups = self._weights.groups()
        _check_rates(state["lrs"], [group.get("lr") for group in groups])
        weights, still = state["weights"], state.get("still", [])
        if not isinstance(still, list) or not all(isinstance(name, str) for name in still):
            raise ValueError(f"WeightPredictor: state_dict has no names of weights in `still`, but {still!r:.80}")
        places = {f"{g}.{i}" for g, group in enumerate(groups) for i in range(len(group["params"]))}
        unknown = sorted({*weights, *still} - places)
        if unknown:
            raise ValueError(
                f"WeightPredictor: state_dict names parameters that the optimizer does not have: {unknown[:3]}"
            )
        needed = {name: param for name, param, _ in self._remembered()}
        lacking = [name for name in needed if name not in weights and name not in still]
        if lacking:
            raise ValueError(f"WeightPredictor: state_dict lacks the weights {lacking[:3]}")
        for name in needed.keys() & weights.keys():
            _check_weight(name, weights[name], needed[name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `check_state_dict` has let pass; what is not in it starts anew."""
        self._follow(self._weights.chunks())
        self._holds = Holds.NOTHING
        self._still.clear()
        if not self.takes(state):
            return
        holds = Holds(state["holds"])
        for name, param, kept in self._remembered():
            if name in state["weights"]:
                kept.copy_(state["weights"][name])
            else:
                _start_afresh(kept, param, holds)
        for group, lr in zip(self._weights.groups(), state["lrs"], strict=True):
            self._lrs[id(group)] = _like(lr, group.get("lr"))
        self._holds = holds

    def takes(self, state: Mapping[str, Any]) -> bool:
        """Whether there is something for this rule in a state, and it is needed."""
        return bool(_KEYS & set(state)) and any(self._weights.form(group) is None for group in self._weights.groups())

    def _names(self) -> dict[int, str]:
        """`"<group>.<index>"`, the place in the optimizer, of each parameter under this rule."""
        return {
            id(p): f"{g}.{i}"
            for g, group in enumerate(self._weights.groups())
            if self._weights.form(group) is None
            for i, p in enumerate(group["params"])
        }

    def _remembered(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, weights and kept tensor of each parameter that is remembered."""
        names = self._names()
        owners = [p for chunk in self._weights.chunks() if chunk.form is None for p in chunk.owners]
        return [(names[id(p)], self._weights.part(p), self._weights.kept[p]) for p in owners]


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


def _check_rates(lrs: Any, current: list[Any]) -> None:
    if not isinstance(lrs, list) or not all(map(_is_learning_rate, lrs)):
        raise ValueError(f"WeightPredictor: state_dict has no learning rates in `lrs`, but {lrs!r:.80}")
    if len(lrs) != len(current):
        raise ValueError(f"WeightPredictor: state_dict has {len(lrs)} parameter groups, the optimizer {len(current)}")
    if any(lr is None and now is not None for lr, now in zip(lrs, current, strict=True)):
        raise ValueError(f"WeightPredictor: state_dict lacks learning rates that the optimizer has: {lrs!r:.80}")


def _is_learning_rate(lr: Any) -> bool:
    """Whether a state may have it: a finite number, or None where an optimizer has none."""
    return lr is None or (type(lr) in (int, float) and abs(lr) <= sys.float_info.max)


def _check_weight(name: str, tensor: Tensor, param: Tensor) -> None:
    if tensor.shape != param.shape:
        raise ValueError(
            f"WeightPredictor: weight {name} of state_dict has shape {tuple(tensor.shape)}, the parameter "
            f"{tuple(param.shape)}"
        )
    if tensor.dtype != param.dtype:
        raise ValueError(
            f"WeightPredictor: weight {name} of state_dict is of type {tensor.dtype}, the parameter of {param.dtype}"
        )
    # What has diverged goes on as it was; but a weight is not finite again that was not so before.
    infinite = ~torch.isfinite(tensor)
    if infinite.any() and (infinite & torch.isfinite(param).to(infinite.device)).any():
        raise ValueError(f"WeightPredictor: weight {name} of state_dict holds NaN or infinity")
