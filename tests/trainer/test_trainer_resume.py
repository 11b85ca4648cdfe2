"""Checkpoints: stopped and resumed is uninterrupted; what plain Trainers write and read; damaged files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

import tiny_models as tiny
from hf_xgrad import XGradTrainer, XGradTrainingArguments

CLOSED_FORM = {"optim": "adamw_torch"}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9"}
LAST_UPDATE = {"optim": "adamw_torch", "xgrad_rule": "last_update", "xgrad_steps": 1.0}
AUTO = {"optim": "adamw_torch", "xgrad_steps": "auto"}
AUTO_LAST_UPDATE = {**LAST_UPDATE, "xgrad_steps": "auto"}
RULES = [
    pytest.param(CLOSED_FORM, id="closed_form"),
    pytest.param(MOMENTUM, id="momentum"),
    pytest.param(LAST_UPDATE, id="last_update"),
    pytest.param({"optim": "adafactor", "xgrad_steps": 1.0}, id="adafactor"),
    pytest.param(AUTO, id="auto"),
    pytest.param(AUTO_LAST_UPDATE, id="auto-last_update"),
]
STEPS = 8
FILE = "xgrad.safetensors"


def make(folder: Path, cls: type = XGradTrainer, *, dropout: float = 0.0, **settings: Any) -> Any:
    """A trainer of 8 steps over 28 samples: 7 batches an epoch, a short window with accumulation 2."""
    model = tiny.bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    args = tiny.arguments(folder, XGradTrainingArguments, max_steps=STEPS, warmup_steps=2, **settings)
    return cls(model=model, args=args, train_dataset=tiny.Sentences(28))


def saving(step: int) -> dict[str, Any]:
    return {"save_strategy": "steps", "save_steps": step}


def outcome(trainer: Any, since: int) -> tuple[Any, ...]:
    """Everything that must be equal: the log since a step, weights, optimizer state, schedule, random numbers."""
    log = [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
        if "loss" in entry and entry["step"] > since
    ]
    generators = random.random(), float(np.random.rand()), float(torch.rand(()))
    weights = [w.tolist() for w in tiny.weights(trainer.model).values()]
    state = [t.tolist() for t in tiny.optimizer_state(trainer)]
    return log, weights, state, trainer.lr_scheduler.get_last_lr(), generators


# ---- stopped and resumed is uninterrupted ----


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [1, 2, 5, 7], ids=lambda step: f"step-{step}")
@pytest.mark.parametrize("rule", RULES)
def test_resumed_equals_uninterrupted(tmp_path: Path, rule: Any, step: int, accumulation: int) -> None:
    """With dropout. With accumulation 1, step 7 ends an epoch; with 2, steps 2 and 5 stand inside one."""
    settings = {"dropout": 0.1, "gradient_accumulation_steps": accumulation, **rule}
    uninterrupted = make(tmp_path, **saving(step), **settings)
    uninterrupted.train()
    expected = outcome(uninterrupted, step)
    resumed = make(tmp_path, **settings)
    forwards = tiny.Forwards(resumed.model)
    callback, true = tiny.recorder(resumed.model, "step_begin")
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert outcome(resumed, step) == expected
    # And a prediction was resumed, not the plain optimizer: but for step 1, whose learning rate was 0. Where s is
    # chosen under the last-update rule, it takes one update more.
    predicts = step > (2 if rule == AUTO_LAST_UPDATE else 1) or rule in (CLOSED_FORM, MOMENTUM, AUTO)
    assert tiny.same(forwards.weights[0], true[0][1]) != predicts


class CheckpointAt(TrainerCallback):
    """Saves as Transformers' just-in-time checkpoint does: in the middle of things, and ends the run."""

    def __init__(self, event: str, step: int) -> None:
        self.event, self.step = event, step
        self.trainer: Any = None
        self.done = False

    def _at(self, event: str, state: Any, control: Any) -> None:
        if event == self.event and state.global_step == self.step and not self.done:
            self.done = True
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
            control.should_training_stop = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at("step_begin", state, control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at("pre_optimizer_step", state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._at("step_end", state, control)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("event", ["step_begin", "pre_optimizer_step", "step_end"])
@pytest.mark.parametrize("rule", [pytest.param({"xgrad": False}, id="plain"), *RULES])
def test_just_in_time_checkpoints(tmp_path: Path, rule: Any, event: str, accumulation: int) -> None:
    """Without dropout: the window under way is run again, and would draw other random numbers.

    "plain" shows that resuming from such checkpoints is exact to begin with.
    """
    step = 3
    settings = {"gradient_accumulation_steps": accumulation, **rule}
    uninterrupted = make(tmp_path / "whole", **settings)
    uninterrupted.train()
    stopped = make(tmp_path / "stopped", **settings)
    checkpoint_at = CheckpointAt(event, step)
    checkpoint_at.trainer = stopped
    stopped.add_callback(checkpoint_at)
    stopped.train()
    assert checkpoint_at.done
    assert stopped.state.global_step < STEPS
    resumed = make(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    # Every number but those of the random generators.
    assert outcome(resumed, step)[:-1] == outcome(uninterrupted, step)[:-1]


def test_the_run_that_wrote_a_checkpoint_goes_on_undisturbed(tmp_path: Path) -> None:
    finals = []
    for settings in ({}, saving(1)):
        trainer = make(tmp_path, gradient_accumulation_steps=2, **settings, **LAST_UPDATE)
        trainer.train()
        finals.append(outcome(trainer, 0))
    assert finals[0] == finals[1]


# ---- what is in the file ----


def test_the_file_holds_the_weights_of_the_step_before(tmp_path: Path) -> None:
    trainer = make(tmp_path, **saving(4), **LAST_UPDATE)
    callback, true = tiny.recorder(trainer.model, "step_begin")
    trainer.add_callback(callback)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-4" / FILE)
    before = true[3][1]  # at the beginning of step 4
    names = {p: name for name, p in trainer.model.named_parameters()}
    expected = {
        f"{g}.{i}": before[names[p]]
        for g, group in enumerate(trainer.optimizer.param_groups)
        for i, p in enumerate(group["params"])
    }
    assert tiny.same(saved, expected)
    with safe_open(tmp_path / "checkpoint-4" / FILE, framework="pt") as file:
        assert json.loads(file.metadata()["lrs"]) == [pytest.approx(1e-2 * 5 / 6)] * 2


@pytest.mark.parametrize(
    "settings",
    [CLOSED_FORM, MOMENTUM, {"xgrad": False}, {"xgrad_steps": 0}],
    ids=str,
)
def test_no_file_where_the_optimizers_state_is_all(tmp_path: Path, settings: Any) -> None:
    trainer = make(tmp_path, **saving(4), **settings)
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert "optimizer.pt" in files
    assert not any("xgrad" in name for name in files)


def test_a_file_of_an_earlier_run_does_not_outlive_its_checkpoint(tmp_path: Path) -> None:
    """The same folder is written again by a run that keeps no such file: what is left there says nothing of it."""
    make(tmp_path, **saving(4), **LAST_UPDATE).train()
    assert (tmp_path / "checkpoint-4" / FILE).exists()
    make(tmp_path, **saving(4), xgrad=False, optim="adamw_torch").train()
    assert not (tmp_path / "checkpoint-4" / FILE).exists()


def test_weights_that_are_not_contiguous_can_be_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path, **saving(4), **LAST_UPDATE)
    weight = trainer.model.bert.encoder.layer[0].output.dense.weight
    weight.data = weight.data.t().contiguous().t()
    trainer.train()
    resumed = make(tmp_path, **LAST_UPDATE)
    weight = resumed.model.bert.encoder.layer[0].output.dense.weight
    weight.data = weight.data.t().contiguous().t()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert outcome(resumed, 4)[:-1] == outcome(trainer, 4)[:-1]


# ---- the plain Trainer's checkpoints, and ours in the plain Trainer ----


def loaded_state(trainer: Any) -> list[dict[str, Any]]:
    """A list that gets the weights, the optimizer's and the scheduler's state when training begins."""
    states: list[dict[str, Any]] = []

    def observe(event: str, **_: Any) -> None:
        if event == "train_begin":
            states.append(
                {
                    "weights": tiny.weights(trainer.model),
                    "optimizer": tiny.optimizer_state(trainer),
                    "steps": trainer.lr_scheduler.last_epoch,
                }
            )

    trainer.add_callback(tiny.EveryEvent(observe))
    return states


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("writer", "reader"), [(XGradTrainer, Trainer), (Trainer, XGradTrainer)], ids=["ours-in-plain", "plain-in-ours"]
)
def test_checkpoints_are_the_plain_trainers(tmp_path: Path, rule: Any, writer: type, reader: type) -> None:
    wrote = make(tmp_path, writer, **saving(4), **rule)
    callback, after = tiny.recorder(wrote.model, "save")
    wrote.add_callback(callback)
    at_save: list[list[Tensor]] = []
    wrote.add_callback(
        tiny.EveryEvent(lambda event, **_: at_save.append(tiny.optimizer_state(wrote)) if event == "save" else None)
    )
    wrote.train()
    read = make(tmp_path, reader, **rule)
    states = loaded_state(read)
    forwards = tiny.Forwards(read.model)
    read.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    [state] = states
    assert tiny.same(state["weights"], after[0][1])
    assert [t.tolist() for t in state["optimizer"]] == [t.tolist() for t in at_save[0]]
    assert state["steps"] == 4
    assert read.state.global_step == STEPS
    assert all(torch.isfinite(t).all() for t in forwards.weights[-1].values())
    # The closed form takes up the plain Trainer's state at once; there is no last update to repeat.
    predicts = reader is XGradTrainer and rule in (CLOSED_FORM, MOMENTUM, AUTO)
    assert tiny.same(forwards.weights[0], after[0][1]) != predicts


def test_our_checkpoint_trains_on_in_the_plain_trainer_as_with_s_0(tmp_path: Path) -> None:
    make(tmp_path, **saving(4), **LAST_UPDATE).train()
    runs = []
    for cls, settings in ((Trainer, {}), (XGradTrainer, {"xgrad_steps": 0}), (XGradTrainer, {"xgrad": False})):
        resumed = make(tmp_path, cls, **{**LAST_UPDATE, **settings})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        runs.append(outcome(resumed, 4))
    assert runs[0] == runs[1] == runs[2]


# ---- missing and damaged files ----


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings of hf_xgrad itself."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("hf_xgrad")]


def test_missing_file_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, **saving(4), **LAST_UPDATE).train()
    (tmp_path / "checkpoint-4" / FILE).unlink()
    resumed = make(tmp_path, **LAST_UPDATE)
    forwards = tiny.Forwards(resumed.model)
    callback, true = tiny.recorder(resumed.model, "step_begin")
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    [warning] = ours(caplog)
    assert FILE in warning
    assert str(tmp_path / "checkpoint-4") in warning
    assert "\n" not in warning
    moved = [not tiny.same(seen, w) for seen, (_, w) in zip(forwards.weights, true, strict=True)]
    assert moved == [False, True, True, True]


def test_what_other_processes_left_is_named_and_not_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run of two processes with sharded weights leaves two such files."""
    make(tmp_path, **saving(4), **LAST_UPDATE).train()
    folder = tmp_path / "checkpoint-4"
    parts = ["xgrad-00001-of-00002.safetensors", "xgrad-00002-of-00002.safetensors"]
    (folder / parts[0]).write_bytes((folder / FILE).read_bytes())
    (folder / FILE).rename(folder / parts[1])
    make(tmp_path, **LAST_UPDATE).train(resume_from_checkpoint=str(folder))
    [warning] = ours(caplog)
    assert all(name in warning for name in (FILE, *parts))
    assert "as many" in warning
    # Written again by this run, the folder has nothing of the other one.
    make(tmp_path, **saving(4), **LAST_UPDATE).train()
    assert sorted(path.name for path in folder.glob("xgrad*")) == [FILE]


@pytest.mark.parametrize(
    ("written", "read", "missing"),
    [
        (CLOSED_FORM, AUTO, "xgrad_steps='auto'"),
        (LAST_UPDATE, AUTO_LAST_UPDATE, "xgrad_steps='auto'"),
        (AUTO, LAST_UPDATE, "the last update"),
    ],
)
def test_what_the_file_does_not_have_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, written: Any, read: Any, missing: str
) -> None:
    make(tmp_path, **saving(4), **written).train()
    make(tmp_path, **read).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    [warning] = ours(caplog)
    assert missing in warning
    assert " and " not in warning
    assert "\n" not in warning


@pytest.mark.parametrize("rule", RULES)
def test_resuming_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, rule: Any) -> None:
    make(tmp_path, **saving(4), **rule).train()
    make(tmp_path, **rule).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert ours(caplog) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def rewrite(
    change: Callable[[dict[str, Tensor], dict[str, str]], dict[str, str] | None],
) -> Callable[[Path], None]:
    """Damages the tensors and the metadata of a file by `change`, which may return other metadata."""

    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(path)
        metadata = change(tensors, metadata) or metadata
        save_file(tensors, path, metadata)

    return damage


DAMAGES = [
    pytest.param(truncate, id="truncated"),
    pytest.param(empty, id="empty"),
    pytest.param(rewrite(lambda t, m: t.__setitem__("0.0", torch.zeros(3, 5))), id="shape"),
    pytest.param(rewrite(lambda t, m: t.__setitem__("0.0", torch.zeros(()))), id="scalar"),
    pytest.param(rewrite(lambda t, m: t.__setitem__("7.0", torch.zeros(1))), id="unknown-weight"),
    pytest.param(rewrite(lambda t, m: t.__delitem__("0.0")), id="missing-weight"),
    pytest.param(rewrite(lambda t, m: {"lrs": m["lrs"]}), id="without-holds"),
    pytest.param(rewrite(lambda t, m: {**m, "holds": "something"}), id="holds"),
    pytest.param(rewrite(lambda t, m: {**m, "lrs": "[0.1]"}), id="lrs-of-other-groups"),
    pytest.param(rewrite(lambda t, m: {**m, "lrs": "["}), id="lrs-not-json"),
    pytest.param(rewrite(lambda t, m: {**m, "lrs": '["a", "b"]'}), id="lrs-not-numbers"),
    pytest.param(rewrite(lambda t, m: {**m, "lrs": "3"}), id="lrs-not-a-list"),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make(tmp_path, **saving(4), **LAST_UPDATE).train()
    path = tmp_path / "checkpoint-4" / FILE
    damage(path)
    resumed = make(tmp_path, **LAST_UPDATE)
    with pytest.raises(ValueError) as error:
        resumed.train(resume_from_checkpoint=str(path.parent))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [truncate, empty], ids=["truncated", "empty"])
def test_a_damaged_file_of_steps_is_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make(tmp_path, **saving(4), **AUTO).train()
    path = tmp_path / "checkpoint-4" / FILE
    damage(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        make(tmp_path, **AUTO).train(resume_from_checkpoint=str(path.parent))


def test_a_damaged_file_does_not_matter_where_it_is_not_read(tmp_path: Path) -> None:
    make(tmp_path, **saving(4), **LAST_UPDATE).train()
    truncate(tmp_path / "checkpoint-4" / FILE)
    for settings in (CLOSED_FORM, {**LAST_UPDATE, "xgrad": False}, {**LAST_UPDATE, "xgrad_steps": 0}):
        make(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# Streams


class Stream(IterableDataset[dict[str, Tensor]]):
    """Four batches and a half of `Sentences`, in another order in each pass."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = tiny.Sentences(18)
        order = torch.randperm(18, generator=torch.Generator().manual_seed(self.epoch))
        return (rows[int(number)] for number in order)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", [CLOSED_FORM, LAST_UPDATE], ids=["closed_form", "last_update"])
def test_a_stream_goes_on_in_the_pass_that_it_was_in(tmp_path: Path, rule: Any, accumulation: int) -> None:
    """Five batches a pass, or two steps and a batch left over: stopped within a pass and at its end."""
    settings = {**rule, **saving(1), "gradient_accumulation_steps": accumulation}

    def make_stream(**changes: Any) -> Any:
        trainer = make(tmp_path, dropout=0.1, **{**settings, **changes})
        trainer.train_dataset = Stream()
        return trainer

    whole = make_stream()
    whole.train()
    expected = outcome(whole, since=0)
    for step in (1, 2, 4, 5, 6, 7):
        resumed = make_stream(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        log, *rest = outcome(resumed, since=step)
        assert (log, rest) == (expected[0][step:], list(expected[1:])), step
        assert resumed.state.epoch == whole.state.epoch


def test_a_stream_whose_run_becomes_longer_goes_on_where_it_was(tmp_path: Path) -> None:
    def make_stream(name: str, **settings: Any) -> Any:
        args = tiny.arguments(tmp_path / name, XGradTrainingArguments, lr_scheduler_type="constant", **settings)
        return XGradTrainer(model=tiny.bert(), args=args, train_dataset=Stream())

    whole = make_stream("whole", max_steps=9)
    whole.train()
    for steps in (3, 7):
        make_stream("part", max_steps=steps, **saving(steps)).train()
        longer = make_stream("longer", max_steps=9)
        longer.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{steps}"))
        assert outcome(longer, since=steps)[0] == outcome(whole, since=steps)[0]
        assert tiny.same(tiny.weights(longer.model), tiny.weights(whole.model))
