"""What a prediction is worth: observers that look at it from outside, and change nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.moves import ClosedFormMove, Move
from hf_xgrad.core.weights import Chunk, Weights

# Weights whose moves are compared with their updates: all of a small model, an even sample of a large one. To keep all
# moves until the step is made would take one more copy of the weights.
SAMPLE = 2**20
# Logged steps in a row at which the smoothed cosine has to be negative for a warning.
_PATIENCE = 5
_LOW_PRECISION = (torch.bfloat16, torch.float16)


class Observer:
    """Is told of every prediction and of every realised step, with the moves of the window that are not zero."""

    def predicted(self, window: Sequence[Move]) -> None:
        """Weights are predicted now."""

    def before_step(self, window: Sequence[Move]) -> None:
        """The optimizer is about to step; all weights are true."""

    def after_step(self, window: Sequence[Move]) -> None:
        """The optimizer has stepped."""


class StepComparison(Observer):
    """Compares the moves of a window with the updates that end it, at steps for which that was asked.

        relative_norm = |w_hat_t - w_t| / |w_t|
        cosine        = <w_hat_t - w_t, w_{t+1} - w_t> / (|w_hat_t - w_t| |w_{t+1} - w_t|)

    The cosine is that of `SAMPLE` weights, evenly spread, where there are more. Nothing waits for the device before
    `result`.

    Args:
        weights: whose groups these are.
        steps: gives `s` of the window: of each group by its place, and whether it was chosen in training.
    """

    def __init__(self, weights: Weights, steps: Callable[[], dict[int, tuple[float | Tensor, bool]]]) -> None:
        self._weights = weights
        self._steps = steps
        self._wanted = False
        self._steps_used: dict[int, tuple[float | Tensor, bool]] = {}
        self._sizes: list[Tensor] = []
        self._samples: list[_Sample] = []
        self._sums: Tensor | None = None
        self._smoothed: float | None = None
        self._negative = 0  # measured steps in a row at which that was below 0
        self._warned = False

    def measure(self, wanted: bool) -> None:
        """Whether to compare at the coming step; what was measured before is forgotten."""
        self._wanted, self._sums = wanted, None

    def before_step(self, window: Sequence[Move]) -> None:
        if self._wanted:
            self._steps_used = self._steps()
            stride = math.ceil(sum(p.numel() for move in window for p in move.chunk.params) / SAMPLE)
            self._sizes, self._samples = [], []
            for move in window:
                self._look(move, stride)

    @torch.no_grad()
    def _look(self, move: Move, stride: int) -> None:
        # A method, so that the moves of one chunk are gone before those of the next are made.
        chunk, moves = move.chunk, move.tensors()
        self._sizes.append(torch.stack([_square(moves), _square(chunk.params)]) / chunk.copies)
        self._samples.append(_Sample(chunk, stride, _sample(moves, stride), _sample(chunk.params, stride)))

    def after_step(self, window: Sequence[Move]) -> None:
        if self._wanted:
            self._compare()

    @torch.no_grad()
    def _compare(self) -> None:
        sizes, products = self._sizes, [sample.products() for sample in self._samples]
        self._wanted, self._sizes, self._samples = False, [], []
        params = (p for group in self._weights.groups() for p in group["params"])
        device = next((self._weights.part(p).device for p in params), torch.device("cpu"))
        sums = torch.zeros(5, device=device)
        for size, product in zip(sizes, products, strict=True):
            sums += torch.cat([size, product]).to(device)
        self._sums = self._weights.total(sums)

    def result(self) -> dict[str, float]:
        """`WeightPredictor.diagnostics`; waits for the device."""
        if self._sums is None:
            return {}
        move, weight, dot, sampled_move, update = self._sums.tolist()
        self._sums = None
        result = {"active": float(move > 0), "relative_norm": (move / weight) ** 0.5 if weight > 0 else 0.0}
        if sampled_move > 0 and update > 0:
            result["cosine"] = dot / (sampled_move * update) ** 0.5
            self._warn_if_harmful(result["cosine"])
        steps = {g: float(s) for g, (s, _) in self._steps_used.items()}
        result["steps"] = mean(list(steps.values()))
        if len(steps) > 1 and any(chosen for _, chosen in self._steps_used.values()):
            result |= {f"steps_{g}": s for g, s in steps.items()}
        return result

    def _warn_if_harmful(self, cosine: float) -> None:
        """One warning where a fixed number of steps is predicted against the direction that the optimizer takes."""
        self._smoothed = cosine if self._smoothed is None else 0.8 * self._smoothed + 0.2 * cosine
        self._negative = self._negative + 1 if self._smoothed < 0 else 0
        fixed = [float(s) for s, chosen in self._steps_used.values() if not chosen and float(s) > 0]
        if self._negative >= _PATIENCE and fixed and not self._warned:
            self._warned = True
            warnings.warn(
                f"XGrad: the predicted moves point against the steps that follow (smoothed cosine "
                f"{self._smoothed:.2f}): this optimizer's updates turn back and forth, and s = {fixed[0]:g} makes it "
                "worse. Use xgrad_steps='auto', which goes to 0 there, or switch XGrad off (xgrad=False).",
                stacklevel=4,
            )


class _Sample(NamedTuple):
    """Moves and true weights of some elements of a chunk, as they were before the step."""

    chunk: Chunk
    stride: int
    moves: Tensor
    weights: Tensor

    def products(self) -> Tensor:
        """`[<move, update>, |move|^2, |update|^2]`, left on the device."""
        updates = _sample(self.chunk.params, self.stride) - self.weights
        pairs = ((self.moves, updates), (self.moves, self.moves), (updates, updates))
        return torch.stack([(a * b).sum() for a, b in pairs]) / self.chunk.copies


class LostMoves(Observer):
    """Warns where most moves vanish in the resolution of low-precision weights.

    Looks at the 1st, 2nd, 4th, 8th... prediction: a warm-up moves too little to judge by the first alone.
    """

    def __init__(self) -> None:
        self._predictions = 0
        self._warned = False

    def predicted(self, window: Sequence[Move]) -> None:
        self._predictions += bool(window)
        if self._warned or not window or not is_power_of_two(self._predictions):
            return
        low = [move for move in window if isinstance(move, ClosedFormMove) and is_low_precision(move.chunk)]
        counts = [count for move in low for count in _lost(move)]
        lost, intended = torch.stack([count.cpu() for count in counts]).sum(0).tolist() if counts else (0, 0)
        if intended and lost / intended > 0.5:
            self._warned = True
            names = ", ".join(sorted({str(move.chunk.params[0].dtype) for move in low}))
            warnings.warn(
                f"XGrad: {lost / intended:.0%} of the predicted moves are smaller than the resolution of the {names} "
                "weights and are lost. Load the model in float32 (dtype=torch.float32) and train with --bf16 or "
                "--fp16 instead.",
                stacklevel=5,
            )


def _lost(move: ClosedFormMove) -> list[Tensor]:
    """For each weight tensor: how many moves are lost, and how many there should be.

    A weight is to be moved where neither the numerator of its direction is 0, nor what that is multiplied by.
    """
    chunk, counts = move.chunk, []
    direction = move.direction(chunk.true)
    factor = 1.0 if direction.factors is None else direction.factors
    factors = repeat(factor) if isinstance(factor, float) else factor
    for param, true, numerator, factor in zip(chunk.params, chunk.true, direction.numerators, factors, strict=False):
        intended = (numerator != 0) & torch.as_tensor(move.scale * factor != 0, device=numerator.device)
        counts.append(torch.stack([(intended & (param == true)).sum(), intended.sum()]))
    return counts


def describe(weights: Weights, config: XGradConfig) -> str:
    """By which rule weights are predicted, how many steps ahead, and why; one line."""
    name = type(weights.optimizer).__name__
    kinds: dict[str, list[int]] = {}
    for g, group in enumerate(weights.groups()):
        form, obstacle = weights.form_or_obstacle(group)
        rule = f"the closed form of {name}" if form is not None else f"the last-update rule ({obstacle})"
        fixed = config.steps_under(form)
        steps = "chosen from the updates while training (auto)" if fixed is None else f"{fixed:g}"
        kinds.setdefault(f"by {rule}, s = {steps}", []).append(g)
    if len(kinds) == 1:
        return f"weights are predicted {next(iter(kinds))}"
    of_groups = "; ".join(f"those of group {', '.join(map(str, gs))} {kind}" for kind, gs in kinds.items())
    return f"weights are predicted: {of_groups}"


def warn_of_rounding(weights: Weights) -> None:
    """Warns where the last update of low-precision weights is to be repeated."""
    groups = [group for group in weights.groups() if weights.form(group) is None]
    low = {str(p.dtype) for group in groups for p in group["params"] if p.dtype in _LOW_PRECISION}
    if low:
        warnings.warn(
            f"XGrad: the last update of weights kept in {', '.join(sorted(low))} is mostly rounding, and a prediction "
            "from it says little. Load the model in float32 (dtype=torch.float32) and train with --bf16 or --fp16 "
            "instead.",
            stacklevel=4,
        )


def is_low_precision(chunk: Chunk) -> bool:
    """Whether forward reads the weights in a type of 16 bits in which the optimizer steps them, too."""
    return chunk.in_place and chunk.params[0].dtype in _LOW_PRECISION


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing, as of the groups of an optimizer that has no weights."""
    return sum(values) / len(values) if values else 0.0


def is_power_of_two(count: int) -> bool:
    """1, 2, 4, 8...: what is looked at so often costs nothing in the long run."""
    return count > 0 and count & (count - 1) == 0


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([_real(t).float().square().sum() for t in tensors]).sum()


def _sample(tensors: Sequence[Tensor], stride: int) -> Tensor:
    """Every `stride`-th number, in the order of the indices, as new tensors in single precision."""
    return torch.cat([_every(_real(t), stride).float() for t in tensors])


def _every(t: Tensor, stride: int) -> Tensor:
    while t.dim() > 1 and math.gcd(stride, t.shape[-1]) > 1:  # else it would meet the same few columns in each row
        stride += 1
    return t.reshape(-1)[::stride]
