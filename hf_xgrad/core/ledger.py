"""The undo log: which weights are predicted right now, and how the true ones come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_xgrad.core.weights import Chunk
from hf_xgrad.core.written import Untouched


@dataclass(slots=True)
class _Entry:
    chunk: Chunk
    as_written: Untouched | None = None  # None while it is being written, and for what others may write


class Ledger:
    """Writes predicted weights and takes them back, whatever comes in between.

    A chunk is entered after its true weights are kept and before the first of them is overwritten, and struck out
    after the last of them is back and before its kept tensors are used again. So at every moment the true weights of
    an entered chunk are in its kept tensors, and those of any other in its parameters.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._compares_values = False  # whether somebody writes weights and puts them back
        self.written: list[Tensor] = []  # parameters that others wrote while they were predicted

    @property
    def is_open(self) -> bool:
        """Whether any weights are predicted."""
        return bool(self._entries)

    def overwrite(self, chunk: Chunk, write: Callable[[list[Tensor]], None], *, compare_values: bool) -> None:
        """Predicts a chunk.

        Args:
            chunk: the chunk.
            write: writes the predicted weights over a list of tensors that hold `w_t`.
            compare_values: whether `bring_back` is to compare what is there then.
        """
        entry = _Entry(chunk)
        if chunk.in_place:
            torch._foreach_copy_(chunk.kept, chunk.params)
            self._entries.append(entry)
            write(chunk.params)
            entry.as_written = Untouched(chunk.params, values=compare_values or self._compares_values)
        else:
            self._entries.append(entry)
            predicted = list(torch._foreach_mul(chunk.params, 1))
            write(predicted)
            torch._foreach_copy_(chunk.targets, predicted)

    def bring_back(self, keep: Callable[[Chunk], Sequence[Tensor] | None]) -> None:
        """Brings the true weights back; may be called again where an interrupt ended it.

        Args:
            keep: gives what the kept tensors of a chunk, which still is predicted, are to hold afterwards; None leaves
                them as they are.
        """
        while self._entries:
            self._bring_back_last(keep)

    def _bring_back_last(self, keep: Callable[[Chunk], Sequence[Tensor] | None]) -> None:
        # A method, so that the temporaries of one chunk are gone before those of the next are made.
        entry = self._entries[-1]
        chunk, untouched, entry.as_written = entry.chunk, entry.as_written, None
        if untouched is not None:
            self.written += [chunk.owners[i] for i in untouched.written(chunk.params)]
            self._compares_values |= untouched.put_back(chunk.params)
        kept = keep(chunk) if chunk.in_place else None
        torch._foreach_copy_(chunk.targets, chunk.true)
        self._entries.pop()
        if kept is not None:
            torch._foreach_copy_(chunk.kept, list(kept))
