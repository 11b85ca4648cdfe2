"""AutoSteps: the s it finds where the right one is known, what it leaves alone, and that it resumes bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_xgrad.core.auto_steps import AutoSteps
from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.rules import register_rule
from hf_xgrad.core.weights import Weights
from inside import sample_limits, sampling
from tiny_models import bert

GAMMA = 0.5
BOUND = 1 / (1 - GAMMA)
# s after each of five updates that are all the same: nothing is known after the first, then sums of gamma^k, averaged.
REPEATED = [0.0, 1.0, (0.98 * 1 + 1.5) / 1.98, (0.98**2 * 1 + 0.98 * 1.5 + 1.75) / (0.98**2 + 1.98)]
REPEATED += [(0.98**3 * 1 + 0.98**2 * 1.5 + 0.98 * 1.75 + 1.875) / (0.98**3 + 0.98**2 + 1.98)]

AUTO = XGradConfig(steps="auto")


class Given(torch.optim.Optimizer):
    """Adds lr times the update it is given to each parameter."""

    def __init__(self, params: Any, lr: Any = 1.0) -> None:
        super().__init__(params, {"lr": lr} if lr is not None else {})

    @torch.no_grad()
    def step(self, updates: Sequence[Tensor | float]) -> None:  # type: ignore[override]
        params = [(p, group.get("lr", 1.0)) for group in self.param_groups for p in group["params"]]
        for (p, lr), update in zip(params, updates, strict=True):
            p += lr * update


class Formed(Given):
    """The same with a closed form, of which nothing but that there is one matters here."""


register_rule(Formed, unless=lambda group: "none is wanted" if group.get("without_form") else None)(
    lambda params, states, group: [torch.zeros_like(p) for p in params]
)


def realise(auto: AutoSteps, step: Callable[[], Any]) -> None:
    auto.before_step()
    step()
    auto.after_step()


def stepped(auto: AutoSteps, step: Callable[[], Any]) -> list[float]:
    """s of each group after a step."""
    realise(auto, step)
    return auto.values()


def given(*sizes: Any, lr: Any = 1.0, **kwargs: Any) -> tuple[Given, AutoSteps]:
    """One group for each size, of one parameter, under the last-update rule: s begins at 0."""
    groups = [{"params": [nn.Parameter(torch.zeros(size, **kwargs))]} for size in sizes]
    optimizer = Given(groups, lr)
    return optimizer, AutoSteps(Weights(optimizer, "auto"), AUTO)


def run(auto: AutoSteps, optimizer: Given, updates: Sequence[Any]) -> list[float]:
    """s of the first group after each of the updates."""
    return [stepped(auto, lambda u=u: optimizer.step([u]))[0] for u in updates]


def twin(weights: Sequence[Tensor], lrs: Sequence[float]) -> float:
    """s after w_0, ..., w_T, from whole vectors and sums over pairs of steps, without a trace."""
    updates = [(b.double() - a.double()) / lr for (a, b), lr in zip(pairwise(weights), lrs, strict=True) if lr]
    product = square = 0.0
    for t in range(1, len(updates)):
        weight = 0.98 ** (len(updates) - 1 - t)
        product += weight * sum(GAMMA ** (t - 1 - k) * float(updates[t] @ updates[k]) for k in range(t))
        square += weight * float(updates[t - 1] @ updates[t - 1])
    return min(max(product / square, 0.0), BOUND)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
}


class Regression:
    """Training of a small model on noisy batches, with a warm-up from 0."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.optimizer = make(self.model.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: min(t / 4, 1.0))
        self.data = torch.Generator().manual_seed(1)

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def step(self) -> None:
        x = torch.randn(8, 6, generator=self.data)
        self.optimizer.zero_grad()
        (self.model(x) - x[:, :2].sin()).square().mean().backward()
        self.optimizer.step()
        self.schedule.step()


# ---- the s it finds ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_whole_vectors_over_pairs_of_steps(name: str) -> None:
    training = Regression(OPTIMIZERS[name])
    auto = AutoSteps(Weights(training.optimizer, "auto"), AUTO)
    weights, lrs, found = [training.vector()], [], []
    for _ in range(30):
        lrs.append(training.optimizer.param_groups[0]["lr"])
        found += stepped(auto, training.step)
        weights.append(training.vector())
    first = 1.0 if name in ("adamw", "momentum") else 0.0  # under a closed form, and under the last-update rule
    assert found[:2] == [first] * 2  # a learning rate of 0, then the first update
    expected = [twin(weights[: t + 2], lrs[: t + 1]) for t in range(2, 30)]
    assert found[2:] == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) > 10


@pytest.mark.parametrize(("cls", "first"), [(Formed, 1.0), (Given, 0.0)])
def test_starts_at_one_under_a_closed_form_and_at_zero_without(cls: type[Given], first: float) -> None:
    optimizer = cls([nn.Parameter(torch.zeros(3))])
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
    assert auto.steps(optimizer.param_groups[0]) == first
    assert auto.values() == [first]
    assert run(auto, optimizer, [1.0, 1.0]) == [first, 1.0]
    # The rule decides, not the class.
    assert AutoSteps(Weights(optimizer, "last_update"), AUTO).values() == [0.0]


@pytest.mark.parametrize(("steps", "chosen"), [("auto", [0, 1]), ("default", [0]), (1.0, [])])
def test_only_groups_that_choose_are_looked_at(steps: Any, chosen: list[int]) -> None:
    """The first follows the last update, the second has a closed form."""
    params = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = Formed([{"params": params[:1], "without_form": True}, {"params": params[1:]}])
    auto = AutoSteps(Weights(optimizer, "auto"), XGradConfig(steps=steps))
    assert auto.values() == [[0.0, 1.0][g] for g in chosen]
    for _ in range(2):
        realise(auto, lambda: optimizer.step([0.5, 1.0]))
    assert auto.values() == [1.0] * len(chosen)
    assert set(auto.state_dict()) == {f"{g}.{name}" for g in chosen for name in ("trace", "sums")}


def test_updates_that_repeat_give_the_bound() -> None:
    optimizer, auto = given(3)
    found = run(auto, optimizer, [1.0] * 400)
    assert found[:5] == pytest.approx(REPEATED)
    assert found[-1] == pytest.approx(BOUND, abs=1e-3)
    assert run(auto, optimizer, [1.5**k for k in range(40)])[-1] == BOUND


def test_updates_that_turn_back_give_zero() -> None:
    optimizer, auto = given(3)
    assert run(auto, optimizer, [1.0, -1.0] * 5)[1:] == [0.0] * 9


@pytest.mark.parametrize("ratio", [0.9, 0.5, -0.2, -0.5])
def test_gradient_descent_in_a_bowl(ratio: float) -> None:
    # With curvature c, u_t = (1 - lr c) u_{t-1}: straight down where that ratio is positive, else across and back.
    lr = 0.25
    p = nn.Parameter(torch.tensor([1.0, -3.0]))
    optimizer = torch.optim.SGD([p], lr=lr)
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)

    def step() -> None:
        optimizer.zero_grad()
        ((1 - ratio) / lr * p.square().sum() / 2).backward()
        optimizer.step()

    found = [stepped(auto, step)[0] for _ in range(12)]
    weights = [torch.tensor([ratio**t], dtype=torch.float64) for t in range(13)]
    assert found[-1] == pytest.approx(twin(weights, [1.0] * 12), abs=1e-4)
    assert (found[-1] > 0.0) == (ratio > 0)


def test_noise_that_a_momentum_smooths() -> None:
    # Autocorrelation b^j: s = b + gamma b^2 + gamma^2 b^3 + ... = b / (1 - gamma b).
    optimizer, auto = given(500)
    generator = torch.Generator().manual_seed(0)
    u, updates = torch.zeros(500), []
    for _ in range(300):
        u = 0.9 * u + torch.randn(500, generator=generator)
        updates.append(u)
    assert run(auto, optimizer, updates)[-1] == pytest.approx(0.9 / (1 - GAMMA * 0.9), abs=0.05)


def test_unit_of_weights_and_learning_rate_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(5, generator=generator) + 1 for _ in range(10)]
    plain = run(*reversed(given(5)), updates)
    assert run(*reversed(given(5, lr=2.0**-12)), updates) == pytest.approx(plain, abs=1e-5)
    assert run(*reversed(given(5)), [1024 * u for u in updates]) == pytest.approx(plain, abs=1e-5)
    optimizer, auto = given(5)
    scheduled = []
    for t, u in enumerate(updates):
        optimizer.param_groups[0]["lr"] = 2.0 ** -(t % 4)
        scheduled += run(auto, optimizer, [u])
    assert scheduled == pytest.approx(plain, abs=1e-5)
    assert 0 < plain[-1] < BOUND


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_that_is_changed_in_place(shape: tuple[int, ...]) -> None:
    optimizer, auto = given(5, lr=torch.ones(shape))
    expected, twin_auto = given(5)
    for t in range(10):
        auto.before_step()
        optimizer.step([1.0 + t % 2])
        optimizer.param_groups[0]["lr"] *= 4.0 if t % 3 else 0.0625
        auto.after_step()
        assert auto.values() == pytest.approx(run(twin_auto, expected, [1.0 + t % 2]), abs=1e-6)


def test_an_optimizer_without_a_learning_rate() -> None:
    optimizer, auto = given(5, lr=None)
    assert run(auto, optimizer, [1.0] * 5) == run(*reversed(given(5)), [1.0] * 5)


def test_groups_are_independent() -> None:
    optimizer, auto = given(4, 7)
    for t in range(60):
        both = stepped(auto, lambda t=t: optimizer.step([1.0, (-1.0) ** t]))
    assert both[0] == run(*reversed(given(4)), [1.0] * 60)[-1]
    assert both[1] == 0.0
    assert isinstance(auto.steps(optimizer.param_groups[0]), float)


# ---- what it leaves alone ----


def test_steps_that_move_nothing_change_nothing() -> None:
    optimizer, auto = given(4)
    before = run(auto, optimizer, [1.0, 1.5, 0.5])[-1]
    state = auto.state_dict()
    assert run(auto, optimizer, [0.0, 0.0]) == [before] * 2
    optimizer.param_groups[0]["lr"] = 0.0
    assert run(auto, optimizer, [1.0]) == [before]
    assert all(torch.equal(value, state[name]) for name, value in auto.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_never_gets_in(bad: float) -> None:
    optimizer, auto = given(4)
    before = run(auto, optimizer, [1.0, 1.5, 0.5])[-1]
    state = auto.state_dict()
    weights = optimizer.param_groups[0]["params"][0]
    kept = weights.detach().clone()
    assert run(auto, optimizer, [torch.tensor([0.0, bad, 1.0, 1.0])]) == [before]
    assert all(torch.equal(value, state[name]) for name, value in auto.state_dict().items())
    with torch.no_grad():
        weights.copy_(kept)
    assert run(auto, optimizer, [1.0])[0] != before


def test_a_learning_rate_of_zero_for_weights_that_move_all_the_same() -> None:
    optimizer, auto = given(4, lr=0.0)
    realise(auto, lambda: optimizer.param_groups[0]["params"][0].data.add_(1))
    assert not any(value.any() for value in auto.state_dict().values())


def test_changes_between_steps_are_no_updates() -> None:
    optimizer, auto = given(4)
    expected = run(*reversed(given(4)), [1.0, 1.5, 0.5, 1.0])
    found = []
    for u in (1.0, 1.5, 0.5, 1.0):
        found += run(auto, optimizer, [u])
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].mul_(-2)
    assert found == pytest.approx(expected, abs=1e-6)


def test_frozen_weights_do_not_count() -> None:
    first, second = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = Given([{"params": [first, second]}])
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
    for u in (1.0, 1.5):
        stepped(auto, lambda u=u: optimizer.step([u, u]))
    second.requires_grad_(False)
    found = [stepped(auto, lambda u=u: optimizer.step([u, 0.0]))[0] for u in (0.5, 1.0)]
    weights = [torch.zeros(6)]
    for u, v in ((1.0, 1.0), (1.5, 1.5), (0.5, 0.0), (1.0, 0.0)):
        weights.append(weights[-1] + torch.tensor([u] * 3 + [v] * 3))
    assert found[-1] == pytest.approx(twin(weights, [1.0] * 4), abs=1e-6)
    second.requires_grad_(True)
    assert stepped(auto, lambda: optimizer.step([1.0, 1.0])) != found[-1:]


def test_groups_that_come_go_and_change() -> None:
    optimizer, auto = given(4)
    known = run(auto, optimizer, [1.0, 1.0, 0.5])[-1]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert auto.values() == [known, 0.0]
    assert auto.steps(optimizer.param_groups[1]) == 0.0
    assert stepped(auto, lambda: optimizer.step([0.0, 1.0])) == [known, 0.0]
    assert stepped(auto, lambda: optimizer.step([0.0, 1.0])) == [known, 1.0]
    _, other = stepped(auto, lambda: optimizer.step([0.0, -0.2]))
    assert 0.0 < other == run(*reversed(given(2)), [1.0, 1.0, -0.2])[-1] < 1.0
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))
    assert stepped(auto, lambda: optimizer.step([1.0, 1.0, 0.0])) == [0.0, other]
    assert stepped(auto, lambda: optimizer.step([1.0, 1.0, 0.0])) == [1.0, other]
    # A group keeps what is known of it wherever it stands.
    optimizer.param_groups.reverse()
    assert auto.values() == [other, 1.0]
    del optimizer.param_groups[1]
    assert auto.values() == [other]
    assert stepped(auto, lambda: optimizer.step([0.0])) == [other]
    assert set(auto.state_dict()) == {"0.trace", "0.sums"}


def test_nothing_to_look_at() -> None:
    optimizer, auto = given(0)
    assert run(auto, optimizer, [1.0, 1.0]) == [0.0, 0.0]
    optimizer.param_groups[0]["params"].clear()
    assert stepped(auto, lambda: optimizer.step([])) == [0.0]
    fresh = AutoSteps(Weights(optimizer, "auto"), AUTO)
    fresh.load_state_dict(auto.state_dict())
    assert fresh.values() == [0.0]


def test_only_a_step_between_before_and_after_counts() -> None:
    optimizer, auto = given(4)
    known = run(auto, optimizer, [1.0, 1.5, 0.5])[-1]
    auto.after_step()
    assert auto.values() == [known]
    auto.before_step()
    optimizer.step([100.0])  # failed half way: the next step begins anew
    assert run(auto, optimizer, [0.5]) == pytest.approx(run(*reversed(given(4)), [1.0, 1.5, 0.5, 0.5])[-1:])


# ---- the sample ----


def reference_of_sample(shape: tuple[int, ...]) -> Tensor:
    """Which elements of a weight are looked at: those that an update of 1 reaches."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = Given([p])
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
    numbers = torch.arange(1.0, p.numel() + 1).reshape(shape)
    stepped(auto, lambda: optimizer.step([numbers]))
    return auto.state_dict()["0.trace"].long() - 1


def test_small_weights_are_looked_at_whole() -> None:
    assert reference_of_sample((16, 32)).tolist() == list(range(512))


@pytest.mark.parametrize("shape", [(513,), (1024, 384), (384, 1536), (31, 1024), (4096, 2), (3, 5, 7, 64)])
def test_large_weights_are_sampled_over_all_rows_and_columns(shape: tuple[int, ...]) -> None:
    seen = reference_of_sample(shape)
    numel, columns = torch.Size(shape).numel(), shape[-1]
    assert 250 < len(seen) <= 512
    assert len(set(seen.tolist())) == len(seen)
    assert seen.max() >= 0.97 * (numel - 1)
    assert len(set((seen % columns).tolist())) >= min(columns, len(seen))
    if len(shape) > 1:
        rows = numel // columns
        assert len(set((seen // columns).tolist())) >= min(rows, 250)


def test_the_sample_of_a_group_is_bounded_and_follows_no_period() -> None:
    # 48 layers of 9 tensors each: every kind of tensor must be among those looked at.
    params = [nn.Parameter(torch.full((40, 30), float(i))) for i in range(48 * 9)]
    optimizer = Given(params)
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
    stepped(auto, lambda: optimizer.step([p.detach() + 1 for p in params]))
    trace = auto.state_dict()["0.trace"]
    tensors, elements = sample_limits()
    assert trace.numel() <= tensors * elements == 2**14
    seen = [int(number) - 1 for number in trace.unique()]
    assert len(seen) == tensors
    assert {i % 9 for i in seen} == set(range(9))
    assert max(b - a for a, b in pairwise([0, *seen, 48 * 9])) <= 2 * 432 / 32


def test_the_sample_tells_what_all_weights_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[float]:
        torch.manual_seed(0)
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
        data = torch.Generator().manual_seed(0)
        found = []
        for _ in range(25):
            ids = torch.randint(0, model.config.vocab_size, (4, 8), generator=data)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
            found += stepped(auto, optimizer.step)
        return found

    sampling(monkeypatch, tensors=10**9, elements=10**9)
    whole = trained()
    sampling(monkeypatch, tensors=12, elements=64)
    assert trained()[5:] == pytest.approx(whole[5:], abs=0.15)


class Count(TorchDispatchMode):
    """Notes the kernels that run, views apart, and the largest tensor that one of them writes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func is torch.ops.aten.promote_types.default:
            return out
        self.names.append(str(func))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_large_weights_are_never_copied_nor_waited_for() -> None:
    # On a device without memory, from which nothing can be read.
    optimizer, auto = given((1000, 300), (300, 1000), device="meta")
    realise(auto, lambda: optimizer.step([1.0, 1.0]))
    with Count() as count:
        auto.before_step()
    optimizer.step([1.0, 1.0])
    with count:
        auto.after_step()
    assert 0 < count.largest <= 512
    assert len(count.names) < 52
    # These are what makes a host wait for its device.
    assert not [name for name in count.names if "_local_scalar_dense" in name or "nonzero" in name]
    assert all(auto.steps(group).device.type == "meta" for group in optimizer.param_groups)
    optimizer, auto = given((1000, 300), (300, 1000))
    realise(auto, lambda: optimizer.step([1.0, 1.0]))
    assert auto.state_dict()["0.trace"].untyped_storage().nbytes() <= 4 * 512


@pytest.mark.parametrize(
    "arranged",
    [
        lambda: torch.zeros(64, 48).t(),
        lambda: torch.zeros(8, 16, 3, 3).to(memory_format=torch.channels_last),
        lambda: torch.zeros(1, 7),
        lambda: torch.zeros(()),
        lambda: torch.zeros(8, 8)[:, :3],
        lambda: torch.zeros(40, 60)[1::2, ::3],
        lambda: torch.zeros(6, 1).expand(6, 1)[::2],
    ],
)
def test_weights_in_any_order_of_memory(arranged: Callable[[], Tensor]) -> None:
    p = nn.Parameter(arranged())
    optimizer = Given([p])
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
    assert run(auto, optimizer, [1.0] * 5) == pytest.approx(REPEATED)


@pytest.mark.parametrize("shape", [(24, 36), (31, 80), (3, 5, 7, 8)])
def test_the_sample_does_not_depend_on_the_order_of_memory(shape: tuple[int, ...]) -> None:
    """Samples are taken in the order of the indices: those of weights with gaps are those of their copies."""
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    traces = []
    for weights in (
        torch.zeros(shape),
        torch.zeros(shape[::-1]).permute(*reversed(range(len(shape)))),
        torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2],
    ):
        optimizer = Given([nn.Parameter(weights)])
        auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
        stepped(auto, lambda optimizer=optimizer: optimizer.step([update]))
        traces.append(auto.state_dict()["0.trace"])
    assert torch.equal(traces[0], traces[1])
    assert torch.equal(traces[0], traces[2])


def test_weights_that_are_given_other_memory() -> None:
    optimizer, auto = given((40, 30))
    (p,) = optimizer.param_groups[0]["params"]
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        p.data = p.data.to(dtype).clone()
        found += run(auto, optimizer, [1.0])
    assert found == pytest.approx(REPEATED[:4])


def test_updates_are_counted_in_single_precision() -> None:
    # In units of this learning rate they are beyond float16.
    optimizer, auto = given(6, lr=2.0**-10, dtype=torch.float16)
    assert run(auto, optimizer, [2.0**17] * 5) == pytest.approx(REPEATED)


def test_both_parts_of_complex_weights_count() -> None:
    optimizer, auto = given(6, dtype=torch.complex64)
    assert run(auto, optimizer, [1j, 1j, -1j])[-2:] == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_every_floating_type(dtype: torch.dtype) -> None:
    optimizer, auto = given(6, dtype=dtype)
    # Sums of these are exact in every type.
    updates = [1.0, 0.5, -0.25, 1.0, 0.25, 1.0]
    assert run(auto, optimizer, updates) == pytest.approx(run(*reversed(given(6)), updates), abs=1e-6)
    assert all(value.dtype == torch.float32 for value in auto.state_dict().values())


def test_types_may_be_mixed() -> None:
    optimizer = Given([nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float16, torch.bfloat16, torch.float32)])
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
    assert [stepped(auto, lambda: optimizer.step([1.0] * 3))[0] for _ in range(5)] == pytest.approx(REPEATED)


# ---- checkpoints ----


@pytest.mark.parametrize("at", [0, 1, 2, 7])
def test_resumed_is_uninterrupted_bit_for_bit(at: int, tmp_path: Path) -> None:
    def noise(t: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(t)
        return [torch.randn(40, 30, generator=generator) + 0.3, torch.randn(5, generator=generator)]

    optimizer, auto = given((40, 30), 5)
    expected = [stepped(auto, lambda t=t: optimizer.step(noise(t))) for t in range(12)]
    optimizer, auto = given((40, 30), 5)
    found = [stepped(auto, lambda t=t: optimizer.step(noise(t))) for t in range(at)]
    save_file(auto.state_dict(), tmp_path / "state.safetensors")
    resumed = copy.deepcopy(optimizer)
    auto = AutoSteps(Weights(resumed, "auto"), AUTO)
    auto.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert auto.values() == (found[-1] if found else [0.0, 0.0])
    found += [stepped(auto, lambda t=t: resumed.step(noise(t))) for t in range(at, 12)]
    assert found == expected


def test_the_state_is_a_copy() -> None:
    optimizer, auto = given(4)
    assert auto.state_dict() == {}
    run(auto, optimizer, [1.0, 1.5])
    state = auto.state_dict()
    kept = copy.deepcopy(state)
    other = AutoSteps(Weights(optimizer, "auto"), AUTO)
    other.load_state_dict(state)
    run(other, optimizer, [0.5])
    run(auto, optimizer, [0.5])
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    auto.load_state_dict({})
    assert auto.values() == [0.0]


def test_a_group_that_has_made_no_step_yet_is_in_the_state() -> None:
    optimizer, auto = given(4)
    known = run(auto, optimizer, [1.0, 1.5, 0.5])[-1]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    other = AutoSteps(Weights(optimizer, "auto"), AUTO)
    other.load_state_dict(auto.state_dict())
    assert other.values() == [known, 0.0]


def spoilt(state: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    return {**{key: t for key, t in state.items() if key != name}, **({} if value is None else {name: value})}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.trace", None, "lacks 0.trace"),
        ("1.sums", None, "lacks 1.sums"),
        ("0.trace", torch.zeros(3), r"0.trace has shape \(3,\), the parameters of this optimizer need \(4,\)"),
        ("0.sums", torch.zeros(2), "0.sums has shape"),
        ("0.trace", torch.full((4,), float("nan")), "0.trace holds NaN or infinity"),
        ("1.sums", torch.tensor([1.0, float("inf"), 1.0, 1.0]), "1.sums holds NaN or infinity"),
        ("2.sums", torch.zeros(3), r"has \['2.sums'\], which no group that chooses its s needs"),
    ],
)
def test_a_state_that_does_not_fit(name: str, value: Tensor | None, message: str) -> None:
    optimizer, auto = given(4, 5)
    for u in (1.0, 1.5, 0.5):
        stepped(auto, lambda u=u: optimizer.step([u, u]))
    known, state = auto.values(), auto.state_dict()
    with pytest.raises(ValueError, match=f"^AutoSteps: .*{message}"):
        auto.load_state_dict(spoilt(state, name, value))
    assert auto.values() == known  # as if it had not been tried


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits_for_the_device() -> None:
    def found_on(device: str) -> list[float]:
        params = [nn.Parameter(torch.zeros(size, device=device)) for size in (600, 5)]
        optimizer = Given([{"params": [p]} for p in params], lr=torch.tensor(0.5, device=device))
        auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
        updates = [[torch.tensor(u, device=device) for u in (1.0 + t % 3, t % 2)] for t in range(8)]
        realise(auto, lambda: optimizer.step(updates[0]))
        found: list[Any] = []
        torch.cuda.set_sync_debug_mode("error")
        try:
            for both in updates[1:]:
                realise(auto, lambda both=both: optimizer.step(both))
                found += list(map(auto.steps, optimizer.param_groups))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(isinstance(s, float if device == "cpu" else Tensor) for s in found)
        return [float(s) for s in found]

    assert found_on("cuda") == pytest.approx(found_on("cpu"), abs=1e-5)


@pytest.mark.parametrize("maker", [torch.optim.Adagrad, torch.optim.AdamW], ids=["last_update", "closed_form"])
def test_updates_that_turn_back_of_late_end_the_repeating_of_updates(maker: Any) -> None:
    """Long after they went straight on, which the long average still tells of: under the last-update rule alone."""
    w = nn.Parameter(torch.zeros(3))
    optimizer = maker([w])
    auto = AutoSteps(Weights(optimizer, "auto"), AUTO)
    chosen = []
    for t in range(60):
        sign = 1.0 if t < 40 or t % 2 else -1.0

        def step(sign: float = sign) -> None:
            w.data.add_(sign)

        realise(auto, step)
        chosen.append(auto.values()[0])
    assert min(chosen[5:40]) > 1.0
    turned = [s == 0.0 for s in chosen[50:]]
    assert all(turned) if maker is torch.optim.Adagrad else not any(turned)
