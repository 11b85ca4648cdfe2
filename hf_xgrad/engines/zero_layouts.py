"""Where DeepSpeed has the weights, in each ZeRO stage and precision: its own data structures, read and written."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from hf_xgrad.core.refusals import UNTRIED, check_deepspeed, refused_by_deepspeed

# ---- where the weights are ----


class Layout:
    """Stage 0: every process steps all weights, and forward reads these.

    Attributes:
        zero: DeepSpeed's optimizer.
        optimizer: the one inside, which steps the masters.
        partitioned: whether each process steps a part of the weights.
        flat: whether masters are stretches of many weights in a row.
    """

    partitioned = False
    flat = False

    def __init__(self, zero: Any, optimizer: Optimizer) -> None:
        self.zero = zero
        self.optimizer = optimizer

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each parameter group the masters, and the compute weights of each."""
        return [[(p, p) for p in group["params"]] for group in self.optimizer.param_groups]

    def clear_padding(self) -> None:
        """Sees to zeros in what masters and compute weights have beyond the weights."""

    def forget(self) -> None:
        """Has what was gathered of the compute weights gathered anew; other processes do the same."""

    def spread(self) -> None:
        """Gathers compute weights that this process has written; other processes do the same."""

    def forget_alone(self) -> None:
        """As `forget`, where other processes may be elsewhere."""

    def missing(self) -> str | None:
        """What of the compute weights this process cannot bring back alone."""
        return None


class _HalfPrecision(Layout):
    """Stage 0 of a model in half precision; weight by weight."""

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        groups = zip(self.zero.fp32_groups, self.zero.fp16_groups, strict=True)
        return [list(zip(masters, computes, strict=True)) for masters, computes in groups]


class _FlatHalfPrecision(Layout):
    """Stage 0 of a model in half precision; each group in one."""

    flat = True

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        return [[pair] for pair in zip(self.zero.fp32_groups_flat, self.zero.fp16_groups_flat, strict=True)]


class _PartitionedMasters(Layout):
    """Stages 1 and 2: masters are partitions, compute weights are whole."""

    partitioned = True
    flat = True

    def _tensors(self) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Of each group its masters, all its compute weights in one, and these by partitions."""
        zero = self.zero
        if type(zero) is BF16_Optimizer:
            return zero.fp32_groups_flat_partition, zero.bf16_groups_flat, zero.bf16_partitioned_groups
        return zero.single_partition_of_fp32_groups, zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        masters, _, partitions = self._tensors()
        ranks = [dist.get_rank(group) for group in self.zero.real_dp_process_group]
        return [[(m, parts[r])] for m, parts, r in zip(masters, partitions, ranks, strict=True)]

    def spread(self) -> None:
        # What the optimizer ends its step with. Its `update_lp_params` would copy the masters over first.
        zero = self.zero
        _, flat, partitions = self._tensors()
        all_gather_dp_groups(
            groups_flat=flat,
            partitioned_param_groups=partitions,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    def missing(self) -> str | None:
        if all(dist.get_world_size(group) == 1 for group in self.zero.real_dp_process_group):
            return None
        return (
            "in this process's model those that other processes step still are. Resume from a checkpoint, or call "
            "model_wrapped.optimizer.update_lp_params() on every process"
        )


class _PartitionedWeights(Layout):
    """Stage 3: masters and compute weights are partitions; whole weights are gathered by forward and backward."""

    partitioned = True
    flat = True

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        zero = self.zero
        result: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.optimizer.param_groups]
        for i, pair in enumerate(
            zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
        ):
            result[zero.sub_group_to_group_id[i]].append(pair)
        return result

    def clear_padding(self) -> None:
        # DeepSpeed leaves there what was in the memory, NaN perhaps: too much for sums over partitions.
        zero = self.zero
        for params, master, compute in zip(
            zero.fp16_groups, zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
        ):
            start = 0
            for p in params:
                length = p.partition_numel()
                filled = min(max(p.ds_numel - length * dist.get_rank(p.ds_process_group), 0), length)
                for flat in (master, compute):
                    flat[start + filled : start + length].zero_()
                start += length

    def forget(self) -> None:
        # An evaluation leaves weights gathered, and small ones (persistent_parameters) always are.
        self.zero.empty_partition_cache()

    def spread(self) -> None:
        # As the optimizer ends its step; all others are gathered by the next forward.
        persistent = self.zero.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def forget_alone(self) -> None:
        # Not those on their way: waiting for them might last for ever.
        for p in self.zero.module.parameters():
            if p.ds_status is ZeroParamStatus.AVAILABLE:
                p.ds_active_sub_modules.clear()
                p.partition()

    def missing(self) -> str | None:
        if all(p.ds_status is not ZeroParamStatus.INFLIGHT for p in self.zero.module.parameters()):
            return None
        return (
            "some weights were being gathered as the predicted ones. Resume from a checkpoint, or call "
            "model_wrapped.empty_partition_cache() on every process"
        )


_LAYOUTS: dict[type, type[Layout]] = {
    FP16_UnfusedOptimizer: _HalfPrecision,
    FP16_Optimizer: _FlatHalfPrecision,
    BF16_Optimizer: _PartitionedMasters,
    DeepSpeedZeroOptimizer: _PartitionedMasters,
    DeepSpeedZeroOptimizer_Stage3: _PartitionedWeights,
}


def layout_of(engine: Any) -> Layout:
    """Where an engine has its weights.

    Raises:
        ValueError: an engine with which no prediction can be right.
    """
    check_deepspeed(engine.config)
    if engine.has_moe_layers:
        raise refused_by_deepspeed("a mixture of experts", UNTRIED)
    if engine.pipeline_parallelism:
        raise refused_by_deepspeed("a PipelineModule", UNTRIED)
    if getattr(engine, "checkpoint_engine", None) is not None and engine.checkpoint_engine.is_decoupled():
        raise refused_by_deepspeed(
            type(engine.checkpoint_engine).__name__,
            "it saves the weights while training goes on, which are predicted ones then",
        )
    zero = engine.optimizer
    if zero is engine.basic_optimizer:
        return Layout(zero, zero)
    layout = _LAYOUTS.get(type(zero))
    if layout is None:
        raise refused_by_deepspeed(f"its {type(zero).__name__}", UNTRIED)
    return layout(zero, zero.optimizer)
