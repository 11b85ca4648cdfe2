"""Weights that several processes share out among them: the part that is here, and what FSDP has gathered of the rest.

With FSDP2 and tensor parallelism parameters are DTensors, with FSDP1 slices of flat parameters. A prediction is
elementwise, so that each process works on its own part, without communication: the next gathering of the weights
carries the predicted parts to where they are needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def _loaded(module: str, *names: str) -> tuple[type, ...]:
    """Classes of `module`; none while nobody has imported it (it takes a second), as nothing is one of them then."""
    loaded = sys.modules.get(module)
    return tuple(getattr(loaded, name) for name in names) if loaded is not None else ()


def is_sharded(p: Tensor) -> bool:
    """Whether this process may hold a part of `p` only: a DTensor, or (a slice of) a flat parameter of FSDP1."""
    return _is_dtensor(p) or getattr(p, "_fsdp_flattened", False)


def _is_dtensor(p: Tensor) -> bool:
    return isinstance(p, _loaded("torch.distributed.tensor", "DTensor"))


def local_part(p: Tensor) -> Tensor:
    """The part of `p` that this process holds, in the memory of `p`; to be called without autograd.

    Of a flat parameter this is an alias: FSDP1 gives the parameter other memory while its weights are gathered.
    """
    if not is_sharded(p):
        return p
    whole: Any = p
    return whole.to_local().detach() if _is_dtensor(p) else p.detach()


def copies(p: Tensor) -> int:
    """How many processes hold the same part of `p` as this one; flat parameters, replicated alike, count as one."""
    processes = process_of_group()[1]
    if _is_dtensor(p):
        whole: Any = p
        sizes = zip(whole.placements, whole.device_mesh.shape, strict=True)
        return processes // math.prod(size for placement, size in sizes if not placement.is_replicate())
    return 1 if is_sharded(p) else processes


def local_state(state: Mapping[str, Any], p: Tensor) -> Mapping[str, Any]:
    """The optimizer's state of `p`, with those parts of its tensors that belong to the local part of `p`."""
    if not any(isinstance(value, Tensor) and is_sharded(value) for value in state.values()):
        return state
    return {name: _part_beside(value, p) if isinstance(value, Tensor) else value for name, value in state.items()}


def _part_beside(value: Any, p: Any) -> Tensor:
    if _is_dtensor(value) and value.shape == p.shape and value.placements != p.placements:
        # Under tensor parallelism a gradient, and the momentum that begins as one, may be whole where p is not.
        value = value.redistribute(p.device_mesh, p.placements)
    return local_part(value)


_FSDP = "torch.distributed.fsdp"


class GatheredWeights:
    """Copies of whole weights that FSDP has gathered, and would use again instead of gathering anew.

    It keeps them beyond an evaluation (of its root unit) and, where it is told not to reshard, beyond a forward. A
    forward that uses such a copy would not see weights that have been written to the shards since.

    Args:
        model: the model as prepared; nothing is done where it is not under FSDP.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        modules: list[Any] = list(model.modules()) if model is not None else []
        self._flat: list[Any] = [m for m in modules if isinstance(m, _loaded(_FSDP, "FullyShardedDataParallel"))]
        self._units: list[Any] = [m for m in modules if isinstance(m, _loaded(_FSDP, "FSDPModule"))]

    def drop(self, *, failed: bool = False) -> None:
        """Has the next forward gather the weights anew; without communication.

        Args:
            failed: whether forward or backward ended in an error, in which state FSDP2's `reshard` does nothing.
        """
        for unit in self._flat:
            _reshard_flat(unit._handle)
        if failed and self._units and self._model is not None:
            self._model.state_dict()  # its hooks reshard in every state, and nothing else that is public does
        else:
            for unit in self._units:
                unit.reshard()


def _reshard_flat(handle: Any) -> None:
    # FSDP1 has no public way to do this without gathering first. Before the first forward it is not set up yet, and
    # has gathered nothing.
    if handle is None or not hasattr(handle.flat_param, "_full_param_padded") or not handle.uses_sharded_strategy:
        return
    if not handle.needs_unshard():
        handle.reshard(free_unsharded_flat_param=True)
        handle.post_reshard()
        handle._prefetched = False


def process_of_group() -> tuple[int, int]:
    """Rank and number of processes; `(0, 1)` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of `values` over all processes, on their device; every process has to call it, and gets the same bits."""
    if process_of_group()[1] == 1:
        return values
    on = values.device
    if on.type not in dist.get_backend_config():
        # Weights that are offloaded to the CPU, under a backend that serves only accelerators.
        on = torch.accelerator.current_accelerator() or on
    total = values.to(on, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)
