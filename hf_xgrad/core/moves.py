"""The move of a chunk: what a prediction adds to its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_xgrad.core.rules import Direction
from hf_xgrad.core.weights import Chunk


class Move(Protocol):
    """`w_hat_t - w_t` of a chunk."""

    @property
    def chunk(self) -> Chunk: ...

    def writer(self) -> Callable[[list[Tensor]], None]:
        """Reads all that the move is made from, and returns what writes `w_hat_t` over tensors that hold `w_t`."""

    def tensors(self) -> Sequence[Tensor]:
        """The move, while `chunk.params` are true and the window is open; not to be written to."""


class ClosedFormMove(NamedTuple):
    """`scale * direction + decay * w_t`, with `scale = -s * lr_t`.

    Attributes:
        chunk: the chunk, of a group with a closed form.
        scale: a number, or a tensor without dimensions.
        decay: `-s` times the share of the weights that weight decay takes; None leaves it out.
    """

    chunk: Chunk
    scale: float | Tensor
    decay: float | Tensor | None = None

    def writer(self) -> Callable[[list[Tensor]], None]:
        direction = self.direction(self.chunk.params)

        def write(weights: list[Tensor]) -> None:
            direction.add_to_(weights, self.scale)
            if self.decay is not None:
                torch._foreach_add_(weights, torch._foreach_mul(self.chunk.true, self.decay))

        return write

    def tensors(self) -> Sequence[Tensor]:
        params = self.chunk.params
        moves = self.direction(params).moves(self.scale)
        if self.decay is not None:
            torch._foreach_add_(moves, torch._foreach_mul(params, self.decay))
        return moves

    def direction(self, true: list[Tensor]) -> Direction:
        """What the closed form says of `true` weights now."""
        assert self.chunk.form is not None
        return self.chunk.form.direction(true, self.chunk.states, self.chunk.group)


class LastUpdateMove(NamedTuple):
    """`scale * (w_t - w_{t-1})`, with `scale = s * lr_t / lr_{t-1}`; or the window's move once more.

    Attributes:
        chunk: the chunk; its kept tensors hold `w_{t-1}`, or the move.
        scale: a number, or a tensor without dimensions; None where the kept tensors hold the move.
    """

    chunk: Chunk
    scale: float | Tensor | None

    def writer(self) -> Callable[[list[Tensor]], None]:
        # New tensors in any case, as the kept ones are about to hold w_t.
        if self.scale is not None and self.chunk.in_place:
            moves = self._moves(self.scale)
            return lambda weights: torch._foreach_add_(weights, moves)
        predicted = (
            list(torch._foreach_add(self.chunk.params, self.chunk.kept))
            if self.scale is None
            else self._predicted(self.scale)
        )
        return lambda weights: torch._foreach_copy_(weights, predicted)

    def tensors(self) -> Sequence[Tensor]:
        # Within a window the kept tensors hold the move since the first prediction was taken back.
        return self.chunk.kept if self.scale is None or self.chunk.in_place else self._moves(self.scale)

    def _moves(self, scale: float | Tensor) -> list[Tensor]:
        """The move as new tensors, rounded to the difference of predicted and true weights.

        So rounded it can be had again from those two, and added once more gives the same weights to the bit: of
        `w + (x - w)`, with both operations rounded, that is true for all numbers `w` and `x`.
        """
        moves = self._predicted(scale)
        torch._foreach_sub_(moves, self.chunk.params)
        return moves

    def _predicted(self, scale: float | Tensor) -> list[Tensor]:
        true, previous = self.chunk.params, self.chunk.kept
        if isinstance(scale, Tensor):
            predicted = list(torch._foreach_sub(true, previous))
            torch._foreach_mul_(predicted, scale)
            torch._foreach_add_(predicted, true)
            return predicted
        # w_{t-1} + (1 + scale) (w_t - w_{t-1}), in one pass
        return list(torch._foreach_lerp(previous, true, 1 + scale))


def on_device(value: Any, chunk: Chunk) -> Any:
    """A number, or None, for kernels on the weights of a chunk.

    They take a tensor without dimensions from the host, but not one from another accelerator.
    """
    if not isinstance(value, Tensor):
        return value
    value = value.reshape(())
    return value if value.device.type == "cpu" else value.to(chunk.params[0].device)
