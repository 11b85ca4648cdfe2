"""XGradTrainer on the CPU: against the plain Trainer, against a hand-written loop, and by what callbacks may see."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Trainer, TrainingArguments, default_data_collator

import tiny_models as tiny
from hf_xgrad import (
    XGradConfig,
    XGradMixin,
    XGradSeq2SeqTrainer,
    XGradSeq2SeqTrainingArguments,
    XGradTrainer,
    XGradTrainingArguments,
)
from inside import kept_weights, predictor_of, watch_comparisons
from small_runs import history

# One setting per prediction rule: what each optimizer gets under "auto".
CLOSED_FORM = {"optim": "adamw_torch"}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9"}
LAST_UPDATE = {"optim": "adafactor"}
RULES = [
    pytest.param(CLOSED_FORM, id="closed_form"),
    pytest.param({"optim": "adamw_torch", "xgrad_rule": "last_update", "xgrad_steps": 1.0}, id="last_update"),
]


def xgrad_trainer(
    folder: Path, model: nn.Module | None = None, data: Any = None, cls: type = XGradTrainer, **settings: Any
) -> Any:
    """An XGradTrainer (or `cls`) of a tiny model; `settings` are fields of XGradTrainingArguments."""
    args = tiny.arguments(folder, XGradTrainingArguments, **settings)
    return cls(model=model or tiny.bert(), args=args, train_dataset=data or tiny.Sentences())


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def random_numbers() -> tuple[float, float, float]:
    """The next number of each generator: tells whether two runs left the same random state."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-11) -> bool:
    return all(torch.allclose(a[name], b[name], rtol=rtol, atol=atol) for name in a)


def finite(model: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters())


# ---- s = 0 is the plain Trainer ----


@pytest.mark.parametrize(
    "off",
    [
        pytest.param({"xgrad_steps": 0}, id="steps=0"),
        pytest.param({"xgrad": False}, id="xgrad=False"),
    ],
)
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param({}, id="default"),
        pytest.param(CLOSED_FORM, id="adamw_torch"),
        pytest.param(MOMENTUM, id="sgd-momentum"),
        pytest.param(LAST_UPDATE, id="adafactor"),
    ],
)
def test_switched_off_is_bit_for_bit_the_plain_trainer(tmp_path: Path, optimizer: Any, off: Any) -> None:
    def run(cls: type, **settings: Any) -> tuple[Any, Any]:
        model = tiny.bert(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
        data = tiny.Sentences(20)
        trainer = xgrad_trainer(tmp_path, model, data, cls, weight_decay=0.1, warmup_steps=2, **optimizer, **settings)
        trainer.train()
        return trainer, random_numbers()

    plain, plain_random = run(Trainer)
    ours, our_random = run(XGradTrainer, **off)
    assert history(ours) == history(plain)
    assert not any(key.startswith("xgrad") for entry in history(ours) for key in entry)
    assert tiny.same(tiny.weights(ours.model), tiny.weights(plain.model))
    assert our_random == plain_random


def test_switched_off_by_config_is_bit_for_bit_the_plain_trainer(tmp_path: Path) -> None:
    runs = []
    for extra in ({}, {"xgrad_config": XGradConfig(enabled=False)}, {"xgrad_config": XGradConfig(steps=0)}):
        cls = XGradTrainer if extra else Trainer
        trainer = cls(model=tiny.bert(), args=tiny.arguments(tmp_path), train_dataset=tiny.Sentences(), **extra)
        trainer.train()
        runs.append(tiny.weights(trainer.model))
    assert tiny.same(runs[0], runs[1])
    assert tiny.same(runs[0], runs[2])


# ---- against a hand-written loop ----


def linear_schedule(base: float, warmup: int, steps: int) -> list[float]:
    """Learning rate of each step: rising from exactly 0, then falling towards 0."""
    return [base * t / warmup if t < warmup else base * (steps - t) / (steps - warmup) for t in range(steps)]


def adamw_move(state: dict[str, Tensor], lr: float, s: float) -> Tensor:
    k = float(state["step"])
    m_hat = state["exp_avg"] / (1 - 0.9**k)
    v_hat = state["exp_avg_sq"] / (1 - 0.999**k)
    return -s * lr * m_hat / (v_hat.sqrt() + 1e-8)


def momentum_move(state: dict[str, Tensor], lr: float, s: float) -> Tensor:
    return -s * lr * state["momentum_buffer"]


def by_hand(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    lrs: Iterable[float],
    *,
    move: Any,
    s: float,
    clip: float,
) -> list[dict[str, Tensor]]:
    """XGrad as the paper writes it, a parameter at a time; the weights that each forward saw.

    `move` reads a parameter's state (closed form); None repeats the last update.
    """
    seen = []
    previous: list[Tensor] | None = None
    previous_lr = 0.0
    params = list(model.parameters())
    for lr, batch in zip(lrs, batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        true = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            if move is not None and optimizer.state[p]:
                p.data = true[i] + move(optimizer.state[p], lr, s)
            elif move is None and previous is not None and previous_lr > 0:
                p.data = true[i] + s * lr / previous_lr * (true[i] - previous[i])
        seen.append(tiny.weights(model))
        model(**batch).loss.backward()
        for p, w in zip(params, true, strict=True):
            p.data = w.clone()
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        previous, previous_lr = true, lr
        optimizer.step()
        optimizer.zero_grad()
    return seen


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on biases and norms: what the Trainer does, told by shape."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def plain_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(model, 0.1), lr=0.0, eps=1e-8)


def plain_sgd(momentum: float) -> Any:
    return lambda model: torch.optim.SGD(decay_groups(model, 0.1), lr=0.0, momentum=momentum)


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("s", [1.0, 2.5])
@pytest.mark.parametrize(
    ("settings", "make_optimizer", "move"),
    [
        pytest.param(CLOSED_FORM, plain_adamw, adamw_move, id="adamw"),
        pytest.param({}, plain_adamw, adamw_move, id="adamw-default-fused"),
        pytest.param(MOMENTUM, plain_sgd(0.9), momentum_move, id="momentum"),
        pytest.param({"optim": "sgd"}, plain_sgd(0.0), None, id="sgd-last-update"),
        pytest.param({**CLOSED_FORM, "xgrad_rule": "last_update"}, plain_adamw, None, id="adamw-last-update"),
    ],
)
def test_equals_a_hand_written_loop(
    tmp_path: Path, settings: Any, make_optimizer: Any, move: Any, s: float, clip: float
) -> None:
    """In double precision, so that Adam does not blow up the rounding of gradients that are 0 but for rounding."""
    steps = 7
    model, twin = tiny.bert().double(), tiny.bert().double()
    forwards = tiny.Forwards(model)
    schedule = {"max_steps": steps, "warmup_steps": 2, "lr_scheduler_type": "linear", "weight_decay": 0.1}
    xgrad_trainer(tmp_path, model, xgrad_steps=s, max_grad_norm=clip, **schedule, **settings).train()
    seen = by_hand(
        twin, forwards.batches, make_optimizer(twin), linear_schedule(1e-2, 2, steps), move=move, s=s, clip=clip
    )
    for step, (ours, expected) in enumerate(zip(forwards.weights, seen, strict=True)):
        assert close(ours, expected), f"forward of step {step}"
    assert close(tiny.weights(model), tiny.weights(twin))


def test_adafactor_repeats_its_last_update_bit_for_bit(tmp_path: Path) -> None:
    model = tiny.bert()
    forwards = tiny.Forwards(model)
    callback, true = tiny.recorder(model, "step_begin")
    trainer = xgrad_trainer(tmp_path, model, xgrad_steps=1.5, lr_scheduler_type="constant", **LAST_UPDATE)
    trainer.add_callback(callback)
    trainer.train()
    assert tiny.same(forwards.weights[0], true[0][1])
    for t in range(1, len(true)):
        now, before = true[t][1], true[t - 1][1]
        # Rounded as the kernels round it: w + (w_hat - w), of which repeating the move gives the same.
        expected = {name: now[name] + (torch.lerp(before[name], now[name], 2.5) - now[name]) for name in now}
        assert tiny.same(forwards.weights[t], expected)
        exact = {name: now[name].double() + 1.5 * (now[name].double() - before[name].double()) for name in now}
        assert close({name: w.double() for name, w in expected.items()}, exact, rtol=1e-6, atol=1e-7)
        assert not tiny.same(now, before)


# ---- drop-in ----


class OwnStep(Trainer):
    """A trainer whose training_step has a signature of its own."""

    calls: list[tuple[Any, ...]]

    def training_step(  # type: ignore[override]
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None, *, mark: str = "none"
    ) -> Tensor:
        self.calls = [*getattr(self, "calls", []), (num_items_in_batch, mark)]
        return super().training_step(model, inputs, num_items_in_batch)


class XGradOwnStep(XGradMixin, OwnStep):
    pass


def one_step_ahead(tmp_path: Path) -> dict[str, Tensor]:
    """Weights after a run with every setting but this at its default."""
    trainer = xgrad_trainer(tmp_path, xgrad_steps=1.0)
    trainer.train()
    return tiny.weights(trainer.model)


def test_plain_training_arguments_predict_one_step_ahead(tmp_path: Path) -> None:
    trainer = XGradTrainer(model=tiny.bert(), args=tiny.arguments(tmp_path), train_dataset=tiny.Sentences())
    assert trainer.xgrad_config == XGradConfig(enabled=True, steps="default", rule="auto", weight_decay=False)
    trainer.train()
    assert tiny.same(tiny.weights(trainer.model), one_step_ahead(tmp_path))


def test_default_optimizer_is_that_of_the_plain_trainer(tmp_path: Path) -> None:
    for args in (tiny.arguments(tmp_path), tiny.arguments(tmp_path, XGradTrainingArguments)):
        assert args.optim == "adamw_torch_fused"
        trainer = XGradTrainer(model=tiny.bert(), args=args, train_dataset=tiny.Sentences())
        forwards = tiny.Forwards(trainer.model)
        callback, true = tiny.recorder(trainer.model, "step_begin")
        trainer.add_callback(callback)
        trainer.train()
        assert trainer.optimizer.param_groups[0]["fused"]
        assert [tiny.same(a, b) for a, (_, b) in zip(forwards.weights, true, strict=True)] == [True] + [False] * 5


def test_xgrad_config_works_with_plain_arguments_and_wins_over_fields(tmp_path: Path) -> None:
    config = XGradConfig(steps=3.0, rule="last_update")
    expected = xgrad_trainer(tmp_path, xgrad_steps=3.0, xgrad_rule="last_update")
    expected.train()
    for cls, settings in ((TrainingArguments, {}), (XGradTrainingArguments, {"xgrad": False, "xgrad_steps": 0.5})):
        trainer = XGradTrainer(
            model=tiny.bert(),
            args=tiny.arguments(tmp_path, cls, **settings),
            train_dataset=tiny.Sentences(),
            xgrad_config=config,
        )
        trainer.train()
        assert trainer.xgrad_config is config
        assert tiny.same(tiny.weights(trainer.model), tiny.weights(expected.model))
    assert not tiny.same(tiny.weights(expected.model), one_step_ahead(tmp_path))


def test_weight_decay_setting_reaches_the_prediction(tmp_path: Path) -> None:
    """With decay in the prediction, matrices move by - lr * wd * w more; biases and norms, without decay, do not."""
    moves = []
    for decay in (False, True):
        model = tiny.bert().double()
        forwards = tiny.Forwards(model)
        callback, true = tiny.recorder(model, "step_begin")
        trainer = xgrad_trainer(
            tmp_path, model, max_steps=2, weight_decay=0.1, lr_scheduler_type="constant", xgrad_weight_decay=decay
        )
        trainer.add_callback(callback)
        trainer.train()
        moves.append({name: w - true[1][1][name] for name, w in forwards.weights[1].items()})
    for name, w in true[1][1].items():
        decay_share = 1e-2 * 0.1 if w.ndim >= 2 else 0.0
        assert torch.allclose(moves[1][name], moves[0][name] - decay_share * w, rtol=1e-9, atol=1e-12), name


def test_mixin_keeps_a_trainers_own_training_step(tmp_path: Path) -> None:
    trainer = xgrad_trainer(tmp_path, cls=XGradOwnStep)
    trainer.train()
    assert len(trainer.calls) == 6
    assert {mark for _, mark in trainer.calls} == {"none"}
    assert tiny.same(tiny.weights(trainer.model), one_step_ahead(tmp_path))
    batch = default_data_collator([tiny.Sentences()[0]])
    trainer.training_step(trainer.model, batch, 5, mark="passed on")
    assert trainer.calls[-1] == (5, "passed on")


# ---- callbacks, evaluation and checkpoints see the true weights ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_callback_ever_sees_predicted_weights(tmp_path: Path, rule: Any, accumulation: int) -> None:
    model = tiny.bert()
    callback, seen = tiny.recorder(model)
    trainer = XGradTrainer(
        model=model,
        args=tiny.arguments(
            tmp_path,
            XGradTrainingArguments,
            gradient_accumulation_steps=accumulation,
            max_steps=9,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=3,
            **rule,
        ),
        train_dataset=tiny.Sentences(28),
        eval_dataset=tiny.Sentences(8, seed=1),
        callbacks=[callback],
    )
    forwards = tiny.Forwards(model)
    trainer.train()
    trainer.predict(tiny.Sentences(8))
    events = [event for event, _ in seen]
    unseen = {event.removeprefix("on_") for event in tiny.EveryEvent.EVENTS} - set(events)
    assert unseen <= {"substep_end", "push_begin"}
    assert ("substep_end" in events) == (accumulation == 2)
    assert tiny.changes(seen) == {"optimizer_step"}
    # Meanwhile the forwards saw other weights: none but the first window saw weights that any callback saw.
    ever = [w for _, w in seen]
    predicted = [not any(tiny.same(w, true) for true in ever) for w in forwards.weights]
    assert predicted == [False] * accumulation + [True] * (len(predicted) - accumulation)


@pytest.mark.parametrize("rule", RULES)
def test_evaluation_and_checkpoints_have_the_true_weights(tmp_path: Path, rule: Any) -> None:
    model = tiny.bert()
    evaluation = tiny.Sentences(8, seed=1)
    evaluated: list[tuple[float, dict[str, Tensor]]] = []
    saved: dict[int, dict[str, Tensor]] = {}

    def observe(event: str, state: Any, metrics: Any = None, **kwargs: Any) -> None:
        if event == "evaluate":
            evaluated.append((metrics["eval_loss"], tiny.weights(model)))
        elif event == "save":
            saved[state.global_step] = tiny.weights(model)

    args = tiny.arguments(
        tmp_path,
        XGradTrainingArguments,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
        **rule,
    )
    trainer = XGradTrainer(
        model=model,
        args=args,
        train_dataset=tiny.Sentences(),
        eval_dataset=evaluation,
        callbacks=[tiny.EveryEvent(observe)],
    )
    trainer.train()
    assert len(evaluated) == 3
    twin = tiny.bert()
    judge = Trainer(model=twin, args=tiny.arguments(tmp_path), eval_dataset=evaluation)
    for loss, true in evaluated:
        twin.load_state_dict(true, strict=False)
        assert judge.evaluate()["eval_loss"] == loss
    assert sorted(saved) == [3, 6]
    for step, true in saved.items():
        assert tiny.same(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"), true)
    trainer.save_model(str(tmp_path / "final"))
    assert tiny.same(load_file(tmp_path / "final" / "model.safetensors"), tiny.weights(model))


# ---- gradient accumulation ----


@pytest.mark.parametrize("rule", RULES)
def test_micro_batches_of_one_window_see_the_same_weights(tmp_path: Path, rule: Any) -> None:
    """28 samples in batches of 4 make 7 micro-batches: windows of 2, 2, 2 and a short one of 1."""
    model = tiny.bert()
    forwards = tiny.Forwards(model)
    callback, true = tiny.recorder(model, "step_begin")
    trainer = xgrad_trainer(
        tmp_path, model, tiny.Sentences(28), max_steps=8, gradient_accumulation_steps=2, warmup_steps=2, **rule
    )
    trainer.add_callback(callback)
    trainer.train()
    assert len(forwards.weights) == 14
    seen = iter(forwards.weights)
    windows = [[next(seen) for _ in range(size)] for size in (2, 2, 2, 1) * 2]
    assert all(tiny.same(window[0], other) for window in windows for other in window)
    assert not any(tiny.same(a[0], b[0]) for a, b in itertools.pairwise(windows[1:]))
    # The first step has lr 0 and no state; from then on AdamW knows where it is heading, and the last update (of a
    # step that did move) a step later.
    first = 2 if "xgrad_rule" in rule else 1
    moved = [not tiny.same(window[0], w) for window, (_, w) in zip(windows, true, strict=True)]
    assert moved == [False] * first + [True] * (8 - first)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model_name", ["bert", "gpt2"])
def test_accumulation_equals_one_large_batch(tmp_path: Path, rule: Any, model_name: str) -> None:
    """`gpt2` has its loss divided by num_items_in_batch, `bert` by the accumulation steps."""
    finals = []
    logged = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        model = getattr(tiny, model_name)().double()
        trainer = xgrad_trainer(
            tmp_path,
            model,
            tiny.Sentences(language_model=model_name == "gpt2"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            warmup_steps=2,
            **rule,
        )
        trainer.train()
        finals.append(tiny.weights(model))
        logged.append(losses(trainer))
    for other, other_losses in zip(finals[1:], logged[1:], strict=True):
        assert close(finals[0], other, rtol=1e-6, atol=1e-8)
        assert other_losses == pytest.approx(logged[0], rel=1e-5)


# ---- nothing but the weights' values differs from the plain Trainer ----


@pytest.mark.parametrize(
    "optimizer", [pytest.param({}, id="default"), *RULES, MOMENTUM, LAST_UPDATE, {"optim": "sgd"}], ids=str
)
def test_optimizer_looks_like_the_plain_trainers(tmp_path: Path, optimizer: Any) -> None:
    plain = xgrad_trainer(tmp_path, cls=Trainer, **optimizer)
    ours = xgrad_trainer(tmp_path, **optimizer)
    plain.train()
    ours.train()
    assert type(ours.optimizer) is type(plain.optimizer)
    assert type(ours.optimizer.optimizer) is type(plain.optimizer.optimizer)
    assert type(ours.lr_scheduler) is type(plain.lr_scheduler)

    def outline(state_dict: dict[str, Any]) -> Any:
        """The state with shapes and types in place of tensors, and the groups with their settings."""
        state = {
            index: {
                key: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)
                for key, value in entries.items()
            }
            for index, entries in state_dict["state"].items()
        }
        return state, state_dict["param_groups"]

    assert outline(ours.optimizer.state_dict()) == outline(plain.optimizer.state_dict())


@pytest.mark.parametrize("rule", RULES)
def test_storages_stay_in_place_and_ties_stay_tied(tmp_path: Path, rule: Any) -> None:
    model = tiny.gpt2()
    tied = model.transformer.wte.weight
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    where: list[dict[str, int]] = []

    def look(*_: Any) -> None:
        assert model.lm_head.weight is model.transformer.wte.weight is tied
        where.append({name: p.data_ptr() for name, p in model.named_parameters()})

    model.register_forward_pre_hook(look)
    trainer = xgrad_trainer(tmp_path, model, tiny.Sentences(language_model=True), **rule)
    trainer.add_callback(tiny.EveryEvent(lambda event, **kwargs: look()))
    trainer.train()
    assert len(where) > 20
    assert all(found == pointers for found in where)
    assert model.lm_head.weight.data_ptr() == tied.data_ptr()


@pytest.mark.parametrize("rule", RULES)
def test_frozen_weights_are_not_touched(tmp_path: Path, rule: Any) -> None:
    model = tiny.bert()
    frozen = [*model.bert.embeddings.parameters(), *model.bert.encoder.layer[0].parameters()]
    for p in frozen:
        p.requires_grad_(False)
    names = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = tiny.weights(model)
    versions = [p._version for p in frozen]
    forwards = tiny.Forwards(model)
    trainer = xgrad_trainer(tmp_path, model, **rule)
    callback, true = tiny.recorder(model, "step_begin")
    trainer.add_callback(callback)
    sizes: list[int] = []
    trainer.add_callback(tiny.EveryEvent(lambda event, **_: sizes.append(kept_elements(trainer))))
    trainer.train()
    # Not even written to with their own values: torch counts every write.
    assert [p._version for p in frozen] == versions
    for seen, (_, w) in zip(forwards.weights, true, strict=True):
        assert all(torch.equal(seen[name], before[name]) for name in names)
        assert all(torch.equal(w[name], before[name]) for name in names)
    assert not tiny.same(forwards.weights[-1], true[-1][1])
    assert max(sizes) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("rule", RULES)
def test_weights_frozen_on_the_way_stand_still(tmp_path: Path, rule: Any) -> None:
    """Their optimizer state stays, and says where they were heading; but they are not heading anywhere any more."""
    model = tiny.bert()
    forwards = tiny.Forwards(model)
    callback, true = tiny.recorder(model, "step_begin")

    def freeze(event: str, state: Any, **_: Any) -> None:
        if event == "step_begin" and state.global_step == 3:
            model.bert.embeddings.requires_grad_(False)

    trainer = xgrad_trainer(tmp_path, model, **rule)
    trainer.add_callback(callback)
    trainer.add_callback(tiny.EveryEvent(freeze))
    trainer.train()
    name = "bert.embeddings.word_embeddings.weight"
    moved = [not torch.equal(seen[name], w[name]) for seen, (_, w) in zip(forwards.weights, true, strict=True)]
    assert moved == [False, True, True, False, False, False]
    assert not tiny.same(forwards.weights[-1], true[-1][1])


def kept_elements(trainer: Any) -> int:
    """Elements of all copies of weights that the trainer's predictor holds."""
    return sum(kept.numel() for kept in kept_weights(predictor_of(trainer)).values())


# ---- precision, checkpointing, compilation ----


@pytest.mark.parametrize("rule", RULES)
def test_bf16_autocast(tmp_path: Path, rule: Any) -> None:
    model = tiny.bert()
    forwards = tiny.Forwards(model)
    callback, seen = tiny.recorder(model)
    inner: list[torch.dtype] = []
    model.classifier.register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    trainer = xgrad_trainer(tmp_path, model, bf16=True, gradient_accumulation_steps=2, **rule)
    trainer.add_callback(callback)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing to warn of: the weights are float32
        trainer.train()
    assert set(inner) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tiny.changes(seen) == {"optimizer_step"}
    true = [w for event, w in seen if event == "step_begin"]
    assert not any(tiny.same(forwards.weights[2 * t], true[t]) for t in range(1, 6))
    assert finite(model)


@pytest.mark.parametrize("whose", ["trainer", "user"])
def test_bf16_autocast_computes_with_the_predicted_weights(tmp_path: Path, whose: str) -> None:
    """The loss of a step is that of a model which holds the weights that the forward hook saw.

    Autocast caches low-precision copies of weights until its outermost context ends: under the `user`'s own, that is
    after the whole training.
    """
    model = tiny.bert()
    forwards = tiny.Forwards(model)
    trainer = xgrad_trainer(tmp_path, model, bf16=whose == "trainer", xgrad_steps=3.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=whose == "user"):
        trainer.train()
    twin = tiny.bert()
    for logged, seen, batch in zip(losses(trainer), forwards.weights, forwards.batches, strict=True):
        twin.load_state_dict(seen, strict=False)
        with torch.autocast("cpu", torch.bfloat16):
            assert twin(**batch).loss.item() == pytest.approx(logged, rel=1e-6)


def test_bf16_autocast_switched_off_equals_plain(tmp_path: Path) -> None:
    plain = xgrad_trainer(tmp_path, cls=Trainer, bf16=True)
    ours = xgrad_trainer(tmp_path, bf16=True, xgrad_steps=0)
    plain.train()
    ours.train()
    assert history(ours) == history(plain)
    assert tiny.same(tiny.weights(ours.model), tiny.weights(plain.model))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path: Path, rule: Any, reentrant: bool) -> None:
    """The recomputed forward, inside backward, must see the predicted weights too; dropout is on."""
    # Before it became "activation checkpointing", Transformers called it this.
    new, old = "activation_checkpointing", "gradient_checkpointing"
    name = new if new in TrainingArguments.__dataclass_fields__ else old
    finals = []
    for checkpointing in (False, True):
        model = tiny.bert(hidden_dropout_prob=0.1)
        layers: list[Tensor] = []
        weight = model.bert.encoder.layer[0].output.dense.weight
        model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(
            lambda module, inputs, layers=layers, weight=weight: layers.append(weight.detach().clone())
        )
        trainer = xgrad_trainer(
            tmp_path,
            model,
            **{name: checkpointing, f"{name}_kwargs": {"use_reentrant": reentrant} if checkpointing else None},
            **rule,
        )
        trainer.train()
        finals.append(tiny.weights(model))
    assert len(layers) == 12, "every layer is run again inside backward"
    assert all(torch.equal(layers[2 * t], layers[2 * t + 1]) for t in range(6))
    assert tiny.same(*finals)


@pytest.mark.parametrize("rule", RULES)
def test_torch_compile_changes_nothing(tmp_path: Path, rule: Any) -> None:
    finals = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny.bert(num_hidden_layers=1).double()
        settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = xgrad_trainer(tmp_path, model, **settings, **rule)
        trainer.train()
        finals.append(tiny.weights(model))
        assert isinstance(trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule) == compiled
    assert close(*finals, rtol=1e-7, atol=1e-9)


# ---- the Trainer's other ways to train ----


@pytest.mark.parametrize("rule", RULES)
def test_best_model_and_early_stopping(tmp_path: Path, rule: Any) -> None:
    evaluated: dict[int, tuple[float, dict[str, Tensor]]] = {}
    model = tiny.bert()

    def observe(event: str, state: Any, metrics: Any = None, **kwargs: Any) -> None:
        if event == "evaluate" and state.global_step not in evaluated:
            evaluated[state.global_step] = metrics["eval_loss"], tiny.weights(model)

    trainer = XGradTrainer(
        model=model,
        args=tiny.arguments(
            tmp_path,
            XGradTrainingArguments,
            max_steps=60,
            learning_rate=0.3,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            **rule,
        ),
        train_dataset=tiny.Sentences(),
        eval_dataset=tiny.Sentences(8, seed=1),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), tiny.EveryEvent(observe)],
    )
    trainer.train()
    assert trainer.state.global_step < 60
    best = min(evaluated, key=lambda step: evaluated[step][0])
    assert trainer.state.best_global_step == best
    assert tiny.same(tiny.weights(model), evaluated[best][1])
    assert trainer.evaluate()["eval_loss"] == evaluated[best][0]


@pytest.mark.parametrize("rule", RULES)
def test_model_init_gives_equal_runs(tmp_path: Path, rule: Any) -> None:
    args = tiny.arguments(tmp_path, XGradTrainingArguments, **rule)
    trainer = XGradTrainer(model_init=lambda: tiny.bert(), args=args, train_dataset=tiny.Sentences())
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append((tiny.weights(trainer.model), history(trainer)))
    assert tiny.same(runs[0][0], runs[1][0])
    assert [e.get("loss") for e in runs[0][1]] == [e.get("loss") for e in runs[1][1]]
    assert [e.get("xgrad/cosine") for e in runs[0][1]] == [e.get("xgrad/cosine") for e in runs[1][1]]


@pytest.mark.parametrize("rule", RULES)
def test_steps_by_hand_before_train_leave_nothing_behind(tmp_path: Path, rule: Any) -> None:
    """train() with model_init makes a new model and optimizer: what was predicted for the old ones is over."""
    forwards: list[tiny.Forwards] = []

    def model_init() -> nn.Module:
        model = tiny.bert()
        forwards.append(tiny.Forwards(model))
        return model

    args = tiny.arguments(tmp_path, XGradTrainingArguments, **rule)
    trainer = XGradTrainer(model_init=model_init, args=args, train_dataset=tiny.Sentences())
    runs = []
    for by_hand in (0, 3):
        for _ in range(by_hand):
            trainer.training_step(trainer.model, default_data_collator([tiny.Sentences()[0]]))
            trainer.optimizer.step()
        trainer.train()
        runs.append([*forwards[-1].weights, tiny.weights(trainer.model)])
    assert all(tiny.same(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("change_weights", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_second_train_goes_on_from_the_optimizers_state(tmp_path: Path, rule: Any, change_weights: bool) -> None:
    """A second train() keeps the optimizer, as the plain Trainer does, but never repeats an update of before."""
    model = tiny.bert()
    trainer = xgrad_trainer(tmp_path, model, max_steps=3, lr_scheduler_type="constant", **rule)
    trainer.train()
    if change_weights:
        model.load_state_dict(tiny.bert(initializer_range=0.5).state_dict())
    forwards = tiny.Forwards(model)
    callback, true = tiny.recorder(model, "step_begin")
    trainer.add_callback(callback)
    trainer.train()
    moved = [not tiny.same(seen, w) for seen, (_, w) in zip(forwards.weights, true, strict=True)]
    assert moved == [rule == CLOSED_FORM, True, True]
    assert finite(model)


@pytest.mark.parametrize("rule", ["closed_form", "last_update"])
@pytest.mark.parametrize("start", [1, 1.0, "auto", "default"], ids=repr)
def test_hyperparameter_search_over_steps(tmp_path: Path, start: Any, rule: str) -> None:
    """Each trial predicts its own number of steps ahead: told by the moves, not by a setting.

    At the first prediction "auto" is 1 under a closed form, and 0 under the last-update rule. What the field was
    before does not matter.
    """
    ratios: list[float] = []
    steps: list[Any] = [0.5, 3.0, "auto"]

    def model_init() -> nn.Module:
        model = tiny.bert().double()
        forwards = tiny.Forwards(model)
        callback, true = tiny.recorder(model, "step_begin")

        def observe(event: str, state: Any, **kwargs: Any) -> None:
            if event == "train_end" and len(true) == 3:
                name = "classifier.weight"
                w0, w1 = true[0][1][name], true[1][1][name]
                ratios.append(float((forwards.weights[1][name] - w1).norm() / (w1 - w0).norm()))

        current[:] = [callback, tiny.EveryEvent(observe)]
        return model

    # The search makes a model per trial, but has one list of callbacks: this one passes every event on to those of
    # the model that was made last.
    current: list[Any] = []
    relay = tiny.EveryEvent(
        lambda event, args, state, control, **kwargs: [
            callback._on(f"on_{event}", args, state, control, **kwargs) for callback in current
        ]
    )
    trainer = XGradTrainer(
        model_init=model_init,
        args=tiny.arguments(
            tmp_path,
            XGradTrainingArguments,
            max_steps=3,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_epsilon=1e-12,
            xgrad_rule=rule,
            xgrad_steps=start,
        ),
        train_dataset=tiny.Sentences(),
        eval_dataset=tiny.Sentences(8, seed=1),
        callbacks=[relay],
    )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"xgrad_steps": trial.suggest_categorical("xgrad_steps", steps)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=3,
        direction="minimize",
        sampler=optuna.samplers.GridSampler({"xgrad_steps": steps}, seed=0),
    )
    assert sorted(ratios) == pytest.approx(sorted([0.5, 3.0, 1.0 if rule == "closed_form" else 0.0]), rel=1e-6)
    assert best.hyperparameters["xgrad_steps"] in steps


# ---- diagnostics ----


def diagnostics_by_hand(
    seen: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]
) -> tuple[float, float, float]:
    """`active`, `relative_norm` and `cosine` from the weights that the forward saw and those around the step."""

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([t.flatten().double() for t in tensors])

    move = flat(seen[name] - before[name] for name in seen)
    update = flat(after[name] - before[name] for name in seen)
    cosine = (
        float(torch.dot(move, update) / (move.norm() * update.norm())) if move.any() and update.any() else math.nan
    )
    return float(move.any()), float(move.norm() / flat(before.values()).norm()), cosine


LOGGING = [
    pytest.param({"logging_steps": 2}, [2, 4, 6, 8], id="every-2"),
    pytest.param({"logging_steps": 3, "logging_first_step": True}, [1, 3, 6], id="first-and-every-3"),
    pytest.param({"logging_strategy": "epoch"}, [4, 8], id="epoch"),
    pytest.param({"logging_strategy": "epoch", "max_steps": 6}, [4, 6], id="epoch-cut-short"),
    pytest.param({"logging_steps": 0.25}, [2, 4, 6, 8], id="share-of-all"),
    pytest.param({"logging_strategy": "no"}, [], id="never"),
]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("logging", "expected_steps"), LOGGING)
def test_diagnostics(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: Any,
    logging: Any,
    expected_steps: list[int],
    accumulation: int,
) -> None:
    """At logging steps only: the values, by hand; and on no other step is anything computed."""
    calls: list[int] = []
    step = [0]
    watch_comparisons(monkeypatch, lambda: calls.append(step[0]))
    model = tiny.bert()
    forwards = tiny.Forwards(model)
    begin, befores = tiny.recorder(model, "step_begin")
    end, afters = tiny.recorder(model, "step_end")
    settings = {"max_steps": 8, "gradient_accumulation_steps": accumulation, "warmup_steps": 2, **logging}
    # 4 steps an epoch.
    trainer = xgrad_trainer(tmp_path, model, tiny.Sentences(16 * accumulation), **settings, **rule)
    trainer.add_callback(begin)
    trainer.add_callback(end)
    trainer.add_callback(tiny.EveryEvent(lambda event, state, **_: step.__setitem__(0, state.global_step + 1)))
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert sorted(logged) == expected_steps
    assert all("xgrad/active" not in entry for entry in trainer.state.log_history if "loss" not in entry)
    assert set(calls) == {t for t in expected_steps if logged[t]["xgrad/active"]}
    for t, entry in logged.items():
        active, relative_norm, cosine = diagnostics_by_hand(
            forwards.weights[(t - 1) * accumulation], befores[t - 1][1], afters[t - 1][1]
        )
        assert entry["xgrad/active"] == active
        # The last update is nothing before a step with lr > 0; both rules know nothing at step 1.
        assert active == float(t > (2 if "xgrad_rule" in rule else 1))
        assert entry["xgrad/relative_norm"] == pytest.approx(relative_norm, rel=1e-3)
        if active:
            assert entry["xgrad/cosine"] == pytest.approx(cosine, abs=1e-3)
        else:
            assert "xgrad/cosine" not in entry
    json.dumps(trainer.state.log_history)


def test_log_tells_the_steps_that_were_chosen(tmp_path: Path) -> None:
    """A mean over the groups (matrices decay, the rest does not); and each, only where they are chosen."""
    for steps, names in (("auto", {"xgrad/steps", "xgrad/steps_0", "xgrad/steps_1"}), (2.0, {"xgrad/steps"})):
        trainer = xgrad_trainer(tmp_path, tiny.bert(), tiny.Sentences(16), max_steps=6, xgrad_steps=steps)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(entries) == 6
        assert all({name for name in entry if name.startswith("xgrad/steps")} == names for entry in entries)
        if steps == 2.0:
            assert {entry["xgrad/steps"] for entry in entries} == {2.0}
        else:
            assert entries[0]["xgrad/steps"] == 1.0
            assert len({entry["xgrad/steps"] for entry in entries}) > 3
            assert all(math.isfinite(entry[name]) and entry[name] >= 0 for entry in entries for name in names)
        json.dumps(trainer.state.log_history)


@pytest.mark.parametrize("rule", RULES)
def test_diagnostics_are_inactive_where_the_learning_rate_is_zero(tmp_path: Path, rule: Any) -> None:
    """A whole period of a cosine: the learning rate is 0 in the middle of the run, and rises again."""
    trainer = xgrad_trainer(
        tmp_path,
        max_steps=6,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 0.0, "num_cycles": 1.0},
        **rule,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    lrs = [entry["learning_rate"] for entry in steps]
    assert lrs[3] == 0
    assert min(lrs[4:]) > 0
    # A step with lr 0 leaves no update to repeat, but for Adam it is a step like any other.
    expected = [False, True, True, False, rule == CLOSED_FORM, True]
    assert [entry["xgrad/active"] for entry in steps] == expected


# ---- sequence to sequence ----


class Pairs(tiny.Sentences):
    """The target of a sentence is the sentence."""

    def __init__(self, size: int = 32, seed: int = 0) -> None:
        super().__init__(size, seed, language_model=True)


@pytest.mark.parametrize("rule", RULES)
def test_seq2seq_generates_with_the_true_weights(tmp_path: Path, rule: Any) -> None:
    model = tiny.t5()
    evaluation = Pairs(8, seed=1)
    generated: list[tuple[np.ndarray, dict[str, Tensor]]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        generated.append((prediction.predictions, tiny.weights(model)))
        return {}

    settings = {"predict_with_generate": True, "generation_max_length": 6, "learning_rate": 0.05}
    args = tiny.arguments(
        tmp_path, XGradSeq2SeqTrainingArguments, eval_strategy="steps", eval_steps=2, **settings, **rule
    )
    forwards = tiny.Forwards(model)
    callback, seen = tiny.recorder(model)
    trainer = XGradSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=Pairs(),
        eval_dataset=evaluation,
        compute_metrics=compute_metrics,
        callbacks=[callback],
    )
    trainer.train()
    true = [w for event, w in seen if event == "step_begin"]
    moved = [not tiny.same(a, b) for a, b in zip(forwards.weights, true, strict=True)]
    assert moved == [False] + [True] * 5
    assert tiny.changes(seen) == {"optimizer_step"}
    assert len(generated) == 3
    twin = tiny.t5()
    judge = Seq2SeqTrainer(
        model=twin,
        args=args,
        eval_dataset=evaluation,
        compute_metrics=lambda prediction: judged.append(prediction.predictions) or {},
    )
    for predictions, w in generated:
        judged: list[np.ndarray] = []
        twin.load_state_dict(w, strict=False)
        judge.evaluate()
        assert np.array_equal(judged[0], predictions)
