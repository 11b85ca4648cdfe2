"""Whatever ends or disturbs a step: the true weights are there again, bit for bit, and training can go on."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import hf_xgrad
import tiny_models as tiny
from hf_xgrad import XGradTrainer, XGradTrainingArguments
from inside import watch_comparisons

RULES = [
    pytest.param({"optim": "adamw_torch"}, id="closed_form"),
    pytest.param({"optim": "adamw_torch", "xgrad_rule": "last_update", "xgrad_steps": 1.0}, id="last_update"),
]
FAULTY_STEP = 3


class BrokenError(Exception):
    pass


def fault(kind: str) -> BaseException:
    return {
        "exception": BrokenError("on purpose"),
        "interrupt": KeyboardInterrupt(),
        "memory": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    }[kind]


class Faults:
    """Mixed into a Trainer: calls `disturb(place)` in the forward, the loss and the backward of every micro-batch."""

    def __init__(self, *args: Any, disturb: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.disturb = disturb
        inner = self.model.classifier if hasattr(self.model, "classifier") else self.model
        inner.register_forward_pre_hook(lambda *_: disturb("forward") if self.model.training else None)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.model.training:
            self.disturb("loss")
            # Called when backward reaches the embeddings: all other gradients are there by then.
            weight = self.model.get_input_embeddings().weight
            handle = weight.register_hook(lambda _: (handle.remove(), self.disturb("backward"))[1])
        return loss


class Faulty(Faults, XGradTrainer):
    pass


class FaultyPlain(Faults, Trainer):
    pass


def faulty(folder: Path, disturb: Callable[[str], None], cls: type = Faulty, **settings: Any) -> Any:
    args = tiny.arguments(folder, XGradTrainingArguments, **{"lr_scheduler_type": "constant", **settings})
    return cls(model=tiny.bert(), args=args, train_dataset=tiny.Sentences(), disturb=disturb)


class At:
    """A disturbance: does `what` at the `count`-th visit of `place`, once, and notes that it did."""

    def __init__(self, place: str, what: Callable[[], None], count: int = FAULTY_STEP) -> None:
        self.place, self.what, self.count = place, what, count
        self.visits = 0
        self.happened = False

    def __call__(self, place: str) -> None:
        if place == self.place:
            self.visits += 1
            if self.visits == self.count:
                self.happened = True
                self.what()


def raising(error: BaseException) -> Callable[[], None]:
    def throw() -> None:
        raise error

    return throw


def watched(trainer: Any) -> tuple[tiny.Forwards, list[tuple[str, dict[str, Tensor]]]]:
    """What the forwards see, and what the callbacks see."""
    callback, seen = tiny.recorder(trainer.model)
    trainer.add_callback(callback)
    return tiny.Forwards(trainer.model), seen


# ---- errors that leave train() ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("place", ["forward", "loss", "backward"])
@pytest.mark.parametrize("kind", ["exception", "interrupt", "memory"])
def test_whoever_catches_an_error_sees_the_true_weights(
    tmp_path: Path, rule: Any, accumulation: int, place: str, kind: str
) -> None:
    # With accumulation the second micro-batch of a window is hit.
    disturb = At(place, raising(fault(kind)), FAULTY_STEP * accumulation)
    trainer = faulty(tmp_path, disturb, gradient_accumulation_steps=accumulation, **rule)
    forwards, seen = watched(trainer)
    with pytest.raises(type(fault(kind))):
        trainer.train()
    assert disturb.happened
    last_event, true = seen[-1]
    assert last_event == ("step_begin" if accumulation == 1 else "substep_end")
    assert tiny.same(tiny.weights(trainer.model), true)
    assert not tiny.same(forwards.weights[-1], true), "the error must have come on predicted weights"


@pytest.fixture
def _listening_to_ctrl_c() -> Iterator[None]:
    """A shell lets its background jobs ignore it, and Python leaves that so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_listening_to_ctrl_c")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", ["forward", "loss", "backward"])
@pytest.mark.parametrize(
    "send", [signal.raise_signal, lambda number: os.kill(os.getpid(), number)], ids=["raise", "kill"]
)
def test_a_real_interrupt(tmp_path: Path, rule: Any, place: str, send: Callable[[int], None]) -> None:
    disturb = At(place, lambda: send(signal.SIGINT))
    trainer = faulty(tmp_path, disturb, **rule)
    forwards, seen = watched(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert disturb.happened
    assert tiny.same(tiny.weights(trainer.model), seen[-1][1])
    assert not tiny.same(forwards.weights[-1], seen[-1][1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "event", ["step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "log"]
)
def test_an_interrupt_in_a_callback(tmp_path: Path, rule: Any, event: str) -> None:
    trainer = faulty(tmp_path, lambda place: None, gradient_accumulation_steps=2, **rule)
    _, seen = watched(trainer)
    disturb = At(event, raising(KeyboardInterrupt()))
    trainer.add_callback(tiny.EveryEvent(lambda event, **_: disturb(event)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert disturb.happened
    assert seen[-1][0] == event
    assert tiny.same(tiny.weights(trainer.model), seen[-1][1])


# The folder, not its name: a clone of the project has the same name, and everything installed in it would count.
PACKAGE = Path(hf_xgrad.__file__).parent


@functools.cache
def file_of_ours(filename: str) -> str | None:
    """The name of a file within hf_xgrad; None of any other."""
    path = Path(filename)
    return path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else None


class Place(NamedTuple):
    file: str
    function: str
    line: int


class InterruptAtLine:
    """A trace function that raises KeyboardInterrupt at the `count`-th line of hf_xgrad: a Ctrl-C at any moment."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.where: Place | None = None

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        file = file_of_ours(frame.f_code.co_filename)
        if file is None:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                self.where = Place(file, frame.f_code.co_name, frame.f_lineno)
                raise KeyboardInterrupt
        return self


class Regression(nn.Module):
    """The smallest model that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}


# Functions that an interrupt has to have come to, else the sweep has missed what it is about.
INTERRUPTED = {
    "core/prediction.py": {"predict", "restore"},
    "core/ledger.py": {"overwrite", "bring_back"},
    "core/last_update.py": {"predicting", "predicted", "restoring", "keep", "restored"},
    "predictor.py": {"predict", "__enter__", "__exit__"},
    "trainer/mixin.py": {"training_step"},
}


@pytest.mark.parametrize("rule", RULES)
def test_an_interrupt_at_any_line_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Any) -> None:
    """In step 3, from its second micro-batch to the optimizer: one run after another, each ended a line later."""
    # Every train() collects garbage, which would take longer than all the rest.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    torch.manual_seed(0)
    model = Regression()
    settings = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "logging_strategy": "no",
    }
    args = tiny.arguments(tmp_path, XGradTrainingArguments, **settings, **rule)
    data = [{"x": torch.tensor([1.0, float(i)]), "labels": torch.tensor(float(i % 2))} for i in range(8)]
    trainer = XGradTrainer(model=model, args=args, train_dataset=data)
    callback, seen = tiny.recorder(model, "substep_end")
    trainer.add_callback(callback)
    tracing = sys.gettrace()

    def arm(event: str, state: Any, **_: Any) -> None:
        if event == "substep_end" and state.global_step == 2:
            sys.settrace(interrupt)
        elif event == "pre_optimizer_step":
            sys.settrace(tracing)

    trainer.add_callback(tiny.EveryEvent(arm))
    places: list[Place] = []
    for count in itertools.count(1):
        # The same trainer every time: what the last interrupt left behind must still work.
        interrupt = InterruptAtLine(count)
        try:
            trainer.train()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
        if interrupt.where is None:
            break
        places.append(interrupt.where)
        assert tiny.same(tiny.weights(model), seen[-1][1]), interrupt.where
    for file, functions in INTERRUPTED.items():
        assert functions <= {place.function for place in places if place.file == file}, file


@pytest.mark.parametrize("rule", RULES)
def test_training_again_after_an_error_equals_never_having_tried(tmp_path: Path, rule: Any) -> None:
    """An error at the first step of a second train() leaves nothing behind in the third."""
    finals = []
    for tries in (1, 2):
        disturb = At("backward", raising(BrokenError()), 7)
        trainer = faulty(tmp_path, disturb if tries == 2 else lambda place: None, **rule)
        trainer.train()
        if tries == 2:
            with pytest.raises(BrokenError):
                trainer.train()
        trainer.train()
        finals.append(tiny.weights(trainer.model))
    assert tiny.same(*finals)


def test_a_trainer_leaves_no_hooks_on_the_users_optimizer(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    args = tiny.arguments(tmp_path)
    for _ in range(2):
        trainer = XGradTrainer(model=model, args=args, train_dataset=tiny.Sentences(), optimizers=(optimizer, None))
        trainer.train()
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


# ---- auto_find_batch_size ----


class TooBig:
    """Fails as a GPU does while batches have more than `limit` samples, from the `after`-th on."""

    def __init__(self, limit: int, after: int) -> None:
        self.limit, self.after = limit, after
        self.sizes: list[int] = []

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.sizes.append(len(kwargs["input_ids"]))
            if self.sizes[-1] > self.limit and len(self.sizes) >= self.after:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("settings", [*RULES, pytest.param({"xgrad_steps": 0}, id="off")])
def test_auto_find_batch_size(tmp_path: Path, settings: Any, after: int) -> None:
    """Out of memory at the first batch, or at the third, when weights are predicted already."""

    def run(cls: type) -> tuple[Any, Any, Any, TooBig]:
        args = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 5, **settings}
        trainer = faulty(tmp_path, lambda place: None, cls, **args)
        too_big = TooBig(7, after)
        forwards, seen = watched(trainer)
        trainer.model.register_forward_pre_hook(too_big, with_kwargs=True)
        trainer.train()
        return trainer, forwards, seen, too_big

    trainer, forwards, seen, too_big = run(Faulty)
    assert too_big.sizes == [8] * after + [7, 7, 7, 7, 4], "32 samples in batches of at most 7"
    assert trainer.state.global_step == 5
    assert tiny.changes(seen) == {"optimizer_step"}
    true = [w for event, w in seen if event == "step_begin"]
    moved = [not tiny.same(a, b) for a, b in zip(forwards.weights, true, strict=True)]
    if settings.get("xgrad_steps") == 0:
        plain, _, _, _ = run(FaultyPlain)
        assert tiny.same(tiny.weights(trainer.model), tiny.weights(plain.model))
        assert not any(moved)
    else:
        # Nothing is known before the first realised step; at the third batch there were two.
        expected = [False, after != 1] + [True] * (len(moved) - 2)
        if settings.get("xgrad_rule") == "last_update":
            # The second attempt is a run of its own: the optimizer has a state then, but no update of this run.
            expected[after] = False
        assert moved == expected


@pytest.mark.parametrize("schedule", ["constant_with_warmup", "linear"])
def test_second_attempt_forgets_the_prediction_of_the_first(tmp_path: Path, schedule: str) -> None:
    """It begins the schedule anew, and what was predicted for the failed step had another learning rate."""
    trainer = faulty(
        tmp_path,
        lambda place: None,
        auto_find_batch_size=True,
        per_device_train_batch_size=8,
        warmup_steps=3 if "warmup" in schedule else 0,
        lr_scheduler_type=schedule,
        optim="adamw_torch",
        xgrad_rule="last_update",
        xgrad_steps=1.0,
    )
    too_big = TooBig(7, after=5)
    forwards, seen = watched(trainer)
    trainer.model.register_forward_pre_hook(too_big, with_kwargs=True)
    trainer.train()
    true = [w for event, w in seen if event == "step_begin"]
    assert not tiny.same(forwards.weights[4], true[4]), "the failed step was predicted"
    assert tiny.same(forwards.weights[5], true[5]), "the first one of the second attempt was not"
    assert tiny.same(true[4], true[5])
    assert not tiny.same(forwards.weights[-1], true[-1])


# ---- fp16: steps that the scaler skips ----

SKIPPED = 3


class Scaler:
    """Mixed into a Trainer: a GradScaler on the CPU, as fp16 has one on a GPU; gradients overflow at `overflows`."""

    overflows: tuple[int, ...] = ()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=4)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step + 1 in self.overflows:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss


class Scaled(Scaler, XGradTrainer):
    pass


class ScaledPlain(Scaler, Trainer):
    pass


class Steps:
    """What there is before and after every optimizer step: weights, optimizer state, scale; then the learning rate."""

    def __init__(self, trainer: Any) -> None:
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self.skipped: list[bool] = []
        self.lrs: list[float] = []

        def snapshot() -> dict[str, Any]:
            return {
                "weights": tiny.weights(trainer.model),
                "state": tiny.optimizer_state(trainer),
                "scale": trainer.accelerator.scaler.get_scale(),
            }

        def observe(event: str, **_: Any) -> None:
            if event == "pre_optimizer_step":
                self.before.append(snapshot())
                self.lrs.append(trainer.optimizer.param_groups[0]["lr"])
            elif event == "optimizer_step":
                self.after.append(snapshot())
                self.skipped.append(trainer.accelerator.optimizer_step_was_skipped)

        trainer.add_callback(tiny.EveryEvent(observe))


def scaled(folder: Path, overflows: tuple[int, ...], cls: type = Scaled, **settings: Any) -> Any:
    args = tiny.arguments(folder, XGradTrainingArguments, max_grad_norm=0.0, **settings)
    trainer = cls(model=tiny.bert(), args=args, train_dataset=tiny.Sentences())
    trainer.overflows = overflows
    return trainer


def same_tensors(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [1, SKIPPED])
def test_a_skipped_step_changes_nothing(tmp_path: Path, rule: Any, accumulation: int, step: int) -> None:
    trainer = scaled(tmp_path, (step,), gradient_accumulation_steps=accumulation, **rule)
    steps = Steps(trainer)
    forwards, seen = watched(trainer)
    trainer.train()
    assert steps.skipped == [t == step for t in range(1, 7)]
    before, after = steps.before[step - 1], steps.after[step - 1]
    assert tiny.same(before["weights"], after["weights"])
    assert same_tensors(before["state"], after["state"])
    assert after["scale"] == before["scale"] / 2
    # The learning rate does not move on, so that the next step predicts the very same weights.
    assert steps.lrs[step] == steps.lrs[step - 1]
    windows = forwards.weights[::accumulation]
    true = [w for event, w in seen if event == "step_begin"]
    assert tiny.same(windows[step], windows[step - 1])
    first = 2 if step == 1 else 1  # the window that has a realised step before it
    moved = [not tiny.same(a, b) for a, b in zip(windows, true, strict=True)]
    assert moved == [False] * first + [True] * (6 - first)
    for t in range(step, 6):
        assert not tiny.same(steps.before[t]["weights"], steps.after[t]["weights"]), "training goes on"
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert tiny.changes(seen) == {"optimizer_step"}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_the_scaler_goes_through_what_it_does_under_the_plain_trainer(tmp_path: Path, optim: str) -> None:
    """Which steps are skipped, every scale and every learning rate; and with s = 0 all weights, too."""
    runs = []
    for cls, settings in ((ScaledPlain, {}), (Scaled, {"xgrad_steps": 0}), (Scaled, {"xgrad_steps": 1.0})):
        trainer = scaled(tmp_path, (1, 3, 4), cls, optim=optim, **settings)
        steps = Steps(trainer)
        trainer.train()
        runs.append((steps, tiny.weights(trainer.model)))
    plain, off, on = (steps for steps, _ in runs)
    for ours in (off, on):
        assert ours.skipped == plain.skipped
        assert ours.lrs == plain.lrs
        assert [s["scale"] for s in ours.after] == [s["scale"] for s in plain.after]
        assert [len(s["state"]) for s in ours.after] == [len(s["state"]) for s in plain.after]
    assert tiny.same(runs[0][1], runs[1][1])
    assert not tiny.same(runs[0][1], runs[2][1])


@pytest.mark.parametrize("rule", ["closed_form", "last_update"])
@pytest.mark.parametrize("step", [1, SKIPPED])
def test_the_fused_optimizer_skips_without_saying_so(tmp_path: Path, rule: str, step: int) -> None:
    """Fused kernels skip inside: the first such step leaves a state with `step` 0, from which nothing is predicted."""
    settings = {"optim": "adamw_torch_fused", "lr_scheduler_type": "constant"}
    trainer = scaled(tmp_path, (step,), xgrad_rule=rule, xgrad_steps=1.0, **settings)
    steps = Steps(trainer)
    forwards, seen = watched(trainer)
    trainer.train()
    assert not any(steps.skipped)
    assert tiny.same(steps.before[step - 1]["weights"], steps.after[step - 1]["weights"])
    true = [w for event, w in seen if event == "step_begin"]
    if step == 1:
        assert tiny.same(forwards.weights[1], true[1])
    elif rule == "closed_form":
        assert tiny.same(forwards.weights[step], forwards.weights[step - 1])
    assert all(w.isfinite().all() for forward in forwards.weights for w in forward.values())
    assert not tiny.same(forwards.weights[-1], true[-1])
    assert tiny.changes(seen) == {"optimizer_step"}


@pytest.mark.parametrize("rule", RULES)
def test_diagnostics_of_a_skipped_step_are_not_made_up_for_at_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    """Step 2 is to be logged and is skipped; step 3 is not to be logged and measures nothing; 4 logs its own."""
    trainer = scaled(tmp_path, (2,), logging_steps=2, **rule)
    measured: list[int] = []
    watch_comparisons(monkeypatch, lambda: measured.append(trainer.state.global_step + 1))
    forwards, seen = watched(trainer)
    trainer.train()
    entries = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    true = [w for event, w in seen if event == "step_begin"]
    moves = [sum((a[n] - b[n]).square().sum() for n in a) for a, b in zip(forwards.weights, true, strict=True)]
    sizes = [sum(w.square().sum() for w in b.values()) for b in true]
    assert "xgrad/cosine" not in entries[2]
    for t in (4, 6):
        expected = float((moves[t - 1] / sizes[t - 1]).sqrt())
        assert entries[t]["xgrad/relative_norm"] == pytest.approx(expected, rel=1e-3)
    assert set(measured) == {4, 6}
