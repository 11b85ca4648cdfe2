"""Weights that somebody else writes: while they are predicted, and between the micro-batches of one window."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.optim import AdaM3

Maker = Callable[[Any], torch.optim.Optimizer]
Case = tuple[str, str, Any]

pytestmark = pytest.mark.filterwarnings("ignore:XGrad")

MAKERS: dict[str, Maker] = {
    # Each eps is one that float16 can hold.
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.05, eps=1e-4),
    "adam3": lambda params: AdaM3(params, lr=0.05, eps=1e-6),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, eps=1e-4),
}
# Optimizer, rule, steps ahead.
CASES: list[Case] = [
    ("momentum", "auto", 1.5),
    ("adamw", "auto", 1.5),
    ("adamw", "auto", "auto"),
    ("adam3", "auto", 1.0),
    ("sgd", "auto", 1.5),
    ("sgd", "auto", "auto"),
    ("adagrad", "auto", 1.0),
    ("adamw", "last_update", 1.5),
]
FEW: list[Case] = [("adamw", "auto", 1.5), ("sgd", "auto", 1.5), ("sgd", "auto", "auto")]


def cases(those: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", those, ids=["-".join(map(str, case)) for case in those])


def by_last_update(case: Case) -> bool:
    name, rule, _ = case
    return rule == "last_update" or name in ("sgd", "adagrad")


class Toy(nn.Module):
    """Gradients that do not depend on the weights: whoever sees other weights still takes the same steps."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.lin = nn.Linear(4, 3)
        self.writer: Callable[[Toy], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.writer is not None:
            self.writer(self)
        return self.emb(torch.tensor([0, 1, 1, 4])).sum() + self.lin(x).sum()


class Loop:
    """A plain training loop, a window at a time."""

    def __init__(self, case: Case, *, named: bool = False, groups: bool = False) -> None:
        name, rule, steps = case
        torch.manual_seed(0)
        self.model = Toy()
        params: Any = list(self.model.parameters())
        if groups:
            params = [{"params": params[:1]}, {"params": params[1:]}]
        self.optimizer = MAKERS[name](params)
        config = XGradConfig(steps=steps, rule=rule)
        self.predictor = (
            WeightPredictor(self.optimizer, config, self.model) if named else WeightPredictor(self.optimizer, config)
        )
        self.data = torch.Generator().manual_seed(1)

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def batch(self) -> Tensor:
        # Of one sign, so that the updates repeat themselves and steps="auto" predicts something.
        return 1 + 0.1 * torch.randn(2, 4, generator=self.data)

    def step(self) -> list[Tensor]:
        """One window of one micro-batch; returns the weights that it saw."""
        with self.predictor.predicted():
            seen = self.weights()
            self.model(self.batch()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return seen

    def run(self, steps: int) -> Loop:
        for _ in range(steps):
            self.step()
        return self


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(bits(x, y) for x, y in zip(a, b, strict=True))


def bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: of NaN and of the sign of 0 too."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(kind), b.detach().view(kind))


# ---- who writes ----


def clamp(model: Toy) -> None:
    with torch.no_grad():
        model.lin.weight.clamp_(-0.01, 0.01)


def clamp_data(model: Toy) -> None:
    model.lin.weight.data.clamp_(-0.01, 0.01)


def add_to_data(model: Toy) -> None:
    model.lin.weight.data += 0.25


def replace_data(model: Toy) -> None:
    model.lin.weight.data.copy_(torch.zeros(3, 4))


def reverse_data(model: Toy) -> None:
    """The same numbers at other places."""
    model.lin.weight.data.copy_(model.lin.weight.data.flip(0))


def step_inside(model: Toy) -> None:
    """A second optimizer."""
    model.lin.weight.grad = torch.ones_like(model.lin.weight)
    torch.optim.SGD([model.lin.weight], lr=0.125).step()
    model.lin.weight.grad = None


IN_PLACE = [clamp, step_inside]
THROUGH_DATA = [clamp_data, add_to_data, replace_data, reverse_data]


def check_message(error: pytest.ExceptionInfo[RuntimeError], weight: str) -> None:
    text = str(error.value)
    assert text.startswith("XGrad")
    assert weight in text
    assert "xgrad=False" in text or "XGradConfig(enabled=False)" in text


@pytest.fixture(params=["leaving predicted()", "restore()"])
def way_out(request: pytest.FixtureRequest) -> Callable[[Loop, Callable[[], None]], None]:
    def with_statement(loop: Loop, body: Callable[[], None]) -> None:
        with loop.predictor.predicted():
            body()

    def by_hand(loop: Loop, body: Callable[[], None]) -> None:
        loop.predictor.predict()
        body()
        loop.predictor.restore()

    return with_statement if request.param == "leaving predicted()" else by_hand


@cases(CASES)
@pytest.mark.parametrize("writer", IN_PLACE)
def test_a_weight_that_is_written_while_predicted_is_an_error(
    writer: Callable[[Toy], None], case: Case, way_out: Callable[..., None]
) -> None:
    """The true weights are back when it is raised, and the run can go on as if the fault had never been."""
    loop, twin = Loop(case).run(3), Loop(case).run(3)
    before = loop.weights()
    loop.model.writer = writer
    with pytest.raises(RuntimeError) as caught:
        way_out(loop, lambda: loop.model(torch.ones(2, 4)).backward())
    check_message(caught, "parameter 1 of group 0")
    assert same(loop.weights(), before)
    assert not loop.predictor.is_predicted
    loop.model.writer = None
    loop.optimizer.zero_grad()
    expected, seen = twin.step(), loop.step()
    assert not same(expected, before)
    if by_last_update(case):
        # One copy of the weights is all there is: of a weight that was written, the prediction may be lost.
        assert bits(seen[1], expected[1]) or bits(seen[1], before[1])
    else:
        assert same(seen, expected)
    assert same(loop.weights(), twin.weights())
    for _ in range(3):
        assert same(loop.step(), twin.step())
        assert same(loop.weights(), twin.weights())


@cases(FEW)
def test_the_weight_is_told_by_its_name_in_the_model(case: Case) -> None:
    loop = Loop(case, named=True).run(3)
    loop.model.writer = clamp
    with pytest.raises(RuntimeError) as caught:
        loop.step()
    check_message(caught, "lin.weight")
    assert "emb.weight" not in str(caught.value)
    assert "lin.bias" not in str(caught.value)


def test_the_weight_is_told_by_its_place_where_there_is_no_model() -> None:
    loop = Loop(("adamw", "auto", 1.0), groups=True).run(3)
    loop.model.writer = clamp
    with pytest.raises(RuntimeError) as caught:
        loop.step()
    check_message(caught, "parameter 0 of group 1")


@cases(CASES)
def test_an_embedding_with_max_norm_writes_in_forward(case: Case) -> None:
    """In the first window nothing is moved yet, so that it may; in the first one that moves, it is noticed."""
    loop = Loop(case)
    loop.model.emb.max_norm = 1.0
    loop.step()
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012
        for _ in range(3):
            before = loop.weights()
            loop.step()
    check_message(caught, "parameter 0 of group 0")
    assert same(loop.weights(), before)
    assert not loop.predictor.is_predicted


@cases(FEW)
def test_a_hook_that_steps_inside_backward_is_noticed(case: Case) -> None:
    loop, twin = Loop(case).run(3), Loop(case).run(3)
    inner = torch.optim.SGD([loop.model.lin.weight], lr=0.125)
    hook = loop.model.lin.weight.register_post_accumulate_grad_hook(lambda p: inner.step())
    before = loop.weights()
    with pytest.raises(RuntimeError) as caught, loop.predictor.predicted():
        loop.model(torch.ones(2, 4)).backward()
    check_message(caught, "parameter 1 of group 0")
    assert same(loop.weights(), before)
    assert not loop.predictor.is_predicted
    hook.remove()
    loop.optimizer.zero_grad()
    loop.step()
    twin.step()
    assert same(loop.step(), twin.step())


@cases(CASES)
@pytest.mark.parametrize("writer", THROUGH_DATA)
def test_a_write_through_data_at_every_forward_is_noticed_at_the_first_move(
    writer: Callable[[Toy], None], case: Case
) -> None:
    """Version counters do not show it; the values do."""
    loop, twin = Loop(case), Loop(case)  # the twin tells which window is the first that moves anything
    loop.model.writer = writer
    for _ in range(4):
        before, of_twin = loop.weights(), twin.weights()
        if not same(twin.step(), of_twin):
            break
        loop.step()
    with pytest.raises(RuntimeError) as caught:
        loop.step()
    check_message(caught, "parameter 1 of group 0")
    assert same(loop.weights(), before)
    assert not loop.predictor.is_predicted


@cases(FEW)
@pytest.mark.parametrize(("first", "at_the_latest"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8)])
def test_a_write_through_data_is_noticed_at_the_1st_2nd_4th_8th_move(
    first: int, at_the_latest: int, case: Case
) -> None:
    """It may begin late, as one under a condition does."""
    loop = Loop(case)
    moves = 0
    for _ in range(12):
        before = loop.weights()
        loop.predictor.predict()
        moves += not same(loop.weights(), before)
        if moves >= first:
            clamp_data(loop.model)
        loop.model(loop.batch()).backward()
        noticed = error_of(loop.predictor.restore)
        assert same(loop.weights(), before)
        if noticed is not None:
            break
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    assert first <= moves <= at_the_latest
    assert "parameter 1 of group 0" in str(noticed)


def error_of(action: Callable[[], Any]) -> RuntimeError | None:
    try:
        action()
    except RuntimeError as error:
        return error
    return None


# ---- who does not ----


@pytest.mark.parametrize("writer", [None, clamp, clamp_data])
@cases(FEW)
def test_an_error_of_the_body_is_the_one_that_comes_out(case: Case, writer: Callable[[Toy], None] | None) -> None:
    loop = Loop(case).run(3)
    before = loop.weights()
    loop.model.writer = writer
    with pytest.raises(ZeroDivisionError, match="mine"), loop.predictor.predicted():  # noqa: PT012
        assert not same(loop.weights(), before)
        loop.model(torch.ones(2, 4))
        raise ZeroDivisionError("mine")
    assert same(loop.weights(), before)
    assert not loop.predictor.is_predicted
    loop.model.writer = None
    loop.run(2)


@cases(FEW)
def test_a_weight_that_was_not_moved_may_be_written(case: Case) -> None:
    """What is written into it stays: those weights are the true ones."""
    loop = Loop(case)
    loop.model.lin.weight.requires_grad_(False)
    loop.model.writer = clamp
    for _ in range(4):
        with torch.no_grad():
            loop.model.lin.weight.fill_(1.0)
        with loop.predictor.predicted():
            loop.model(loop.batch()).backward()
        assert torch.equal(loop.model.lin.weight, torch.full((3, 4), 0.01))
        loop.optimizer.step()
        loop.optimizer.zero_grad()


EVERY: dict[str, Maker] = {
    **MAKERS,
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "radam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "adamax": lambda params: torch.optim.Adamax(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "adadelta": lambda params: torch.optim.Adadelta(params),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.01),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
}


class Busy(nn.Module):
    """Layers that write something in forward, but no weights of theirs; two weights are tied, one serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.1)
        self.outer = nn.Linear(6, 6)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(torch.tanh(self.inner(x))))
        h = checkpoint(self.outer, h, use_reentrant=False)
        return self.inner(h).square().mean()


@pytest.mark.parametrize("rule", ["auto", "last_update"])
@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_raised_where_nobody_writes(name: str, rule: str) -> None:
    """All optimizers, with accumulation, autocast, clipping, and weights that are written between the steps."""
    torch.manual_seed(0)
    model = Busy()
    optimizer = EVERY[name](model.parameters())
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.5, rule=rule))
    moved = 0
    for i in range(4):
        for autocast in (False, True):
            before = [p.detach().clone() for p in model.parameters()]
            with predictor.predicted():
                moved += not torch.equal(model.inner.weight, before[0])
                with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                    loss = model(torch.randn(4, 6))
                loss.backward()
                _ = [p.data.norm() for p in model.parameters()]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert same([p.detach() for p in model.parameters()], before)
        optimizer.step()
        optimizer.zero_grad()
        if i % 2:
            with torch.no_grad():
                model.inner.weight.clamp_(-0.5, 0.5)
            model.outer.bias.data.mul_(0.5)
    assert moved >= 5


@cases(FEW)
def test_weights_that_have_diverged_are_not_taken_for_written(case: Case) -> None:
    """NaN is not equal to itself."""
    loop = Loop(case).run(1)
    with loop.predictor.predicted():
        (loop.model(loop.batch()) * float("nan")).backward()
    loop.optimizer.step()
    for _ in range(5):
        loop.optimizer.zero_grad()
        before = loop.weights()
        loop.step()
        assert before[1].isnan().all()


# ---- embeddings that renormalise themselves ----


class Encoder(nn.Module):
    def __init__(self, emb: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"words": emb, "out": nn.Linear(4, 2)})


EMBEDDINGS = [nn.Embedding, nn.EmbeddingBag]


@pytest.mark.parametrize("steps", [1.0, "auto"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_with_max_norm_is_refused_where_the_model_is_known(
    kind: type[nn.Module], name: str, steps: Any
) -> None:
    model = Encoder(kind(5, 4, max_norm=2.0))
    with pytest.raises(ValueError, match=r"(?s)encoder\.words.*max_norm|max_norm.*encoder\.words") as caught:
        WeightPredictor(MAKERS[name](model.parameters()), XGradConfig(steps=steps), model)
    assert "xgrad=False" in str(caught.value) or "XGradConfig(enabled=False)" in str(caught.value)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_that_is_not_moved_may_have_max_norm(kind: type[nn.Module], name: str) -> None:
    model = Encoder(kind(5, 4, max_norm=2.0))
    optimizer = MAKERS[name](model.parameters())
    for config in (XGradConfig(enabled=False), XGradConfig(steps=0.0)):
        WeightPredictor(optimizer, config, model)
    model.encoder["words"].weight.requires_grad_(False)
    WeightPredictor(optimizer, XGradConfig(steps=1.0), model)
    without = Encoder(kind(5, 4))
    WeightPredictor(MAKERS[name](without.parameters()), XGradConfig(steps=1.0), without)


# ---- between two micro-batches ----


def magnitudes(n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random numbers of very different size, within what float16 can hold, zeros of both signs among them."""
    numbers = torch.randn(n, generator=generator, dtype=torch.float64)
    numbers *= 10.0 ** (torch.rand(n, generator=generator, dtype=torch.float64) * 10 - 7)
    numbers[::17] = 0.0
    numbers[1::17] = -0.0
    return numbers.to(dtype)


class Wild:
    """Two weights under an optimizer, gradients of very different size, a learning rate that jumps."""

    LRS = (1.0, 0.3, 0.7, 0.05, 0.11, 0.9)

    def __init__(self, name: str, rule: str, steps: Any, dtype: torch.dtype, elements: int = 400) -> None:
        self.data = torch.Generator().manual_seed(3)
        self.params = [nn.Parameter(magnitudes(elements, self.data, dtype)) for _ in range(2)]
        self.optimizer = MAKERS[name](self.params)
        self.predictor = WeightPredictor(self.optimizer, XGradConfig(steps=steps, rule=rule))
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.steps = 0

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def forward(self) -> list[Tensor]:
        """A micro-batch: the weights that it sees; the true ones have to be back after it."""
        before = self.weights()
        with self.predictor.predicted():
            seen = self.weights()
        assert same(self.weights(), before)
        return seen

    def step(self) -> None:
        for p in self.params:
            # Much of it stays as it is, so that steps="auto" predicts something.
            p.grad = (25 + magnitudes(p.numel(), self.data, torch.float64).abs().clamp(max=50)).to(p.dtype)
        self.optimizer.step()
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = self.lr * self.LRS[self.steps % len(self.LRS)]

    def run(self, steps: int) -> Wild:
        for _ in range(steps):
            self.forward()
            self.step()
        return self


LAST = [("sgd", "auto"), ("adagrad", "auto"), ("adamw", "last_update")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(
    [case for case in CASES if not by_last_update(case) and case[2] != "auto"]
    + [(*case, s) for case in LAST for s in (1.0, 1.5, 3.0, "auto")]
)
def test_all_micro_batches_of_a_window_see_the_same_weights(case: Case, dtype: torch.dtype) -> None:
    """To the last bit, whatever the size of the weights and of their updates."""
    wild = Wild(*case, dtype, elements=4000)
    moved = 0
    for _ in range(6):
        true = wild.weights()
        first, *others = [wild.forward() for _ in range(3)]
        moved += not same(first, true)
        for seen in others:
            assert all(torch.equal(a, b) for a, b in zip(seen, first, strict=True))
        wild.step()
    assert moved >= (3 if case[2] == "auto" else 4)


@pytest.mark.parametrize("s", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_window_sees_the_same_weights_however_they_are_rounded(dtype: torch.dtype, s: float) -> None:
    """w, and w_{t-1} of up to 64 times its size: in bfloat16 all of them there are, but for common factors of two.

    A move that is worked out anew as `w_hat - w` does not always lead to `w_hat` again: -384 is what is kept for
    129 -> -256, and leads to -255.
    """
    digits = torch.arange(128, 256, dtype=torch.float64)
    if dtype is torch.float16:  # some of them
        digits = torch.randint(1024, 2048, (128,), generator=torch.Generator().manual_seed(0)).double() / 8
    sizes = torch.tensor([sign * 2.0**e for e in range(-6, 7) for sign in (1, -1)], dtype=torch.float64)
    w, previous, factor = (x.flatten() for x in torch.meshgrid(digits, digits, sizes, indexing="ij"))
    w, previous = w.to(dtype), (previous * factor).to(dtype)
    p = nn.Parameter(previous.clone())
    optimizer = torch.optim.SGD([p], lr=1.0)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=s))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    with torch.no_grad():
        p.copy_(w)  # the update is what has become of the weights, whoever did it
    seen = []
    for _ in range(3):
        with predictor.predicted():
            seen.append(p.detach().clone())
        assert bits(p, w)
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0])
    expected = w.double() + s * (w.double() - previous.double())
    largest = torch.maximum(
        w.double().abs(), torch.maximum((s * (w.double() - previous.double())).abs(), expected.abs())
    )
    assert ((seen[0].double() - expected).abs() <= 3 * torch.finfo(dtype).eps * largest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases(CASES)
def test_a_perturbation_between_two_micro_batches_is_seen_too(case: Case, dtype: torch.dtype) -> None:
    """As in adversarial training: w + e is there instead of w, so forward sees w_hat + e; then e is taken away."""
    wild, twin = (Wild(*case, dtype).run(3) for _ in range(2))
    for _ in range(3):
        true = wild.weights()
        predicted = wild.forward()
        assert not torch.equal(predicted[0], true[0])
        e = magnitudes(true[0].numel(), torch.Generator().manual_seed(9), dtype)
        with torch.no_grad():
            wild.params[0].add_(e)
        perturbed = wild.weights()
        assert not torch.equal(perturbed[0], true[0])
        seen = wild.forward()  # which also checks that w + e comes back
        _check_sum(seen[0], predicted[0], e, [true[0], perturbed[0]])
        # The weight that nobody wrote is seen as before.
        assert torch.equal(seen[1], predicted[1])
        with torch.no_grad():
            wild.params[0].copy_(true[0])
        again = wild.forward()
        _check_sum(again[0], predicted[0], torch.zeros_like(e), [true[0], perturbed[0], seen[0]])
        assert torch.equal(again[1], predicted[1])
        # And the coming windows are those of a run that never met it.
        twin.forward()
        wild.step()
        twin.step()
        assert same(wild.weights(), twin.weights())


def _check_sum(seen: Tensor, predicted: Tensor, e: Tensor, sizes: list[Tensor]) -> None:
    """`seen` is `predicted + e`, but for a few roundings of numbers of these sizes."""
    largest = torch.stack([x.double().abs() for x in (seen, predicted, e, *sizes)]).amax(0)
    finfo = torch.finfo(seen.dtype)
    error = (seen.double() - (predicted.double() + e.double())).abs()
    bound = 6 * finfo.eps * largest + 6 * finfo.smallest_normal * finfo.eps
    assert (error <= bound).all(), f"at worst {(error / bound).max():.3g} times the bound"


@pytest.mark.parametrize("name", ["sgd", "adagrad", "momentum", "adamw"])
def test_a_perturbation_that_stays_becomes_part_of_the_weights(name: str) -> None:
    wild = Wild(name, "last_update", 1.5, torch.float64).run(3)
    wild.forward()
    with torch.no_grad():
        wild.params[0].add_(1.0)
    wild.forward()
    before, last_lr = wild.weights(), wild.optimizer.param_groups[0]["lr"]
    wild.step()
    ratio = wild.optimizer.param_groups[0]["lr"] / last_lr
    for seen, w, w_before in zip(wild.forward(), wild.weights(), before, strict=True):
        torch.testing.assert_close(seen, w + 1.5 * ratio * (w - w_before), rtol=1e-12, atol=1e-14)
