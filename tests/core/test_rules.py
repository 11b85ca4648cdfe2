"""Rules against the slow twin, against the optimizer's own last update, and at their edges."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from few_weights import SHAPES, predict, take_steps
from hf_xgrad import WeightPredictor, XGradConfig, register_rule
from hf_xgrad.closed_forms.formulas import adaptive_direction, bias_corrections, state_steps
from hf_xgrad.core.rules import Direction, closed_form_of, last_update_scale
from hf_xgrad.optim import AdaM3
from reference import adam3_trajectory, predicted_weights


def adabelief(params: Any, **settings: Any) -> torch.optim.Optimizer:
    module = pytest.importorskip("pytorch_optimizer", reason="AdaBelief is an optional extra")
    return module.AdaBelief(params, **settings)


# name -> (maker, settings); weight decay is off where the last update is compared, and on in its own test.
CLOSED_FORMS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd-dampening": (torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}),
    "sgd-l2": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "sgd-foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "sgd-fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "sgd-maximize": (torch.optim.SGD, {"momentum": 0.9, "maximize": True}),
    "sgd-fused-maximize": (torch.optim.SGD, {"momentum": 0.9, "maximize": True, "fused": True}),
    "adam": (torch.optim.Adam, {}),
    "adam-l2": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adam-amsgrad": (torch.optim.Adam, {"amsgrad": True, "betas": (0.5, 0.6)}),
    "adam-maximize": (torch.optim.Adam, {"maximize": True}),
    "adam-fused": (torch.optim.Adam, {"fused": True}),
    "adam-foreach": (torch.optim.Adam, {"foreach": True}),
    "adam-tensor-lr": (torch.optim.Adam, {"lr": torch.tensor(1e-2, dtype=torch.float64), "foreach": False}),
    "adam-no-first-moment": (torch.optim.Adam, {"betas": (0.0, 0.9)}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.0}),
    "adamw-large-eps": (torch.optim.AdamW, {"weight_decay": 0.0, "eps": 0.1}),
    "adamw-fused-amsgrad": (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True, "amsgrad": True}),
    "adamw-fused-maximize": (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True, "maximize": True}),
    "adabelief": (adabelief, {}),
    "adabelief-ams": (adabelief, {"ams_bound": True, "betas": (0.5, 0.6)}),
    "adabelief-one-by-one": (adabelief, {"foreach": False}),
    "adabelief-l2": (adabelief, {"weight_decouple": False, "weight_decay": 0.1}),
    "adam3": (AdaM3, {}),
    "adam3-one-by-one": (AdaM3, {"foreach": False}),
    "adam3-maximize": (AdaM3, {"maximize": True}),
    "adam3-large-eps": (AdaM3, {"eps": 1e-2}),
}


def make(
    name: str, dtype: torch.dtype = torch.float64, **overrides: Any
) -> tuple[list[Tensor], torch.optim.Optimizer]:
    maker, settings = CLOSED_FORMS[name]
    torch.manual_seed(0)
    params: list[Tensor] = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    return params, maker(params, **{"lr": 1e-2, **settings, **overrides})


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("steps", [1, 3])
def test_closed_form_is_that_of_the_slow_twin(name: str, steps: int) -> None:
    params, optimizer = make(name)
    take_steps(params, optimizer, steps)
    for s in (1.0, 2.5):
        expected = predicted_weights(optimizer, s)
        for got, want in zip(predict(optimizer, params, steps=s, rule="closed_form"), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_is_the_last_update_once_more(name: str) -> None:
    params, optimizer = make(name)
    take_steps(params, optimizer, 4)
    before = [p.detach().clone() for p in params]
    take_steps(params, optimizer, 1, seed=2)
    updates = [p.detach() - w for p, w in zip(params, before, strict=True)]
    assert all(bool((u != 0).all()) for u in updates)
    for got, p, update in zip(predict(optimizer, params), params, updates, strict=True):
        torch.testing.assert_close(got - p.detach(), update, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_both_rules_agree_under_a_changing_learning_rate(name: str) -> None:
    """The last-update rule rescales the last update to the coming learning rate, as the closed form does by itself."""
    params, optimizer = make(name)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="last_update"))
    take_steps(params, optimizer, 3)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.3
    with predictor.predicted():
        repeated = [p.detach().clone() for p in params]
    for got, want in zip(repeated, predict(optimizer, params, rule="closed_form"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adabelief", "adam3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_the_slow_twin(name: str, dtype: torch.dtype) -> None:
    params, optimizer = make(name, dtype)
    take_steps(params, optimizer, 3)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for got, want in zip(predict(optimizer, params, steps=10.0), predicted_weights(optimizer, 10.0), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("maker", [torch.optim.SGD, torch.optim.AdamW, AdaM3])
def test_each_group_has_its_own_settings(maker: Callable[..., torch.optim.Optimizer]) -> None:
    params = [nn.Parameter(torch.full((3,), float(i + 1), dtype=torch.float64)) for i in range(3)]
    if maker is torch.optim.SGD:
        settings: list[dict[str, Any]] = [{"momentum": 0.9}, {"momentum": 0.5, "lr": 0.3}, {"momentum": 0.1}]
    else:
        settings = [{"betas": (0.9, 0.99)}, {"betas": (0.5, 0.7), "lr": 0.3}, {"eps": 0.5}]
    optimizer = maker([{"params": [p], **own} for p, own in zip(params, settings, strict=True)], lr=0.1)
    take_steps(list(params), optimizer, 3)
    moved = predict(optimizer, list(params), steps=2.0)
    for got, want in zip(moved, predicted_weights(optimizer, 2.0), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_parameters_have_their_own_step_counts() -> None:
    """A weight that gets no gradient in some steps is bias-corrected by its own count."""
    params, optimizer = make("adamw")
    take_steps(params, optimizer, 2)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.zero_grad()
    assert {float(optimizer.state[p]["step"]) for p in params} == {2.0, 3.0}
    for got, want in zip(predict(optimizer, params), predicted_weights(optimizer, 1.0), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["int", "float", "vector"])
def test_steps_of_any_kind_give_the_same_direction(kind: str) -> None:
    params, optimizer = make("adamw")
    take_steps(params, optimizer, 3)
    expected = predict(optimizer, params)
    for p in params:
        step = optimizer.state[p]["step"]
        optimizer.state[p]["step"] = {"int": int(step), "float": float(step), "vector": step.reshape(1)}[kind]
    for got, want in zip(predict(optimizer, params), expected, strict=True):
        assert torch.equal(got, want)


def test_steps_that_live_on_the_device_are_corrected_there() -> None:
    """What a GPU does for fused and capturable optimizers: no number leaves the device."""
    steps = [0.0, 1.0, 7.0, 2000.0]
    for beta in (0.0, 0.9, 0.999):
        expected = [1 - beta**k for k in steps]
        for given in (beta, torch.tensor(beta, dtype=torch.float64)):
            on_device = bias_corrections(given, torch.tensor(steps, dtype=torch.float64))
            assert on_device.tolist() == pytest.approx(expected, rel=1e-12)
    m, v = [torch.randn(3) for _ in steps], [torch.rand(3) for _ in steps]
    for root in (False, True):
        for scale in (-0.3, torch.tensor(-0.3)):
            host, device = (
                adaptive_direction(m, v, k, (0.9, 0.999), 1e-8, eps_in_root=root) for k in (steps, torch.tensor(steps))
            )
            for a, b in zip(host.moves(scale), device.moves(scale), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("scale", [-0.3, 0.0, torch.tensor(-0.3), torch.tensor(0.0)])
@pytest.mark.parametrize("kind", ["adaptive", "plain"])
def test_adding_a_delta_is_adding_its_moves(kind: str, scale: Any, on_device: bool) -> None:
    """Whichever kernels it takes."""

    def delta() -> Direction:
        generator = torch.Generator().manual_seed(0)
        m, v = ([torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(2)] for _ in range(2))
        steps: Any = torch.tensor([0.0, 3.0]) if on_device else [0.0, 3.0]
        return adaptive_direction(m, v, steps, (0.9, 0.999), 1e-8) if kind == "adaptive" else Direction(m)

    params = [torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    delta().add_to_(params, scale)
    for param, move in zip(params, delta().moves(scale), strict=True):
        torch.testing.assert_close(param, 1 + move, rtol=1e-7, atol=0)
    assert bool((params[1] != 1).all()) is bool(scale != 0)
    assert torch.equal(params[0], torch.ones_like(params[0])) is (kind == "adaptive" or bool(scale == 0))


@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("eps_in_root", [False, True])
def test_state_without_a_step_predicts_nothing(eps: float, on_device: bool, eps_in_root: bool) -> None:
    """Invariant 9: the fused AdamW under a skipping GradScaler leaves step 0 and empty moments."""
    zeros = [torch.zeros(3), torch.zeros(2)]
    steps: Any = torch.zeros(2) if on_device else [0.0, 0.0]
    delta = adaptive_direction(zeros, zeros, steps, (0.9, 0.999), eps, eps_in_root=eps_in_root)
    assert all(torch.equal(move, torch.zeros_like(move)) for move in delta.moves(2.0))
    params = [torch.ones(3), torch.ones(2)]
    delta.add_to_(params, 2.0)
    assert all(torch.equal(param, torch.ones_like(param)) for param in params)


def test_element_without_gradient_stands_still_at_eps_zero() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([w], eps=0.0)
    w.grad = torch.tensor([1.0, 0.0, 1.0])
    optimizer.step()
    optimizer.state[w]["exp_avg_sq"][1] = 0.0
    with torch.no_grad():
        w.fill_(1.0)
    moved = predict(optimizer, [w])[0]
    assert moved[1] == 1.0
    assert bool(torch.isfinite(moved).all())
    assert moved[0] < 1.0


@pytest.mark.parametrize("name", ["adam", "adamw", "adam3", "adabelief", "adabelief-fixed"])
def test_weight_decay_joins_the_prediction_on_request(name: str) -> None:
    """With it the prediction is the whole last update of a decoupled optimizer from the new weights."""
    lr, decay, s = 0.1, 0.2, 2.0
    extra: dict[str, Any] = {"fixed_decay": True} if name == "adabelief-fixed" else {}
    if name == "adam":
        extra = {"decoupled_weight_decay": True}
    params, optimizer = make(name.removesuffix("-fixed"), lr=lr, weight_decay=decay, **extra)
    take_steps(params, optimizer, 2)
    without = predict(optimizer, params, steps=s)
    with_decay = predict(optimizer, params, steps=s, weight_decay=True)
    share = decay if extra.get("fixed_decay") else lr * decay
    for a, b, p in zip(without, with_decay, params, strict=True):
        torch.testing.assert_close(b, a - s * share * p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["adam-l2", "sgd-l2", "adabelief-l2"])
def test_coupled_weight_decay_is_in_the_state_already(name: str) -> None:
    params, optimizer = make(name)
    take_steps(params, optimizer, 2)
    plain, asked = predict(optimizer, params), predict(optimizer, params, weight_decay=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, asked, strict=True))


def test_scale_of_the_last_update() -> None:
    assert last_update_scale(2.0, 0.3, 0.1) == pytest.approx(6.0)
    assert last_update_scale(2.0, 0.3, 0.0) == 0.0
    assert last_update_scale(2.0, 0.0, 0.1) == 0.0
    assert last_update_scale(2.0, None, None) == 2.0
    for lr, previous, expected in ((0.3, 0.1, 6.0), (0.3, 0.0, 0.0)):
        scale = last_update_scale(2.0, torch.tensor([lr]), torch.tensor([previous]))
        assert isinstance(scale, Tensor)
        assert scale.shape == ()
        assert float(scale) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [-0.5, torch.tensor(-0.5)])
@pytest.mark.parametrize("factors", [None, [3.0], torch.tensor([3.0])])
@pytest.mark.parametrize("divided", [False, True])
def test_any_part_of_a_delta_may_be_left_out(divided: bool, factors: Any, scale: Any) -> None:
    delta = Direction([torch.tensor([8.0])], [torch.tensor([4.0])] if divided else None, factors)
    expected = -0.5 * 8 / (4 if divided else 1) * (1 if factors is None else 3)
    assert delta.moves(scale)[0].item() == expected
    param = torch.tensor([1.0])
    delta.add_to_([param], scale)
    assert param.item() == 1 + expected


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_directions_do_not_touch_the_state(name: str) -> None:
    params, optimizer = make(name)
    take_steps(params, optimizer, 2)
    before = {i: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for i, p in enumerate(params)}
    predict(optimizer, params)
    for i, p in enumerate(params):
        assert all(torch.equal(torch.as_tensor(v), before[i][k]) for k, v in optimizer.state[p].items())


def test_state_steps_reads_the_host_once() -> None:
    assert state_steps([{"step": 2}, {"step": 3.0}]) == [2.0, 3.0]
    assert state_steps([{"step": torch.tensor(2.0)}, {"step": torch.tensor(3.0)}]) == [2.0, 3.0]


def test_only_the_exact_class_has_the_closed_form() -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert closed_form_of(torch.optim.AdamW) is not None
    assert closed_form_of(Mine) is None
    with pytest.raises(ValueError, match="Mine has no closed form"):
        WeightPredictor(Mine([nn.Parameter(torch.ones(1))]), XGradConfig(steps=1.0, rule="closed_form"))

    @register_rule(Mine)
    def mine(params: Any, states: Any, group: Any) -> list[Tensor]:
        return [torch.full_like(p, 7.0) for p in params]

    w = nn.Parameter(torch.zeros(2))
    optimizer = Mine([w], lr=0.5)
    take_steps([w], optimizer, 1)
    before = w.detach().clone()
    torch.testing.assert_close(predict(optimizer, [w], rule="closed_form")[0], before - 3.5)


def test_register_rule_wants_a_class() -> None:
    with pytest.raises(TypeError, match="optimizer_class"):
        register_rule(torch.optim.AdamW([nn.Parameter(torch.ones(1))]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"momentum": 0.0}, "without momentum"), ({"momentum": 0.9, "nesterov": True}, "Nesterov")],
)
def test_sgd_without_a_closed_form_says_why(settings: dict[str, Any], reason: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, **settings)
    with pytest.raises(ValueError, match=reason):
        WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="closed_form"))
    WeightPredictor(optimizer, XGradConfig(steps=1.0))


@pytest.mark.parametrize("option", ["rectify", "adanorm", "adam_debias"])
def test_adabelief_variants_follow_the_last_update(option: str) -> None:
    optimizer = adabelief([nn.Parameter(torch.ones(1))], lr=0.1, **{option: True})
    with pytest.raises(ValueError, match=option):
        WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="closed_form"))


# ---- AdaM3 itself ----


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam3_follows_its_equations(foreach: bool | None, weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    gradients = [torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(5)]
    settings: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": weight_decay}
    w = nn.Parameter(start.clone())
    optimizer = AdaM3([w], foreach=foreach, **settings)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), adam3_trajectory(start, gradients, **settings), rtol=1e-12, atol=1e-13)


def test_adam3_maximizes_by_turning_the_gradient() -> None:
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    up, down = AdaM3([a], maximize=True), AdaM3([b])
    for g in (torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, 0.1, -1.0])):
        a.grad, b.grad = g.clone(), -g
        up.step()
        down.step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_adam3_resumes_from_its_state_dict(lr: Any) -> None:
    def gradients(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(3, generator=generator) for _ in range(3)]

    a = nn.Parameter(torch.ones(3))
    one = AdaM3([a], lr=lr, weight_decay=0.1)
    for g in gradients(0):
        a.grad = g
        one.step()
    b = nn.Parameter(a.detach().clone())
    two = AdaM3([b], lr=lr)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for g in gradients(1):
        a.grad, b.grad = g.clone(), g.clone()
        one.step()
        two.step()
    assert torch.equal(a, b)


def test_adam3_handles_complex_weights_as_pairs() -> None:
    z = nn.Parameter(torch.complex(torch.ones(2), torch.full((2,), 2.0)))
    pair = nn.Parameter(torch.view_as_real(z.detach()).clone())
    a, b = AdaM3([z]), AdaM3([pair])
    z.grad = torch.complex(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]))
    pair.grad = torch.view_as_real(z.grad).clone()
    a.step()
    b.step()
    assert torch.equal(torch.view_as_real(z.detach()), pair.detach())


def test_adam3_passes_the_closure_on_and_skips_weights_without_gradient() -> None:
    w, idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = AdaM3([w, idle])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert w.item() != 1.0
    assert idle.item() == 1.0
    assert idle not in optimizer.state


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": torch.ones(2)}, "lr"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_adam3_refuses_settings_outside_their_range(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AdaM3([nn.Parameter(torch.ones(1))], **settings)


def test_adam3_refuses_sparse_gradients() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SparseAdam"):
        AdaM3(embedding.parameters()).step()


# ---- the package ----


@pytest.mark.parametrize(
    "code",
    [
        # A rule of the user's own stays, whatever is imported after it.
        """
from hf_xgrad import register_rule
import torch
own = lambda *_: []
register_rule(torch.optim.NAdam)(own)
from hf_xgrad import WeightPredictor, XGradTrainer
from hf_xgrad.core.rules import closed_form_of
assert closed_form_of(torch.optim.NAdam).function is own
from hf_xgrad import *
XGradTrainingArguments, XGradSeq2SeqTrainer
import hf_xgrad as x
x.optim.AdaM3, x.trainer.XGradTrainer, x.core, x.predictor, x.closed_forms, x.enable_xgrad
        """,
        "import sys, hf_xgrad; assert 'XGradTrainer' in dir(hf_xgrad) and 'transformers' not in sys.modules",
    ],
)
def test_importing(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
