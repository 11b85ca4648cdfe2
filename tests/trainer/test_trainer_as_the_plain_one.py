"""As in the plain Trainer: where a run ends, what errors say, how arguments are printed, who makes the optimizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

import tiny_models as tiny
from hf_xgrad import (
    XGradMixin,
    XGradSeq2SeqTrainer,
    XGradSeq2SeqTrainingArguments,
    XGradTrainer,
    XGradTrainingArguments,
)
from hf_xgrad.optim import AdaM3
from small_runs import CLOSED_FORM, LAST_UPDATE, Regression, history, listening, make, outcome, training_logs

RULES = [
    pytest.param(CLOSED_FORM, id="closed_form"),
    pytest.param(LAST_UPDATE, id="last_update"),
    pytest.param({"optim": "adafactor", "xgrad_steps": 1.0}, id="adafactor"),
]
OFF = [
    pytest.param({"optim": "adamw_torch", "xgrad": False}, id="xgrad=False"),
    pytest.param({"optim": "adamw_torch", "xgrad_steps": 0}, id="steps=0"),
]
SAVING = {"save_strategy": "steps", "save_steps": 3}


# ---- arguments as a text ----


CLASSES = [
    pytest.param(XGradTrainingArguments, TrainingArguments, id="XGradTrainingArguments"),
    pytest.param(XGradSeq2SeqTrainingArguments, Seq2SeqTrainingArguments, id="XGradSeq2SeqTrainingArguments"),
]


@pytest.mark.parametrize(("ours", "theirs"), CLASSES)
def test_arguments_are_printed_without_their_tokens(tmp_path: Path, ours: Any, theirs: Any) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "hub_token": "secret", "learning_rate": 3e-4}
    args, plain = ours(xgrad_steps=2.0, **settings), theirs(**settings)
    assert args.hub_token == "secret"
    assert "secret" not in repr(args)
    assert repr(args) == str(args)
    assert repr([args]) == f"[{args}]"
    # In form it is the text of theirs, with our fields among the others.
    first, *lines = repr(args).splitlines()
    assert first == f"{ours.__name__}("
    assert [line for line in lines if not line.startswith("xgrad")] == str(plain).splitlines()[1:]
    added = [line.partition("=")[0] for line in lines if line.startswith("xgrad")]
    assert added == ["xgrad", "xgrad_rule", "xgrad_steps", "xgrad_weight_decay"]
    assert "xgrad_steps=2.0," in lines


def test_arguments_of_a_trainer_are_printed_without_their_tokens(tmp_path: Path) -> None:
    trainer = make(tmp_path, hub_token="secret")
    assert "secret" not in repr(trainer.args)
    assert repr(trainer.args) == str(trainer.args)


# ---- resumed where nothing is left to train ----


def events_of(trainer: Any) -> list[str]:
    """A list that gets the events; a log is told by what it is of."""
    events: list[str] = []

    def observe(event: str, logs: Any = None, **_: Any) -> None:
        kind = next((key for key in ("loss", "eval_loss", "train_loss") if key in (logs or {})), "")
        events.append(f"{event} {kind}" if event == "log" else event)

    trainer.add_callback(tiny.EveryEvent(observe))
    return events


OF_A_STEP = ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "log loss")
AT_THE_EPOCHS_END = [
    pytest.param({"eval_strategy": "epoch"}, 1, id="evaluate"),
    pytest.param({"eval_strategy": "epoch", "logging_strategy": "epoch"}, 2, id="evaluate-and-log"),
    pytest.param({"eval_strategy": "epoch", "save_strategy": "epoch"}, 1, id="evaluate-and-save"),
    pytest.param({}, 1, id="nothing"),
]


@pytest.mark.parametrize(("settings", "accumulation"), AT_THE_EPOCHS_END)
@pytest.mark.parametrize("rule", [*RULES[:2], *OFF])
def test_resumed_at_its_last_step_a_run_ends_its_epoch_without_another_step(
    tmp_path: Path, rule: Any, settings: Any, accumulation: int
) -> None:
    """The plain Trainer makes one step too many there; but for that step's, all its events are kept."""
    common = {"max_steps": 3, "gradient_accumulation_steps": accumulation, **rule}
    whole = make(tmp_path / "whole", **{**SAVING, "eval_strategy": "epoch"}, **common)
    whole.train()
    runs = {}
    for cls in (Trainer, XGradTrainer):
        folder = tmp_path / cls.__name__
        shutil.copytree(tmp_path / "whole", folder)
        trainer = make(folder, cls, **settings, **common)
        events = events_of(trainer)
        result = trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        runs[cls] = trainer, events, result
    _, plain_events, _ = runs[Trainer]
    ours, our_events, result = runs[XGradTrainer]
    assert "step_begin" in plain_events, "the plain Trainer has been mended"
    assert our_events == [event for event in plain_events if event not in OF_A_STEP]
    assert our_events.count("epoch_end") == 1
    assert our_events.count("evaluate") == ("eval_strategy" in settings)
    assert ours.state.global_step == result.global_step == 3
    assert tiny.same(tiny.weights(ours.model), tiny.weights(whole.model))
    # The evaluation is that which the uninterrupted run made at its end.
    evaluated = [entry for entry in history(ours) if "eval_loss" in entry]
    assert evaluated == [entry for entry in history(whole) if "eval_loss" in entry][: len(evaluated)]


@pytest.mark.parametrize("rule", [*RULES[:2], *OFF])
def test_resumed_at_the_end_of_an_epoch_nothing_happens(tmp_path: Path, rule: Any) -> None:
    """There, the plain Trainer makes no step either."""
    settings = {"max_steps": 8, "eval_strategy": "epoch", **rule}
    make(tmp_path, save_strategy="steps", save_steps=8, **settings).train()
    runs = []
    for cls in (Trainer, XGradTrainer):
        trainer = make(tmp_path, cls, **settings)
        events = events_of(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        runs.append((events, trainer.state.global_step))
    assert runs[0] == runs[1]


# ---- a checkpoint that is not there ----


def error_of(folder: Path, cls: type, resume: Any, **settings: Any) -> tuple[type, str]:
    """What train() raises, with its notes."""
    trainer = make(folder, cls, **settings)
    with pytest.raises(Exception) as error:
        trainer.train(resume_from_checkpoint=resume)
    return error.type, "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


@pytest.mark.parametrize(
    "settings", [{}, {"xgrad_rule": "last_update"}, {"xgrad": False}, {"xgrad_steps": 0}], ids=str
)
@pytest.mark.parametrize("name", ["does-not-exist", "run/checkpoint-7", "empty"])
def test_a_checkpoint_that_is_none_is_told_in_the_trainers_words(tmp_path: Path, name: str, settings: Any) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint = str(tmp_path / name)
    kind, words = error_of(tmp_path / "run", Trainer, checkpoint)
    assert words == f"Can't find a valid checkpoint at {checkpoint}"
    our_kind, our_words = error_of(tmp_path / "run", XGradTrainer, checkpoint, **settings)
    assert our_kind is kind is ValueError
    assert words in our_words
    if settings.get("xgrad", True) and settings.get("xgrad_steps") != 0:
        assert "XGrad" in our_words


def test_a_name_that_is_no_path_is_told_in_the_trainers_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, words = error_of(tmp_path, XGradTrainer, "does-not-exist")
    assert "Can't find a valid checkpoint at does-not-exist" in words
    assert "XGrad" in words


@pytest.mark.parametrize("settings", [{}, {"xgrad": False}], ids=str)
def test_a_folder_without_checkpoints_is_told_in_the_trainers_words(tmp_path: Path, settings: Any) -> None:
    kind, words = error_of(tmp_path, Trainer, True)
    our_kind, our_words = error_of(tmp_path, XGradTrainer, True, **settings)
    assert our_kind is kind
    assert words in our_words


# ---- a checkpoint without the optimizer's state ----


def without_optimizer(folder: Path, **rule: Any) -> Path:
    """The checkpoint of a run, its optimizer.pt deleted."""
    make(folder, max_steps=3, **SAVING, **rule).train()
    checkpoint = folder / "checkpoint-3"
    (checkpoint / "optimizer.pt").unlink()
    return checkpoint


@pytest.mark.parametrize("by_name", [True, False], ids=["by-name", "the-last-one"])
@pytest.mark.parametrize("rule", RULES)
def test_without_the_optimizers_state_a_run_is_resumed_with_one_warning(
    tmp_path: Path, rule: Any, by_name: bool
) -> None:
    checkpoint = without_optimizer(tmp_path, **rule)
    trainer = make(tmp_path, max_steps=8, **rule)
    seen = tiny.Forwards(trainer.model).weights
    callback, true = tiny.recorder(trainer.model, "step_begin")
    trainer.add_callback(callback)
    with listening() as said:
        trainer.train(resume_from_checkpoint=str(checkpoint) if by_name else True)
    [warning] = said
    assert "XGrad" in warning
    assert "optimizer.pt" in warning
    assert "anew" in warning
    assert "\n" not in warning
    assert trainer.state.global_step == 8
    moved = [not tiny.same(a, b) for a, (_, b) in zip(seen, true, strict=True)]
    assert len(moved) == 5
    assert all(moved[2:])
    if rule == CLOSED_FORM:
        assert moved == [False] + [True] * 4
    assert training_logs(trainer)[-1]["xgrad/active"] == 1.0


@pytest.mark.parametrize("off", OFF)
def test_switched_off_it_is_resumed_as_by_the_plain_trainer(tmp_path: Path, off: Any) -> None:
    checkpoint = without_optimizer(tmp_path, **off)
    runs = []
    for cls in (Trainer, XGradTrainer):
        for resume in (str(checkpoint), True):
            trainer = make(tmp_path, cls, max_steps=8, lr_scheduler_type="linear", **off)
            events = events_of(trainer)
            with listening() as said:
                trainer.train(resume_from_checkpoint=resume)
            runs.append((events, outcome(trainer)))
            if off.get("xgrad") is False:
                assert said == []
    assert all(run == runs[0] for run in runs)


def test_an_older_checkpoint_is_not_taken_for_it(tmp_path: Path) -> None:
    """The last one is resumed, though one before it has an optimizer.pt."""
    make(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, **CLOSED_FORM).train()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    trainer = make(tmp_path, max_steps=8, **CLOSED_FORM)
    steps: list[int] = []
    trainer.add_callback(tiny.EveryEvent(lambda event, state, **_: steps.append(state.global_step)))
    with listening() as said:
        trainer.train(resume_from_checkpoint=True)
    # The events of its making come before.
    assert steps[0] == 4
    assert len(said) == 1


# ---- who makes the optimizer ----


class AsAMethod(Trainer):
    """A trainer that chooses the settings of its optimizer by what it is."""

    own_lr = 0.02

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, {**kwargs, "lr": self.own_lr}


class AsAClassMethod(Trainer):
    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        optimizer_class, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return optimizer_class, {**kwargs, "lr": 0.02}


class AsAStaticMethod(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return cls, {**kwargs, "lr": 0.02}


kinds = pytest.mark.parametrize("base", [AsAMethod, AsAClassMethod, AsAStaticMethod])


def over(base: type) -> type:
    return type(f"XGrad{base.__name__}", (XGradMixin, base), {})


@kinds
@pytest.mark.parametrize("settings", [{}, {"xgrad_rule": "closed_form"}, {"xgrad_steps": 0}], ids=str)
def test_a_trainers_own_settings_of_its_optimizer_hold(tmp_path: Path, base: type, settings: Any) -> None:
    """In double precision, for the prediction to be told by its size."""
    model = Regression().double()
    trainer = make(tmp_path, over(base), model, optim="adamw_torch", **settings)
    seen = tiny.Forwards(model).weights
    callback, true = tiny.recorder(model, "step_begin")
    trainer.add_callback(callback)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert [entry["learning_rate"] for entry in training_logs(trainer)] == [0.02] * 6
    assert tiny.same(seen[-1], true[-1][1]) == (settings.get("xgrad_steps") == 0)


@kinds
def test_with_nothing_predicted_it_is_that_trainer(tmp_path: Path, base: type) -> None:
    runs = []
    for cls in (base, over(base)):
        trainer = make(tmp_path, cls, optim="adamw_torch", xgrad_steps=0)
        trainer.train()
        runs.append(outcome(trainer))
    assert runs[0] == runs[1]


@kinds
@pytest.mark.parametrize(("optim", "name"), [("adam3", "AdaM3"), ("adabelief", "AdaBelief")])
def test_our_names_train_there_too(tmp_path: Path, base: type, optim: str, name: str) -> None:
    if optim == "adabelief":
        pytest.importorskip("pytorch_optimizer")
    trainer = make(tmp_path, over(base), optim=optim)
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == name
    assert training_logs(trainer)[-1]["xgrad/active"] == 1.0


@pytest.mark.parametrize("cls", [XGradTrainer, XGradSeq2SeqTrainer])
def test_the_optimizer_of_some_arguments_can_be_asked_of_the_class(tmp_path: Path, cls: Any) -> None:
    """As that of the plain Trainer, with the names that we add."""
    args = tiny.arguments(tmp_path, XGradTrainingArguments, optim="adamw_torch")
    assert cls.get_optimizer_cls_and_kwargs(args) == Trainer.get_optimizer_cls_and_kwargs(args)
    args = tiny.arguments(tmp_path, XGradTrainingArguments, optim="adam3")
    assert cls.get_optimizer_cls_and_kwargs(args)[0] is AdaM3
