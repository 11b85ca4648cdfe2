"""Every optimizer there is, on a small transformer under XGrad: a case each, and the row that it gets in the table.

A case trains, is checked by what can be seen from outside (weights before, inside and after each prediction), and
returns its row. `tests/test_every_optimizer.py` asserts that the rows are those of `hf_xgrad/optimizers.json`;

    python tests/support/every_optimizer.py --write

makes that file and docs/optimizers.md anew. Nothing is known to fail here without a control: what does not work is
tried without XGrad too.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import pickle
import random
import re
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.training_args import OptimizerNames
from transformers.utils import logging

import tiny_models as tiny
from hf_xgrad import WeightPredictor, XGradConfig, XGradTrainer, XGradTrainingArguments
from hf_xgrad.cli import grouped
from hf_xgrad.core.rules import form_of_group
from hf_xgrad.trainer.arguments import EXTRA_OPTIMIZERS
from hf_xgrad.trainer.optimizers import extra_optimizer

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "hf_xgrad" / "optimizers.json"
PAGE = ROOT / "docs" / "optimizers.md"

WINDOWS = 10
MICRO_BATCHES = 2
SAVED = 5  # windows before the checkpoint
STEPS_AHEAD = 1.5  # not 1, so that a forgotten factor shows

PLAIN = XGradConfig(enabled=False)
CLOSED, LAST_UPDATE, REFUSED, NOT_RUN = "closed form", "last update", "refused", "not run"

# Closed forms that cannot be the last update, because the coming gradient counts on its own: by exact class, what they
# do about it, and how near the last update they are at least (cosine over all weights, mean of a run).
_AT_REST = "takes the coming gradient, which counts on its own, to be its running mean"
_UNCLIPPED = "without the clipping, which the coming gradient decides"
INEXACT = {
    "torch.optim.nadam.NAdam": (_AT_REST, 0.5),
    # Signs, of which noise flips more.
    "bitsandbytes.optim.lion.Lion": (_AT_REST, 0.3),
    "pytorch_optimizer.optimizer.lion.Lion": (_AT_REST, 0.3),
    "optimi.stableadamw.StableAdamW": (_UNCLIPPED, 0.95),
    "pytorch_optimizer.optimizer.adamw.StableAdamW": (_UNCLIPPED, 0.95),
}


# ---- what a run shows from outside ----


class CaseError(AssertionError):
    """A check that did not hold."""


@dataclass
class Window:
    """One accumulation window: weights by name, learning rates by group."""

    true: dict[str, Tensor]
    lrs: list[Any]
    seen: list[dict[str, Tensor]] = field(default_factory=list)
    restored: bool = True


@dataclass
class Trace:
    """What a run of `WINDOWS` windows, or the end of one, left behind."""

    windows: list[Window]
    final: dict[str, Tensor]
    groups: dict[str, int]  # parameter name -> its group in the optimizer
    rule: str
    optimizer_class: type
    checkpoint: Any = None

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(w).all()) for w in self.final.values())


def values_of_lr(optimizer: Optimizer) -> list[Any]:
    return [lr.clone() if isinstance(lr := g.get("lr"), Tensor) else lr for g in optimizer.param_groups]


def groups_of(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    place = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    return {name: place[id(p)] for name, p in model.named_parameters() if id(p) in place}


def rule_of(optimizer: Optimizer, rule: str) -> str:
    """Rule that the groups of an optimizer are predicted by: one for all, or both."""
    used = {CLOSED if form_of_group(optimizer, g, rule) else LAST_UPDATE for g in optimizer.param_groups}
    return " and ".join(sorted(used))


def copies(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    return tiny.weights(model), {name: p.data_ptr() for name, p in model.named_parameters()}


# ---- cases ----


@dataclass(frozen=True)
class Case:
    """One optimizer with its settings; `train` runs it and tells what could be seen.

    Attributes:
        source: where a user finds it; the section of the table.
        name: as the user would write it.
        options: its settings, where they are not the default.
        install: what has to be installed for it beside this package, as pip names it.
        remark: what a user should know, beside what the run shows.
        slow: whether the suite leaves it to the slow tests.
    """

    source: str
    name: str
    options: str = ""
    install: str = ""
    remark: str = ""
    slow: bool = False

    @property
    def key(self) -> tuple[str, str, str]:
        return self.source, self.name, self.options

    def train(self, config: XGradConfig, *, decay: bool = True, checkpoint: Any = None) -> Trace:
        raise NotImplementedError

    def known_class(self) -> str:
        """The exact class of the plain optimizer, where that can be made; for those that are not run."""
        raise NotImplementedError


def batch_of(window: int, micro: int) -> dict[str, Tensor]:
    first = (window * MICRO_BATCHES + micro) * 4
    items = [_DATA[(first + i) % len(_DATA)] for i in range(4)]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


_DATA = tiny.Sentences(32)


def small_bert() -> nn.Module:
    """Embeddings, layer norms, matrices and biases, one layer of them."""
    return tiny.bert(num_hidden_layers=1)


def wide_bert() -> nn.Module:
    """Matrices of 4096 elements and more: what is smaller, no optimizer keeps in 8 bits or 4."""
    return tiny.bert(num_hidden_layers=1, hidden_size=64, intermediate_size=128)


@dataclass(frozen=True)
class LoopCase(Case):
    """An optimizer made from a class, in a plain PyTorch loop under a learning rate schedule.

    Attributes:
        make: `(model, with weight decay or not) -> optimizer`.
        model: makes the model.
        inside: what the run needs around it.
    """

    make: Callable[[nn.Module, bool], Any] = None  # type: ignore[assignment]
    model: Callable[[], nn.Module] = small_bert
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext

    def train(self, config: XGradConfig, *, decay: bool = True, checkpoint: Any = None) -> Trace:
        with self.inside():
            return self._train(config, decay, checkpoint)

    def _train(self, config: XGradConfig, decay: bool, checkpoint: Any) -> Trace:
        torch.manual_seed(0)
        model = self.model().train()
        optimizer = self.make(model, decay)
        # The control is without XGrad, not with XGrad switched off.
        predictor = WeightPredictor(optimizer, config) if config.enabled else None
        base = values_of_lr(optimizer)
        start, saved = 0, None
        if checkpoint is not None:
            start = SAVED
            load_checkpoint(checkpoint, model, optimizer, predictor)
        windows = []
        for t in range(start, WINDOWS):
            if t == SAVED and checkpoint is None:
                # Saved as the Trainer does it; not before the run is over is it known whether that went well.
                saved = checkpoint_of(model, optimizer, predictor)
            schedule(optimizer, base, t)
            true, pointers = copies(model)
            window = Window(true, values_of_lr(optimizer))
            for micro in range(MICRO_BATCHES):
                with predictor.predicted() if predictor is not None else nullcontext():
                    window.seen.append(tiny.weights(model))
                    loss = model(**batch_of(t, micro)).loss / MICRO_BATCHES
                    loss.backward()
                now, pointers_now = copies(model)
                window.restored &= tiny.same(now, true) and pointers_now == pointers
            optimizer.step()
            optimizer.zero_grad()
            windows.append(window)
        inner = predictor.optimizer if predictor is not None else optimizer
        return Trace(
            windows, tiny.weights(model), groups_of(model, inner), rule_of(inner, config.rule), type(inner), saved
        )

    def known_class(self) -> str:
        with self.inside(), suppress(ImportError):
            return name_of(type(self.make(self.model(), True)))
        return ""


def schedule(optimizer: Optimizer, base: list[Any], t: int) -> None:
    """Warm-up over three steps, then a slow decay."""
    factor = min((t + 1) / 3, 1.0) * (1 - 0.03 * t)
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        if isinstance(lr, Tensor):
            group["lr"].fill_(lr * factor)
        elif lr is not None:
            group["lr"] = lr * factor


def checkpoint_of(model: nn.Module, optimizer: Optimizer, predictor: WeightPredictor | None) -> dict[str, Any]:
    """The bytes of a checkpoint, or the error that the optimizer's state ended in."""
    weights = safetensors.torch.save({name: p.detach().clone() for name, p in model.named_parameters()})
    rng = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    try:
        states = [in_bytes(state.state_dict()) for state in (optimizer, predictor) if state is not None]
    except Exception as error:
        return {"error": error}
    return {"weights": weights, "states": states, "rng": rng}


def in_bytes(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def load_checkpoint(
    saved: dict[str, Any], model: nn.Module, optimizer: Any, predictor: WeightPredictor | None
) -> None:
    if "error" in saved:
        raise saved["error"]
    with torch.no_grad():
        for name, value in safetensors.torch.load(saved["weights"]).items():
            model.get_parameter(name).copy_(value)
    # As the Trainer loads it.
    for owner, state in zip((optimizer, predictor), saved["states"], strict=False):
        owner.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    python, numpy, pytorch = saved["rng"]
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(pytorch)


@dataclass(frozen=True)
class TrainerCase(Case):
    """An optimizer that the Trainer makes itself, from `--optim` or from a class or factory that it is given."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[[], nn.Module] = small_bert
    given: Callable[[], tuple[Any, dict[str, Any]]] | None = None

    def trainer(self, folder: str, config: XGradConfig, decay: bool) -> XGradTrainer:
        args = tiny.arguments(
            folder,
            XGradTrainingArguments,
            max_steps=WINDOWS,
            gradient_accumulation_steps=MICRO_BATCHES,
            warmup_steps=3,
            save_strategy="steps",
            save_steps=SAVED,
            logging_steps=WINDOWS,
            weight_decay=0.1 if decay else 0.0,
            xgrad=config.enabled,
            xgrad_steps=config.steps,
            xgrad_rule=config.rule,
            **self.settings,
        )
        given = self.given() if self.given is not None else None
        return XGradTrainer(
            model=self.model(), args=args, train_dataset=tiny.Sentences(80), optimizer_cls_and_kwargs=given
        )

    def train(self, config: XGradConfig, *, decay: bool = True, checkpoint: Any = None) -> Trace:
        # A checkpoint is the folder of the run that wrote it, which lasts as long as its trace.
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        trainer = self.trainer(folder.name, config, decay)
        trainer.remove_callback(PrinterCallback)
        observer = Observer(trainer)
        resumed = f"{checkpoint.name}/checkpoint-{SAVED}" if checkpoint is not None else None
        trainer.train(resume_from_checkpoint=resumed)
        optimizer: Any = trainer.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        return Trace(
            observer.windows,
            tiny.weights(trainer.model),
            groups_of(trainer.model, inner),
            rule_of(inner, config.rule),
            type(inner),
            folder,
        )

    def known_class(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, PLAIN, True)
            with suppress(ImportError, ValueError):
                if trainer.args.optim in EXTRA_OPTIMIZERS:
                    return name_of(extra_optimizer(trainer.args)[0])
                return name_of(trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)[0])
        return ""


class Observer(TrainerCallback):
    """Fills `windows` while a trainer trains."""

    def __init__(self, trainer: XGradTrainer) -> None:
        self.windows: list[Window] = []
        self._trainer = trainer
        self._pointers: dict[str, int] = {}
        trainer.add_callback(self)
        trainer.model.register_forward_pre_hook(self._see)

    def _see(self, model: nn.Module, inputs: Any) -> None:
        self.windows[-1].seen.append(tiny.weights(model))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        true, self._pointers = copies(self._trainer.model)
        self.windows.append(Window(true, values_of_lr(self._trainer.optimizer)))

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        now, pointers = copies(self._trainer.model)
        self.windows[-1].restored &= tiny.same(now, self.windows[-1].true) and pointers == self._pointers

    on_pre_optimizer_step = on_substep_end


# ---- checks ----


def check(holds: bool, message: str) -> None:
    if not holds:
        raise CaseError(message)


def check_windows(trace: Trace) -> None:
    """Restoring is exact, a window has one prediction, and something is predicted; training goes on and is finite."""
    check(len(trace.windows) == WINDOWS, f"{len(trace.windows)} windows")
    for t, window in enumerate(trace.windows):
        check(len(window.seen) == MICRO_BATCHES, f"window {t} has {len(window.seen)} forwards")
        check(window.restored, f"window {t}: the true weights, or their places, did not come back")
        check(
            all(tiny.same(seen, window.seen[0]) for seen in window.seen),
            f"window {t}: its micro-batches see different weights",
        )
    check(tiny.same(trace.windows[0].seen[0], trace.windows[0].true), "weights moved before there was a step")
    moved = [not tiny.same(window.seen[0], window.true) for window in trace.windows]
    check(any(moved), "nothing is ever predicted")
    check(not tiny.same(trace.windows[0].true, trace.final), "the weights never change")
    check(trace.finite, "NaN or infinity in the weights")


def check_last_update(trace: Trace) -> None:
    """Predicted are exactly w_t + s * (lr_t / lr_{t-1}) * (w_t - w_{t-1})."""
    for t in range(1, len(trace.windows)):
        window, last = trace.windows[t], trace.windows[t - 1]
        for name, w in window.true.items():
            expected, exact = w, True
            if name in trace.groups:
                place = trace.groups[name]
                expected, exact = repeated(w, last.true[name], window.lrs[place], last.lrs[place])
            seen = window.seen[0][name]
            close = torch.equal(seen, expected) if exact else torch.allclose(seen, expected, rtol=1e-6, atol=1e-8)
            check(
                close, f"window {t}: {name} is not the last update once more, off by {(seen - expected).abs().max()}"
            )


def repeated(w: Tensor, previous: Tensor, lr: Any, previous_lr: Any) -> tuple[Tensor, bool]:
    """The prediction by the last-update rule, and whether its order of operations is known to the bit."""
    exact = not isinstance(lr, Tensor)
    if lr is None:
        factor = STEPS_AHEAD
    else:
        lr, previous_lr = float(lr), float(previous_lr)
        if previous_lr == 0:
            return w, True
        factor = STEPS_AHEAD * lr / previous_lr
    return w + (torch.lerp(previous, w, 1 + factor) - w), exact


def check_closed_form(trace: Trace, least_cosine: float | None) -> None:
    """Without weight decay the predicted move is the last update once more, up to rounding; or near it."""
    cosines = []
    for t in range(1, len(trace.windows)):
        window, last = trace.windows[t], trace.windows[t - 1]
        moves, updates = [], []
        for name, place in trace.groups.items():
            w, lr, previous_lr = window.true[name], float(window.lrs[place]), float(last.lrs[place])
            if previous_lr == 0:
                continue
            factor = STEPS_AHEAD * lr / previous_lr
            move, update = window.seen[0][name] - w, factor * (w - last.true[name])
            moves.append(move.flatten())
            updates.append(update.flatten())
            if least_cosine is None:
                resolution = torch.finfo(w.dtype).eps * (1 + factor) * w.abs()
                worst = ((move - update).abs() - 1e-4 * update.abs().max() - 8 * resolution).max()
                check(bool(worst <= 0), f"window {t}: {name} is predicted off the last update, by {worst}")
        if moves:
            cosines.append(torch.cosine_similarity(torch.cat(moves), torch.cat(updates), dim=0))
    if least_cosine is not None:
        mean = float(torch.stack(cosines).mean())
        check(mean > least_cosine, f"the cosine of predicted moves with the last updates is {mean:.3f}")


def check_resumed(case: Case, trace: Trace, config: XGradConfig) -> None:
    """Stopped after `SAVED` windows and resumed is bit for bit what it would have been."""
    again = case.train(config, checkpoint=trace.checkpoint)
    windows = trace.windows[SAVED:]
    check(len(again.windows) == len(windows), f"resumed for {len(again.windows)} windows")
    for t, (window, other) in enumerate(zip(windows, again.windows, strict=True), start=SAVED):
        check(tiny.same(window.true, other.true), f"window {t}: other weights after resuming")
        check(tiny.same(window.seen[0], other.seen[0]), f"window {t}: predicted otherwise after resuming")
    check(tiny.same(trace.final, again.final), "other weights in the end after resuming")


# ---- from a case to its row ----


def name_of(cls: Any) -> str:
    if cls.__module__ == __name__:
        return "one of your own"
    return f"{cls.__module__}.{cls.__qualname__}"


# Errors of plain optimizers, by a part of their text, and what they come to.
EXPLANATIONS = {
    "capturable=True": "capturable needs a GPU",
    "torch_xla": "needs torch_xla",
    "torch_npu": "needs torch_npu",
    "torchdistx": "needs torchdistx",
    "CUDA": "needs CUDA",
}


def explained(error: BaseException) -> str:
    """One line that says what an error comes to."""
    text = str(error).strip()
    for part, explanation in EXPLANATIONS.items():
        if part in text:
            return explanation
    return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}" if text else type(error).__name__


def run_case(case: Case) -> dict[str, str]:
    """Trains and checks; raises `CaseError` where XGrad is at fault, and else returns the row of the table.

    Raises:
        CaseError: a check does not hold, or XGrad raises where the plain optimizer trains.
    """
    with quiet():
        outcome = _outcome(case)
    return {
        "source": case.source,
        "name": case.name,
        "options": case.options,
        "rule": outcome["rule"],
        "class": outcome["class"],
        "note": "; ".join(filter(None, (outcome["note"], case.remark))),
        "install": case.install,
    }


def _outcome(case: Case) -> dict[str, str]:
    config = XGradConfig(steps=STEPS_AHEAD)
    try:
        trace = case.train(config)
    except ValueError as error:
        reason = re.fullmatch(r"XGrad: (.+?) is refused: (.+)\. .*xgrad=False\)\.", str(error))
        if reason is None:
            return _not_run(case, error)
        return {"rule": REFUSED, "note": reason[2], "class": case.known_class()}
    except Exception as error:
        return _not_run(case, error)
    notes = []
    check_windows(trace)
    resumed = _resume_note(case, trace, config)
    if trace.rule == LAST_UPDATE:
        check_last_update(trace)
    else:
        check(trace.rule == CLOSED, f"groups under both rules: {trace.rule}")
        note, least_cosine = INEXACT.get(name_of(trace.optimizer_class), ("", None))
        check_closed_form(case.train(config, decay=False), least_cosine)
        notes.append(note)
        # What has a closed form can also be told to follow the last update.
        other = case.train(XGradConfig(steps=STEPS_AHEAD, rule="last_update"))
        check_windows(other)
        check_last_update(other)
    notes.append(resumed)
    return {"class": name_of(trace.optimizer_class), "rule": trace.rule, "note": "; ".join(filter(None, notes))}


def _not_run(case: Case, error: Exception) -> dict[str, str]:
    """Not XGrad's fault if the plain optimizer ends in the same error."""
    try:
        case.train(PLAIN)
    except Exception as plain:
        if type(plain) is type(error):
            return {"rule": NOT_RUN, "class": case.known_class(), "note": f"{explained(plain)}, without XGrad too"}
    raise CaseError(f"raises {explained(error)}, and the plain optimizer does not") from error


def _resume_note(case: Case, trace: Trace, config: XGradConfig) -> str:
    """Nothing where resuming is exact; else whether that is so without XGrad as well."""
    error = resuming_ends_in(case, trace, config)
    if error is None:
        return ""
    plain = resuming_ends_in(case, case.train(PLAIN), PLAIN)
    if plain is None or type(plain) is not type(error):
        raise CaseError(f"resuming ends in {explained(error)}, that of the plain optimizer in {plain!r}") from error
    if isinstance(plain, CaseError):
        return "its own checkpoint is not exact: it does not resume bit for bit without XGrad either"
    if not isinstance(plain, pickle.UnpicklingError):
        raise CaseError(f"resuming ends in {explained(plain)}, with XGrad and without") from error
    with any_pickle():
        check_resumed(case, trace, config)
    return "its own checkpoint holds more than tensors: Transformers does not load it, without XGrad either"


def resuming_ends_in(case: Case, trace: Trace, config: XGradConfig) -> Exception | None:
    """What is raised by resuming, or by what it comes to; None where that is bit for bit the same."""
    try:
        check_resumed(case, trace, config)
    except Exception as error:
        return error
    return None


@contextmanager
def any_pickle() -> Iterator[None]:
    """Loads whatever a checkpoint holds, as somebody who trusts it can."""
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.load = load


@contextmanager
def quiet() -> Iterator[None]:
    """Optimizers warn of much that is none of this table's business; Transformers logs and shows progress."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---- torch.optim ----

TORCH = "torch.optim"
# Further settings of a class, beside what its signature lets one switch on or off.
TORCH_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{"rho": 0.5}],
    "Adafactor": [{"d": 2.0, "beta2_decay": -0.5}],
    "Adagrad": [{"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    "ASGD": [{"t0": 2.0, "lambd": 0.01}],
    "Muon": [{"adjust_lr_fn": "match_rms_adamw"}],
    "NAdam": [{"momentum_decay": 0.1}],
    "RMSprop": [{"momentum": 0.9}, {"momentum": 0.9, "centered": True}],
    "Rprop": [{"etas": (0.7, 1.1), "step_sizes": (1e-5, 0.1)}],
    "SGD": [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}],
}
# What goes with a switch of SGD: Nesterov needs a momentum, and with one the others are worth more as well.
_MOMENTUM = {"momentum": 0.9}


def torch_classes() -> dict[str, type[Optimizer]]:
    return {
        name: cls
        for name, cls in sorted(vars(torch.optim).items())
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


def torch_cases() -> Iterator[Case]:
    for name, cls in torch_classes().items():
        settings: list[dict[str, Any]] = [{}, *TORCH_SETTINGS.get(name, [])]
        for parameter in inspect.signature(cls).parameters.values():
            # None is left to torch, which chooses between a loop (foreach=False) and the others.
            values = {"foreach": [True, False], "fused": [True]}.get(parameter.name, [])
            if isinstance(parameter.default, bool):
                values = [not parameter.default]
            settings += [{**(_MOMENTUM if name == "SGD" else {}), parameter.name: value} for value in values]
            if parameter.name == "lr" and "Tensor" in str(parameter.annotation):
                settings.append({"lr": torch.tensor(parameter.default, dtype=torch.float32)})
        for kwargs in settings:
            yield LoopCase(
                TORCH,
                name,
                written(kwargs),
                make=partial(made_of, cls, kwargs),
                model=sparse_classifier if name == "SparseAdam" else small_bert,
                remark="of matrices only; the other parameters need another optimizer" if name == "Muon" else "",
            )


def written(settings: Mapping[str, Any]) -> str:
    """As a user would write them."""
    return ", ".join(f"{k}={'tensor' if isinstance(v, Tensor) else repr(v)}" for k, v in settings.items())


def made_of(cls: Any, kwargs: Mapping[str, Any], model: nn.Module, decay: bool) -> Optimizer:
    """An optimizer of `cls`, with weight decay where it has that."""
    settings = {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    accepted = inspect.signature(cls).parameters
    if "weight_decay" in accepted:
        settings.setdefault("weight_decay", 0.1 if decay else 0.0)
    if next(iter(accepted)) == "model":
        return cls(model, **settings)
    return cls(parameters_for(cls, model), **settings)


def parameters_for(cls: Any, model: nn.Module) -> list[Any]:
    """What an optimizer can be given of a model, in the form that it wants."""
    params = [p for p in model.parameters() if p.requires_grad]
    if cls.__name__ in ("Muon", "SpectralSphere") and not hasattr(cls, "_muon_state_keys"):
        return [p for p in params if p.ndim == 2]
    if hasattr(cls, "_muon_state_keys"):
        # One optimizer for all, told by group what it orthogonalises.
        hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "encoder" in name]
        others = [p for p in params if not any(p is q for q in hidden)]
        return [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}]
    return params


class SparseClassifier(nn.Module):
    """A bag of embeddings: SparseAdam takes sparse gradients only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tiny.VOCABULARY, 2, sparse=True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        loss = nn.functional.cross_entropy(self.embedding(input_ids).mean(1), labels)
        return argparse.Namespace(loss=loss)


def sparse_classifier() -> nn.Module:
    torch.manual_seed(0)
    return SparseClassifier()


# ---- names of --optim ----

OPTIM = "--optim"
_LOW_RANK = "rank=4,update_proj_gap=4"
OPTIM_SETTINGS: dict[str, dict[str, Any]] = {
    # These work on the matrices of modules that are named; the ranks of their projections are those of large models.
    **{
        member.value: {"optim_target_modules": ["attention", "intermediate"], "optim_args": _LOW_RANK}
        for member in OptimizerNames
        if member.value.startswith(("galore", "apollo"))
    },
}
# Package of the optimizer, told by a part of the name; the rest is in torch and Transformers.
OPTIM_PACKAGES = {
    "galore_adamw_8bit": "galore-torch bitsandbytes",
    "galore": "galore-torch",
    "apollo": "apollo-torch",
    "adalomo": "lomo-optim",
    "lomo": "lomo-optim",
    "grokadamw": "grokadamw",
    "stable_adamw": "torch-optimi",
    "schedule_free": "schedulefree",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "lion": "bitsandbytes",
    "adabelief": "pytorch-optimizer",
}


def package_of(name: str) -> str:
    return next((package for part, package in OPTIM_PACKAGES.items() if part in name), "")


def optim_names() -> list[str]:
    return [*(member.value for member in OptimizerNames), *EXTRA_OPTIMIZERS]


def optim_cases() -> Iterator[Case]:
    for name in optim_names():
        yield TrainerCase(
            OPTIM,
            name,
            install=package_of(name),
            settings={"optim": name, **OPTIM_SETTINGS.get(name, {})},
            model=wide_bert if "bit" in name or name == "rmsprop_bnb" else small_bert,
            # torchao compiles its steps; the first time on a machine that takes most of a minute.
            slow=package_of(name) == "torchao",
        )
    for name, text in (
        ("sgd", "momentum=0.9"),
        ("sgd", "momentum=0.9,nesterov=true"),
        ("rmsprop", "momentum=0.9"),
        ("ademamix", "t_alpha=5,t_beta3=5"),
        ("adabelief", "rectify=true"),
        ("adam", "amsgrad=true"),
        ("nadam", "decoupled_weight_decay=true"),
    ):
        settings = {"optim": name, "optim_args": text}
        yield TrainerCase(OPTIM, name, text.replace(",", ", "), package_of(name), settings=settings)


# ---- pytorch-optimizer ----

LIBRARY = "pytorch-optimizer"
# Constructor arguments that a class cannot do without, or that a run of ten steps asks for.
LIBRARY_SETTINGS: dict[str, dict[str, Any]] = {
    "adammini": {"lr": 1e-3, "num_embeds": 16, "num_heads": 2},  # its default of 1.0 is for nobody; sizes as the model
    "adashift": {"keep_num": 2},  # its default waits ten steps before the first
    "bsam": {"num_data": 32},
    "lorarite": {"lora_l_dim": -1, "lora_r_dim": 0},  # A is (rank, in), B is (out, rank): PEFT's order
    "ranger21": {"num_iterations": WINDOWS},
    "sara": {"threshold": 2e-2},  # it trains the weights below; the default is for weights of large models
}


def library_classes() -> dict[str, Any]:
    import pytorch_optimizer

    return {name: pytorch_optimizer.load_optimizer(name) for name in pytorch_optimizer.get_supported_optimizers()}


def library_cases() -> Iterator[Case]:
    for name, cls in sorted(library_classes().items()):
        yield LoopCase(
            LIBRARY,
            cls.__name__,
            install=LIBRARY if name != "lorarite" else f"{LIBRARY} peft",
            make=partial(made_of, cls, LIBRARY_SETTINGS.get(name, {})),
            model=lora_bert if name == "lorarite" else small_bert,
            inside=process_group if name in ("demo", "distributedmuon") else nullcontext,
            slow=name == "spectralsphere",  # it solves for a multiplier in every step
        )


def lora_bert() -> nn.Module:
    """LoRA-RITE steps pairs of adapters."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    return get_peft_model(small_bert(), config)


@contextmanager
def process_group() -> Iterator[None]:
    """A group of this one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# ---- around and of several ----

WRAPPERS = "around others"


class Several(Optimizer):
    """Several optimizers as one: its groups are theirs, and a step is one of each."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        # The very groups, so that a schedule reaches them.
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): o.state_dict() for i, o in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]


def muon_and_adamw(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1) -> Several:
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "encoder" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "encoder" not in name]
    return Several(
        torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay),
    )


class MuonFactory:
    """What Transformers calls an optimizer factory."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> Several:
        return muon_and_adamw(model, **kwargs)


def averaged(model: nn.Module, decay: bool) -> Optimizer:
    optimizer = made_of(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}, model, decay)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    return optimizer


def around(wrapper: Callable[..., Any], *args: Any, base: Any = torch.optim.AdamW, **kwargs: Any) -> Any:
    """Makes an optimizer inside another."""

    def make(model: nn.Module, decay: bool) -> Any:
        return wrapper(made_of(base, {"lr": 1e-3}, model, decay), *args, **kwargs)

    return make


def sam(cls: Any, **kwargs: Any) -> Any:
    """Makes one of the SAM family, which are given a class."""

    def make(model: nn.Module, decay: bool) -> Any:
        settings = {"base_optimizer": torch.optim.SGD, "lr": 1e-2, "momentum": 0.9, **kwargs}
        if "model" in inspect.signature(cls).parameters:
            settings["model"] = model
        return cls(params=model.parameters(), **settings)

    return make


def gsam(model: nn.Module, decay: bool) -> Any:
    import pytorch_optimizer

    base = torch.optim.SGD(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0)
    rho = pytorch_optimizer.ProportionScheduler(schedule, max_lr=1e-2, min_lr=1e-3, max_value=1e-2)
    return pytorch_optimizer.GSAM(model.parameters(), base, model, rho)


def prepared(model: nn.Module, decay: bool) -> Any:
    return Accelerator(cpu=True).prepare(made_of(torch.optim.AdamW, {}, model, decay))


def wrapper_cases() -> Iterator[Case]:
    yield LoopCase(WRAPPERS, "Accelerator.prepare", "AdamW", make=prepared)
    yield LoopCase(
        WRAPPERS,
        "AveragedModel of torch.optim.swa_utils",
        "SGD",
        make=averaged,
        remark="averages true weights; SWALR is a schedule like others",
    )
    yield LoopCase(
        WRAPPERS,
        "several optimizers as one",
        "Muon and AdamW",
        make=lambda model, decay: muon_and_adamw(model, weight_decay=0.1 if decay else 0.0),
    )
    yield TrainerCase(
        WRAPPERS, "optimizer factory of the Trainer", "Muon and AdamW", given=lambda: (MuonFactory, {"lr": 1e-3})
    )
    yield TrainerCase(
        WRAPPERS,
        "optimizer_cls_and_kwargs of the Trainer",
        "Adamax",
        given=lambda: (torch.optim.Adamax, {"lr": 1e-3}),
    )
    try:
        import pytorch_optimizer as library
    except ImportError:
        return
    made: dict[tuple[str, str], Any] = {
        ("Lookahead", "AdamW"): around(library.Lookahead),
        ("Lookahead", "SGDW, pullback_momentum='reset'"): around(
            library.Lookahead, base=library.SGDW, pullback_momentum="reset"
        ),
        ("Lookahead", "SGDW, pullback_momentum='pullback'"): around(
            library.Lookahead, base=library.SGDW, pullback_momentum="pullback"
        ),
        ("OrthoGrad", "AdamW"): around(library.OrthoGrad),
        ("PCGrad", "AdamW"): around(library.PCGrad),
        # Its default starts 1e-8 of the base optimizer's steps large, which ten steps do not get away from.
        ("TRAC", "AdamW"): around(library.TRAC, s_prev=0.1),
        ("SafeFP16Optimizer", "AdamW"): around(library.SafeFP16Optimizer),
        ("ScheduleFreeWrapper", "AdamW"): around(library.ScheduleFreeWrapper),
        ("SAM", "SGD"): sam(library.SAM),
        ("WSAM", "SGD"): sam(library.WSAM),
        ("LookSAM", "SGD"): sam(library.LookSAM),
        ("FriendlySAM", "SGD"): sam(library.FriendlySAM),
        ("GSAM", "SGD"): gsam,
    }
    for (name, options), make in made.items():
        yield LoopCase(WRAPPERS, name, options, LIBRARY, make=make)


# ---- the table ----


@cache
def cases() -> dict[tuple[str, str, str], Case]:
    """Every case there is with what is installed, by its place in the table."""
    found = [*torch_cases(), *optim_cases()]
    with suppress(ImportError):
        found += library_cases()
    found += wrapper_cases()
    by_key = {case.key: case for case in found}
    assert len(by_key) == len(found), "two cases of one name"
    return by_key


def packages_of(row: Mapping[str, str]) -> list[str]:
    """What decides how a row comes out, as pip names it."""
    return ["torch", *(["transformers"] if row["source"] in (OPTIM, WRAPPERS) else []), *row["install"].split()]


def version_of(package: str) -> str | None:
    """Without what says how it was built, such as +cpu; None where it is not installed."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def differing(table: Mapping[str, Any], row: Mapping[str, str]) -> str:
    """What a row depends on that is not here as it was when the table was made; empty where all is."""
    made_with = table["versions"]
    return ", ".join(
        f"{package} is {version_of(package) or 'not installed'}, the table is of {made_with.get(package) or 'none'}"
        for package in packages_of(row)
        if version_of(package) != made_with.get(package)
    )


RULES = (CLOSED, LAST_UPDATE, REFUSED, NOT_RUN)
HEADINGS = {
    TORCH: "torch.optim",
    OPTIM: "Names of `--optim`",
    LIBRARY: "The pytorch-optimizer library",
    WRAPPERS: "Around others, and several as one",
}
INTRODUCTION = """\
# Optimizers

<!-- Made by `python tests/support/every_optimizer.py --write`: edit there. -->

Every name of `--optim`, every class of torch.optim with its options and of the pytorch-optimizer library, and
optimizers around others. Each was trained on a small BERT under a learning rate schedule, for ten steps of two
micro-batches, and checked: the prediction against what can be measured from outside; that the true weights come back
bit for bit; that an accumulation window sees one prediction; that a run which was stopped after five steps and resumed
ends bit for bit as the one that was not. This is what came out, and a test holds it to that.
`hf-xgrad optimizers` prints it.

- **closed form**: predicted from the optimizer's state. `xgrad_rule="last_update"` works with these too (checked).
- **last update**: predicted by the last-update rule, the last realised update once more, at the new learning rate.
- **refused**: no prediction could be right. The error says why and what to do, before any training time is spent.
- **not run**: not even the plain optimizer runs where the table was made, on a machine without a GPU.
"""


def page(table: Mapping[str, Any]) -> str:
    """docs/optimizers.md."""
    rows = table["optimizers"]
    counts = Counter((row["source"], row["rule"]) for row in rows)
    lines = [INTRODUCTION, "| | " + " | ".join(RULES) + " | all |", "| --- |" + " ---: |" * (len(RULES) + 1)]
    for source, heading in [*HEADINGS.items(), ("", "all")]:
        numbers = [sum(n for (of, by), n in counts.items() if by == rule and source in ("", of)) for rule in RULES]
        lines.append(f"| {heading} | {' | '.join(map(str, numbers))} | {sum(numbers)} |")
    versions = ", ".join(f"{package} {version}" for package, version in table["versions"].items() if version)
    made = f"An optimizer counts once for each of its settings. Made with {versions}."
    lines += ["", *textwrap.wrap(made, 119, break_on_hyphens=False)]
    for source, heading in HEADINGS.items():
        lines += ["", f"## {heading}", "", "| optimizer | rule | exact class | remark | to install |"]
        lines.append("| --- | --- | --- | --- | --- |")
        for group in grouped(row for row in rows if row["source"] == source):
            name = f"`{group['name']}`" if source != WRAPPERS else group["name"]
            cells = (
                name + in_markdown(group["settings"]),
                group["rule"],
                f"`{group['class']}`" if group["class"] else "",
                group["note"],
                group["install"],
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def in_markdown(settings: list[str]) -> str:
    if settings == [""]:
        return ""
    named = [f"`{setting}`" for setting in settings if setting]
    return (", also with " if "" in settings else " with ") + "; ".join(named)


def make_table() -> dict[str, Any]:
    """Runs every case."""
    rows = []
    for case in tqdm(cases().values(), unit="case"):
        try:
            rows.append(run_case(case))
        except CaseError as error:
            raise CaseError(f"{' '.join(case.key)}: {error}") from error
    packages = sorted({package for row in rows for package in packages_of(row)})
    return {"versions": {package: version_of(package) for package in packages}, "optimizers": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description="Every optimizer under XGrad.")
    parser.add_argument("--write", action="store_true", help="make the table anew, and the page from it")
    parser.add_argument("--write_page", action="store_true", help="make only the page anew, from the table as it is")
    arguments = parser.parse_args()
    if arguments.write:
        torch.set_num_threads(1)
        table = make_table()
        rows = ",\n".join(f"    {json.dumps(row)}" for row in table["optimizers"])
        versions = json.dumps(table["versions"])
        TABLE.write_text(f'{{\n  "versions": {versions},\n  "optimizers": [\n{rows}\n  ]\n}}\n')
    elif not arguments.write_page:
        parser.error("nothing to do: give --write or --write_page")
    PAGE.write_text(page(json.loads(TABLE.read_text())))
    return 0


if __name__ == "__main__":
    # As the module that the tests import: a class is known by its module's name.
    import every_optimizer

    sys.exit(every_optimizer.main())
