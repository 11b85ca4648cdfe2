"""Settings and optimizers that a callback changes while the trainer trains: followed from the next window on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import tiny_models as tiny
from hf_xgrad import XGradTrainer
from small_runs import CLOSED_FORM, LAST_UPDATE, MOMENTUM, Regression, make, outcome, training_logs

LR = 0.05
Weights = dict[str, Tensor]


class Window(TrainerCallback):
    """What stands at the beginning of every window: true weights, and each weight's state in the optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.trainer: Any = None
        self.true: list[Weights] = []
        self.states: list[dict[str, dict[str, Tensor]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not what the Trainer tells its callbacks, which would be the optimizer of the beginning.
        known = self.trainer.optimizer.state
        self.true.append(tiny.weights(self.model))
        self.states.append(
            {
                name: {key: torch.as_tensor(value).clone() for key, value in known.get(p, {}).items()}
                for name, p in self.model.named_parameters()
            }
        )


def momentum(state: dict[str, Tensor]) -> Tensor:
    """The direction of SGD with momentum."""
    return state["momentum_buffer"]


def adam(state: dict[str, Tensor]) -> Tensor:
    """The direction of AdamW."""
    k = float(state["step"])
    return (state["exp_avg"] / (1 - 0.9**k)) / ((state["exp_avg_sq"] / (1 - 0.999**k)).sqrt() + 1e-8)


def watched(folder: Path, callback: TrainerCallback | None = None, **settings: Any) -> Any:
    """A trainer in double precision, what its windows begin with, and what its forwards see."""
    model = Regression().double()
    window = Window(model)
    forwards = tiny.Forwards(model)
    # Before the one that changes things.
    trainer = make(folder, model=model, callbacks=[window, *filter(None, [callback])], **settings)
    window.trainer = trainer
    if callback is not None:
        callback.trainer = trainer  # type: ignore[attr-defined]
    return trainer, window, forwards.weights


def assert_moved(seen: Weights, window: Window, t: int, s: float, direction: Callable[..., Tensor]) -> None:
    """The weights of window t are w - s * lr * delta."""
    for name, w in window.true[t].items():
        expected = w - s * LR * direction(window.states[t][name]) if s else w
        assert torch.allclose(seen[name], expected, rtol=1e-9, atol=1e-12), f"window {t}, {name}"
        assert torch.equal(seen[name], w) == (s == 0), f"window {t}, {name}"


# ---- settings ----


class Change(TrainerCallback):
    """Gives fields of the arguments other values, at an event of a step."""

    def __init__(self, event: str, changes: dict[int, dict[str, Any]]) -> None:
        self.event, self.changes = event, dict(changes)

    def change(self, event: str, args: Any, state: Any) -> None:
        if event == self.event:
            for name, value in self.changes.pop(state.global_step, {}).items():
                setattr(args, name, value)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.change("step_end", args, state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.change("substep_end", args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.change("log", args, state)


# s of each of eight windows, told by the number of steps that were realised when it is changed.
SCHEDULES = [
    pytest.param({"xgrad_steps": 1.0}, {3: 3.0, 5: 0.5}, [0, 1, 1, 3, 3, 0.5, 0.5, 0.5], "step_end", id="up-and-down"),
    pytest.param({"xgrad_steps": 1.0}, {2: 0, 4: 2}, [0, 1, 0, 0, 2, 2, 2, 2], "log", id="off-and-on"),
    pytest.param({"xgrad_steps": 0}, {3: 2.0}, [0, 0, 0, 2, 2, 2, 2, 2], "step_end", id="from-0"),
    pytest.param({"xgrad_steps": 2.0}, {3: "default"}, [0, 2, 2, 1, 1, 1, 1, 1], "step_end", id="to-the-default"),
]


@pytest.mark.parametrize(("start", "changes", "expected", "event"), SCHEDULES)
def test_other_steps_ahead_are_followed_from_the_next_window_on(
    tmp_path: Path, start: Any, changes: dict[int, Any], expected: list[float], event: str
) -> None:
    change = Change(event, {step: {"xgrad_steps": s} for step, s in changes.items()})
    trainer, window, seen = watched(tmp_path, change, max_steps=8, **MOMENTUM, **start)
    trainer.train()
    assert change.changes == {}
    assert len(seen) == len(window.true) == 8
    for t, s in enumerate(expected):
        assert_moved(seen[t], window, t, s, momentum)


def test_the_window_under_way_goes_on_as_it_began(tmp_path: Path) -> None:
    """Changed between its micro-batches."""
    change = Change("substep_end", {2: {"xgrad_steps": 4.0}, 4: {"xgrad_steps": 0}})
    trainer, window, seen = watched(
        tmp_path, change, max_steps=6, gradient_accumulation_steps=2, xgrad_steps=1.0, **MOMENTUM
    )
    trainer.train()
    assert change.changes == {}
    for t, s in enumerate([0, 1, 1, 4, 4, 0]):
        assert tiny.same(seen[2 * t], seen[2 * t + 1])
        assert_moved(seen[2 * t], window, t, s, momentum)


def test_the_switch_is_followed(tmp_path: Path) -> None:
    change = Change("step_end", {2: {"xgrad": False}, 4: {"xgrad": True}})
    trainer, window, seen = watched(tmp_path, change, max_steps=7, xgrad_steps=1.5, **MOMENTUM)
    trainer.train()
    for t, s in enumerate([0, 1.5, 0, 0, 1.5, 1.5, 1.5]):
        assert_moved(seen[t], window, t, s, momentum)


def test_switched_on_for_the_first_time_on_the_way(tmp_path: Path) -> None:
    change = Change("step_end", {3: {"xgrad": True}})
    trainer, window, seen = watched(tmp_path, change, max_steps=6, xgrad=False, xgrad_steps=2.0, **MOMENTUM)
    trainer.train()
    for t, s in enumerate([0, 0, 0, 2, 2, 2]):
        assert_moved(seen[t], window, t, s, momentum)


def test_the_last_update_is_rescaled_anew(tmp_path: Path) -> None:
    change = Change("step_end", {3: {"xgrad_steps": 3.0}})
    trainer, window, seen = watched(tmp_path, change, **{**LAST_UPDATE, "xgrad_steps": 1.0})
    trainer.train()
    for t, s in enumerate([0, 1, 1, 3, 3, 3]):
        for name, w in window.true[t].items():
            expected = w + s * (w - window.true[t - 1][name]) if s else w
            assert torch.allclose(seen[t][name], expected, rtol=1e-9, atol=1e-12), f"window {t}, {name}"


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(CLOSED_FORM, id="closed_form"),
        pytest.param(MOMENTUM, id="momentum"),
        pytest.param(LAST_UPDATE, id="last_update"),
    ],
)
def test_from_there_on_it_is_the_run_that_has_these_steps_ahead(tmp_path: Path, rule: Any) -> None:
    """The other run is resumed with them, from where this one changes."""
    change = Change("step_end", {3: {"xgrad_steps": 2.5}})
    # The checkpoint is written after the change, which none of its files knows of.
    changed = make(
        tmp_path, callbacks=[change], max_steps=8, save_strategy="steps", save_steps=3, **{**rule, "xgrad_steps": 1.0}
    )
    changed.train()
    expected = outcome(changed, 3)
    resumed = make(tmp_path, max_steps=8, **{**rule, "xgrad_steps": 2.5})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert outcome(resumed, 3) == expected
    unchanged = make(tmp_path, max_steps=8, **{**rule, "xgrad_steps": 1.0})
    unchanged.train()
    assert outcome(unchanged, 3)[1] != expected[1]


# ---- optimizers ----


class Replace(TrainerCallback):
    """Gives the trainer an AdamW of its own after a step."""

    def __init__(self, way: str, step: int = 3, cls: Any = torch.optim.AdamW, **settings: Any) -> None:
        self.way, self.step = way, step
        self.make = lambda params: cls(params, lr=LR, **settings)
        self.trainer: Any = None
        self.made: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.step:
            return
        trainer = self.trainer
        self.made = self.make([{"params": group["params"]} for group in trainer.optimizer.param_groups])
        if self.way == "prepared":
            trainer.optimizer = trainer.accelerator.prepare(self.made)
        else:
            trainer.optimizer.optimizer = self.made


ways = pytest.mark.parametrize("way", ["prepared", "inside-the-wrapper"])
WEIGHT_DECAY = {"weight_decay": 0.0}


@ways
@pytest.mark.parametrize("before", [{"optim": "adamw_torch"}, MOMENTUM, {"optim": "adafactor"}], ids=str)
def test_another_optimizer_is_followed(tmp_path: Path, before: Any, way: str) -> None:
    """It has no state in the first window after, and from then on its own, whose steps begin at 1."""
    accumulation = 2
    replace = Replace(way, **WEIGHT_DECAY)
    trainer, window, all_seen = watched(
        tmp_path, replace, max_steps=7, gradient_accumulation_steps=accumulation, xgrad_steps=1.5, **before
    )
    trainer.train()
    seen = all_seen[::accumulation]
    assert all(tiny.same(a, all_seen[i // accumulation * accumulation]) for i, a in enumerate(all_seen))
    assert not tiny.same(seen[2], window.true[2]), "the first one was not predicted"
    assert tiny.same(seen[3], window.true[3])
    for t in (4, 5, 6):
        assert {float(state["step"]) for state in window.states[t].values()} == {t - 3}
        assert_moved(seen[t], window, t, 1.5, adam)
    # The steps were those of the new one, and the log tells what was predicted.
    assert len(replace.made.state) == 3
    active = [entry["xgrad/active"] for entry in training_logs(trainer)]
    assert active == [0, 1, 1, 0, 1, 1, 1]


@ways
def test_another_optimizer_has_the_rule_that_fits_it(tmp_path: Path, way: str) -> None:
    """From a closed form to one that has none."""
    replace = Replace(way, cls=torch.optim.Adagrad)
    trainer, window, seen = watched(tmp_path, replace, max_steps=7, xgrad_steps=1.0, optim="adamw_torch")
    trainer.train()
    assert tiny.same(seen[3], window.true[3])
    for t in (4, 5, 6):
        for name, w in window.true[t].items():
            assert torch.allclose(seen[t][name], 2 * w - window.true[t - 1][name], rtol=1e-9, atol=1e-12)
        assert not tiny.same(seen[t], window.true[t])


@ways
def test_another_optimizer_under_the_last_update_rule(tmp_path: Path, way: str) -> None:
    replace = Replace(way, **WEIGHT_DECAY)
    trainer, window, seen = watched(tmp_path, replace, max_steps=7, **LAST_UPDATE)
    trainer.train()
    assert not tiny.same(seen[2], window.true[2])
    assert tiny.same(seen[3], window.true[3])
    for t in (4, 5, 6):
        for name, w in window.true[t].items():
            assert torch.allclose(seen[t][name], 2 * w - window.true[t - 1][name], rtol=1e-9, atol=1e-12)


@ways
def test_another_optimizer_trains_as_in_the_plain_trainer_where_nothing_is_predicted(tmp_path: Path, way: str) -> None:
    finals = []
    for cls in (Trainer, XGradTrainer):
        replace = Replace(way)
        trainer = make(tmp_path, cls, callbacks=[replace], xgrad_steps=0, optim="adamw_torch")
        replace.trainer = trainer
        trainer.train()
        finals.append(outcome(trainer))
    assert finals[0] == finals[1]
