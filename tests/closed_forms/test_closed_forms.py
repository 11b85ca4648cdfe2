"""Closed forms of further optimizers: against slow twins that follow the gradients, and against what was stepped."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from few_weights import SHAPES, predict, take_steps
from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.closed_forms import formulas, galore_torch, torch_optim
from hf_xgrad.core.rules import closed_form_of

Twin = Callable[[list[Tensor], dict[str, Any]], Tensor]
MATRICES = ((3, 5), (6, 2))


@dataclass(frozen=True)
class Case:
    """An optimizer under settings.

    Attributes:
        path: `library.Class`.
        twin: delta from the gradients; None where a setting puts more than them into the state.
        exact: whether -lr * delta is the last update.
        single: the library works in float32 somewhere, whatever the weights are in.
    """

    path: str
    twin: Twin | None
    settings: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    single: bool = False
    shapes: tuple[tuple[int, ...], ...] = SHAPES

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.single else torch.float64

    @property
    def tolerance(self) -> dict[str, float]:
        return {"rtol": 1e-4, "atol": 1e-6} if self.single else {"rtol": 1e-6, "atol": 1e-12}


def radam(**settings: Any) -> Case:
    return Case("torch.optim.RAdam", reference.radam_from_gradients, settings)


def nadam(**settings: Any) -> Case:
    return Case("torch.optim.NAdam", reference.nadam_from_gradients, settings, exact=False)


def adamax(**settings: Any) -> Case:
    return Case("torch.optim.Adamax", reference.adamax_from_gradients, settings)


def rmsprop(**settings: Any) -> Case:
    return Case("torch.optim.RMSprop", reference.rmsprop_from_gradients, {"momentum": 0.7, **settings})


def library(name: str, twin: Twin, exact: bool = True, **settings: Any) -> Case:
    return Case(f"pytorch_optimizer.{name}", twin, settings, exact)


def bits(name: str, twin: Twin, exact: bool = True, **settings: Any) -> Case:
    settings = {"weight_decay": 0.0, **settings}
    return Case(f"bitsandbytes.optim.{name}", twin, settings, exact, single=True)


def galore(shapes: tuple[tuple[int, ...], ...] = MATRICES, **settings: Any) -> Case:
    projection = {"rank": 2, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    settings = {"no_deprecation_warning": True, **({} if shapes is SHAPES else projection), **settings}
    return Case("galore_torch.GaLoreAdamW", reference.galore_from_gradients, settings, single=True, shapes=shapes)


CASES: dict[str, Case] = {
    "radam": radam(),
    "radam-for-loop": radam(foreach=False),
    "radam-maximize": radam(maximize=True),
    "radam-large-eps": radam(eps=0.1),
    "radam-never-rectified": radam(betas=(0.9, 0.5)),
    "radam-tensor-lr": radam(lr=torch.tensor(1e-2, dtype=torch.float64)),
    "nadam": nadam(),
    "nadam-for-loop": nadam(foreach=False),
    "nadam-maximize": nadam(maximize=True),
    "nadam-settings": nadam(momentum_decay=0.3, betas=(0.8, 0.95), eps=0.1),
    "nadam-no-first-moment": nadam(betas=(0.0, 0.9)),
    "nadam-tensor-lr": nadam(lr=torch.tensor(1e-2, dtype=torch.float64)),
    "adamax": adamax(),
    "adamax-for-loop": adamax(foreach=False),
    "adamax-maximize": adamax(maximize=True),
    "adamax-large-eps": adamax(eps=0.1, betas=(0.5, 0.6)),
    "adamax-tensor-lr": adamax(lr=torch.tensor(1e-2, dtype=torch.float64)),
    "rmsprop": rmsprop(),
    "rmsprop-for-loop": rmsprop(foreach=False),
    "rmsprop-centered": rmsprop(centered=True, alpha=0.8),
    "rmsprop-maximize": rmsprop(maximize=True),
    "rmsprop-tensor-lr": rmsprop(lr=torch.tensor(1e-2, dtype=torch.float64)),
    "library-sgdw": library("SGDW", reference.sgdw_from_gradients, momentum=0.9, dampening=0.3),
    "library-sgdw-for-loop": library("SGDW", reference.sgdw_from_gradients, momentum=0.9, foreach=False),
    "library-radam": library("RAdam", reference.library_radam_from_gradients),
    "library-radam-for-loop": library("RAdam", reference.library_radam_from_gradients, foreach=False),
    "library-adamax": library("AdaMax", reference.adamax_from_gradients),
    "library-adamax-for-loop": library("AdaMax", reference.adamax_from_gradients, foreach=False),
    "library-adan": library("Adan", reference.adan_from_gradients),
    "library-adan-for-loop": library("Adan", reference.adan_from_gradients, foreach=False, eps=0.1),
    "library-adopt": library("ADOPT", reference.adopt_from_gradients),
    "library-ademamix": library("AdEMAMix", reference.ademamix_from_gradients),
    "library-ademamix-for-loop": library("AdEMAMix", reference.ademamix_from_gradients, foreach=False),
    "library-ademamix-warm-up": library("AdEMAMix", reference.ademamix_from_gradients, t_alpha_beta3=5, alpha=2.0),
    "library-stable": library("StableAdamW", reference.stable_adamw_from_gradients, exact=False),
    "library-stable-for-loop": library(
        "StableAdamW", reference.stable_adamw_from_gradients, exact=False, foreach=False
    ),
    "library-lion": library("Lion", reference.lion_from_gradients, exact=False),
    "lion-pytorch": Case("lion_pytorch.Lion", reference.lion_from_gradients, exact=False),
    "optimi-stable": Case("optimi.StableAdamW", reference.stable_adamw_from_gradients, exact=False),
    "optimi-stable-for-loop": Case(
        "optimi.StableAdamW", reference.stable_adamw_from_gradients, {"foreach": False, "eps": 0.1}, exact=False
    ),
    "bitsandbytes-adamw": bits("AdamW", reference.adamw_from_gradients),
    "bitsandbytes-adamw-paged": bits("AdamW", reference.adamw_from_gradients, is_paged=True, eps=0.1),
    "bitsandbytes-adam": bits("Adam", reference.adamw_from_gradients),
    "bitsandbytes-paged-adamw-32bit": bits("PagedAdamW32bit", reference.adamw_from_gradients),
    "bitsandbytes-ademamix": bits("AdEMAMix", reference.ademamix_from_gradients),
    "bitsandbytes-ademamix-warm-up": bits("AdEMAMix", reference.ademamix_from_gradients, t_alpha=5, t_beta3=4),
    "bitsandbytes-lion": bits("Lion", reference.lion_from_gradients, exact=False),
    "galore": galore(),
    "galore-uncorrected": galore(correct_bias=False, eps=0.1),
    "galore-without-projection": galore(SHAPES),
}
# The state holds weight decay too, which the twins know nothing of.
COUPLED: dict[str, Case] = {
    "radam-l2": Case("torch.optim.RAdam", None, {"weight_decay": 0.1}),
    "adamax-l2": Case("torch.optim.Adamax", None, {"weight_decay": 0.1}),
    "rmsprop-l2": Case("torch.optim.RMSprop", None, {"momentum": 0.7, "weight_decay": 0.1}),
    "library-sgdw-l2": Case(
        "pytorch_optimizer.SGDW", None, {"momentum": 0.9, "weight_decay": 0.1, "weight_decouple": False}
    ),
    "library-adamax-l2": Case("pytorch_optimizer.AdaMax", None, {"weight_decay": 0.1, "weight_decouple": False}),
    "library-ademamix-l2": Case("pytorch_optimizer.AdEMAMix", None, {"weight_decay": 0.1, "weight_decouple": False}),
}
EXACT = {name: case for name, case in {**CASES, **COUPLED}.items() if case.exact}


def make(case: Case, dtype: torch.dtype | None = None, **overrides: Any) -> tuple[list[Tensor], torch.optim.Optimizer]:
    module, _, name = case.path.rpartition(".")
    imported = pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)
    if module == "pytorch_optimizer" and not hasattr(imported.AdEMAMix, "_step_foreach"):
        pytest.skip("the twins follow pytorch-optimizer from 4.0 on")
    torch.manual_seed(0)
    params: list[Tensor] = [nn.Parameter(torch.randn(shape, dtype=dtype or case.dtype)) for shape in case.shapes]
    settings = {"lr": 1e-2, "weight_decay": 0.0, **case.settings, **overrides}
    group = {key: settings.pop(key) for key in ("rank", "update_proj_gap", "scale", "proj_type") if key in settings}
    return params, getattr(imported, name)([{"params": params, **group}], **settings)


def gradients_for(params: list[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    """`[step][parameter]`, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params] for _ in range(steps)]


def step_with(params: list[Tensor], optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> list[Tensor]:
    """Steps along the given gradients; the last update."""
    before: list[Tensor] = []
    for step in gradients:
        before = [p.detach().clone() for p in params]
        for p, g in zip(params, step, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() - w for p, w in zip(params, before, strict=True)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_delta_is_that_of_the_slow_twin(name: str, steps: int) -> None:
    """RAdam's second moment is trusted from the sixth step on."""
    case = CASES[name]
    params, optimizer = make(case)
    gradients = gradients_for(params, steps)
    step_with(params, optimizer, gradients)
    sign = -1.0 if case.settings.get("maximize") else 1.0
    group, s = optimizer.param_groups[0], 2.5
    moved = predict(optimizer, params, steps=s, rule="closed_form")
    assert case.twin is not None
    for i, (got, p) in enumerate(zip(moved, params, strict=True)):
        delta = case.twin([sign * step[i] for step in gradients], group)
        want = p.detach().double() - s * float(group["lr"]) * delta
        torch.testing.assert_close(
            got.double(), want, **(case.tolerance if case.single else {"rtol": 1e-9, "atol": 1e-11})
        )


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_exact_forms_are_the_last_update_once_more(name: str, steps: int) -> None:
    case = EXACT[name]
    params, optimizer = make(case)
    updates = step_with(params, optimizer, gradients_for(params, steps))
    for got, p, update in zip(predict(optimizer, params, rule="closed_form"), params, updates, strict=True):
        torch.testing.assert_close(got - p.detach(), update, **case.tolerance)
    # Nothing moves while RAdam of the library waits for its second moment, and in ADOPT's first step.
    waits = (name.startswith("library-radam") and steps < 6) or (name == "library-adopt" and steps == 1)
    assert all(bool((u != 0).any()) is not waits for u in updates)


@pytest.mark.parametrize("name", [name for name in CASES if "stable" in name])
def test_stable_adamw_is_exact_where_it_is_not_clipped(name: str) -> None:
    """Gradients that shrink are never clipped; those that grow are, which scales the update of each tensor."""
    for growth, clipped in ((0.8, False), (1.3, True)):
        params, optimizer = make(CASES[name])
        base = gradients_for(params, 1)[0]
        updates = step_with(params, optimizer, [[growth**k * g for g in base] for k in range(6)])
        for got, p, update in zip(predict(optimizer, params), params, updates, strict=True):
            ratio = (got - p.detach()) / update
            torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-6, atol=0)
            assert bool((ratio > 1 + 1e-3).all()) is clipped
            if not clipped:
                torch.testing.assert_close(got - p.detach(), update, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if "nadam" in name or "lion" in name])
def test_forms_at_rest_become_the_last_update_under_a_lasting_gradient(name: str) -> None:
    case = CASES[name]
    params, optimizer = make(case)
    updates = step_with(params, optimizer, gradients_for(params, 1) * 300)
    for got, p, update in zip(predict(optimizer, params), params, updates, strict=True):
        torch.testing.assert_close(got - p.detach(), update, rtol=1e-4 if case.single else 1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["nadam", "library-lion", "lion-pytorch", "bitsandbytes-lion"])
def test_forms_at_rest_foresee_a_noisy_step_better_than_the_last_update(name: str) -> None:
    """Cosine with the step that comes next, over 80 steps on a quadratic under noise ten times the gradient."""
    cosines: dict[str, float] = {}
    for rule in ("closed_form", "last_update"):
        case = CASES[name]
        params, optimizer = make(case, lr=1e-3)
        predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, rule=rule))
        generator = torch.Generator().manual_seed(0)
        total = 0.0
        for _ in range(80):
            with predictor.predicted():
                guess = [p.detach().clone() for p in params]
            start = [p.detach().clone() for p in params]
            for p in params:
                p.grad = p.detach() + 10 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            optimizer.step()
            move, step = (
                torch.cat([(b - a).flatten() for a, b in zip(start, list(end), strict=True)])
                for end in (guess, [p.detach() for p in params])
            )
            total += float(torch.nn.functional.cosine_similarity(move, step, dim=0))
        cosines[rule] = total / 80
    assert cosines["closed_form"] > cosines["last_update"] + 0.05


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_double(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    params, optimizer = make(case, dtype)
    gradients = [[g.to(torch.bfloat16).double() for g in step] for step in gradients_for(params, 8)]
    step_with(params, optimizer, gradients)
    assert case.twin is not None
    sign = -1.0 if case.settings.get("maximize") else 1.0
    lr = float(optimizer.param_groups[0]["lr"])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for i, (got, p) in enumerate(zip(predict(optimizer, params, steps=1 / lr), params, strict=True)):
        delta = case.twin([sign * step[i] for step in gradients], optimizer.param_groups[0])
        assert got.dtype == dtype
        error = (got.double() - (p.detach().double() - delta)).norm() / (delta.norm() + p.detach().norm())
        assert error < tolerance


@pytest.mark.parametrize("name", CASES)
def test_each_group_has_its_own_settings(name: str) -> None:
    case = CASES[name]
    both, optimizer = make(case)
    apart = [make(case) for _ in both]
    group = optimizer.param_groups.pop()
    for i, p in enumerate(both):
        own = {**group, "params": [p], "lr": group["lr"] * (i + 1)}
        optimizer.param_groups.append(own)
        apart[i][1].param_groups[0]["lr"] = own["lr"]
        # A parameter of its own optimizer, which sees no other.
        apart[i][1].param_groups[0]["params"] = [apart[i][0][i]]
    gradients = gradients_for(both, 7)
    step_with(both, optimizer, gradients)
    moved = predict(optimizer, both)
    for i, (params, alone) in enumerate(apart):
        step_with([params[i]], alone, [[step[i]] for step in gradients])
        assert torch.equal(moved[i], predict(alone, [params[i]])[0])


@pytest.mark.parametrize("name", ["radam", "nadam", "adamax", "bitsandbytes-adamw", "galore-without-projection"])
def test_parameters_have_their_own_step_counts(name: str) -> None:
    """So that RAdam may trust the second moment of one parameter and not yet that of another."""
    case = CASES[name]
    params, optimizer = make(case)
    gradients = gradients_for(params, 7)
    step_with(params, optimizer, gradients[:4])
    # Without a gradient a parameter is not stepped.
    step_with(params[:2], optimizer, [step[:2] for step in gradients[4:]])
    assert case.twin is not None
    group = optimizer.param_groups[0]
    for i, (got, p) in enumerate(zip(predict(optimizer, params), params, strict=True)):
        delta = case.twin([step[i] for step in (gradients if i < 2 else gradients[:4])], group)
        torch.testing.assert_close(got.double(), p.detach().double() - group["lr"] * delta, **case.tolerance)


@pytest.mark.parametrize("name", ["radam", "nadam", "adamax", "galore"])
def test_steps_that_live_on_the_device_are_worked_with_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does for capturable optimizers: no number leaves the device."""
    params, optimizer = make(CASES[name])
    gradients = gradients_for(params, 7)
    step_with(params, optimizer, gradients[:4])
    step_with(params[:1], optimizer, [step[:1] for step in gradients[4:]])
    on_host = predict(optimizer, params)
    for module in (formulas, galore_torch, torch_optim):
        monkeypatch.setattr(module, "readable", lambda column: column)
    for got, want in zip(predict(optimizer, params), on_host, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_state_without_a_step_predicts_nothing(name: str) -> None:
    """What a reset, or a skipped first step, leaves behind: empty averages and no step."""
    params, optimizer = make(CASES[name])
    step_with(params, optimizer, gradients_for(params, 2))
    for state in optimizer.state.values():
        for key, value in state.items():
            if key == "mu_product":
                value.fill_(1.0)
            elif isinstance(value, Tensor):
                value.zero_()
            elif key == "step":
                state[key] = 0
    for group in optimizer.param_groups:
        group["eps"] = 0.0
        if "step" in group:
            group["step"] = 0
    for got, p in zip(predict(optimizer, params, steps=5.0, rule="closed_form"), params, strict=True):
        assert torch.equal(got, p.detach())


@pytest.mark.parametrize("name", CASES)
def test_before_the_first_step_nothing_is_predicted(name: str) -> None:
    params, optimizer = make(CASES[name])
    for got, p in zip(predict(optimizer, params, rule="closed_form"), params, strict=True):
        assert torch.equal(got, p.detach())


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif hasattr(value, "ortho_matrix"):
        yield value.ortho_matrix


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("decay", [False, True])
def test_directions_do_not_touch_the_state(name: str, decay: bool) -> None:
    params, optimizer = make(CASES[name])
    step_with(params, optimizer, gradients_for(params, 2))
    before = [t.clone() for state in optimizer.state.values() for t in tensors_in(state)]
    predict(optimizer, params, weight_decay=decay)
    after = [t for state in optimizer.state.values() for t in tensors_in(state)]
    assert len(before) >= len(params)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


DECOUPLED: dict[str, dict[str, Any]] = {
    "radam": {"decoupled_weight_decay": True},
    "nadam": {"decoupled_weight_decay": True},
    "library-sgdw": {},
    "library-radam": {},
    "library-radam-for-loop": {"fixed_decay": True},
    "library-adamax": {"weight_decouple": True},
    "library-adan": {"weight_decouple": True},
    "library-adan-for-loop": {"weight_decouple": False},
    "library-adopt": {"weight_decouple": True},
    "library-ademamix": {"weight_decouple": True, "fixed_decay": True},
    "library-stable": {},
    "library-lion": {},
    "lion-pytorch": {},
    "optimi-stable": {},
    "optimi-stable-for-loop": {"decouple_lr": True, "max_lr": 0.1},
    "bitsandbytes-adamw": {},
    "bitsandbytes-ademamix": {},
    "bitsandbytes-lion": {},
    "galore": {},
}


@pytest.mark.parametrize("name", DECOUPLED)
def test_decay_is_what_the_optimizer_takes_off_the_weights(name: str) -> None:
    """The share is measured: two steps from the same point, one with decay."""
    case, lr = CASES[name], 1e-3
    params, optimizer = make(case, lr=lr, **DECOUPLED[name])
    # Shrinking, as StableAdamW clips its decay too.
    gradients = [[0.8**k * g for g in step] for k, step in enumerate(gradients_for(params, 1) * 8)]
    step_with(params, optimizer, gradients[:7])
    plain_params, plain = make(case, lr=lr, **DECOUPLED[name])
    step_with(plain_params, plain, gradients[:7])
    start = [p.detach().clone() for p in params]
    decay = 20.0 * (lr if "fixed_decay" in DECOUPLED[name] else 0.1 if "decouple_lr" in DECOUPLED[name] else 1.0)
    for group in optimizer.param_groups:
        group["weight_decay"] = decay
    without = predict(optimizer, params)
    with_decay = predict(optimizer, params, weight_decay=True)
    step_with(params, optimizer, gradients[7:])
    step_with(plain_params, plain, gradients[7:])
    for a, b, w, decayed, kept in zip(without, with_decay, start, params, plain_params, strict=True):
        taken = kept.detach() - decayed.detach()
        assert float((taken / w).abs().mean()) > 1e-2
        torch.testing.assert_close(a - b, taken, rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("name", ["radam", "nadam", "library-adamax", "library-ademamix"])
def test_coupled_decay_adds_nothing_to_the_prediction(name: str) -> None:
    extra = {"weight_decouple": False} if name.startswith("library") else {}
    params, optimizer = make(CASES[name], weight_decay=0.1, **extra)
    step_with(params, optimizer, gradients_for(params, 2))
    plain, asked = predict(optimizer, params), predict(optimizer, params, weight_decay=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, asked, strict=True))


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("rmsprop", {"momentum": 0.0}, "without momentum"),
        ("library-sgdw", {"momentum": 0.0}, "without momentum"),
        ("library-sgdw", {"nesterov": True}, "Nesterov"),
        ("library-radam", {"adam_debias": True}, "adam_debias"),
        ("library-radam", {"degenerated_to_sgd": True}, "degenerated_to_sgd"),
        ("library-radam", {"n_sma_threshold": 4}, "n_sma_threshold"),
        ("library-adamax", {"adam_debias": True}, "adam_debias"),
        ("library-ademamix", {"cautious": True}, "cautious"),
        ("library-ademamix", {"stable_adamw": True}, "stable_adamw"),
        ("library-adopt", {"cautious": True}, "cautious"),
        ("library-lion", {"cautious": True}, "cautious"),
        ("lion-pytorch", {"decoupled_weight_decay": True}, "decoupled_weight_decay"),
        ("bitsandbytes-adamw", {"optim_bits": 8}, "8 bits"),
        ("bitsandbytes-ademamix", {"optim_bits": 8}, "8 bits"),
        ("bitsandbytes-lion", {"optim_bits": 8}, "8 bits"),
    ],
)
def test_variants_that_step_otherwise_say_so(name: str, settings: dict[str, Any], reason: str) -> None:
    params, optimizer = make(CASES[name], **settings)
    with pytest.raises(ValueError, match=reason):
        WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="closed_form"))
    # And follow the last update, where one is free to choose.
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    take_steps(params, optimizer, 1)
    with predictor.predicted():
        assert predictor.is_predicted


@pytest.mark.parametrize("name", ["library-ademamix", "library-adopt", "library-lion"])
def test_old_releases_follow_the_last_update(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = make(CASES[name])
    monkeypatch.delattr(type(optimizer), "_step_foreach")
    with pytest.raises(ValueError, match="old releases"):
        WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="closed_form"))


@pytest.mark.parametrize(
    ("setting", "value", "reason"), [("max_unorm", 1.0, "max_unorm"), ("skip_zeros", True, "skip_zeros")]
)
def test_bitsandbytes_says_what_needs_the_gradient(setting: str, value: Any, reason: str) -> None:
    _, optimizer = make(CASES["bitsandbytes-adamw"])
    setattr(optimizer.args, setting, value)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=reason):
        WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="closed_form"))


@pytest.mark.parametrize("bits_of_one", [8, 32])
@pytest.mark.parametrize("by_module", [False, True])
def test_bitsandbytes_overrides_count(by_module: bool, bits_of_one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers keeps embeddings in 32 bits that way, which changes nothing here."""
    params, optimizer = make(CASES["bitsandbytes-adamw"])
    manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    monkeypatch.setattr(manager, "pid2config", {})
    monkeypatch.setattr(manager, "module_weight_config_triple", [])
    if by_module:
        manager.register_module_override(nn.Embedding(2, 2), "weight", {"optim_bits": bits_of_one})
    else:
        manager.override_config(params[1], "optim_bits", bits_of_one)
    if bits_of_one == 32:
        WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="closed_form"))
    else:
        with pytest.raises(ValueError, match="overrides"):
            WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="closed_form"))


def test_bitsandbytes_classes_of_other_defaults_have_the_same_form() -> None:
    optim = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes is not installed", exc_type=ImportError)
    for name in ("Adam", "AdamW", "Lion"):
        form = closed_form_of(getattr(optim, name))
        assert form is not None
        for other in (f"{name}32bit", f"Paged{name}", f"Paged{name}32bit"):
            assert closed_form_of(getattr(optim, other)) == form
        assert closed_form_of(getattr(optim, f"{name}8bit")) is None
    assert closed_form_of(optim.PagedAdEMAMix) == closed_form_of(optim.AdEMAMix) is not None


@pytest.mark.parametrize(
    ("paged", "on_gpu", "obstacle"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_state_that_is_paged_to_the_host_of_a_gpu_is_not_read(paged: bool, on_gpu: bool, obstacle: bool) -> None:
    """Copying it over for each prediction would wait for the device, parameter by parameter."""
    manager = SimpleNamespace(pid2config={}, index2config={}, module_weight_config_triple=[])
    optimizer: Any = SimpleNamespace(
        args=SimpleNamespace(optim_bits=32, max_unorm=0.0, skip_zeros=False),
        is_paged=paged,
        mng=manager,
        param_groups=[{"params": [SimpleNamespace(is_cuda=on_gpu)]}],
    )
    form = closed_form_of(type("AdamW", (), {"__module__": "bitsandbytes.optim.adamw", "__qualname__": "AdamW"}))
    assert form is not None
    assert ("memory" in (form.obstacle(optimizer, {}) or "")) is obstacle


@pytest.mark.parametrize("name", ["Adadelta", "Adagrad", "ASGD", "Rprop", "Adafactor", "LBFGS", "SparseAdam", "Muon"])
def test_what_the_state_does_not_determine_has_no_form(name: str) -> None:
    optimizer = getattr(torch.optim, name, None)
    assert optimizer is None or closed_form_of(optimizer) is None
