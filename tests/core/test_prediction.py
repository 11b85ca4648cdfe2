"""WeightPredictor: what it writes, that it restores bit for bit, and what an accumulation window sees."""

from __future__ import annotations

import copy
import gc
import io
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.optim import AdaM3
from inside import chosen_steps, in_chunks, kept_weights, window
from reference import predicted_weights
from tiny_models import bert, gpt2

Maker = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    # Each eps is one that float16 can hold.
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, eps=1e-4),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, eps=1e-4, fused=True),
    "adam3": lambda params: AdaM3(params, lr=0.01, eps=1e-6),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, eps=1e-4),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
}
WITHOUT_FORM = ("sgd", "nesterov", "rmsprop", "adagrad")
RULES = ("auto", "last_update")


class Loop:
    """A plain training loop on a small regression, a micro-batch at a time."""

    def __init__(
        self, make: Maker, config: XGradConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
        self.dtype = dtype
        self.optimizer = make(self.model.parameters())
        self.predictor = WeightPredictor(self.optimizer, config or XGradConfig(steps=1.0))
        self.data = torch.Generator().manual_seed(1)
        self.seen: list[list[Tensor]] = []

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def micro_batch(self) -> None:
        x = torch.randn(4, 6, generator=self.data).to(self.dtype)
        with self.predictor.predicted():
            self.seen.append(self.weights())
            self.model(x).square().mean().backward()

    def step(self, micro_batches: int = 1) -> None:
        for _ in range(micro_batches):
            self.micro_batch()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps: int, micro_batches: int = 1) -> Loop:
        for _ in range(steps):
            self.step(micro_batches)
        return self


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- what is written, and that it goes away again ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.filterwarnings("ignore:XGrad")
def test_restoring_is_exact(name: str, rule: str, dtype: torch.dtype) -> None:
    if name == "adamw-fused" and dtype is torch.float16:
        pytest.skip("torch's fused AdamW has no float16 kernel on the CPU")
    loop = Loop(OPTIMIZERS[name], XGradConfig(steps=3.0, rule=rule), dtype).run(2)
    storages = [p.data_ptr() for p in loop.model.parameters()]
    before, state = loop.weights(), copy.deepcopy(loop.optimizer.state_dict())
    with loop.predictor.predicted():
        moved = loop.weights()
    assert same(loop.weights(), before)
    assert not same(moved, before)
    assert [p.data_ptr() for p in loop.model.parameters()] == storages
    after = loop.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all(
        torch.equal(torch.as_tensor(after["state"][i][k]), torch.as_tensor(v))
        for i, entries in state["state"].items()
        for k, v in entries.items()
        if v is not None
    )


@pytest.mark.parametrize("name", ["momentum", "adamw", "adamw-fused", "adam3"])
def test_forward_sees_the_weights_of_the_slow_twin(name: str) -> None:
    loop = Loop(OPTIMIZERS[name], XGradConfig(steps=2.0), torch.float64)
    for _ in range(4):
        expected = predicted_weights(loop.optimizer, 2.0)
        loop.step()
        for got, want in zip(loop.seen[-1], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WITHOUT_FORM)
def test_last_update_rule_repeats_the_last_realised_update(name: str, rule: str) -> None:
    """w_hat = w_t + s (lr_t / lr_{t-1}) (w_t - w_{t-1}), measured from outside, under a changing learning rate."""
    loop = Loop(OPTIMIZERS[name], XGradConfig(steps=1.5, rule=rule), torch.float64)
    previous = current = loop.weights()
    last_lr = None
    for lr in (0.02, 0.05, 0.01, 0.04):
        loop.optimizer.param_groups[0]["lr"] = lr
        loop.step()
        for seen, w, w_before in zip(loop.seen[-1], current, previous, strict=True):
            ratio = 0.0 if last_lr is None else lr / last_lr
            torch.testing.assert_close(seen, w + 1.5 * ratio * (w - w_before), rtol=1e-12, atol=1e-14)
        previous, current, last_lr = current, loop.weights(), lr
    assert not same(loop.seen[-1], previous)


def test_learning_rates_of_zero_predict_nothing() -> None:
    """Warm-up starts at exactly 0: the step after has no update that could be rescaled."""
    loop = Loop(OPTIMIZERS["sgd"])
    for lr, moves in ((0.0, False), (0.1, False), (0.1, True), (0.0, False), (0.1, False)):
        loop.optimizer.param_groups[0]["lr"] = lr
        before = loop.weights()
        loop.step()
        assert same(loop.seen[-1], before) is not moves


def test_groups_without_a_closed_form_take_the_last_update_rule() -> None:
    """One optimizer may hold groups of both kinds."""
    first, second = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([{"params": [first], "momentum": 0.9}, {"params": [second]}], lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=2.0))
    for _ in range(2):
        first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        optimizer.step()
    with predictor.predicted():
        torch.testing.assert_close(first.detach(), torch.full((2,), 1 - 0.1 - 0.19 - 2 * 0.19, dtype=torch.float64))
        torch.testing.assert_close(second.detach(), torch.full((2,), 0.8 - 0.2, dtype=torch.float64))


def test_learning_rates_may_be_tensors_changed_in_place() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=lr)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    for value, expected in ((0.1, 1.0), (0.2, 0.9 - 0.2), (0.0, 0.7)):
        lr.fill_(value)
        with predictor.predicted():
            torch.testing.assert_close(w.detach(), torch.full((2,), expected, dtype=torch.float64))
        w.grad = torch.ones_like(w)
        optimizer.step()


@pytest.mark.parametrize("config", [XGradConfig(steps=0.0), XGradConfig(enabled=False)])
def test_switched_off_it_neither_moves_nor_keeps_anything(config: XGradConfig) -> None:
    loop = Loop(OPTIMIZERS["sgd"], config)
    plain = Loop(OPTIMIZERS["sgd"], config)
    for _ in range(3):
        before = loop.weights()
        loop.step()
        plain.model(torch.randn(4, 6, generator=plain.data)).square().mean().backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        assert same(loop.seen[-1], before)
    assert same(loop.weights(), plain.weights())
    assert not kept_weights(loop.predictor)
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_gradient_is_that_at_the_predicted_weights() -> None:
    """On L(w) = w^2 / 2 the gradient *is* the weight that it was taken at."""
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    trajectory = [1.0]
    for _ in range(3):
        with predictor.predicted():
            (w**2 / 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(w.item())
    # By hand: buf 1, w 0.5; then at 0.5 - 0.5*1 = 0: buf 0.9, w 0.05; then at 0.05 - 0.5*0.9 = -0.4: buf 0.41.
    assert trajectory == pytest.approx([1.0, 0.5, 0.05, -0.155])


# ---- windows ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_window_sees_one_prediction(name: str, rule: str) -> None:
    loop = Loop(OPTIMIZERS[name], XGradConfig(steps=1.0, rule=rule)).run(4, micro_batches=3)
    windows = [loop.seen[i : i + 3] for i in range(0, 12, 3)]
    for first, *others in windows:
        assert all(same(first, other) for other in others)
    assert not same(windows[2][0], windows[3][0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_accelerate_accumulation_keeps_one_prediction(name: str, rule: str) -> None:
    """The prepared optimizer's `step` does nothing within a window; only realised steps count."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    inner = OPTIMIZERS[name](model.parameters())
    model, optimizer = accelerator.prepare(model, inner)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, rule=rule))
    assert predictor.optimizer is inner
    seen = []
    for x in torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0)):
        with accelerator.accumulate(model):
            with predictor.predicted():
                seen.append(model.weight.detach().clone())
                accelerator.backward(model(x).square().mean())
            true = model.weight.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
    for start in (0, 4, 8):
        assert all(torch.equal(seen[start], w) for w in seen[start : start + 4])
    assert not torch.equal(seen[4], seen[0])
    assert not torch.equal(seen[8], true)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["sgd", "adamw", "momentum"])
def test_skipped_step_leaves_everything_as_it_was(name: str, rule: str) -> None:
    """A GradScaler that meets an inf does not step: no window ends, and the same weights are predicted again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    loop = Loop(OPTIMIZERS[name], XGradConfig(steps=1.0, rule=rule))
    for i in range(6):
        with loop.predictor.predicted():
            loop.seen.append(loop.weights())
            x = torch.randn(4, 6, generator=loop.data)
            scaler.scale(loop.model(x).square().mean()).backward()
        before = loop.weights()
        if i in (0, 3):
            next(loop.model.parameters()).grad[0, 0] = float("inf")
        state = copy.deepcopy(loop.optimizer.state_dict())
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        assert same(loop.weights(), before) is (i in (0, 3))
        if i == 3:
            assert str(loop.optimizer.state_dict()) == str(state)
    assert same(loop.seen[3], loop.seen[4])
    assert not same(loop.seen[4], loop.seen[5])


def test_fused_optimizer_that_skips_inside_predicts_nothing_from_an_empty_state() -> None:
    """The fused AdamW is stepped even when it skips, and its state then has step 0."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loop = Loop(OPTIMIZERS["adamw-fused"])
    start = loop.weights()
    for expect_skip in (True, False, False):
        with loop.predictor.predicted():
            loop.seen.append(loop.weights())
            scaler.scale(loop.model(torch.ones(4, 6)).square().mean()).backward()
        if expect_skip:
            next(loop.model.parameters()).grad[0, 0] = float("inf")
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        if expect_skip:
            steps = {float(s["step"]) for s in loop.optimizer.state.values()}
            assert steps == {0.0}
    assert same(loop.seen[0], start)
    assert same(loop.seen[1], start)
    assert not same(loop.seen[2], start)
    assert all(bool(torch.isfinite(w).all()) for w in loop.seen[2])


# ---- steps="auto" ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["momentum", "adamw", "adam3", "sgd"])
def test_auto_predicts_the_chosen_number_of_steps(name: str, rule: str) -> None:
    """Each group its own number, one for all micro-batches of a window, and the log tells it."""

    def groups(params: Any) -> torch.optim.Optimizer:
        first, *rest = params
        return OPTIMIZERS[name]([{"params": [first]}, {"params": rest}])

    loop = Loop(groups, XGradConfig(steps="auto", rule=rule), torch.float64)
    previous, chosen = loop.weights(), []
    for _ in range(6):
        current = loop.weights()
        steps = chosen_steps(loop.predictor)
        chosen.append(steps)
        of_param = [steps[0], *[steps[1]] * (len(current) - 1)]
        if rule == "auto" and name not in WITHOUT_FORM:
            unit = predicted_weights(loop.optimizer, 1.0)
            expected = [w + s * (one - w) for w, one, s in zip(current, unit, of_param, strict=True)]
        else:
            expected = [w + s * (w - v) for w, v, s in zip(current, previous, of_param, strict=True)]
        loop.predictor.measure()
        loop.step(2)
        assert same(loop.seen[-1], loop.seen[-2])
        for seen, want in zip(loop.seen[-1], expected, strict=True):
            torch.testing.assert_close(seen, want, rtol=1e-10, atol=1e-14)
        told = loop.predictor.diagnostics()
        assert [told["steps_0"], told["steps_1"]] == steps
        assert told["steps"] == pytest.approx(sum(steps) / 2)
        previous = current
    assert len({s for steps in chosen for s in steps}) > 4


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_auto_goes_back_to_an_earlier_state(name: str) -> None:
    """One that was saved before the first step, too: it is empty."""
    loop = Loop(OPTIMIZERS[name], XGradConfig(steps="auto"))
    saved = copy.deepcopy([part.state_dict() for part in (loop.model, loop.optimizer, loop.predictor)])
    seen = []
    for _ in range(2):
        for part, state in zip((loop.model, loop.optimizer, loop.predictor), copy.deepcopy(saved), strict=True):
            part.load_state_dict(state)
        loop.data.manual_seed(1)
        assert chosen_steps(loop.predictor) == [0.0 if name in WITHOUT_FORM else 1.0]
        loop.run(6)
        seen.append(loop.seen[-6:])
    assert all(same(first, second) for first, second in zip(*seen, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_a_fixed_number_of_steps_is_told_once_for_all_groups(rule: str) -> None:
    def groups(params: Any) -> torch.optim.Optimizer:
        first, *rest = params
        return OPTIMIZERS["adamw"]([{"params": [first]}, {"params": rest}])

    loop = Loop(groups, XGradConfig(steps=1.5, rule=rule)).run(2)
    loop.predictor.measure()
    loop.step()
    told = loop.predictor.diagnostics()
    assert {name: value for name, value in told.items() if "steps" in name} == {"steps": 1.5}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_auto_resumes_exactly(name: str) -> None:
    """Between steps and in the middle of a window, through a file that holds nothing but tensors and plain values."""
    for micro_batches in (0, 1):
        one = Loop(OPTIMIZERS[name], XGradConfig(steps="auto")).run(4)
        for _ in range(micro_batches):
            one.micro_batch()
        one.optimizer.zero_grad()
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (one.model, one.optimizer, one.predictor)], file)
        file.seek(0)
        two = Loop(OPTIMIZERS[name], XGradConfig(steps="auto"))
        for part, state in zip(
            (two.model, two.optimizer, two.predictor), torch.load(file, weights_only=True), strict=True
        ):
            part.load_state_dict(state)
        two.data.set_state(one.data.get_state())
        assert chosen_steps(one.predictor) == chosen_steps(two.predictor)
        one.run(3)
        two.run(3)
        assert same(one.weights(), two.weights())
        assert chosen_steps(one.predictor) == chosen_steps(two.predictor)
        assert same(one.seen[-3], two.seen[-3])


# ---- which parameters, how much memory ----


def test_frozen_parameters_are_never_touched() -> None:
    model = bert()
    for p in model.bert.embeddings.parameters():
        p.requires_grad = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    ids = torch.arange(1, 9).reshape(2, 4)
    for _ in range(2):
        with predictor.predicted():
            model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    frozen = set(model.bert.embeddings.parameters())
    assert frozen.isdisjoint(kept_weights(predictor))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(b.numel() for b in kept_weights(predictor).values()) <= trainable


@pytest.mark.parametrize("rule", RULES)
def test_weights_frozen_on_the_way_stand_still(rule: str) -> None:
    loop = Loop(OPTIMIZERS["momentum"], XGradConfig(steps=1.0, rule=rule)).run(3)
    first = next(loop.model.parameters())
    first.requires_grad = False
    value = first.detach().clone()
    loop.run(2)
    assert torch.equal(loop.seen[-1][0], value)
    first.requires_grad = True
    loop.micro_batch()
    if rule == "last_update":
        # It stood still: there is no last update to repeat.
        assert torch.equal(loop.seen[-1][0], value)
    assert torch.equal(first, value)


def test_weights_without_state_are_not_predicted() -> None:
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, idle])
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    used.grad = torch.ones(2)
    optimizer.step()
    before = idle.detach().clone()
    with predictor.predicted():
        assert torch.equal(idle, before)
        assert idle not in optimizer.state


@pytest.mark.parametrize("rule", RULES)
def test_kept_weights_are_allocated_once_and_no_larger_than_the_weights(rule: str) -> None:
    loop = Loop(OPTIMIZERS["adamw"], XGradConfig(steps=1.0, rule=rule)).run(2)
    storages = {id(p): b.data_ptr() for p, b in kept_weights(loop.predictor).items()}
    loop.run(3, micro_batches=2)
    assert {id(p): b.data_ptr() for p, b in kept_weights(loop.predictor).items()} == storages
    elements = sum(b.numel() for b in kept_weights(loop.predictor).values())
    assert elements == sum(p.numel() for p in loop.model.parameters())


def test_tied_weights_stay_tied() -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    ids = torch.arange(8).reshape(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with predictor.predicted():
        assert model.lm_head.weight is model.transformer.wte.weight
        moved = model.lm_head.weight.detach().clone()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not torch.equal(moved, model.lm_head.weight)


def test_parameters_added_later_are_predicted_too() -> None:
    for name in ("sgd", "adamw"):
        loop = Loop(OPTIMIZERS[name]).run(2)
        extra = nn.Parameter(torch.ones(3))
        loop.optimizer.add_param_group({"params": [extra]})
        for expected_to_move in (False, True):
            before = extra.detach().clone()
            with loop.predictor.predicted():
                assert torch.equal(extra, before) is not expected_to_move
                (extra.square().sum() + loop.model(torch.ones(1, 6)).sum()).backward()
            assert torch.equal(extra, before)
            loop.optimizer.step()
            loop.optimizer.zero_grad()


class _Counter(TorchDispatchMode):
    """Counts the operations that Python dispatches, and apart from them the numbers that are read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_read = "_local_scalar_dense" in str(func)
        self.reads += is_read
        self.operations += not is_read
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["momentum", "adamw-fused", "sgd", "adam3"])
def test_cost_in_kernels_does_not_grow_with_the_number_of_parameters(name: str) -> None:
    """Multi-tensor: as many dispatched operations for 3 parameters as for 300.

    Nothing is read but the counts of steps, where the optimizer keeps them in tensors on the host.
    """

    def operations(n: int) -> int:
        params = [nn.Parameter(torch.ones(2)) for _ in range(n)]
        optimizer = OPTIMIZERS[name](params)
        predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
        for _ in range(3):
            for p in params:
                p.grad = torch.ones(2)
            with predictor.predicted():
                pass
            optimizer.step()
        with _Counter() as counter:
            predictor.predict()
            predictor.restore()
        assert counter.reads == (n if name in ("adamw-fused", "adam3") else 0)
        return counter.operations

    few = operations(3)
    assert operations(300) == few > 0


def test_large_models_are_worked_on_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Loop(OPTIMIZERS["adamw"]), Loop(OPTIMIZERS["adamw"])
    whole.run(3)
    in_chunks(monkeypatch, 10)
    cut.run(3)
    assert len(window(cut.predictor)) == 0
    with cut.predictor.predicted():
        assert len(window(cut.predictor)) == 4
    assert same(whole.seen[-1], cut.seen[-1])
    assert same(whole.weights(), cut.weights())


# ---- ways out ----


def test_nesting_raises_and_leaves_the_outer_prediction_alone() -> None:
    loop = Loop(OPTIMIZERS["adamw"]).run(2)
    before = loop.weights()
    with loop.predictor.predicted():
        outer = loop.weights()
        with pytest.raises(RuntimeError, match="already"), loop.predictor.predicted():
            pass
        with pytest.raises(RuntimeError, match="already"):
            loop.predictor.predict()
        assert same(loop.weights(), outer)
        assert loop.predictor.is_predicted
    assert same(loop.weights(), before)


def test_restore_may_be_called_at_any_time() -> None:
    loop = Loop(OPTIMIZERS["sgd"]).run(2)
    before = loop.weights()
    loop.predictor.restore()
    loop.predictor.predict()
    assert loop.predictor.is_predicted
    moved = loop.weights()
    loop.predictor.restore()
    loop.predictor.restore()
    assert not loop.predictor.is_predicted
    assert same(loop.weights(), before)
    with loop.predictor.predicted():
        assert same(loop.weights(), moved)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError])
def test_whoever_catches_an_error_sees_the_true_weights(error: type[BaseException], rule: str) -> None:
    loop = Loop(OPTIMIZERS["adamw"], XGradConfig(steps=1.0, rule=rule)).run(2)
    before = loop.weights()
    with pytest.raises(error), loop.predictor.predicted():  # noqa: PT012
        assert not same(loop.weights(), before)
        raise error("injected")
    assert same(loop.weights(), before)
    # And the next attempt predicts what the failed one did.
    twin = Loop(OPTIMIZERS["adamw"], XGradConfig(steps=1.0, rule=rule)).run(3)
    loop.run(1)
    assert same(loop.seen[-1], twin.seen[-1])
    assert same(loop.weights(), twin.weights())


def test_stepping_on_predicted_weights_is_an_error() -> None:
    loop = Loop(OPTIMIZERS["adamw"]).run(2)
    before = loop.weights()
    loop.model(torch.ones(1, 6)).sum().backward()
    for _ in range(3):  # again and again
        with (
            pytest.raises(RuntimeError, match=r"optimizer\.step\(\) on predicted weights"),
            loop.predictor.predicted(),
        ):
            loop.optimizer.step()
        assert same(loop.weights(), before)


@pytest.mark.parametrize("micro_batches_before", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_interrupt_at_any_kernel_leaves_the_true_weights(
    rule: str, micro_batches_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C between any two copies of predict or restore, in a model of several chunks."""
    in_chunks(monkeypatch, 20)
    copy_ = torch._foreach_copy_

    def interrupted_at(count: int, *, done: bool) -> bool:
        loop = Loop(OPTIMIZERS["momentum"], XGradConfig(steps=1.0, rule=rule)).run(2)
        for _ in range(micro_batches_before):
            loop.micro_batch()
        before = loop.weights()
        calls = 0

        def interrupting(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count and not done:
                raise KeyboardInterrupt
            result = copy_(*args)
            if calls == count and done:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(torch, "_foreach_copy_", interrupting)
        hit = False
        try:
            with loop.predictor.predicted():
                pass
        except KeyboardInterrupt:
            hit = True
        monkeypatch.setattr(torch, "_foreach_copy_", copy_)
        assert same(loop.weights(), before)
        assert not loop.predictor.is_predicted
        # What is left is either the whole memory of the last update, or none of it: training goes on.
        loop.run(3)
        assert all(bool(torch.isfinite(w).all()) for w in loop.weights())
        return hit

    for done in (False, True):
        hits = [interrupted_at(count, done=done) for count in range(1, 20)]
        assert hits == sorted(hits, reverse=True)
        assert sum(hits) >= 6
        assert not hits[-1]


def test_rule_that_raises_half_way_leaves_the_true_weights() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": [second]}], lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    first.grad, second.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    before = [first.detach().clone(), second.detach().clone()]
    del optimizer.state[second]["exp_avg"]
    with pytest.raises(KeyError):
        predictor.predict()
    assert same([first.detach(), second.detach()], before)
    assert not predictor.is_predicted


# ---- autocast, precision ----


def test_autocast_does_not_serve_weights_of_before() -> None:
    """An autocast region that is left open keeps low-precision copies of the weights."""
    loop = Loop(OPTIMIZERS["momentum"], XGradConfig(steps=50.0)).run(2)
    x = torch.ones(1, 6)
    with loop.predictor.predicted(), torch.autocast("cpu", torch.bfloat16):
        expected = loop.model(x).detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        true = loop.model(x).detach().clone()
        with loop.predictor.predicted():
            assert torch.equal(loop.model(x), expected)
        assert torch.equal(loop.model(x), true)
    assert not torch.equal(true, expected)


def _warnings_of(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "XGrad" in str(w.message)]


def test_prediction_lost_in_bf16_weights_is_said_once() -> None:
    def make(lr: float) -> Maker:
        return lambda params: torch.optim.AdamW(params, lr=lr)

    messages = _warnings_of(lambda: Loop(make(1e-5), dtype=torch.bfloat16).run(9))
    assert len(messages) == 1
    found = re.search(r"(\d+)% of the predicted moves .* torch\.bfloat16 .* float32 .* --bf16", messages[0])
    assert found
    assert int(found[1]) > 50
    assert not _warnings_of(lambda: Loop(make(1e-5)).run(9))
    assert not _warnings_of(lambda: Loop(make(0.05), dtype=torch.bfloat16).run(9))


def test_a_move_of_zero_is_not_lost() -> None:
    """As at the beginning of a warm-up."""
    loop = Loop(lambda params: torch.optim.AdamW(params, lr=0.05), dtype=torch.bfloat16)
    loop.run(1)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    assert not _warnings_of(lambda: loop.run(4))


def test_share_that_is_lost_in_bf16_is_counted() -> None:
    """Of four weights two are too large for a move of 2^-10 to show in bf16, and one is not to move at all."""
    w = nn.Parameter(torch.tensor([1.0, 1.0, 2.0**-8, 1.0], dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([w], lr=2.0**-10, momentum=0.9)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
    w.grad = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.bfloat16)
    optimizer.step()
    assert "67% of the predicted moves" in _warnings_of(predictor.predict)[0]


def test_last_update_rule_on_bf16_weights_warns_at_once() -> None:
    messages = _warnings_of(lambda: Loop(OPTIMIZERS["sgd"], dtype=torch.bfloat16))
    assert len(messages) == 1
    assert "mostly rounding" in messages[0]
    assert not _warnings_of(lambda: Loop(OPTIMIZERS["sgd"]))


# ---- refusals ----


class _ScheduleFree(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class _Lomo(torch.optim.SGD):
    def fused_backward(self, loss: Tensor, lr: float) -> None: ...


class _LayerWise(torch.optim.SGD):
    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.optimizer_dict: dict[Any, Any] = {}


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(_ScheduleFree, "already trains at an extrapolated"), (_Lomo, "inside backward"), (_LayerWise, "layer-wise")],
)
def test_optimizers_that_cannot_be_right_are_refused(cls: type[torch.optim.SGD], reason: str) -> None:
    optimizer = cls([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=f"{cls.__name__} .*{reason}.*xgrad=False"):
        WeightPredictor(optimizer, XGradConfig(steps=1.0))
    WeightPredictor(optimizer, XGradConfig(enabled=False))
    WeightPredictor(optimizer, XGradConfig(steps=0))
    prepared = Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(ValueError, match=reason):
        WeightPredictor(prepared, XGradConfig(steps=1.0))


def test_only_optimizers_are_taken() -> None:
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer, got Linear"):
        WeightPredictor(nn.Linear(1, 1), XGradConfig(steps=1.0))  # type: ignore[arg-type]


def test_sharded_parameters_need_the_model() -> None:
    w = nn.Parameter(torch.ones(1))
    w._fsdp_flattened = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="prepared model"):
        WeightPredictor(torch.optim.AdamW([w]), XGradConfig(steps=1.0))


# ---- checkpoints ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("micro_batches", [0, 1])
def test_resumed_is_the_uninterrupted_run(name: str, rule: str, micro_batches: int) -> None:
    """Between steps and in the middle of a window."""
    one = Loop(OPTIMIZERS[name], XGradConfig(steps=1.0, rule=rule)).run(3)
    for _ in range(micro_batches):
        one.micro_batch()
    one.optimizer.zero_grad()
    saved = copy.deepcopy((one.model.state_dict(), one.optimizer.state_dict(), one.predictor.state_dict()))
    assert bool(saved[2]) is bool(one.predictor.remembers) is (rule == "last_update" or name in WITHOUT_FORM)
    two = Loop(OPTIMIZERS[name], XGradConfig(steps=1.0, rule=rule), seed=5)
    for part, state in zip((two.model, two.optimizer, two.predictor), saved, strict=True):
        part.load_state_dict(state)
    two.data.set_state(one.data.get_state())
    one.run(3)
    two.run(3)
    assert same(one.seen[-3], two.seen[-3])
    assert same(one.weights(), two.weights())


def test_state_with_a_tensor_learning_rate_resumes_exactly() -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=torch.tensor(0.1))

    one = Loop(make).run(2)
    two = Loop(make, seed=3)
    two.model.load_state_dict(one.model.state_dict())
    two.predictor.load_state_dict(copy.deepcopy(one.predictor.state_dict()))
    for loop in (one, two):
        loop.optimizer.param_groups[0]["lr"].fill_(0.07)
        loop.data.manual_seed(4)
        loop.run(1)
    assert same(one.seen[-1], two.seen[-1])


def test_state_dict_is_refused_inside_a_prediction() -> None:
    loop = Loop(OPTIMIZERS["sgd"]).run(2)
    with loop.predictor.predicted():
        with pytest.raises(RuntimeError, match="inside a prediction"):
            loop.predictor.state_dict()
        with pytest.raises(RuntimeError, match="inside a prediction"):
            loop.predictor.load_state_dict({})


def test_empty_state_forgets_the_last_update() -> None:
    loop = Loop(OPTIMIZERS["sgd"]).run(2)
    loop.predictor.load_state_dict({})
    before = loop.weights()
    loop.step()
    assert same(loop.seen[-1], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("lrs"), "lacks"),
        (lambda s: s.update(holds="current"), "current"),
        (lambda s: s["lrs"].append(0.1), "2 parameter groups"),
        (lambda s: s["weights"].update({"4.0": torch.ones(1)}), r"4\.0"),
        (lambda s: s["weights"].update({"0.0": torch.ones(1)}), "shape"),
    ],
)
def test_state_of_other_parameters_is_refused(change: Callable[[Any], Any], message: str) -> None:
    loop = Loop(OPTIMIZERS["sgd"]).run(2)
    state = loop.predictor.state_dict()
    state = {**state, "weights": dict(state["weights"])}
    change(state)
    with pytest.raises(ValueError, match=message):
        loop.predictor.load_state_dict(state)


def test_state_of_weights_that_need_none_now_is_left_alone() -> None:
    """Written under the last-update rule, read where (some) groups have a closed form."""
    for settings in ({"momentum": 0.9}, {"momentum": 0.0}):

        def make(params: Any, settings: Any = settings) -> torch.optim.Optimizer:
            first, *rest = params
            return torch.optim.SGD([{"params": [first]}, {"params": rest, **settings}], lr=0.1, momentum=0.9)

        written = Loop(make, XGradConfig(steps=1.0, rule="last_update")).run(3)
        state = copy.deepcopy([part.state_dict() for part in (written.model, written.optimizer, written.predictor)])
        for steps in (1.0, "auto"):
            read = Loop(make, XGradConfig(steps=steps))
            for part, of_part in zip((read.model, read.optimizer, read.predictor), copy.deepcopy(state), strict=True):
                part.load_state_dict(of_part)
            read.run(1)
            first, second = written.model[0].weight, written.model[0].bias
            buffers = [written.optimizer.state[p]["momentum_buffer"] for p in (first, second) if settings["momentum"]]
            if buffers:
                torch.testing.assert_close(read.seen[0][1], second - 0.1 * buffers[1])
            else:
                before = state[2]["weights"]["1.0"]
                s = 0.0 if steps == "auto" else 1.0  # what was learnt is in no state that a fixed s has left
                torch.testing.assert_close(read.seen[0][1], second + s * (second - before))


def test_state_with_a_group_that_was_just_added() -> None:
    one = Loop(OPTIMIZERS["sgd"]).run(2)
    extra = nn.Parameter(torch.ones(3))
    one.optimizer.add_param_group({"params": [extra], "lr": 0.1})
    state = copy.deepcopy(one.predictor.state_dict())
    before = one.weights()
    one.predictor.load_state_dict(state)
    one.step()
    assert not same(one.seen[-1], before)
    assert torch.equal(extra, torch.ones(3))


# ---- diagnostics ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_diagnostics_compare_the_prediction_with_the_step(name: str, rule: str, micro_batches: int) -> None:
    loop = Loop(OPTIMIZERS[name], XGradConfig(steps=1.5, rule=rule)).run(3)
    assert loop.predictor.diagnostics() == {}
    before = loop.weights()
    loop.predictor.measure()
    loop.step(micro_batches)
    w = torch.cat([x.flatten() for x in before])
    move = torch.cat([x.flatten() for x in loop.seen[-1]]) - w
    update = torch.cat([x.flatten() for x in loop.weights()]) - w
    got = loop.predictor.diagnostics()
    assert got["active"] == 1.0
    assert got["relative_norm"] == pytest.approx(float(move.norm() / w.norm()), rel=1e-4)
    assert got["cosine"] == pytest.approx(float(torch.cosine_similarity(move, update, dim=0)), abs=1e-4)
    assert loop.predictor.diagnostics() == {}
    loop.run(1)
    assert loop.predictor.diagnostics() == {}


def test_diagnostics_of_a_step_without_prediction() -> None:
    loop = Loop(OPTIMIZERS["adamw"])
    loop.predictor.measure()
    loop.run(1)
    assert loop.predictor.diagnostics() == {"active": 0.0, "relative_norm": 0.0, "steps": 1.0}


def test_measuring_changes_nothing() -> None:
    one, two = Loop(OPTIMIZERS["sgd"]), Loop(OPTIMIZERS["sgd"])
    for _ in range(4):
        one.predictor.measure()
        one.step(2)
        two.step(2)
    assert same(one.weights(), two.weights())


# ---- life ----


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_predictor_that_is_dropped_leaves_no_trace_on_the_optimizer() -> None:
    loop = Loop(OPTIMIZERS["sgd"]).run(2)
    optimizer, reference = loop.optimizer, weakref.ref(loop.predictor)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    del loop.predictor
    assert reference() is None
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()
