"""DeepSpeed, ZeRO stages 0 to 3: where the weights are that it steps, and the copies of them that forward reads.

ZeRO has two sorts of weights. The *masters* are those that its optimizer steps, in single precision: flat partitions,
of which each process holds its own. The *compute weights* are what forward reads, in the precision of the model: the
modules' parameters, or (stage 3) partitions that are gathered when they are needed. After a step DeepSpeed itself
copies the masters over, and gathers what other processes have to know.

So a prediction starts from the masters, is written into the compute weights, and is gathered the way DeepSpeed does
it. The masters stay true throughout: no backup is needed, and whatever engine.step() does is right. Only where both
sorts are the same memory (of a model in single precision: in stage 0, and in stage 3 where DeepSpeed can) a backup is
kept.

`deepspeed.utils.safe_get_local_fp32_param` and its kin do not do for this: they work parameter by parameter, those of
stages 1 and 2 communicate each time, and none of them writes to the compute weights.
"""

from __future__ import annotations

import math
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
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

from hf_xgrad import prediction
from hf_xgrad.auto_steps import AutoSteps
from hf_xgrad.prediction import WeightPredictor, _Chunk, _Holds, _Predicted, no_closed_form
from hf_xgrad.rules import ClosedForm, Delta, Group, State, adaptive_delta, decoupled_decay, register_rule, state_steps

if TYPE_CHECKING:
    from hf_xgrad.arguments import XGradConfig


# ---- what is refused ----


class _Refusal(NamedTuple):
    setting: str  # of DeepSpeed's config, with its sections
    is_wrong: Callable[[Any], bool]
    reason: str


def _is_on(value: Any) -> bool:
    return value not in (None, False, "none", 0)


_FLOAT16 = ("fp16", "float16", "half", "torch.float16")
_UNTRIED = "a prediction was never tried with it"
_SECOND_COPY = "forward reads copies of the partitions that a prediction does not reach"
_REFUSALS = (
    _Refusal(
        "zero_optimization.offload_param.device",
        lambda device: device == "nvme",
        "the weights are in files between their uses, and each prediction would have to rewrite them all",
    ),
    _Refusal(
        "zero_optimization.offload_optimizer.device",
        lambda device: device == "nvme",
        "the weights that the optimizer steps and its state are in files, which each prediction would have to read",
    ),
    _Refusal(
        "zero_optimization.offload_optimizer.ratio",
        lambda ratio: ratio is not None and ratio < 1,
        "a second optimizer, with settings of its own, steps some of the weights",
    ),
    _Refusal(
        "zero_optimization.offload_optimizer.super_offload", _is_on, "its optimizer runs ahead, and rolls steps back"
    ),
    _Refusal("zero_optimization.zenflow", _is_on, "it steps some of the weights at other times than the others"),
    _Refusal("zero_optimization.zero_hpz_partition_size", lambda size: (size or 1) > 1, _SECOND_COPY),
    _Refusal("zero_optimization.mics_shard_size", lambda size: (size or -1) > 0, _SECOND_COPY),
    _Refusal("zero_optimization.zero_quantized_weights", _is_on, _UNTRIED),
    _Refusal("tensor_parallel.autotp_size", lambda size: (size or 1) > 1, _UNTRIED),
    _Refusal("compile.deepcompile", _is_on, "the gathering of weights is compiled into the model"),
    _Refusal("hybrid_engine.enabled", _is_on, "it generates from copies of the weights"),
    _Refusal(
        "torch_autocast",
        lambda autocast: _is_on(autocast) and _is_on(autocast.get("enabled")) and autocast.get("dtype") in _FLOAT16,
        "each process may skip a step on its own, so that nobody knows which steps were taken",
    ),
    _Refusal(
        "optimizer.type",
        lambda name: str(name).lower() in ("onebitadam", "zerooneadam", "onebitlamb"),
        "it communicates what it steps by in a compressed form, so that the weights alone do not tell its steps",
    ),
)


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError, with the cause and the way out, where a DeepSpeed config asks for what cannot be right."""
    for setting, is_wrong, reason in _REFUSALS:
        *sections, name = setting.split(".")
        node: Any = config
        for section in sections:
            node = node.get(section) or {}
        value = node.get(name)
        if value != "auto" and is_wrong(value):
            raise _refused(f"{setting}={value!r}", reason)


def _check_engine(engine: Any) -> None:
    """The same of what only a running engine shows."""
    check_config(engine.config)
    if engine.has_moe_layers:
        raise _refused("a mixture of experts", _UNTRIED)
    if engine.pipeline_parallelism:
        raise _refused("a PipelineModule", _UNTRIED)
    if getattr(engine, "checkpoint_engine", None) is not None and engine.checkpoint_engine.is_decoupled():
        raise _refused(
            type(engine.checkpoint_engine).__name__,
            "it saves the weights while training goes on, which are predicted ones then",
        )


def _refused(what: str, reason: str) -> ValueError:
    return ValueError(
        f"XGrad: DeepSpeed with {what} is refused: {reason}. Train without it, or switch XGrad off (xgrad=False)."
    )


# ---- where the weights are ----


class _Layout:
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


class _HalfPrecision(_Layout):
    """Stage 0 of a model in half precision; weight by weight."""

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        groups = zip(self.zero.fp32_groups, self.zero.fp16_groups, strict=True)
        return [list(zip(masters, computes, strict=True)) for masters, computes in groups]


class _FlatHalfPrecision(_Layout):
    """Stage 0 of a model in half precision; each group in one."""

    flat = True

    def pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        return [[pair] for pair in zip(self.zero.fp32_groups_flat, self.zero.fp16_groups_flat, strict=True)]


class _PartitionedMasters(_Layout):
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


class _PartitionedWeights(_Layout):
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


_LAYOUTS: dict[type, type[_Layout]] = {
    FP16_UnfusedOptimizer: _HalfPrecision,
    FP16_Optimizer: _FlatHalfPrecision,
    BF16_Optimizer: _PartitionedMasters,
    DeepSpeedZeroOptimizer: _PartitionedMasters,
    DeepSpeedZeroOptimizer_Stage3: _PartitionedWeights,
}


def _layout_of(engine: Any) -> _Layout:
    _check_engine(engine)
    zero = engine.optimizer
    if zero is engine.basic_optimizer:
        return _Layout(zero, zero)
    layout = _LAYOUTS.get(type(zero))
    if layout is None:
        raise _refused(f"its {type(zero).__name__}", _UNTRIED)
    return layout(zero, zero.optimizer)


# ---- prediction ----


class ZeroPredictor(WeightPredictor):
    """`WeightPredictor` of a DeepSpeed engine; within `predicted()` there may be engine.step() too.

    Every process has to enter and to leave it: entering takes the communication that DeepSpeed does at the end of a
    step, and so does leaving where no step was taken in it. Leaving with an error takes none, as others may not
    follow; where that leaves something wrong, the error has a note that says what to do.

    Args:
        engine: what deepspeed.initialize gave, with an optimizer.
        config: as of `WeightPredictor`.

    Raises:
        ValueError: what `WeightPredictor` refuses, and what cannot be right with DeepSpeed.
    """

    def __init__(self, engine: Any, config: XGradConfig) -> None:
        self._engine = engine
        optimizer = engine.basic_optimizer
        self._layout = _layout_of(engine) if config.active else _Layout(optimizer, optimizer)
        self._views: list[ChainMap[str, Any]] = []
        self._computes: dict[Tensor, Tensor] = {}  # by their masters
        self._in_place = False
        self._writing = False
        self._exposed = False  # whether `restore` has something to do
        self._left_behind = False  # whether compute weights are predicted ones, restored or not
        self._alone = False
        self._steps_at_predict = 0
        self._stepping_from: int | None = None  # steps taken before the one that was not looked at yet
        super().__init__(self._layout.optimizer, config)
        if not self._active:
            return
        with torch.no_grad():
            self._layout.clear_padding()
        self._sharded = self._layout.partitioned
        if self._auto_steps is not None:
            self._auto_steps = AutoSteps(self._groups, sharded=self._sharded)
        self._universal_groups()  # raises where there should be a closed form

    def _locate(self) -> None:
        """Looks up where the weights are: a checkpoint may bring other groups, `offload_states` other memory."""
        pairs = self._layout.pairs()
        self._computes = {master: compute for group in pairs for master, compute in group}
        self._in_place = all(master.data_ptr() == compute.data_ptr() for master, compute in self._computes.items())
        groups = self._layout.optimizer.param_groups
        if [id(view.maps[1]) for view in self._views] != [id(group) for group in groups]:
            self._views = [
                ChainMap({"params": [master for master, _ in own]}, group)
                for own, group in zip(pairs, groups, strict=True)
            ]

    def _groups(self) -> Sequence[Group]:
        # Stage 3 empties the optimizer's own outside its steps, and within a step DeepSpeed shows it one at a time.
        if not self._views:
            self._locate()
        return self._views

    def _form(self, group: Group) -> ClosedForm | None:
        form = super()._form(group)
        if form is None or form.elementwise or not self._layout.flat:
            return form
        if self.config.rule == "closed_form":
            raise no_closed_form(
                f"that of {type(self.optimizer).__name__} needs whole weights, and DeepSpeed has it step flat "
                "stretches of them"
            )
        return None

    def _decay(self, group: Group, form: ClosedForm | None, steps: float | Tensor) -> float | Tensor | None:
        if not getattr(self.optimizer, "adam_w_mode", True):  # DeepSpeed's Adam then adds the decay to the gradient
            return None
        return super()._decay(group, form, steps)

    # ---- predict and restore ----

    def predicted(self) -> _Predicted:
        """As of `WeightPredictor`; on every process."""
        return _ZeroPredicted(self)

    def _write(self) -> None:
        self._settle()
        self._stepping_from = None
        self._locate()
        self._steps_at_predict = self._steps_taken()
        self._exposed, self._left_behind, self._alone = True, True, False
        try:
            self._layout.forget()
            if self._in_place:
                super()._write()
            else:
                self._write_beside()
            self._layout.spread()
        except BaseException:
            self._restore(failed=True)
            raise

    def _write_beside(self) -> None:
        """Writes the predicted weights into the compute weights; the masters stay."""
        self._window = []
        for chunk, computes in self._pieces(universal=self._holds is not _Holds.NOTHING):
            predicted = list(torch._foreach_mul(chunk.params, 1))
            self._delta(chunk).add_to_(predicted, chunk.scale)
            if chunk.decay is not None:
                torch._foreach_add_(predicted, torch._foreach_mul(chunk.params, chunk.decay))
            torch._foreach_copy_(computes, predicted)
            self._window.append(chunk)
        torch.clear_autocast_cache()

    def _chunks(self, *, universal: bool) -> Iterator[_Chunk]:
        return (chunk for chunk, _ in self._pieces(universal=universal))

    def _pieces(self, *, universal: bool) -> Iterator[tuple[_Chunk, list[Tensor]]]:
        """Chunks, and the compute weights of each; a long partition is cut, as it is worked on elementwise."""
        self._writing = True
        try:
            for chunk in super()._chunks(universal=universal):
                computes = [self._computes[master] for master in chunk.params]
                yield from _cut(chunk, computes) if self._layout.flat else [(chunk, computes)]
        finally:
            self._writing = False

    def _backup(self, p: Tensor) -> Tensor:
        if self._writing and not self._in_place:
            # Only the universal rule has (and needs) one: with closed forms the master is its own.
            return self._backups.get(p, p)
        return super()._backup(p)

    @torch.no_grad()
    def _restore(self, *, failed: bool) -> None:
        if not self._exposed:
            self._inside = False
            return
        # Until this process is through with its own, an interrupt may end it: nobody to communicate with then.
        alone, self._alone = failed or self._alone, True
        super()._restore(failed=failed)
        # A step ends by copying the masters over and gathering; but not one that was skipped for overflow.
        self._left_behind = self._steps_taken() == self._steps_at_predict
        if self._left_behind:
            self._copy_masters()
            if alone:
                self._layout.forget_alone()
        self._exposed = False
        if alone:
            self._stepping_from = None
            return
        if self._left_behind:
            self.refresh()
        self._settle()

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings true compute weights to every process, also after an error; every process has to call it."""
        self._layout.forget()
        self._copy_masters()
        self._layout.spread()
        self._left_behind = False

    def _copy_masters(self) -> None:
        if not self._in_place:
            for master, compute in self._computes.items():
                compute.copy_(master)
            torch.clear_autocast_cache()

    def explain(self, error: BaseException) -> None:
        """Adds a note to an error that has ended a prediction, if that has left something wrong."""
        missing = self._layout.missing() if self._left_behind else None
        if missing is not None:
            error.add_note(f"XGrad: this error came while weights were predicted: {missing}.")

    # ---- realised steps ----

    def _attach(self) -> None:
        reference = weakref.ref(self)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            predictor = reference()
            if predictor is None or predictor._ignores_steps:
                return
            taken = predictor._steps_taken()
            if predictor._stepping_from != taken:  # else it is another group of the same step
                predictor._settle()
                predictor._before_step()
                predictor._stepping_from = taken

        weakref.finalize(self, self.optimizer.register_step_pre_hook(before).remove)

    def _steps_taken(self) -> int:
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def _settle(self) -> None:
        """Looks at the step that was taken since. No hook tells the end of one: its groups are stepped one by one."""
        if self._stepping_from is not None and self._stepping_from != self._steps_taken():
            self._stepping_from = None
            self._after_step()

    @torch.no_grad()
    def _before_step(self) -> None:
        if self._in_place:
            super()._restore(failed=False)
        elif self._measuring:
            # What the masters are now, to compare.
            self._window = [
                chunk if chunk.form is None else chunk._replace(backups=list(torch._foreach_mul(chunk.params, 1)))
                for chunk in self._window
            ]
        super()._before_step()

    def _move_once_more(self, chunk: _Chunk) -> list[Tensor]:
        if chunk.form is None and not self._in_place:
            return self._delta(chunk).moves(chunk.scale)
        return super()._move_once_more(chunk)

    def measure(self, enabled: bool = True) -> None:
        """As of `WeightPredictor`."""
        self._settle()
        super().measure(enabled)

    def diagnostics(self) -> dict[str, float]:
        """As of `WeightPredictor`; on every process."""
        self._settle()
        return super().diagnostics()

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """As of `WeightPredictor`; on every process."""
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As of `WeightPredictor`; after the engine has loaded its checkpoint."""
        self._settle()
        self._locate()
        super().load_state_dict(state_dict)


class _ZeroPredicted(_Predicted):
    _predictor: ZeroPredictor

    def __enter__(self) -> WeightPredictor:
        try:
            return super().__enter__()
        except BaseException as error:
            self._predictor.explain(error)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, traceback)
        except BaseException as interrupt:
            self._predictor.explain(interrupt)
            raise
        if error is not None:
            self._predictor.explain(error)


def _cut(chunk: _Chunk, computes: list[Tensor]) -> Iterator[tuple[_Chunk, list[Tensor]]]:
    """Pieces of at most `_CHUNK_ELEMENTS` of a chunk of flat tensors; one that is longer than that stands alone."""
    length, size = max(p.numel() for p in chunk.params), prediction._CHUNK_ELEMENTS
    if length <= size:
        yield chunk, computes
        return
    for start in range(0, length, size):
        part = slice(start, start + size)
        yield (
            chunk._replace(
                params=[p[part] for p in chunk.params],
                backups=[backup[part] for backup in chunk.backups],
                states=[_cut_state(state, length, part) for state in chunk.states],
            ),
            [compute[part] for compute in computes],
        )


def _cut_state(state: State, length: int, part: slice) -> State:
    return {
        name: value[..., part] if isinstance(value, Tensor) and value.dim() and value.shape[-1] == length else value
        for name, value in state.items()
    }


# ---- closed forms of DeepSpeed's own optimizers ----


def _counts_by_groups(optimizer: Optimizer) -> str | None:
    # Not so under ZeRO, which gives it one stretch of weights at a time.
    if any(len(group["params"]) > 1 for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} counts the steps of only one weight of each group"
    return None


@register_rule("deepspeed.ops.adam.fused_adam.FusedAdam", decay=decoupled_decay, unless_optimizer=_counts_by_groups)
@register_rule("deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam", decay=decoupled_decay)
def adam_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> Delta:
    """FusedAdam and DeepSpeedCPUAdam, exact: as `rules.adam_direction`; with `bias_correction=False` as for large k.

    State read: `exp_avg` (m), `exp_avg_sq` (v), `step` (k).
    """
    return adaptive_delta(
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        state_steps(states) if group["bias_correction"] else [math.inf] * len(states),
        group["betas"],
        group["eps"],
    )


@register_rule("deepspeed.ops.lion.fused_lion.FusedLion", decay=decoupled_decay)
@register_rule("deepspeed.ops.lion.cpu_lion.DeepSpeedCPULion", decay=decoupled_decay)
def lion_direction(params: Sequence[Tensor], states: Sequence[State], group: Group) -> list[Tensor]:
    """FusedLion and DeepSpeedCPULion, at rest: as `closed_forms.lion_direction`. State read: `exp_avg` (m)."""
    return list(torch._foreach_sign([state["exp_avg"] for state in states]))
