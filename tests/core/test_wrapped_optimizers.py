"""Optimizers around other optimizers, and those that want a closure: predicted exactly, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from every_optimizer import Several
from hf_xgrad import WeightPredictor, XGradConfig


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def copies(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def assert_follows_its_last_update(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], s: float = 2.0
) -> None:
    """The last-update rule, from snapshots taken outside: `w + s (w - w_previous)`, at a constant learning rate."""
    predictor = WeightPredictor(optimizer, XGradConfig(steps=s, rule="last_update"))
    trajectory = [copies(params)]
    for t in range(7):
        with predictor.predicted():
            seen = copies(params)
            give_gradients(params, t)
        assert all(torch.equal(p, w) for p, w in zip(params, trajectory[-1], strict=True))
        previous = trajectory[max(t - 1, 0)]
        for now, before, predicted in zip(trajectory[-1], previous, seen, strict=True):
            assert torch.equal(predicted, now + s * (now - before))
        optimizer.step()
        trajectory.append(copies(params))
        assert not any(torch.equal(a, b) for a, b in zip(*trajectory[-2:], strict=True))


class Decaying(torch.optim.SGD):
    """Shrinks the weights before and after the step of its base, which runs the same hooks once more inside."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for _ in range(2):
            with torch.no_grad():
                for group in self.param_groups:
                    torch._foreach_mul_(group["params"], 0.9)
            if _ == 0:
                super().step()


def lookahead(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    library = pytest.importorskip("pytorch_optimizer", reason="Lookahead is of an optional library")
    return library.Lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.9), k=3)


AROUND: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "several": lambda params: Several(torch.optim.SGD(params[:1], lr=0.1), torch.optim.Adam(params[1:], lr=0.1)),
    "muon and adam": lambda params: Several(torch.optim.Muon(params[:1], lr=0.1), torch.optim.AdamW(params[1:])),
    "lookahead": lookahead,
    "accelerate": lambda params: Accelerator(cpu=True).prepare(torch.optim.SGD(params, lr=0.1)),
    "accelerate around several": lambda params: Accelerator(cpu=True).prepare(AROUND["several"](params)),
    "subclass": lambda params: Decaying(params, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", AROUND)
def test_follows_the_last_update_of_the_whole(name: str) -> None:
    params = weights()
    assert_follows_its_last_update(AROUND[name](params), params)


class Failing(torch.optim.SGD):
    fails = True

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if self.fails:
            raise FloatingPointError
        super().step()


def test_a_step_that_raised_is_forgotten() -> None:
    params = weights()
    optimizer = Failing(params, lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="last_update"))
    trajectory, seen = [], []
    for t in range(4):
        with predictor.predicted():
            seen.append(copies(params))
            give_gradients(params, t)
        trajectory.append(copies(params))
        optimizer.fails = t == 0
        if optimizer.fails:
            with pytest.raises(FloatingPointError):
                optimizer.step()
        else:
            optimizer.step()
    for t in (2, 3):
        for p, w, v in zip(seen[t], trajectory[t], trajectory[t - 1], strict=True):
            assert torch.equal(p, w + (w - v))


def test_steps_after_one_that_raised_are_seen() -> None:
    """Without a prediction between them."""
    params = weights()
    optimizer = Failing(params, lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, rule="last_update"))
    give_gradients(params, 0)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    optimizer.fails = False
    trajectory = [copies(params)]
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
        trajectory.append(copies(params))
    with predictor.predicted():
        for p, w, v in zip(params, trajectory[-1], trajectory[-2], strict=True):
            assert torch.equal(p, w + (w - v))


class Hidden(torch.optim.SGD):
    """Steps, through an optimizer inside, weights that its own groups do not have."""

    def __init__(self, params: list[nn.Parameter], inside: Any) -> None:
        super().__init__(params, lr=0.1)
        self.inside = inside


class Unhooked(torch.optim.Optimizer):
    """Never called `torch.optim.Optimizer.__init__`: none of its steps runs a hook."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {}
        self.defaults = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.optimizer.step()


class Releasing(torch.optim.SGD):
    """Says as optimi's optimizers do that it updates inside backward."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["gradient_release"] = True


class Sam(torch.optim.SGD):
    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


def hidden(params: list[nn.Parameter], wrap: Callable[[Any], Any]) -> torch.optim.Optimizer:
    return Hidden(params[:1], wrap(torch.optim.SGD(params[1:], lr=0.1)))


REFUSED: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], str]] = {
    "inner": (lambda params: hidden(params, lambda inner: inner), "Hidden .*SGD inside"),
    "inner in a list": (lambda params: hidden(params, lambda inner: [inner]), "Hidden .*SGD inside"),
    "inner in a dict": (lambda params: hidden(params, lambda inner: {"b": inner}), "Hidden .*SGD inside"),
    "no hooks": (lambda params: Unhooked(torch.optim.SGD(params, lr=0.1)), "Unhooked .*no step hooks"),
    "gradient release": (lambda params: Releasing(params), "Releasing .*inside backward"),
    "sam": (lambda params: Sam(params, lr=0.1), "Sam .*between two backward passes"),
    "around one that is refused": (lambda params: Several(Sam(params, lr=0.1)), "Several .*two backward passes"),
    "around a refused setting": (
        lambda params: Several(torch.optim.AdamW(params, differentiable=True)),
        "Several .*differentiable",
    ),
    "differentiable": (lambda params: torch.optim.AdamW(params, differentiable=True), "AdamW .*differentiable"),
    "lbfgs": (lambda params: torch.optim.LBFGS(params), "LBFGS .*closure"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_the_way_out(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"{reason}.*xgrad=False") as error:
        WeightPredictor(make(weights()), XGradConfig(steps=1.0))
    assert "\n" not in str(error.value)
    WeightPredictor(make(weights()), XGradConfig(steps=0))


@pytest.mark.parametrize("name", ["SAM", "GSAM", "WSAM", "LookSAM", "BSAM", "AdaHessian", "SophiaH", "AliG"])
def test_refused_of_pytorch_optimizer(name: str) -> None:
    """By its classes, so that a trainer refuses them before it makes one."""
    library = pytest.importorskip("pytorch_optimizer", reason="an optional library")
    from hf_xgrad.core.refusals import refusal

    found = getattr(library, name)
    assert refusal(found) is not None
    assert refusal(type("Derived", (found,), {})) is not None


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_closure_is_refused_before_it_runs(how: str) -> None:
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))

    def closure() -> float:
        raise AssertionError("was called")

    before = copies(params)
    with pytest.raises(RuntimeError, match="without a closure"):
        optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert not predictor.is_predicted


def test_a_closure_is_left_alone_where_nothing_is_predicted() -> None:
    params = weights()
    optimizer = torch.optim.SGD(params, lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=0))
    assert optimizer.step(lambda: 3.0) == 3.0
    WeightPredictor(optimizer, XGradConfig(steps=1.0))  # gone at once, and its hooks with it
    assert optimizer.step(lambda: 4.0) == 4.0
    assert not predictor.is_predicted
