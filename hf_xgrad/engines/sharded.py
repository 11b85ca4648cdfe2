"""Weights that several processes share out among them (FSDP, tensor parallelism).

With FSDP2 and tensor parallelism parameters are DTensors, with FSDP1 slices of flat parameters. A prediction is
elementwise, so that each process works on its own part, without communication: the next gathering of the weights
carries the predicted parts to where they are needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from hf_xgrad.core.rules import State
from hf_xgrad.core.weights import Weights


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


def _part_beside(value: Any, p: Any) -> Tensor:
    if _is_dtensor(value) and value.shape == p.shape and value.placements != p.placements:
        # Under tensor parallelism a gradient, and the momentum that begins as one, may be whole where p is not.
        value = value.redistribute(p.device_mesh, p.placements)
    return local_part(value)


_FSDP = "torch.distributed.fsdp"


class ShardedWeights(Weights):
    """The parts of the weights that this process holds, and no more of what FSDP has gathered of the rest.

    FSDP keeps gathered weights beyond an evaluation (those of its root unit) and, where it is told not to reshard,
    beyond a forward. A forward that uses them again would not see what has been written to the shards since.

    Args:
        optimizer: the optimizer.
        rule: of `XGradConfig`.
        model: the model as prepared.
    """

    in_parts = "these are sharded"

    def __init__(self, optimizer: Optimizer, rule: str, model: nn.Module) -> None:
        super().__init__(optimizer, rule, model)
        self.process = list(process_of_group())
        modules: list[Any] = list(model.modules())
        self._flat: list[Any] = [m for m in modules if isinstance(m, _loaded(_FSDP, "FullyShardedDataParallel"))]
        self._units: list[Any] = [m for m in modules if isinstance(m, _loaded(_FSDP, "FSDPModule"))]

    def addresses(self, params: list[Tensor]) -> list[int]:
        return [getattr(p, "_local_tensor", p).data_ptr() for p in params]

    def part(self, p: Tensor) -> Tensor:
        return local_part(p)

    def state(self, p: Tensor) -> State:
        state = self.optimizer.state[p]
        is_whole = not any(isinstance(value, Tensor) and is_sharded(value) for value in state.values())
        return state if is_whole else _LocalState(state, p)

    def copies(self, p: Tensor) -> int:
        return copies(p)

    def total(self, values: Tensor) -> Tensor:
        return sum_over_processes(values)

    def forget_copies(self, *, failed: bool = False) -> None:
        """Has the next forward gather the weights anew; without communication."""
        super().forget_copies(failed=failed)
        for unit in self._flat:
            _reshard_flat(unit._handle)
        if failed and self._units and self.model is not None:
            # After an error FSDP2's reshard() does nothing. The hooks of state_dict() reshard in every state, and
            # nothing else that is public does.
            self.model.state_dict()
        else:
            for unit in self._units:
                unit.reshard()


class _LocalState(Mapping[str, Any]):
    """The optimizer's state of a parameter, as it is now; of its tensors the parts beside the local part."""

    def __init__(self, state: Mapping[str, Any], p: Tensor) -> None:
        self._state = state
        self._p = p

    def __getitem__(self, name: str) -> Any:
        value = self._state[name]
        return _part_beside(value, self._p) if isinstance(value, Tensor) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


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
