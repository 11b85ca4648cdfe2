"""Whether anybody writes weights while they are predicted: what is written then would be lost."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from hf_xgrad.core.weights import Weights

_VERSION = attrgetter("_version")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**18  # numbers summed up at a time, for small temporaries


class Untouched:
    """How some weights are now, to tell later which of them were written since.

    Autograd's version counters tell of every write, also of one that was put back, but not of those through `.data`;
    the values tell of what is other than it was, but reading them all takes time.

    Args:
        weights: the weights.
        values: whether to look at the values.
    """

    def __init__(self, weights: list[Tensor], *, values: bool) -> None:
        self._sums = list(map(_sum_of_bits, weights)) if values and not weights[0].is_meta else None
        self._versions = list(map(_VERSION, weights))

    def written(self, weights: list[Tensor]) -> list[int]:
        """The places of the weights that were written; where values are known, of those that are not as they were."""
        if self._sums is not None:
            now = map(_sum_of_bits, weights)
            return [i for i, (a, b) in enumerate(zip(self._sums, now, strict=True)) if bool(a != b)]
        versions = list(map(_VERSION, weights))
        if versions == self._versions:
            return []
        return [i for i, (a, b) in enumerate(zip(self._versions, versions, strict=True)) if a != b]

    def put_back(self, weights: list[Tensor]) -> bool:
        """Whether they are known to have been written, and to be as they were."""
        is_known = self._sums is not None and self._versions != list(map(_VERSION, weights))
        return is_known and not self.written(weights)


def write_is_lost(name: str) -> RuntimeError:
    """The error for a weight that was written while it was predicted, with the way out."""
    return RuntimeError(
        f"XGrad: {name} was written while it was predicted (in forward or backward, by a hook, by another optimizer). "
        "What was written is lost, as it was no change of the true weights. Write weights outside of predicted() (in "
        "a callback, after the optimizer's step), or switch XGrad off (xgrad=False, XGradConfig(enabled=False))."
    )


def name_of(p: Tensor, weights: Weights) -> str:
    """What a message calls a parameter: its name in the model, if that is known, else its place in the optimizer."""
    named = weights.model.named_parameters(remove_duplicate=False) if weights.model is not None else ()
    for name, parameter in named:
        if parameter is p:
            return repr(name.replace("_orig_mod.", "").removeprefix("module."))
    for g, group in enumerate(weights.groups()):
        for i, parameter in enumerate(group["params"]):
            if parameter is p:
                return f"parameter {i} of group {g}"
    return f"a parameter of shape {tuple(p.shape)}"


def _sum_of_bits(p: Tensor) -> Tensor:
    """A number that is another one where anything in a tensor was written or moved about."""
    real = torch.view_as_real(p) if p.is_complex() else p
    bits = real.detach().view(_BITS[real.element_size()]).reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=p.device)
    for some in bits.split(_PIECE):
        # Odd factors, different for each place; what does not fit into 64 bits is left out, the same way each time.
        places = torch.arange(1, 2 * len(some), 2, device=p.device)
        total = total * 31 + (some * places).sum()
    return total
