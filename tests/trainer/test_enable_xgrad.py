"""enable_xgrad: a trainer that somebody else has made then trains as an XGradTrainer does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import tiny_models as tiny
from hf_xgrad import (
    XGradConfig,
    XGradMixin,
    XGradSeq2SeqTrainer,
    XGradTrainer,
    XGradTrainingArguments,
    enable_xgrad,
)
from small_runs import (
    Regression,
    history,
    listening,
    make,
    outcome,
    rows,
    trained,
    training_logs,
)

ADAMW = {"optim": "adamw_torch"}


def plain(folder: Path, cls: type = Trainer, model: nn.Module | None = None, **settings: Any) -> Any:
    """A trainer as others make it, with arguments that know nothing of XGrad."""
    given = {key: settings.pop(key) for key in ("optimizers", "xgrad_config") if key in settings}
    defaults = {"lr_scheduler_type": "linear", "warmup_steps": 2, "weight_decay": 0.1, "learning_rate": 0.05}
    args = tiny.arguments(folder, **{**defaults, **ADAMW, **settings})
    model = Regression() if model is None else model
    return cls(model=model, args=args, train_dataset=rows(), eval_dataset=rows(8, seed=2), **given)


def predicts(trainer: Any) -> list[bool]:
    """Trains, and tells of each forward whether it saw other weights than the true ones."""
    seen = tiny.Forwards(trainer.model).weights
    callback, true = tiny.recorder(trainer.model, "step_begin")
    trainer.add_callback(callback)
    trainer.train()
    return [not tiny.same(a, b) for a, (_, b) in zip(seen, true, strict=True)]


# ---- it is an XGradTrainer then ----


SETTINGS = [
    pytest.param({}, id="default"),
    pytest.param({"steps": 2.0}, id="steps"),
    pytest.param({"steps": "auto"}, id="auto"),
    pytest.param({"rule": "last_update"}, id="last_update"),
    pytest.param({"rule": "last_update", "steps": 1.0}, id="last_update-steps"),
    pytest.param({"steps": 1.0, "weight_decay": True}, id="weight_decay"),
    pytest.param({"rule": "closed_form", "steps": 0.5, "enabled": True}, id="closed_form"),
]


@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_it_trains_as_an_xgrad_trainer(tmp_path: Path, settings: Any, optim: str) -> None:
    if settings.get("rule") == "closed_form" and optim == "adagrad":
        pytest.skip("it has no closed form")
    expected = trained(plain(tmp_path, XGradTrainer, optim=optim, xgrad_config=XGradConfig(**settings)))
    trainer = plain(tmp_path, optim=optim)
    assert enable_xgrad(trainer, **settings) is trainer
    assert trainer.xgrad_config == XGradConfig(**settings)
    assert trained(trainer) == expected
    assert any("xgrad/active" in entry for entry in training_logs(trainer))


class Doubling(Trainer):
    """A trainer with a loss and a method of its own."""

    calls = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return 2 * super().compute_loss(*args, **kwargs)

    def greet(self) -> str:
        return "hello"


class XGradDoubling(XGradMixin, Doubling):
    pass


@pytest.mark.parametrize(
    ("cls", "ours"), [(Trainer, XGradTrainer), (Doubling, XGradDoubling), (Seq2SeqTrainer, XGradSeq2SeqTrainer)]
)
def test_it_stays_what_it_was(tmp_path: Path, cls: type, ours: type) -> None:
    kind = Seq2SeqTrainingArguments if cls is Seq2SeqTrainer else TrainingArguments

    def made(cls: type, **given: Any) -> Any:
        args = tiny.arguments(tmp_path, kind, learning_rate=0.05, **ADAMW)
        return cls(model=Regression(), args=args, train_dataset=rows(), **given)

    expected = trained(made(ours, xgrad_config=XGradConfig(steps=2.0)))
    trainer = made(cls)
    model, args, handler = trainer.model, trainer.args, trainer.callback_handler
    enable_xgrad(trainer, steps=2.0)
    assert isinstance(trainer, XGradMixin)
    assert isinstance(trainer, cls)
    assert (trainer.model, trainer.args, trainer.callback_handler) == (model, args, handler)
    assert trained(trainer) == expected
    if cls is Doubling:
        assert trainer.calls == 6
        assert trainer.greet() == "hello"
    # Others of its class are left alone.
    other = made(cls)
    assert type(other) is cls
    assert predicts(other) == [False] * 6


def test_two_trainers_have_settings_of_their_own(tmp_path: Path) -> None:
    one, other = enable_xgrad(plain(tmp_path), steps=2.0), enable_xgrad(plain(tmp_path), steps=0.5)
    for trainer, s in ((one, 2.0), (other, 0.5)):
        trainer.train()
        assert {entry["xgrad/steps"] for entry in training_logs(trainer)} == {s}


@pytest.mark.parametrize("settings", [{"steps": 0}, {"enabled": False}, {"enabled": False, "steps": 3.0}], ids=str)
def test_switched_off_it_is_the_plain_trainer(tmp_path: Path, settings: Any) -> None:
    runs = []
    for change in (lambda trainer: trainer, lambda trainer: enable_xgrad(trainer, **settings)):
        trainer = change(plain(tmp_path, eval_strategy="steps", eval_steps=2))
        events: list[str] = []
        trainer.add_callback(tiny.EveryEvent(lambda event, events=events, **_: events.append(event)))
        trainer.train()
        runs.append((events, outcome(trainer), history(trainer)))
    assert runs[0] == runs[1]


def test_the_optimizer_may_have_been_made(tmp_path: Path) -> None:
    """Given to the trainer, or made by whoever made it."""
    finals = []
    for early in (False, True):
        trainer = plain(tmp_path)
        if early:
            trainer.create_optimizer()
        enable_xgrad(trainer, steps=2.0)
        finals.append(trained(trainer))
    assert finals[0] == finals[1]
    model = Regression()
    trainer = plain(tmp_path, model=model, optimizers=(torch.optim.AdamW(model.parameters(), lr=0.05), None))
    assert predicts(enable_xgrad(trainer)) == [False, True, True, True, True, True]


@pytest.mark.parametrize("rule", ["auto", "last_update"])
def test_stopped_and_resumed_is_uninterrupted(tmp_path: Path, rule: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    checkpoint = str(tmp_path / "checkpoint-3")
    expected = trained(enable_xgrad(plain(tmp_path, **saving), rule=rule), since=3)
    assert trained(enable_xgrad(plain(tmp_path), rule=rule), checkpoint, since=3) == expected
    # And an XGradTrainer goes on from there.
    other = plain(tmp_path, XGradTrainer, xgrad_config=XGradConfig(rule=rule))
    assert trained(other, checkpoint, since=3) == expected


def test_callbacks_see_the_true_weights(tmp_path: Path) -> None:
    trainer = enable_xgrad(plain(tmp_path, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1))
    callback, seen = tiny.recorder(trainer.model)
    trainer.add_callback(callback)
    trainer.train()
    assert tiny.changes(seen) == {"optimizer_step"}


def test_its_card_tells_of_it(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, max_steps=3, **ADAMW)
    trainer = Trainer(model=tiny.bert(), args=args, train_dataset=tiny.Sentences())
    enable_xgrad(trainer, steps=2.0)
    trainer.train()
    trainer.create_model_card()
    assert "XGrad" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_nothing_is_said(tmp_path: Path) -> None:
    with listening() as said:
        enable_xgrad(plain(tmp_path), steps=2.0).train()
    assert said == []


# ---- on one that is an XGradTrainer already ----


@pytest.mark.parametrize("before", [{}, {"steps": 3.0, "rule": "last_update"}, {"enabled": False}], ids=str)
def test_it_replaces_settings_given_as_a_config(tmp_path: Path, before: Any) -> None:
    expected = trained(plain(tmp_path, XGradTrainer, xgrad_config=XGradConfig(steps=2.0)))
    trainer = plain(tmp_path, XGradTrainer, xgrad_config=XGradConfig(**before))
    assert enable_xgrad(trainer, steps=2.0) is trainer
    assert type(trainer) is XGradTrainer
    assert trained(trainer) == expected


def test_it_replaces_those_of_the_arguments(tmp_path: Path) -> None:
    expected = trained(make(tmp_path, xgrad_steps=0.5, **ADAMW))
    trainer = make(tmp_path, xgrad_steps=3.0, xgrad_rule="last_update", **ADAMW)
    enable_xgrad(trainer, steps=0.5)
    assert trained(trainer) == expected


def test_the_last_call_counts(tmp_path: Path) -> None:
    expected = trained(plain(tmp_path, XGradTrainer, xgrad_config=XGradConfig(steps=0.5)))
    trainer = enable_xgrad(plain(tmp_path), steps=3.0, rule="last_update", weight_decay=True)
    kind = type(trainer)
    enable_xgrad(trainer, steps=0.5)
    assert type(trainer) is kind
    assert trained(trainer) == expected


# ---- what is refused ----


class Switching(torch.optim.SGD):
    """Has the two methods by which Schedule-Free optimizers switch their weights."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


def with_switching(folder: Path) -> Any:
    model = Regression()
    return plain(folder, model=model, optimizers=(Switching(model.parameters(), lr=0.05, momentum=0.9), None))


REFUSED: list[Any] = [
    pytest.param(with_switching, {}, "Switching", id="optimizer"),
    pytest.param(lambda folder: plain(folder, optim="lomo"), {}, "lomo", id="lomo"),
    pytest.param(lambda folder: plain(folder, optim="schedule_free_adamw"), {}, "schedule_free", id="schedule-free"),
    pytest.param(
        lambda folder: plain(folder, optim="adagrad"), {"rule": "closed_form"}, "closed_form", id="no-closed-form"
    ),
    pytest.param(
        lambda folder: plain(folder, model=Regression(max_norm=1.0)), {"steps": 1.0}, "max_norm", id="max_norm"
    ),
    pytest.param(plain, {"steps": -1.0}, "steps", id="steps"),
    pytest.param(plain, {"steps": float("nan")}, "steps", id="nan"),
    pytest.param(plain, {"steps": "many"}, "steps", id="word"),
    pytest.param(plain, {"rule": "best"}, "rule", id="rule"),
]


@pytest.mark.parametrize(("made", "settings", "name"), REFUSED)
def test_what_the_constructor_refuses_is_refused_and_changes_nothing(
    tmp_path: Path, made: Callable[[Path], Any], settings: Any, name: str
) -> None:
    trainer = made(tmp_path)
    attributes = dict(vars(trainer))
    with pytest.raises(ValueError, match=name):
        enable_xgrad(trainer, **settings)
    assert type(trainer) is Trainer
    assert dict(vars(trainer)) == attributes


@pytest.mark.parametrize("settings", [{"steps": -1.0}, {"rule": "best"}], ids=str)
def test_a_trainer_that_was_refused_trains_as_before(tmp_path: Path, settings: Any) -> None:
    runs = []
    for refused in (False, True):
        trainer = with_switching(tmp_path)
        if refused:
            with pytest.raises(ValueError):
                enable_xgrad(trainer)
            with pytest.raises(ValueError):
                enable_xgrad(trainer, **settings)
        runs.append(trained(trainer))
    assert runs[0] == runs[1]


def test_refused_on_an_xgrad_trainer_its_settings_stay(tmp_path: Path) -> None:
    settings = {"optim": "adagrad", "xgrad_config": XGradConfig(steps=2.0)}
    expected = trained(plain(tmp_path, XGradTrainer, **settings))
    trainer = plain(tmp_path, XGradTrainer, **settings)
    for refused in ({"rule": "closed_form"}, {"steps": -1.0}):
        with pytest.raises(ValueError):
            enable_xgrad(trainer, **refused)
        assert trainer.xgrad_config == XGradConfig(steps=2.0)
    assert trained(trainer) == expected


def test_switched_off_nothing_is_refused(tmp_path: Path) -> None:
    runs = []
    for settings in (None, {"enabled": False}, {"steps": 0}):
        trainer = with_switching(tmp_path)
        if settings is not None:
            enable_xgrad(trainer, **settings)
        runs.append(trained(trainer))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(
    "thing", [None, object(), Trainer, XGradTrainer, nn.Linear(2, 2), "trainer"], ids=lambda thing: str(thing)[:20]
)
def test_what_is_no_trainer_is_told(thing: Any) -> None:
    with pytest.raises(TypeError, match="enable_xgrad"):
        enable_xgrad(thing)


@pytest.mark.parametrize("event", ["train_begin", "substep_end", "step_end"])
@pytest.mark.parametrize("made", [plain, lambda folder, **s: plain(folder, XGradTrainer, **s)], ids=["plain", "xgrad"])
def test_once_training_has_begun_it_is_too_late(tmp_path: Path, made: Any, event: str) -> None:
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    runs = []
    for calls in (False, True):
        trainer = made(tmp_path, **settings)
        kind = type(trainer)
        errors: list[Exception] = []

        def call(now: str, trainer: Any = trainer, errors: list[Exception] = errors, **_: Any) -> None:
            if now == event and not errors:
                with pytest.raises((ValueError, RuntimeError)) as error:
                    enable_xgrad(trainer, steps=2.0)
                errors.append(error.value)

        if calls:
            trainer.add_callback(tiny.EveryEvent(call))
        runs.append(trained(trainer))
        assert len(errors) == calls
        for error in errors:
            assert "enable_xgrad" in str(error)
            assert "train" in str(error)
            assert "\n" not in str(error)
        assert type(trainer) is kind
    assert runs[0] == runs[1]


def test_the_error_leaves_train(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    callback, seen = tiny.recorder(trainer.model)
    trainer.add_callback(callback)

    def call(event: str, **_: Any) -> None:
        if event == "step_end":
            enable_xgrad(trainer)

    trainer.add_callback(tiny.EveryEvent(call))
    with pytest.raises((ValueError, RuntimeError), match="enable_xgrad"):
        trainer.train()
    assert type(trainer) is Trainer
    assert trainer.state.global_step == 1
    weights: dict[str, Tensor] = seen[-1][1]
    assert tiny.same(tiny.weights(trainer.model), weights)


def test_arguments_with_fields_of_ours(tmp_path: Path) -> None:
    """In a plain Trainer they say nothing; what is given to enable_xgrad counts."""
    expected = trained(make(tmp_path, xgrad_steps=2.0, **ADAMW))
    trainer = make(tmp_path, Trainer, xgrad=False, **ADAMW)
    assert isinstance(trainer.args, XGradTrainingArguments)
    enable_xgrad(trainer, steps=2.0)
    assert trained(trainer) == expected
