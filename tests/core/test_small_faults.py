"""Small faults that were found by looking, each with what it did wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.optim import AdaM3

pytestmark = pytest.mark.filterwarnings("ignore:XGrad")

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adam3": lambda params: AdaM3(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}
CLOSED = ("momentum", "adamw", "adam3")
LAST = ("sgd", "rmsprop")


def forward(
    predictor: WeightPredictor, params: list[nn.Parameter], gradient: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """A micro-batch: what it sees. The true weights have to be back bit for bit."""
    true = [p.detach().clone() for p in params]
    with predictor.predicted():
        seen = [p.detach().clone() for p in params]
        for p in params:
            p.grad = gradient(p.detach())
    assert all(torch.equal(p, w) for p, w in zip(params, true, strict=True))
    return seen


def values(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- states beside those of the parameters ----


@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_may_keep_numbers_beside_the_states_of_its_parameters(name: str) -> None:
    """SPAM of pytorch-optimizer counts all its steps so: the plan of the chunks asked the count for its length."""
    seen = []
    for counted in (False, True):
        params = [nn.Parameter(values(4, 0))]
        optimizer = MAKERS[name](params)
        predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
        for step in range(4):
            if counted:
                optimizer.state["total"] = 1000 * step  # type: ignore[index]
            seen.append(forward(predictor, params, lambda w: 2 * w))
            optimizer.step()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen[:4], seen[4:], strict=True))


# ---- AdaM3 ----


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16_by_default")
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_adam3_counts_its_steps_beyond_256(dtype: torch.dtype, foreach: bool) -> None:
    """bfloat16 knows no number between 256 and 258: a count in the default type stood still there."""
    w = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = AdaM3([w], lr=1e-3, eps=1e-4, foreach=foreach)
    w.grad = torch.ones_like(w)
    for _ in range(260):
        optimizer.step()
    step = optimizer.state[w]["step"]
    assert step.dtype == torch.float32
    assert step.item() == 260


# ---- weights that are not there yet ----


@pytest.mark.parametrize("rule", ["auto", "last_update"])
@pytest.mark.parametrize("steps", [1.5, "auto"])
@pytest.mark.parametrize("name", MAKERS)
def test_lazy_layers_get_their_weights_in_the_first_forward(name: str, steps: Any, rule: str) -> None:
    """Before it there is nothing to predict; what it makes are true weights; later ones are predicted as any other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
    optimizer = MAKERS[name](model.parameters())
    predictor = WeightPredictor(optimizer, XGradConfig(steps=steps, rule=rule))
    predictor.load_state_dict(predictor.state_dict())
    x = torch.linspace(-1, 2, 20).reshape(5, 4)
    seen: list[list[Tensor]] = []
    true: list[list[Tensor]] = []
    for _ in range(5):
        with predictor.predicted():
            if seen:
                seen.append([p.detach().clone() for p in model.parameters()])
            loss = model(x).sum()
            if not seen:
                seen.append([p.detach().clone() for p in model.parameters()])
            loss.backward()
        true.append([p.detach().clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(seen[0], true[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[4], true[4], strict=True))
    if steps == 1.5 and (rule == "last_update" or name in LAST):
        for s, w, before in zip(seen[4], true[4], true[3], strict=True):
            torch.testing.assert_close(s, w + 1.5 * (w - before))


# ---- a first prediction in inference mode ----


@pytest.mark.parametrize("rule", ["auto", "last_update"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_first_prediction_may_be_one_of_inference_mode(name: str, rule: str) -> None:
    """As of a run that is resumed and evaluated on predicted weights first: what it allocates serves training too."""

    def run(*, look: bool) -> list[Tensor]:
        params = [nn.Parameter(values(4, 1)), nn.Parameter(values(6, 2))]
        optimizer = MAKERS[name](params)
        for t in range(2):
            for p in params:
                p.grad = values(p.numel(), 10 + t)
            optimizer.step()
        predictor = WeightPredictor(optimizer, XGradConfig(steps=1.5, rule=rule))
        seen = []
        for t in range(4):
            if look:
                true = [p.detach().clone() for p in params]
                with torch.inference_mode():
                    with predictor.predicted():
                        looked_at = [p.detach().clone() for p in params]
                    assert all(torch.equal(p, w) for p, w in zip(params, true, strict=True))
            seen += forward(predictor, params, lambda w, t=t: w / 10 + values(w.numel(), 20 + t))
            assert not look or all(torch.equal(a, b) for a, b in zip(looked_at, seen[-2:], strict=True))
            optimizer.step()
        assert not torch.equal(seen[-1], params[-1])
        return seen + [p.detach().clone() for p in params]

    assert all(torch.equal(a, b) for a, b in zip(run(look=True), run(look=False), strict=True))


# ---- a buffer that is None ----


@pytest.mark.parametrize("steps", [1.5, "auto"])
def test_a_buffer_of_none_predicts_nothing(steps: Any) -> None:
    """SGD makes one of None at its next step; states that were saved without momentum hold such."""
    params = [nn.Parameter(values(4, 1)), nn.Parameter(values(4, 2)), nn.Parameter(values(3, 3))]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][1]["momentum_buffer"] = None
    optimizer.load_state_dict(state)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=steps))
    for t in range(3):
        true = [p.detach().clone() for p in params]
        seen = forward(predictor, params, torch.ones_like)
        assert torch.equal(seen[1], true[1]) is (t == 0)
        assert not torch.equal(seen[0], true[0])
        assert not torch.equal(seen[2], true[2])
        optimizer.step()


# ---- complex weights ----


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside real ones"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_diagnostics_of_complex_weights(name: str, dtype: torch.dtype, beside: bool) -> None:
    """Their imaginary parts count as their real ones do."""

    def numbers(seed: int) -> Tensor:
        return torch.complex(values(5, seed), values(5, seed + 100) * 3 + 1).to(dtype)

    w, v = nn.Parameter(numbers(1)), nn.Parameter(values(4, 9))
    params = [w, v] if beside else [w]
    optimizer = MAKERS[name](params)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.5, rule="last_update"))

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([torch.view_as_real(t).flatten().double() if t.is_complex() else t.double() for t in tensors])

    for t in range(4):
        predictor.measure()
        seen = forward(predictor, params, lambda x, t=t: numbers(20 + t) if x.is_complex() else values(4, 30 + t))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        told = predictor.diagnostics()
    move = flat(seen) - flat(before)
    update = flat([p.detach() for p in params]) - flat(before)
    assert told["active"] == 1.0
    assert told["relative_norm"] == pytest.approx(float(move.norm() / flat(before).norm()), rel=1e-4)
    assert told["cosine"] == pytest.approx(float(torch.cosine_similarity(move, update, dim=0)), abs=1e-4)


# ---- float16 and learning rates on a device ----


@pytest.mark.parametrize(
    ("cls", "betas"),
    [
        (torch.optim.AdamW, (0.9, 0.999)),
        (torch.optim.AdamW, (torch.tensor(0.9), torch.tensor(0.999))),
        (torch.optim.Adam, (0.9, 0.999)),
        (AdaM3, (0.9, 0.999)),
    ],
    ids=["AdamW", "AdamW with tensors for betas", "Adam", "AdaM3"],
)
def test_a_tensor_lr_moves_float16_weights_as_a_number_does(cls: type[torch.optim.Optimizer], betas: Any) -> None:
    """The root of v over lr is beyond what float16 holds, and the move that it stands below was lost."""

    def window(lr: Any, betas: Any) -> tuple[Tensor, Tensor]:
        w = nn.Parameter(torch.linspace(0.001, 0.01, 10).half())
        optimizer = cls([w], lr=lr, betas=betas, eps=1e-4)  # type: ignore[call-arg]
        predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
        for _ in range(3):
            w.grad = torch.full_like(w, 200.0)
            optimizer.step()
        true = w.detach().clone()
        with predictor.predicted():
            seen = w.detach().clone()
        assert torch.equal(w, true)
        return true.double(), seen.double()

    true, seen = window(1e-4, (0.9, 0.999))
    assert ((true - seen).abs() > 5e-5).all()
    of_tensor, seen_of_tensor = window(torch.tensor(1e-4), betas)
    torch.testing.assert_close(seen_of_tensor - of_tensor, seen - true, rtol=0.02, atol=2e-5)


# ---- life ----


@pytest.mark.parametrize("steps", [1.0, "auto", "default"])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_nothing_waits_for_the_garbage_collector(name: str, steps: Any) -> None:
    """Weights and all that is kept of them are large: they go when predictor and optimizer are dropped."""
    params = [nn.Parameter(values(4, 1))]
    optimizer = MAKERS[name](params)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=steps))
    for _ in range(3):
        predictor.measure()
        forward(predictor, params, torch.ones_like)
        optimizer.step()
        predictor.diagnostics()
    references = [weakref.ref(predictor), weakref.ref(optimizer), weakref.ref(params[0])]
    gc.disable()
    try:
        del predictor
        assert references[0]() is None
        del optimizer, params
        assert references[1]() is None
        assert references[2]() is None
    finally:
        gc.enable()


# ---- steps="default" ----


def run(name: str, config: XGradConfig, windows: int = 6, gradient: Callable[[int], float] = lambda t: 1.0) -> Any:
    """`(seen, true, told)` of each window; gradients do not depend on the weights."""
    p = nn.Parameter(values(5, 1))
    optimizer = MAKERS[name]([p])
    predictor = WeightPredictor(optimizer, config)
    result = []
    for t in range(windows):
        true = p.detach().clone()
        predictor.measure()
        seen = forward(predictor, [p], lambda w, t=t: gradient(t) + 0.1 * values(5, 50 + t))[0]
        optimizer.step()
        result.append((seen, true, predictor.diagnostics()))
    return result


def test_the_default_is_the_default() -> None:
    assert XGradConfig().steps == "default"
    assert XGradConfig() == XGradConfig(steps="default")


@pytest.mark.parametrize("name", CLOSED)
def test_by_default_a_closed_form_predicts_one_step(name: str) -> None:
    for mine, one in zip(run(name, XGradConfig()), run(name, XGradConfig(steps=1.0)), strict=True):
        assert torch.equal(mine[0], one[0])
        assert torch.equal(mine[1], one[1])
        assert mine[2] == one[2]
        assert mine[2]["steps"] == 1.0


@pytest.mark.parametrize(("name", "rule"), [("sgd", "auto"), ("rmsprop", "auto"), ("adamw", "last_update")])
def test_by_default_the_last_update_rule_chooses_its_steps(name: str, rule: str) -> None:
    """As "auto" does, and it moves nothing before it knows two updates."""
    by_default = run(name, XGradConfig(rule=rule))
    for t, (seen, true, told) in enumerate(by_default):
        assert torch.equal(seen, true) is (t < 2)
        if t < 2:
            assert told["active"] == 0.0
        else:
            assert 0.0 < told["steps"] <= 2.0
            before = by_default[t - 1][1]
            torch.testing.assert_close(seen, true + told["steps"] * (true - before), rtol=1e-6, atol=1e-7)
    assert len({told["steps"] for _, _, told in by_default[2:]}) == 4
    for mine, auto in zip(by_default[2:], run(name, XGradConfig(steps="auto", rule=rule))[2:], strict=True):
        assert torch.equal(mine[0], auto[0])
        assert mine[2]["steps"] == auto[2]["steps"]


@pytest.mark.parametrize("name", LAST)
def test_by_default_nothing_is_moved_where_updates_turn_back_and_forth(name: str) -> None:
    for t, (seen, true, told) in enumerate(run(name, XGradConfig(), 12, lambda t: (-1.0) ** t)):
        assert torch.equal(seen, true)
        assert told["active"] == 0.0
        assert t < 2 or told["steps"] == 0.0


def test_updates_that_begin_to_turn_bring_the_steps_to_0() -> None:
    """And they come back when the updates repeat themselves again."""

    def gradient(t: int) -> float:
        return 1.0 if t < 5 or t >= 40 else (-1.0) ** t

    windows = run("sgd", XGradConfig(), 100, gradient)
    assert windows[5][2]["steps"] > 1.0
    for seen, true, told in windows[30:41]:
        assert told["steps"] == 0.0
        assert torch.equal(seen, true)
    assert windows[-1][2]["steps"] > 0.1
    assert not torch.equal(windows[-1][0], windows[-1][1])


def test_by_default_each_group_has_the_steps_of_its_rule() -> None:
    first, second = nn.Parameter(values(4, 1)), nn.Parameter(values(4, 2))
    optimizer = torch.optim.SGD([{"params": [first], "momentum": 0.9}, {"params": [second]}], lr=0.1)
    predictor = WeightPredictor(optimizer, XGradConfig())
    last = second.detach().clone()
    for t in range(6):
        true = [p.detach().clone() for p in (first, second)]
        predictor.measure()
        seen = forward(predictor, [first, second], lambda w, t=t: 1 + 0.1 * values(4, 50 + t))
        buffer = optimizer.state[first]["momentum_buffer"].clone() if t else torch.zeros_like(first)
        optimizer.step()
        told = predictor.diagnostics()
        assert told["steps_0"] == 1.0
        assert told["steps"] == pytest.approx((1 + told["steps_1"]) / 2)
        torch.testing.assert_close(seen[0], true[0] - 0.1 * buffer)
        if t < 2:
            assert torch.equal(seen[1], true[1])
        else:
            assert 0.0 < told["steps_1"] <= 2.0
            assert told["steps_1"] != 1.0
            torch.testing.assert_close(seen[1], true[1] + told["steps_1"] * (true[1] - last), rtol=1e-6, atol=1e-7)
        last = true[1]


# ---- what diagnostics tell of s ----


def told_of(name: str, steps: Any, groups: int) -> list[dict[str, float]]:
    params = [nn.Parameter(values(3, i)) for i in range(groups)]
    optimizer = MAKERS[name]([{"params": [p]} for p in params])
    predictor = WeightPredictor(optimizer, XGradConfig(steps=steps))
    told = []
    for _ in range(3):
        predictor.measure()
        forward(predictor, params, torch.ones_like)
        optimizer.step()
        told.append(predictor.diagnostics())
    forward(predictor, params, torch.ones_like)
    optimizer.step()
    assert predictor.diagnostics() == {}
    return told


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("steps", [1.0, 1.5])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_measured_step_always_tells_its_number_of_steps(name: str, steps: float, groups: int) -> None:
    """Also of the first step, at which there is nothing yet to move; a fixed number is not told group by group."""
    for told in told_of(name, steps, groups):
        assert told["steps"] == steps
        assert set(told) - {"cosine"} == {"active", "relative_norm", "steps"}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_are_told_by_group_where_groups_choose_theirs(name: str) -> None:
    for told in told_of(name, "auto", 1):
        assert set(told) - {"cosine"} == {"active", "relative_norm", "steps"}
    for told in told_of(name, "auto", 2):
        assert set(told) - {"cosine"} == {"active", "relative_norm", "steps", "steps_0", "steps_1"}
        assert told["steps"] == pytest.approx((told["steps_0"] + told["steps_1"]) / 2)


def test_weights_that_are_quantised_for_training_are_refused() -> None:
    """torchao rounds whatever is written to them, at random."""
    training = pytest.importorskip("torchao.prototype.quantized_training")
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_(model[1], training.int8_weight_only_quantized_training(), filter_fn=lambda *_: True)
    optimizer = torch.optim.AdamW(model.parameters())
    for settings in ((optimizer, XGradConfig()), (optimizer, XGradConfig(), model)):
        with pytest.raises(ValueError, match=r"^XGrad: .*Int8Quantized.* is refused: .*xgrad=False"):
            WeightPredictor(*settings)
    WeightPredictor(optimizer, XGradConfig(enabled=False), model)
    model[1].weight.requires_grad_(False)
    WeightPredictor(torch.optim.AdamW(model[0].parameters()), XGradConfig(), model)
