"""Adapters of PEFT under XGradTrainer: only they move, only they are kept, and what is saved and merged is true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import tiny_models as tiny
from hf_xgrad import XGradTrainer, XGradTrainingArguments
from inside import kept_weights, predictor_of
from reference import predicted_weights

peft = pytest.importorskip("peft")

RULES = ["closed_form", "last_update"]
LINEAR = {"target_modules": ["query", "value"]}
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, **LINEAR),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **LINEAR),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=6, tinit=1, tfinal=1, **LINEAR),
    "vera": lambda: peft.VeraConfig(r=2, **LINEAR),
    "ia3": lambda: peft.IA3Config(
        target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    "saved-modules": lambda: peft.LoraConfig(r=2, modules_to_save=["classifier", "pooler"], **LINEAR),
}
METHODS = list(CONFIGS)


def adapted(name: str) -> Any:
    """The tiny BERT with adapters; they start off zero or random, so that all of them do something."""
    model = peft.get_peft_model(tiny.bert(), CONFIGS[name]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def make(folder: Path, model: nn.Module, cls: type = XGradTrainer, **settings: Any) -> Any:
    args = tiny.arguments(folder, XGradTrainingArguments, optim="adamw_torch", **settings)
    return cls(model=model, args=args, train_dataset=tiny.Sentences())


def adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_predicted_and_nothing_else_is_touched_or_kept(tmp_path: Path, name: str, rule: str) -> None:
    s = 1.5
    model = adapted(name).double()
    trainable = set(adapters(model))
    assert 0 < len(trainable) < len(list(model.parameters()))
    first = tiny.weights(model)
    buffers = {buffer: value.clone() for buffer, value in model.named_buffers()}
    trainer = make(tmp_path, model, xgrad_steps=s, xgrad_rule=rule, gradient_accumulation_steps=2, warmup_steps=2)
    seen = tiny.Forwards(model).weights
    true: list[dict[str, Tensor]] = []
    twin: list[dict[str, Tensor]] = []
    lrs: list[float] = []
    kept: list[set[str]] = []
    sizes: list[int] = []

    def observe(event: str, optimizer: Any = None, **kwargs: Any) -> None:
        names = {p: n for n, p in model.named_parameters()}
        if event == "step_begin":
            true.append(tiny.weights(model))
            lrs.append(optimizer.param_groups[0]["lr"])
            params = [p for group in optimizer.param_groups for p in group["params"]]
            twin.append({names[p]: w for p, w in zip(params, predicted_weights(optimizer.optimizer, s), strict=True)})
        elif event == "step_end":
            copies = kept_weights(predictor_of(trainer))
            kept.append({names[p] for p in copies})
            sizes.append(sum(copy.numel() for copy in copies.values()))

    trainer.add_callback(tiny.EveryEvent(observe))
    trainer.train()
    assert (len(seen), len(true)) == (12, 6)
    for t in range(6):
        assert tiny.same(seen[2 * t], seen[2 * t + 1])
        assert all(torch.equal(w, first[n]) for n, w in (seen[2 * t] | true[t]).items() if n not in trainable)
    # The learning rate is 0 in the first step.
    for t in range(2, 6):
        for n in trainable:
            w, before = true[t][n], true[t - 1][n]
            expected = twin[t][n] if rule == "closed_form" else w + s * lrs[t] / lrs[t - 1] * (w - before)
            torch.testing.assert_close(seen[2 * t][n], expected, rtol=1e-12, atol=1e-14)
            assert not torch.equal(seen[2 * t][n], w)
    # Kept is one copy of every adapter, and no more.
    assert kept[-1] == trainable
    assert sizes[-1] == max(sizes) == sum(p.numel() for p in adapters(model).values())
    assert all(torch.equal(w, first[n]) for n, w in tiny.weights(model).items() if n not in trainable)
    assert all(torch.equal(value, buffers[buffer]) for buffer, value in model.named_buffers())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", METHODS)
def test_saved_adapters_are_the_true_ones(tmp_path: Path, name: str, rule: str) -> None:
    """In every checkpoint; and what they merge to is what the trained model merges to."""
    model = adapted(name)
    trainer = make(tmp_path, model, xgrad_rule=rule, xgrad_steps=1.0, save_strategy="steps", save_steps=2)
    callback, true = tiny.recorder(model, "save")
    trainer.add_callback(callback)
    trainer.train()
    assert len(true) == 3
    for step, (_, w) in zip((2, 4, 6), true, strict=True):
        loaded = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path / f"checkpoint-{step}")
        assert tiny.same(tiny.weights(loaded), w)
    if name != "prompt":
        assert tiny.same(loaded.merge_and_unload().state_dict(), trainer.model.merge_and_unload().state_dict())


@pytest.mark.parametrize("off", [{"xgrad_steps": 0}, {"xgrad": False}], ids=["steps=0", "off"])
@pytest.mark.parametrize("name", METHODS)
def test_switched_off_is_bit_for_bit_the_plain_trainer(tmp_path: Path, name: str, off: dict[str, Any]) -> None:
    runs = []
    for cls, settings in ((Trainer, {}), (XGradTrainer, off)):
        trainer = make(tmp_path, adapted(name), cls, weight_decay=0.1, warmup_steps=2, **settings)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, tiny.weights(trainer.model), float(torch.rand(()))))
    (losses, weights, number), (our_losses, our_weights, our_number) = runs
    assert our_losses == losses
    assert tiny.same(our_weights, weights)
    assert our_number == number
