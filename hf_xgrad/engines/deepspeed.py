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

import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_xgrad.core import weights as weights_module
from hf_xgrad.core.realised_steps import OwnerT
from hf_xgrad.core.rules import ClosedForm, Group, State
from hf_xgrad.core.weights import Chunk, Weights
from hf_xgrad.engines.sharded import process_of_group, sum_over_processes
from hf_xgrad.engines.zero_layouts import layout_of


class ZeroWeights(Weights):
    """The weights of a DeepSpeed engine; `params` are the masters, `targets` the compute weights.

    Predicting takes the communication that DeepSpeed does at the end of a step, and so does restoring where no step
    was taken meanwhile. Restoring after an error takes none, as other processes may not follow.

    Args:
        engine: what deepspeed.initialize gave, with an optimizer.
        rule: of `XGradConfig`.
    """

    steps_inside = True

    def __init__(self, engine: Any, rule: str) -> None:
        self._layout = layout_of(engine)
        super().__init__(self._layout.optimizer, rule)
        self._engine = engine
        self._views: list[ChainMap[str, Any]] = []
        self._computes: dict[Tensor, Tensor] = {}  # by their masters
        self._in_place = False
        self._left_behind = False  # whether compute weights may be predicted ones, restored or not
        self._alone = False  # whether others may be elsewhere
        self._steps_at_predict = 0
        self._within_step = False
        self._stepping_from: int | None = None  # steps taken before the one that was not looked at yet
        self._after_step: Callable[[], None] = lambda: None
        if self._layout.flat:
            self.in_parts = "DeepSpeed has it step flat stretches of them"
        if self._layout.partitioned:
            self.process = list(process_of_group())
        with torch.no_grad():
            self._layout.clear_padding()
        self._locate()

    def _locate(self) -> None:
        """Looks up where the weights are: a checkpoint may bring other groups, `offload_states` other memory."""
        pairs = self._layout.pairs()
        self._computes = {master: compute for group in pairs for master, compute in group}
        self._in_place = all(master.data_ptr() == compute.data_ptr() for master, compute in self._computes.items())
        groups = self._layout.optimizer.param_groups
        if [id(view.maps[1]) for view in self._views] != [id(group) for group in groups]:
            # Stage 3 empties the optimizer's own outside its steps, and within a step shows it one at a time.
            self._views = [ChainMap({}, group) for group in groups]
        for view, own in zip(self._views, pairs, strict=True):
            view["params"] = [master for master, _ in own]

    # ---- the plan ----

    def groups(self) -> Sequence[Group]:
        return self._views

    def form_or_obstacle(self, group: Group) -> tuple[ClosedForm | None, str]:
        form, obstacle = super().form_or_obstacle(group)
        if form is not None and not getattr(self.optimizer, "adam_w_mode", True):
            form = form._replace(decay=None)  # DeepSpeed's Adam then adds the decay to the gradient
        return form, obstacle

    def chunks(self) -> list[Chunk]:
        if self._within_step:
            # DeepSpeed shows its optimizer one group at a time then.
            return self._chunks
        self._locate()
        return super().chunks()

    def addresses(self, params: list[Tensor]) -> list[int]:
        return super().addresses(params) + super().addresses([self._computes[p] for p in params])

    def _keep(self, p: Tensor, part: Tensor, form: ClosedForm | None) -> Tensor:
        # Masters stay true beside compute weights of their own: then only the last-update rule keeps anything.
        return part if form is not None and not self._in_place else super()._keep(p, part, form)

    def _pieces(self, chunk: Chunk) -> Iterable[Chunk]:
        if not self._in_place:
            chunk = replace(chunk, targets=[self._computes[p] for p in chunk.owners])
        # A partition is worked on elementwise, however long it is.
        return _cut(chunk) if self._layout.flat else [chunk]

    # ---- between the processes ----

    def total(self, values: Tensor) -> Tensor:
        return sum_over_processes(values) if self._layout.partitioned else values

    def begin(self) -> None:
        self.settle()
        self._stepping_from = None
        self._steps_at_predict = self._steps_taken()
        self._left_behind, self._alone = True, False
        super().begin()
        self._layout.forget()

    def publish(self) -> None:
        self._layout.spread()

    def finish(self, *, failed: bool) -> None:
        # Until this process is through, an interrupt may end it: then there is nobody to communicate with.
        alone, self._alone = failed or self._alone, True
        self.forget_copies(failed=failed)
        # A step ends by copying the masters over and gathering; but not one that was skipped for overflow.
        self._left_behind = self._steps_taken() == self._steps_at_predict
        if alone:
            self._stepping_from = None
            if self._left_behind:
                self._layout.forget_alone()
        else:
            if self._left_behind:
                self.refresh()
            self.settle()

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings true compute weights to every process, also after an error; every process has to call it."""
        self._layout.forget()
        if not self._in_place:
            for master, compute in self._computes.items():
                compute.copy_(master)
        self._layout.spread()
        self._left_behind = False

    def explain(self, error: BaseException) -> None:
        missing = self._layout.missing() if self._left_behind else None
        if missing is not None:
            error.add_note(f"XGrad: this error came while weights were predicted: {missing}.")

    # ---- realised steps ----

    def watch_steps(self, owner: OwnerT, before: Callable[[OwnerT], None], after: Callable[[OwnerT], None]) -> None:
        reference = weakref.ref(owner)

        def pre(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            alive = reference()
            if alive is None or self.ignores_steps:
                return
            taken = self._steps_taken()
            if self._stepping_from != taken:  # else it is another group of the same step
                self.settle()
                self._within_step = True
                try:
                    before(alive)
                finally:
                    self._within_step = False
                self._stepping_from = taken

        def after_step() -> None:
            alive = reference()
            if alive is not None:
                after(alive)

        self._after_step = after_step
        weakref.finalize(owner, self.optimizer.register_step_pre_hook(pre).remove)

    def _steps_taken(self) -> int:
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def settle(self) -> None:
        # No hook tells the end of a step: its groups are stepped one by one.
        if self._stepping_from is not None and self._stepping_from != self._steps_taken():
            self._stepping_from = None
            self._after_step()


def _cut(chunk: Chunk) -> Iterator[Chunk]:
    """Pieces of at most `CHUNK_ELEMENTS` of a chunk of flat tensors; one that is longer than that stands alone."""
    length, size = max(p.numel() for p in chunk.params), weights_module.CHUNK_ELEMENTS
    if length <= size:
        yield chunk
        return
    for start in range(0, length, size):
        part = slice(start, start + size)
        params = [p[part] for p in chunk.params]
        yield replace(
            chunk,
            params=params,
            targets=params if chunk.in_place else [target[part] for target in chunk.targets],
            kept=[kept[part] for kept in chunk.kept],
            states=[_StateOfPart(state, length, part) for state in chunk.states],
        )


class _StateOfPart(Mapping[str, Any]):
    """The optimizer's state, as it is now, of a part of a flat tensor."""

    def __init__(self, state: State, length: int, part: slice) -> None:
        self._state = state
        self._length = length
        self._part = part

    def __getitem__(self, name: str) -> Any:
        value = self._state[name]
        is_flat = isinstance(value, Tensor) and value.dim() and value.shape[-1] == self._length
        return value[..., self._part] if is_flat else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
