"""The number of steps ahead that is chosen where none is given, what is said of it, and the warning of a bad one."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import HfArgumentParser

import tiny_models as tiny
from hf_xgrad import (
    XGradConfig,
    XGradSeq2SeqTrainingArguments,
    XGradTrainer,
    XGradTrainingArguments,
)
from small_runs import MOMENTUM, Regression, history, listening, make, training_logs

# Optimizers with a closed form, and those that the last-update rule serves.
WITH_FORM: list[Any] = [
    pytest.param({}, id="the-trainers-own"),
    pytest.param({"optim": "adamw_torch"}, id="adamw_torch"),
    pytest.param(MOMENTUM, id="momentum"),
    pytest.param({"optim": "adam3"}, id="adam3"),
]
WITHOUT_FORM: list[Any] = [
    pytest.param({"optim": "adagrad"}, id="adagrad"),
    pytest.param({"optim": "adafactor"}, id="adafactor"),
    pytest.param({"optim": "sgd"}, id="sgd"),
    pytest.param({"optim": "adamw_torch", "xgrad_rule": "last_update"}, id="adamw_torch-last_update"),
]
OFF = [{"xgrad": False}, {"xgrad_steps": 0}]
TWO_PARTS = r"closed form|last-update rule"


# ---- the default ----


@pytest.mark.parametrize("cls", [XGradTrainingArguments, XGradSeq2SeqTrainingArguments])
def test_the_default_has_a_name(tmp_path: Path, cls: Any) -> None:
    args = cls(output_dir=str(tmp_path), use_cpu=True)
    assert args.xgrad_steps == "default"
    assert XGradConfig() == XGradConfig(enabled=True, steps="default", rule="auto", weight_decay=False)
    assert XGradConfig.from_args(args) == XGradConfig()


@pytest.mark.parametrize("cls", [XGradTrainingArguments, XGradSeq2SeqTrainingArguments])
@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ([], "default"),
        (["--xgrad_steps", "default"], "default"),
        (["--xgrad_steps", "auto"], "auto"),
        (["--xgrad_steps", "2"], 2.0),
        (["--xgrad_steps", "0"], 0.0),
        (["--xgrad_steps", "0.5"], 0.5),
    ],
)
def test_flags(tmp_path: Path, cls: Any, flags: list[str], steps: Any) -> None:
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *flags])
    assert args.xgrad_steps == steps
    assert type(args.xgrad_steps) is type(steps)


def test_other_words_are_refused(tmp_path: Path) -> None:
    for steps in ("defaults", "", "DEFAULT"):
        with pytest.raises(ValueError, match=r"default.*auto|auto.*default"):
            XGradTrainingArguments(output_dir=str(tmp_path), use_cpu=True, xgrad_steps=steps)


def run(folder: Path, model: nn.Module | None = None, **settings: Any) -> tuple[Any, list[dict[str, Tensor]]]:
    """A trained trainer and the weights that its forwards saw."""
    trainer = make(folder, model=model, max_steps=8, **settings)
    seen = tiny.Forwards(trainer.model).weights
    trainer.train()
    return trainer, [*seen, tiny.weights(trainer.model)]


def assert_same_runs(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    (one_trainer, one_seen), (other_trainer, other_seen) = one, other
    assert all(tiny.same(a, b) for a, b in zip(one_seen, other_seen, strict=True))
    assert history(one_trainer) == history(other_trainer)


@pytest.mark.parametrize("optimizer", WITH_FORM)
def test_a_closed_form_predicts_one_step_ahead(tmp_path: Path, optimizer: Any) -> None:
    default = run(tmp_path, **optimizer)
    assert_same_runs(default, run(tmp_path, xgrad_steps=1.0, **optimizer))
    assert_same_runs(default, run(tmp_path, xgrad_steps="default", **optimizer))


@pytest.mark.parametrize("optimizer", WITHOUT_FORM)
def test_the_last_update_rule_chooses_while_it_trains(tmp_path: Path, optimizer: Any) -> None:
    default = run(tmp_path, **optimizer)
    settings = {**optimizer, "xgrad_rule": "last_update", "xgrad_steps": "auto"}
    assert_same_runs(default, run(tmp_path, **settings))
    assert_same_runs(default, run(tmp_path, **{**settings, "xgrad_steps": "default"}))
    _, fixed = run(tmp_path, **{**settings, "xgrad_steps": 1.0})
    assert not tiny.same(default[1][-1], fixed[-1])


@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad"])
def test_plain_arguments_and_a_config_have_the_same_default(tmp_path: Path, optim: str) -> None:
    finals = []
    for given in ({}, {"xgrad_config": XGradConfig()}, None):
        model = Regression()
        if given is None:
            trainer = make(tmp_path, model=model, optim=optim)
        else:
            args = tiny.arguments(
                tmp_path, optim=optim, lr_scheduler_type="constant", max_grad_norm=0.0, learning_rate=0.05
            )
            data = make(tmp_path).train_dataset
            trainer = XGradTrainer(model=model, args=args, train_dataset=data, **given)
        trainer.train()
        finals.append(tiny.weights(model))
    assert tiny.same(finals[0], finals[1])
    assert tiny.same(finals[0], finals[2])


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """A group with a closed form, and one without: momentum, and none."""
    return torch.optim.SGD(
        [{"params": [model.words.weight]}, {"params": model.score.parameters(), "momentum": 0.0}],
        lr=0.05,
        momentum=0.9,
    )


def test_each_group_has_the_default_of_its_rule(tmp_path: Path) -> None:
    runs = []
    for steps in ("default", 1.0, "auto"):
        model = Regression()
        trainer = make(
            tmp_path, model=model, max_steps=8, xgrad_steps=steps, given={"optimizers": (two_groups(model), None)}
        )
        seen = tiny.Forwards(model).weights
        callback, true = tiny.recorder(model, "step_begin")
        trainer.add_callback(callback)
        trainer.train()
        runs.append((training_logs(trainer), seen, [w for _, w in true]))
    logs, seen, true = runs[0]
    assert all(entry["xgrad/steps_0"] == 1.0 for entry in logs)
    assert len({entry["xgrad/steps_1"] for entry in logs}) > 3
    assert all(
        entry["xgrad/steps"] == pytest.approx((entry["xgrad/steps_0"] + entry["xgrad/steps_1"]) / 2) for entry in logs
    )
    # The last update, rescaled by the s that the log tells.
    for t in range(2, 8):
        for name in ("score.weight", "score.bias"):
            update = true[t][name] - true[t - 1][name]
            expected = true[t][name] + logs[t]["xgrad/steps_1"] * update
            assert torch.allclose(seen[t][name], expected, rtol=1e-5, atol=1e-6)


# ---- the log ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"optim": "adamw_torch"}, 1.0),
        ({**MOMENTUM, "xgrad_steps": 2.5}, 2.5),
        ({"optim": "adafactor", "xgrad_steps": 0.5}, 0.5),
        ({"optim": "adamw_torch", "xgrad_rule": "last_update", "xgrad_steps": 2.0}, 2.0),
    ],
    ids=str,
)
def test_every_training_log_tells_a_fixed_s(tmp_path: Path, settings: Any, expected: float) -> None:
    trainer, _ = run(tmp_path, gradient_accumulation_steps=2, **settings)
    assert [entry["xgrad/steps"] for entry in training_logs(trainer)] == [expected] * 8
    assert not any("xgrad/steps" in entry for entry in trainer.state.log_history if "loss" not in entry)


@pytest.mark.parametrize("logging_settings", [{"logging_steps": 3}, {"logging_strategy": "epoch"}], ids=str)
@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad"])
def test_every_training_log_tells_s_however_seldom(tmp_path: Path, optim: str, logging_settings: Any) -> None:
    trainer, _ = run(tmp_path, optim=optim, **logging_settings)
    logs = training_logs(trainer)
    assert logs
    assert all("xgrad/steps" in entry for entry in logs)


# ---- one line when training begins ----


def lines(said: list[str]) -> list[str]:
    """What was said of rule and s."""
    return [line for line in said if re.search(TWO_PARTS, line)]


LINES = [
    pytest.param({}, ["closed form", "AdamW", "s = 1"], id="the-trainers-own"),
    pytest.param({"optim": "adamw_torch"}, ["closed form", "AdamW", "s = 1"], id="adamw"),
    pytest.param({"optim": "adamw_torch", "xgrad_steps": "auto"}, ["closed form", "AdamW", "auto"], id="adamw-auto"),
    pytest.param({**MOMENTUM, "xgrad_steps": 2.5}, ["closed form", "SGD", "s = 2.5"], id="momentum"),
    pytest.param({"optim": "adagrad"}, ["last-update rule", "auto"], id="adagrad"),
    pytest.param({"optim": "adafactor"}, ["last-update rule", "auto"], id="adafactor"),
    pytest.param({"optim": "adafactor", "xgrad_steps": 1.5}, ["last-update rule", "s = 1.5"], id="adafactor-fixed"),
    pytest.param(
        {"optim": "adamw_torch", "xgrad_rule": "last_update"}, ["last-update rule", "auto"], id="last_update"
    ),
]


@pytest.mark.parametrize(("settings", "parts"), LINES)
def test_a_line_tells_rule_and_s(tmp_path: Path, settings: Any, parts: list[str]) -> None:
    when: list[tuple[str, int, int]] = []
    trainer = make(tmp_path, gradient_accumulation_steps=2, **settings)
    trainer.add_callback(
        tiny.EveryEvent(lambda event, state, **_: when.append((event, state.global_step, len(lines(said)))))
    )
    with listening(logging.INFO) as said:
        trainer.train()
    [line] = lines(said)
    assert "\n" not in line
    assert all(part in line for part in parts), line
    # It is there before the first step is realised, and not made by the run's end.
    assert all(number == 1 for event, steps, number in when if event == "pre_optimizer_step" or steps > 0)


def test_the_line_tells_each_group(tmp_path: Path) -> None:
    model = Regression()
    trainer = make(tmp_path, model=model, given={"optimizers": (two_groups(model), None)})
    with listening(logging.INFO) as said:
        trainer.train()
    [line] = lines(said)
    for part in ("closed form", "last-update rule", "s = 1", "auto"):
        assert part in line


def test_one_line_for_each_training(tmp_path: Path) -> None:
    trainer = make(tmp_path, optim="adamw_torch", save_strategy="steps", save_steps=3)
    with listening(logging.INFO) as said:
        trainer.train()
        assert len(lines(said)) == 1
        trainer.train()
        assert len(lines(said)) == 2
        make(tmp_path, optim="adamw_torch").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(lines(said)) == 3


def test_the_line_is_no_warning(tmp_path: Path) -> None:
    with listening() as said:
        make(tmp_path, optim="adamw_torch").train()
        make(tmp_path, optim="adagrad").train()
    assert said == []


@pytest.mark.parametrize("off", OFF, ids=str)
def test_switched_off_there_is_no_line(tmp_path: Path, off: Any) -> None:
    with listening(logging.INFO) as said:
        make(tmp_path, optim="adamw_torch", **off).train()
    assert said == []


# ---- a fixed s that predicts badly ----


class Bowl(nn.Module):
    """Half the squared norm of a vector, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, 8))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight.square().sum() / 2, "logits": labels}


def descend(folder: Path, lr: float, **settings: Any) -> tuple[Any, list[str]]:
    """Twenty steps of plain SGD in the bowl, and what was said of the cosine.

    Above a learning rate of 1 a step leads to the other side: the updates turn back and forth.
    """
    model = Bowl()
    # One group, for the log to tell its s: the Trainer would make a second one, without a weight.
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    given = {"optimizers": (optimizer, None)}
    trainer = make(folder, model=model, given=given, max_steps=20, xgrad_rule="last_update", **settings)
    with listening() as said:
        trainer.train()
    return trainer, [line for line in said if "cosine" in line]


def cosines(trainer: Any) -> list[float]:
    return [entry["xgrad/cosine"] for entry in training_logs(trainer) if "xgrad/cosine" in entry]


@pytest.mark.parametrize("s", [1.0, 0.5])
def test_a_fixed_s_whose_cosine_stays_negative_is_one_warning(tmp_path: Path, s: float) -> None:
    trainer, said = descend(tmp_path, 1.2, xgrad_steps=s)
    assert max(cosines(trainer)) < 0
    assert len(cosines(trainer)) == 19
    [warning] = said
    assert "XGrad" in warning
    assert "auto" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("steps", ["default", "auto", None])
def test_a_chosen_s_is_not_warned_of(tmp_path: Path, steps: str | None) -> None:
    trainer, said = descend(tmp_path, 1.2, **({} if steps is None else {"xgrad_steps": steps}))
    assert said == []
    # It has gone to 0 by itself.
    assert training_logs(trainer)[-1]["xgrad/steps"] < 0.1


@pytest.mark.parametrize("s", [1.0, 0.5])
def test_a_fixed_s_that_predicts_well_is_not_warned_of(tmp_path: Path, s: float) -> None:
    trainer, said = descend(tmp_path, 0.05, xgrad_steps=s)
    assert min(cosines(trainer)) > 0.9
    assert said == []


@pytest.mark.parametrize("off", OFF, ids=str)
def test_switched_off_nothing_is_warned_of(tmp_path: Path, off: Any) -> None:
    _, said = descend(tmp_path, 1.2, **off)
    assert said == []
