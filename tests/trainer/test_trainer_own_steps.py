"""A training_step of the user's own: with more passes than one, without super(), and the order of the bases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer

import tiny_models as tiny
from hf_xgrad import XGradMixin, XGradSeq2SeqTrainer, XGradTrainer, XGradTrainingArguments
from small_runs import CLOSED_FORM, LAST_UPDATE, MOMENTUM, Regression, listening, make, outcome

RULES = [
    pytest.param(CLOSED_FORM, id="closed_form"),
    pytest.param({**MOMENTUM, "xgrad_steps": 1.0}, id="momentum"),
    pytest.param(LAST_UPDATE, id="last_update"),
    pytest.param({"optim": "adagrad", "xgrad_steps": 1.0}, id="adagrad"),
    pytest.param({"optim": "adafactor", "xgrad_steps": 1.0}, id="adafactor"),
    pytest.param({**LAST_UPDATE, "xgrad_steps": "auto"}, id="last_update-auto"),
]
THREE = [RULES[0], RULES[2], RULES[4]]
OFF = [pytest.param({"xgrad": False}, id="xgrad=False"), pytest.param({"xgrad_steps": 0}, id="steps=0")]


# ---- two passes per micro-batch ----


class TwicePerBatch:
    """Mixed into a trainer: a second pass at embeddings that were moved along their gradient, by a length of 0.5."""

    disturbances: list[Tensor]

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        table = self.model.words.weight
        clean = super().training_step(model, dict(inputs), *args, **kwargs)
        before = table.detach().clone()
        disturbance = 0.5 * table.grad / table.grad.norm()
        self.disturbances = [*getattr(self, "disturbances", []), disturbance]
        self.add(table, disturbance)
        super().training_step(model, dict(inputs), *args, **kwargs)
        self.put_back(table, before)
        return clean

    @torch.no_grad()
    def add(self, table: nn.Parameter, disturbance: Tensor) -> None:
        table.add_(disturbance)

    @torch.no_grad()
    def put_back(self, table: nn.Parameter, before: Tensor) -> None:
        table.copy_(before)


class ThroughData(TwicePerBatch):
    """The same through `.data`, as FGM's own code has it: autograd's version counters do not see that."""

    def add(self, table: nn.Parameter, disturbance: Tensor) -> None:
        table.data.add_(disturbance)

    def put_back(self, table: nn.Parameter, before: Tensor) -> None:
        table.data = before


class XGradTwice(TwicePerBatch, XGradTrainer):
    pass


class XGradTwiceThroughData(ThroughData, XGradTrainer):
    pass


class PlainTwice(TwicePerBatch, Trainer):
    pass


ways = pytest.mark.parametrize(
    "twice", [pytest.param(XGradTwice, id="no_grad"), pytest.param(XGradTwiceThroughData, id="data")]
)


@ways
@pytest.mark.parametrize("rule", RULES)
def test_a_second_pass_sees_what_was_added_in_between(tmp_path: Path, rule: Any, twice: type) -> None:
    accumulation = 2
    model = Regression()
    trainer = make(tmp_path, twice, model, gradient_accumulation_steps=accumulation, **rule)
    callback, events = tiny.recorder(model)
    trainer.add_callback(callback)
    seen = tiny.Forwards(model).weights
    trainer.train()
    passes = list(zip(seen[::2], seen[1::2], trainer.disturbances, strict=True))
    assert len(passes) == 6 * accumulation
    for first, second, disturbance in passes:
        apart = second["words.weight"] - first["words.weight"]
        assert torch.allclose(apart, disturbance, rtol=0, atol=1e-6)
        assert float(apart.norm()) == pytest.approx(0.5, abs=1e-5)
        assert all(torch.equal(first[name], second[name]) for name in ("score.weight", "score.bias"))
    # The micro-batches of a window begin at the same weights.
    for begin in range(0, len(passes), accumulation):
        for first, _, _ in passes[begin : begin + accumulation]:
            assert all(torch.allclose(w, passes[begin][0][name], rtol=0, atol=1e-6) for name, w in first.items())
    # These are predicted ones, and what callbacks see is changed by the optimizer alone.
    true = [w for event, w in events if event == "step_begin"]
    predicted = [not tiny.same(first, w) for (first, _, _), w in zip(passes[::accumulation], true, strict=True)]
    # Under the last-update rule nothing is known of s before there were two updates.
    unknown = 2 if rule.get("xgrad_steps") == "auto" else 1
    assert predicted == [False] * unknown + [True] * (6 - unknown)
    assert tiny.changes(events) == {"optimizer_step"}


@pytest.mark.parametrize("rule", [CLOSED_FORM, LAST_UPDATE], ids=["closed_form", "last_update"])
@pytest.mark.parametrize("off", OFF)
def test_switched_off_two_passes_are_the_plain_trainers(tmp_path: Path, off: Any, rule: Any) -> None:
    runs = []
    for cls, settings in ((PlainTwice, {}), (XGradTwice, off)):
        trainer = make(tmp_path, cls, gradient_accumulation_steps=2, **{**rule, **settings})
        forwards = tiny.Forwards(trainer.model)
        trainer.train()
        runs.append((outcome(trainer), [[w.tolist() for w in seen.values()] for seen in forwards.weights]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("rule", RULES)
def test_two_passes_resumed_are_those_of_the_uninterrupted_run(tmp_path: Path, rule: Any) -> None:
    whole = make(tmp_path, XGradTwice, save_strategy="steps", save_steps=3, **rule)
    whole.train()
    expected = outcome(whole, 3)
    resumed = make(tmp_path, XGradTwice, **rule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert outcome(resumed, 3) == expected


# ---- a training_step that never asks ours ----


class OwnStep:
    """Mixed into a trainer: the forward and the backward, as many a tutorial writes them."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class XGradOwnStep(OwnStep, XGradTrainer):
    pass


class PlainOwnStep(OwnStep, Trainer):
    pass


THE_METHOD = re.compile(r"\btraining_step\b")


def naming_the_step(said: list[str]) -> list[str]:
    return [line for line in said if THE_METHOD.search(line)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", THREE)
def test_a_step_that_is_not_predicted_is_one_warning(tmp_path: Path, rule: Any, accumulation: int) -> None:
    trainer = make(tmp_path, XGradOwnStep, gradient_accumulation_steps=accumulation, **rule)
    heard: list[tuple[str, int, int]] = []

    def count(event: str, state: Any, **_: Any) -> None:
        heard.append((event, state.global_step, len(naming_the_step(said))))

    trainer.add_callback(tiny.EveryEvent(count))
    with listening() as said:
        trainer.train()
        once = len(naming_the_step(said))
        trainer.train()
    assert once == 1
    assert len(naming_the_step(said)) == 2, "once for each train()"
    assert said == naming_the_step(said)
    assert "XGrad" in said[0]
    assert "\n" not in said[0]
    first_run = heard[: [event for event, _, _ in heard].index("train_end") + 1]
    assert all(number == 0 for event, steps, number in first_run if event == "pre_optimizer_step" and steps == 0)
    assert all(number == 1 for event, steps, number in first_run if event == "step_begin" and steps == 1)


@pytest.mark.parametrize("rule", THREE)
def test_a_step_that_is_not_predicted_trains_as_the_plain_trainer(tmp_path: Path, rule: Any) -> None:
    runs = []
    for cls in (PlainOwnStep, XGradOwnStep):
        trainer = make(tmp_path, cls, **rule)
        trainer.train()
        log, *others = outcome(trainer)
        runs.append(([{k: v for k, v in entry.items() if not k.startswith("xgrad/")} for entry in log], others))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("off", OFF)
def test_switched_off_a_step_of_ones_own_is_no_matter(tmp_path: Path, off: Any) -> None:
    with listening() as said:
        make(tmp_path, XGradOwnStep, **{**CLOSED_FORM, **off}).train()
    assert said == []


@pytest.mark.parametrize("cls", [XGradTrainer, XGradTwice])
@pytest.mark.parametrize("rule", THREE)
def test_a_step_that_is_predicted_is_no_warning(tmp_path: Path, cls: type, rule: Any) -> None:
    with listening() as said:
        make(tmp_path, cls, **rule).train()
    assert said == []


def card(folder: Path, cls: type, **settings: Any) -> str:
    """The text of the model card of a run."""
    args = tiny.arguments(folder, XGradTrainingArguments, max_steps=3, **settings)
    trainer = cls(model=tiny.bert(), args=args, train_dataset=tiny.Sentences())
    trainer.train()
    trainer.create_model_card()
    return (folder / "README.md").read_text(encoding="utf-8")


class XGradOwnStepWithSuper(XGradTrainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs)


CLAIM = "each gradient was taken at the weights that the optimizer was heading for"


@pytest.mark.parametrize("cls", [XGradTrainer, XGradOwnStepWithSuper])
def test_the_card_of_a_run_on_predicted_weights_says_so(tmp_path: Path, cls: type) -> None:
    text = " ".join(card(tmp_path, cls, optim="adamw_torch").split())
    assert CLAIM in text
    assert not THE_METHOD.search(text)


def test_the_card_of_a_run_on_true_weights_does_not_claim_otherwise(tmp_path: Path) -> None:
    with listening():
        text = " ".join(card(tmp_path, XGradOwnStep, optim="adamw_torch").split())
    assert CLAIM not in text
    assert "Trained with [XGrad]" not in text
    # But that it was to be, and what came in between.
    assert "XGrad" in text
    assert THE_METHOD.search(text)


# ---- the order of the bases ----


class Plain:
    """Mixed into a trainer, and no trainer itself."""

    def greet(self) -> str:
        return "hello"


class SomeTrainer(Trainer):
    pass


@pytest.mark.parametrize(
    "bases",
    [
        (Trainer, XGradMixin),
        (SomeTrainer, XGradMixin),
        (Seq2SeqTrainer, XGradMixin),
        (Plain, Trainer, XGradMixin),
        (PlainOwnStep, XGradMixin),
    ],
    ids=lambda bases: "-".join(base.__name__ for base in bases),
)
def test_the_mixin_after_a_trainer_is_refused_when_the_class_is_made(bases: tuple[type, ...]) -> None:
    with pytest.raises(TypeError) as error:
        type("Last", bases, {})
    message = str(error.value)
    trainer = next(base for base in bases if issubclass(base, Trainer))
    assert "XGrad" in message
    assert "Last" in message
    # The way out: the bases in their right order.
    assert re.search(rf"XGradMixin\b.*, {trainer.__name__}\b", message), message


@pytest.mark.parametrize(
    "bases",
    [
        (XGradMixin, Trainer),
        (XGradMixin, SomeTrainer),
        (Plain, XGradMixin, SomeTrainer),
        (Plain, XGradTrainer),
        (XGradTrainer, Plain),
    ],
    ids=lambda bases: "-".join(base.__name__ for base in bases),
)
def test_the_mixin_before_the_trainers_predicts(tmp_path: Path, bases: tuple[type, ...]) -> None:
    # And so does whoever goes on from there.
    for cls in (first := type("First", bases, {}), type("Further", (first,), {})):
        trainer = make(tmp_path, cls, **CLOSED_FORM)
        seen = tiny.Forwards(trainer.model).weights
        callback, true = tiny.recorder(trainer.model, "step_begin")
        trainer.add_callback(callback)
        trainer.train()
        assert [not tiny.same(a, b) for a, (_, b) in zip(seen, true, strict=True)] == [False] + [True] * 5


def test_other_classes_with_the_mixin_can_be_made() -> None:
    type("First", (OwnStep, XGradTrainer), {})
    type("First", (XGradSeq2SeqTrainer,), {})
    type("First", (XGradMixin, Plain, Seq2SeqTrainer), {})
    # Without a trainer among its bases a class is a mixin too, and yet to be mixed into one.
    mixin = type("OurMixin", (XGradMixin,), {})
    type("First", (mixin, Trainer), {})
    with pytest.raises(TypeError, match="XGrad"):
        type("Last", (Trainer, mixin), {})
