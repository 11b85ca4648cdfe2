"""The undo log: which weights are predicted right now, and how the true ones come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from hf_xgrad.core.weights import Chunk

_VERSION = attrgetter("_version")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**18  # numbers summed up at a time, for small temporaries


@dataclass(slots=True)
class _Entry:
    """A chunk whose weights are predicted, and how they were when they had been written."""

    chunk: Chunk
    versions: list[int] | None = None
    sums: list[Tensor] | None = None


class Ledger:
    """Writes predicted weights and takes them back, whatever comes in between.

    A chunk is entered after its true weights are kept and before the first of them is overwritten, and struck out
    after the last of them is back and before its kept tensors are used again. So at every moment the true weights of
    an entered chunk are in its kept tensors, and those of any other in its parameters.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self.written: list[Tensor] = []  # parameters that others wrote while they were predicted
        self.compares_values = False  # whether somebody writes weights and puts them back

    @property
    def is_open(self) -> bool:
        """Whether any weights are predicted."""
        return bool(self._entries)

    def overwrite(self, chunk: Chunk, add: Callable[[list[Tensor]], None], *, compare_values: bool = False) -> None:
        """Predicts a chunk.

        Args:
            chunk: the chunk.
            add: adds the move to a list of weights, which hold `w_t`.
            compare_values: whether `bring_back` is to compare what is there then, too: others may write past
                autograd's version counters (through `.data`), or put back what they have written.
        """
        if not chunk.in_place:
            self._entries.append(_Entry(chunk))
            predicted = list(torch._foreach_mul(chunk.params, 1))
            add(predicted)
            torch._foreach_copy_(chunk.targets, predicted)
            return
        torch._foreach_copy_(chunk.kept, chunk.params)
        entry = _Entry(chunk)
        self._entries.append(entry)
        add(chunk.params)
        if compare_values or self.compares_values:
            entry.sums = _sums(chunk.params)
        entry.versions = list(map(_VERSION, chunk.params))

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
        chunk = entry.chunk
        if not chunk.in_place:
            torch._foreach_copy_(chunk.targets, chunk.params)
            self._entries.pop()
            return
        self.written += self._written(entry)
        entry.versions = entry.sums = None
        kept = keep(chunk)
        torch._foreach_copy_(chunk.params, chunk.kept)
        self._entries.pop()
        if kept is not None:
            torch._foreach_copy_(chunk.kept, list(kept))

    def _written(self, entry: _Entry) -> list[Tensor]:
        """The parameters that are not any more as they were predicted."""
        chunk = entry.chunk
        changed = entry.versions is not None and entry.versions != list(map(_VERSION, chunk.params))
        if entry.sums is not None:
            pairs = zip(chunk.owners, entry.sums, _sums(chunk.params), strict=True)
            written = [owner for owner, before, now in pairs if bool(before != now)]
            self.compares_values |= changed and not written
            return written
        if not changed or entry.versions is None:
            return []
        versions = zip(chunk.owners, entry.versions, map(_VERSION, chunk.params), strict=True)
        return [owner for owner, before, now in versions if before != now]


def _sums(params: list[Tensor]) -> list[Tensor]:
    """A number for each tensor that is another one where anything in it was written or moved about."""
    return [_sum(torch.view_as_real(p) if p.is_complex() else p) for p in params]


def _sum(p: Tensor) -> Tensor:
    bits = p.detach().view(_BITS[p.element_size()]).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=p.device)
    for some in bits.split(_PIECE):
        # Odd factors, different for each place; what does not fit into 64 bits is left out, the same way each time.
        places = torch.arange(1, 2 * len(some), 2, device=p.device)
        total = total * 31 + (some * places).sum()
    return total
