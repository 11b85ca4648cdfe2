"""Every precision that training can run in: what is predicted, what the forward computes with, what comes back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AORecipeKwargs
from accelerate.utils.ao import convert_model_to_fp8_ao
from accelerate.utils.dataclasses import FP8BackendType
from torch import Tensor, nn

import tiny_models as tiny
from hf_xgrad import WeightPredictor, XGradConfig, XGradTrainer, XGradTrainingArguments
from reference import predicted_weights

RULES = [
    pytest.param({"optim": "adamw_torch_fused"}, id="closed_form"),
    pytest.param({"optim": "adamw_torch_fused", "xgrad_rule": "last_update"}, id="last_update"),
]
NORMS_AND_HEAD = ("LayerNorm", "classifier")


def in_dtype(dtype: torch.dtype, *, but: tuple[str, ...] = ()) -> nn.Module:
    """A model of `dtype`, but for the parts named, which stay float32."""
    model = tiny.bert()
    for name, p in model.named_parameters():
        if not any(part in name for part in but):
            p.data = p.data.to(dtype)
    return model


class Run:
    """An XGradTrainer's run: at each step the true weights, the weights to expect in the forward, those it saw."""

    def __init__(self, folder: Path, model: nn.Module, *, s: float = 2.0, **settings: Any) -> None:
        args = tiny.arguments(folder, XGradTrainingArguments, xgrad_steps=s, **settings)
        self.model = model
        self.trainer: Any = XGradTrainer(model=model, args=args, train_dataset=tiny.Sentences())
        self.accumulation = args.gradient_accumulation_steps
        self.true: list[dict[str, Tensor]] = []
        self.expected: list[dict[str, Tensor]] = []
        self._lrs: list[float] = []
        self._s = s
        self._rule = args.xgrad_rule
        self.forwards = tiny.Forwards(model)
        callback, self.events = tiny.recorder(model)
        self.trainer.add_callback(callback)
        self.trainer.add_callback(tiny.EveryEvent(self._observe))

    def train(self) -> Run:
        self.trainer.train()
        return self

    def _observe(self, event: str, **_: Any) -> None:
        if event != "step_begin":
            return
        optimizer = self.trainer.optimizer.optimizer
        self.true.append(tiny.weights(self.model))
        self._lrs.append(float(optimizer.param_groups[0]["lr"]))
        if self._rule == "last_update":
            self.expected.append(self._last_update())
        else:
            names = {id(p): name for name, p in self.model.named_parameters()}
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            weights = predicted_weights(optimizer, self._s)
            self.expected.append({names[id(p)]: w for p, w in zip(stepped, weights, strict=True)})

    def _last_update(self) -> dict[str, Tensor]:
        now = {name: w.double() for name, w in self.true[-1].items()}
        if len(self.true) < 2:
            return now
        scale = self._s * self._lrs[-1] / self._lrs[-2]
        return {name: w + scale * (w - self.true[-2][name].double()) for name, w in now.items()}

    def check(self) -> None:
        """Every micro-batch saw what was to be expected, and only the optimizer has changed the true weights."""
        assert tiny.changes(self.events) == {"optimizer_step"}
        assert len(self.true) == 6
        for t, (true, expected) in enumerate(zip(self.true, self.expected, strict=True)):
            for seen in self.forwards.weights[t * self.accumulation : (t + 1) * self.accumulation]:
                for name, w in seen.items():
                    assert w.dtype == true[name].dtype
                    assert close(w, expected[name], true[name]), (t, name)
                assert tiny.same(seen, true) == (t == 0)


def close(seen: Tensor, expected: Tensor, true: Tensor) -> bool:
    """To some roundings of weights and moves of this precision."""
    limits = torch.finfo(seen.dtype)
    sizes = torch.maximum(expected.abs(), true.double().abs()).clamp_min(limits.tiny)
    error = (seen.double() - expected).abs()
    return bool((error <= limits.eps * (2 * sizes + 8 * (expected - true).abs())).all())


# ---- mixed precision ----


class Classifier:
    """What the last layer computes with under autocast, as seen from outside: its tensors forward and backward."""

    def __init__(self, model: Any) -> None:
        self.weights: list[tuple[Tensor, Tensor]] = []
        self.forwards: list[tuple[Tensor, Tensor]] = []
        self.backwards: list[tuple[Tensor, Tensor]] = []
        model.classifier.register_forward_hook(self._forward)
        model.classifier.register_full_backward_hook(self._backward)

    def _forward(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.weights.append((module.weight.detach().clone(), module.bias.detach().clone()))
        self.forwards.append((inputs[0].detach(), output.detach()))

    def _backward(self, module: Any, grad_inputs: tuple[Tensor, ...], grad_outputs: tuple[Tensor, ...]) -> None:
        self.backwards.append((grad_outputs[0], grad_inputs[0]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("open_region", [False, True])
def test_bf16_autocast_computes_with_the_predicted_weights_rounded(
    tmp_path: Path, rule: Any, accumulation: int, open_region: bool
) -> None:
    """Forward and backward, bit for bit; in a region that is left open autocast's copies of weights outlive a step."""
    run = Run(tmp_path, tiny.bert(), bf16=True, gradient_accumulation_steps=accumulation, **rule)
    layer = Classifier(run.model)
    with torch.autocast("cpu", torch.bfloat16, enabled=open_region):
        run.train()
    run.check()
    assert len(layer.weights) == len(layer.backwards) == 6 * accumulation
    for (w, b), (x, y), (grad_y, grad_x) in zip(layer.weights, layer.forwards, layer.backwards, strict=True):
        assert w.dtype == torch.float32
        low = w.bfloat16()
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, nn.functional.linear(x.bfloat16(), low, b.bfloat16()))
        assert torch.equal(grad_x, (grad_y.bfloat16() @ low).to(grad_x.dtype))
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_auto_learns_nothing_from_a_step_that_the_scaler_skips(optim: str) -> None:
    """The fused kernels are called all the same, and skip inside."""
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=optim.endswith("fused"))
    predictor = WeightPredictor(optimizer, XGradConfig(steps="auto"))
    seen, chosen = [], []
    for step, x in enumerate(torch.randn(6, 4, 6)):
        chosen.append(copy.deepcopy(predictor.state_dict()))
        with predictor.predicted():
            seen.append([p.detach().clone() for p in model.parameters()])
            scaler.scale(model(x).square().mean()).backward()
        if step == 3:
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert str(chosen[4]) == str(chosen[3])
    assert str(chosen[5]) != str(chosen[4])
    assert all(torch.equal(a, b) for a, b in zip(seen[4], seen[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[5], seen[4], strict=True))


# ---- weights that are not float32 ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(lambda: in_dtype(torch.float64), {}, id="float64"),
        pytest.param(lambda: in_dtype(torch.bfloat16), {}, id="bfloat16"),
        pytest.param(lambda: in_dtype(torch.bfloat16, but=NORMS_AND_HEAD), {"bf16": True}, id="bfloat16-and-float32"),
        pytest.param(lambda: in_dtype(torch.float16, but=NORMS_AND_HEAD), {"bf16": True}, id="float16-and-float32"),
    ],
)
@pytest.mark.filterwarnings("ignore:XGrad")
def test_weights_of_other_dtypes(tmp_path: Path, make: Callable[[], nn.Module], settings: Any, rule: Any) -> None:
    # With eps and a learning rate that float16 can hold; its kernels are not among the fused ones of the CPU.
    settings = {"adam_epsilon": 1e-3, "max_grad_norm": 0.0, **settings, **rule}
    model = make()
    if any(p.dtype == torch.float16 for p in model.parameters()):
        settings["optim"] = "adamw_torch"
    run = Run(tmp_path, model, **settings)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    run.train().check()
    assert {name: p.dtype for name, p in model.named_parameters()} == dtypes


@pytest.mark.parametrize("rule", ["closed_form", "last_update"])
@pytest.mark.filterwarnings("ignore:XGrad")
def test_weights_of_several_dtypes_in_one_group(rule: str) -> None:
    """Each is predicted as if it were alone; a weight without a gradient too, with an eps that float16 just holds."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16]
    together = [nn.Parameter(torch.linspace(-1, 1, 7).to(dtype)) for dtype in dtypes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [torch.optim.AdamW(params, lr=0.1, eps=5e-7) for params in (together, *([p] for p in alone))]
    predictors = [WeightPredictor(optimizer, XGradConfig(steps=1.5, rule=rule)) for optimizer in optimizers]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        true = [p.detach().clone() for p in together]
        for predictor in predictors:
            predictor.predict()
        assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))
        assert not step or not any(torch.equal(p, w) for p, w in zip(together, true, strict=True))
        for predictor in predictors:
            predictor.restore()
        assert all(torch.equal(p, w) for p, w in zip(together, true, strict=True))
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn(7, generator=generator).to(p.dtype)
            p.grad[0] = 0
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"learning_rate": 1e-6}, ["% of the predicted moves are smaller than the resolution of the torch.bfloat16"]),
        ({"learning_rate": 1e-2}, []),
        ({"learning_rate": 1e-2, "xgrad_rule": "last_update"}, ["last update of weights kept in torch.bfloat16"]),
    ],
)
def test_bf16_weights_are_warned_of_where_the_prediction_is_lost(
    tmp_path: Path, settings: Any, messages: list[str]
) -> None:
    run = Run(tmp_path, in_dtype(torch.bfloat16), s=1.0, lr_scheduler_type="constant", **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    texts = [str(w.message) for w in caught if "XGrad" in str(w.message)]
    assert len(texts) == len(messages)
    assert all(message in text for message, text in zip(messages, texts, strict=True))
    assert tiny.changes(run.events) == {"optimizer_step"}


# ---- fp8 ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp8_of_torchao_casts_the_predicted_weights(
    tmp_path: Path, rule: Any, accumulation: int, fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `accelerate launch --mixed_precision fp8`; the loss is that of a model that holds what was seen.

    The weights are kept in float32 and cast at each forward. The kernels run on a CPU too.
    """
    pytest.importorskip("torchao.float8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "AO")
    monkeypatch.setenv("ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER", "false")
    run = Run(tmp_path, tiny.bert(), gradient_accumulation_steps=accumulation, **rule).train()
    assert run.trainer.accelerator.fp8_backend == FP8BackendType.AO
    run.check()
    twin = tiny.bert()
    convert_model_to_fp8_ao(twin)
    assert sum(type(module).__name__ == "Float8Linear" for module in twin.modules()) == 12
    logged = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    seen = zip(run.forwards.weights, run.forwards.batches, strict=True)
    ours = []
    for weights, batch in seen:
        twin.load_state_dict(weights, strict=False)
        with torch.autocast("cpu", torch.bfloat16):
            ours.append(twin(**batch).loss.item())
    windows = [ours[i : i + accumulation] for i in range(0, len(ours), accumulation)]
    assert [sum(window) / accumulation for window in windows] == pytest.approx(logged, rel=1e-6)


def test_fp8_that_a_prediction_does_not_reach_is_refused(
    tmp_path: Path, fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MS-AMP, which needs a GPU, is only named here; Accelerate's default for torchao is the all-gather in fp8."""
    pytest.importorskip("torchao.float8")

    def make(**settings: Any) -> None:
        args = tiny.arguments(tmp_path, XGradTrainingArguments, **settings)
        XGradTrainer(model=tiny.bert(), args=args, train_dataset=tiny.Sentences())

    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "fp8_backend", property(lambda _: FP8BackendType.MSAMP))
        with pytest.raises(ValueError, match="fp8 by MS-AMP is refused"):
            make()
        make(xgrad=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "AO")
    monkeypatch.setenv("ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER", "true")
    if AORecipeKwargs().config is None:
        pytest.skip("this release of Accelerate gathers in fp8 only where it is given a recipe")
    with pytest.raises(ValueError, match="ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER=false"):
        make()
    make(xgrad=False)


# ---- tf32 ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
def test_tf32_is_for_matrices_and_not_for_the_prediction(tmp_path: Path, rule: Any) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        Run(tmp_path, tiny.bert(), tf32=True, use_cpu=False, **rule).train().check()
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
