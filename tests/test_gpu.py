"""What only a GPU can show: step counts that live on the device, and that nothing waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, GPT2LMHeadModel

import tiny_models as tiny
from hf_xgrad import WeightPredictor, XGradConfig, XGradTrainer, XGradTrainingArguments
from hf_xgrad.optim import AdaM3
from inside import chosen_steps, kept_weights, predictor_of
from reference import predicted_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "adamw-capturable": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01).cuda(), capturable=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam3": lambda params: AdaM3(params, lr=0.01),
}


@pytest.mark.parametrize("steps", [2.0, "auto"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prediction_on_the_device(name: str, steps: float | str) -> None:
    """The slow twin's weights, restored bit for bit, without a single wait for the device."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).cuda()
    optimizer = OPTIMIZERS[name](model.parameters())
    predictor = WeightPredictor(optimizer, XGradConfig(steps=steps))
    for x in torch.randn(4, 16, 6).cuda():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # The first prediction allocates.
    with predictor.predicted():
        pass
    before = [p.detach().clone() for p in model.parameters()]
    expected = predicted_weights(optimizer, chosen_steps(predictor)[0] if steps == "auto" else 2.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        predictor.predict()
        moved = [p.detach().clone() for p in model.parameters()]
        predictor.restore()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(moved, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not any(torch.equal(m, w) for m, w in zip(moved, before, strict=True))


@pytest.mark.parametrize("steps", [2.0, "auto"])
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (torch.optim.RAdam, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
    ],
)
def test_capturable_optimizers_are_predicted_as_on_the_cpu(cls: Any, settings: Any, steps: float | str) -> None:
    seen = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
        optimizer = cls(model.parameters(), lr=0.01, capturable=device == "cuda", **settings)
        predictor = WeightPredictor(optimizer, XGradConfig(steps=steps))
        for x in torch.randn(12, 16, 6):
            with predictor.predicted():
                model(x.to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            predictor.predict()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        seen.append([p.detach().cpu() for p in model.parameters()])
        predictor.restore()
    for on_cpu, on_gpu in zip(*seen, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"optim": "adamw_torch"}, id="closed_form"),
        pytest.param({"optim": "adamw_torch", "xgrad_rule": "last_update", "xgrad_steps": 1.0}, id="last_update"),
        pytest.param({"optim": "paged_adamw_8bit", "xgrad_steps": 1.0}, id="paged_adamw_8bit"),
    ],
)
def test_adapters_on_a_4_bit_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    """LoRA on a quantised base, which stays bit for bit: only the adapters are predicted, and only they are kept."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    tiny.gpt2().save_pretrained(tmp_path / "base")
    quantised = GPT2LMHeadModel.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        device_map={"": 0},
    )
    base = peft.prepare_model_for_kbit_training(quantised)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"))
    names = {p: name for name, p in model.named_parameters()}
    trainable = {name for p, name in names.items() if p.requires_grad}
    first = tiny.weights(model)
    assert any(w.dtype == torch.uint8 for w in first.values())
    args = tiny.arguments(tmp_path, XGradTrainingArguments, use_cpu=False, **settings)
    trainer = XGradTrainer(model=model, args=args, train_dataset=tiny.Sentences(language_model=True))
    callback, true = tiny.recorder(model, "step_begin")
    trainer.add_callback(callback)
    kept: list[dict[str, int]] = []

    def observe(event: str, **kwargs: Any) -> None:
        if event == "step_end":
            kept.append({names[p]: copy.numel() for p, copy in kept_weights(predictor_of(trainer)).items()})

    trainer.add_callback(tiny.EveryEvent(observe))
    forwards = tiny.Forwards(model)
    trainer.train()
    for seen, (_, w) in zip(forwards.weights, true, strict=True):
        moved = {name for name in seen if not torch.equal(seen[name], w[name])}
        assert moved <= trainable
        assert all(torch.equal(seen[name], first[name]) for name in seen if name not in trainable)
    assert moved == trainable
    assert kept[-1] == {name: first[name].numel() for name in trainable}
