"""Models and hooks that write weights themselves: adapters merged on eval(), weights bounded in forward, own steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import tiny_models as tiny
from hf_xgrad import XGradConfig, XGradTrainer
from small_runs import CLOSED_FORM, LAST_UPDATE, Regression, history, make, training_logs

RULES = [pytest.param(CLOSED_FORM, id="closed_form"), pytest.param(LAST_UPDATE, id="last_update")]
OFF = [pytest.param({"xgrad": False}, id="xgrad=False"), pytest.param({"xgrad_steps": 0}, id="steps=0")]
accumulations = pytest.mark.parametrize("accumulation", [1, 2])


# ---- adapters that are merged into a frozen weight on eval() ----


class LowRank(nn.Module):
    """A frozen matrix and a trainable product beside it.

    In evaluation mode the product stands in the matrix itself, and train() takes it out again: as LoRA first did it.
    """

    def __init__(self, size: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.eye(size), requires_grad=False)
        self.down = nn.Parameter(torch.randn(rank, size))
        self.up = nn.Parameter(torch.zeros(size, rank))
        self.merges = 0
        self._merged = False

    def product(self) -> Tensor:
        return self.up.detach() @ self.down.detach()

    def train(self, mode: bool = True) -> LowRank:
        if mode and self._merged:
            self.base.data.sub_(self.product())
        elif not mode and not self._merged:
            self.base.data.add_(self.product())
            self.merges += 1
        self._merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.base.T
        return y if self._merged else y + x @ self.down.T @ self.up.T


class Adapted(Regression):
    """A `Regression` in which only the adapters are trained, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.adapter = LowRank(4)
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        score = self.score(self.adapter(self.words(ids)).mean(1)).squeeze(-1)
        return {"loss": nn.functional.mse_loss(score, labels.double()), "logits": score}


@accumulations
@pytest.mark.parametrize("rule", RULES)
def test_adapters_merged_for_evaluation_come_out_of_the_frozen_weight(
    tmp_path: Path, rule: Any, accumulation: int
) -> None:
    """What train() takes out must be what eval() has put in: the true adapters, not the predicted ones."""
    model = Adapted()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": accumulation}
    trainer = make(tmp_path, model=model, max_steps=8, **settings, **rule)
    forwards = tiny.Forwards(model)
    bases: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda *_: bases.append(model.adapter.base.detach().clone()) if model.training else None
    )
    trainer.train()
    model.train()
    assert model.adapter.merges == 8, "no evaluation merged the adapters"
    assert [entry["xgrad/active"] for entry in training_logs(trainer)] == [0.0] + [1.0] * 7
    assert float(model.adapter.up.detach().abs().max()) > 0.1, "nothing was learnt"
    assert len(forwards.weights) == 8 * accumulation
    drift = [float((base - torch.eye(4)).abs().max()) for base in [*bases, model.adapter.base.detach()]]
    assert max(drift) < 1e-6, drift


@accumulations
@pytest.mark.parametrize("rule", RULES)
def test_evaluation_between_steps_changes_nothing_of_such_a_model(
    tmp_path: Path, rule: Any, accumulation: int
) -> None:
    runs = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = make(tmp_path, model=Adapted(), gradient_accumulation_steps=accumulation, **settings, **rule)
        trainer.train()
        trainer.model.train()
        runs.append([*tiny.weights(trainer.model).values()])
    for without, evaluated in zip(*runs, strict=True):
        assert torch.allclose(without, evaluated, rtol=0, atol=1e-6)


# ---- forwards that write weights ----


class Bounded(nn.Module):
    """A linear map that keeps its weights within bounds, from a given forward in training on."""

    def __init__(self, bound: Callable[[Tensor], Any], since: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.1, -0.2, 0.3, -0.4]]))
        self.bound = bound
        self.since = since
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls >= self.since:
            with torch.no_grad():
                self.bound(self.weight)
        return x @ self.weight.T


class BoundedRegression(Regression):
    def __init__(self, *bounded: Any) -> None:
        super().__init__()
        self.score = nn.ModuleDict({"head": Bounded(*bounded)})  # type: ignore[assignment]

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        score = self.score["head"](self.words(ids).mean(1)).squeeze(-1)
        return {"loss": nn.functional.mse_loss(score, labels), "logits": score}


BOUNDS = [
    pytest.param(lambda w: w.clamp_(min=0), 1, id="clamp"),
    pytest.param(lambda w: w.clamp_(min=0), 2, id="clamp-accumulation"),
    pytest.param(lambda w: w.div_(w.norm()), 1, id="normalise"),
    pytest.param(lambda w: w.copy_(w.relu()), 1, id="copy"),
    pytest.param(lambda w: w[0, 1:2].zero_(), 1, id="a-part-of-it"),
]


def failing(trainer: Any) -> tuple[str, list[dict[str, Tensor]]]:
    """The message of the RuntimeError that train() raises, and the true weights at the beginning of each step."""
    callback, true = tiny.recorder(trainer.model, "step_begin")
    trainer.add_callback(callback)
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    return str(error.value), [w for _, w in true]


@pytest.mark.parametrize(("bound", "accumulation"), BOUNDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_weight_written_in_forward_is_named_at_the_first_step_that_predicted_it(
    tmp_path: Path, bound: Any, rule: Any, accumulation: int
) -> None:
    trainer = make(tmp_path, model=BoundedRegression(bound), gradient_accumulation_steps=accumulation, **rule)
    message, true = failing(trainer)
    assert message.startswith("XGrad")
    assert "score.head.weight" in message
    # It is not the other one.
    assert "words.weight" not in message
    # Nothing is predicted in the first step, and its writing was into true weights.
    assert trainer.state.global_step == 1
    assert len(true) == 2
    assert tiny.same(tiny.weights(trainer.model), true[-1])


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_written_later_on_is_an_error_then(tmp_path: Path, rule: Any) -> None:
    trainer = make(tmp_path, model=BoundedRegression(lambda w: w.clamp_(min=0), 4), **rule)
    message, true = failing(trainer)
    assert message.startswith("XGrad")
    assert "score.head.weight" in message
    assert trainer.state.global_step == 3
    assert tiny.same(tiny.weights(trainer.model), true[-1])


@pytest.mark.parametrize("off", OFF)
def test_switched_off_a_forward_may_write_weights(tmp_path: Path, off: Any) -> None:
    runs = []
    for cls, settings in ((Trainer, {}), (XGradTrainer, off)):
        trainer = make(tmp_path, cls, BoundedRegression(lambda w: w.clamp_(min=0)), **{**CLOSED_FORM, **settings})
        trainer.train()
        runs.append((history(trainer), [w.tolist() for w in tiny.weights(trainer.model).values()]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("rule", RULES)
def test_writing_what_is_not_predicted_is_no_error(tmp_path: Path, rule: Any) -> None:
    """A frozen weight, and the buffers of a normalisation."""

    class Normalised(BoundedRegression):
        def __init__(self) -> None:
            super().__init__(lambda w: w.mul_(0.9))
            self.score["head"].requires_grad_(False)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            score = self.score["head"](self.norm(self.words(ids).mean(1))).squeeze(-1)
            return {"loss": nn.functional.mse_loss(score, labels), "logits": score}

    trainer = make(tmp_path, model=Normalised(), **rule)
    trainer.train()
    assert training_logs(trainer)[-1]["xgrad/active"] == 1.0
    assert trainer.model.norm.num_batches_tracked == 6


# ---- max_norm ----


class Bag(Regression):
    """A `Regression` whose words stand in a module of their own, in a bag if `kind` says so."""

    def __init__(self, kind: type, **settings: Any) -> None:
        super().__init__()
        self.words = nn.ModuleDict({"table": kind(12, 4, **settings)})  # type: ignore[assignment]

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        table = self.words["table"]
        mean = table(ids) if isinstance(table, nn.EmbeddingBag) else table(ids).mean(1)
        score = self.score(mean).squeeze(-1)
        return {"loss": nn.functional.mse_loss(score, labels), "logits": score}


kinds = pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])


@kinds
@pytest.mark.parametrize("rule", RULES)
def test_max_norm_is_refused_when_the_trainer_is_made(tmp_path: Path, kind: type, rule: Any) -> None:
    with pytest.raises(ValueError, match="XGrad") as error:
        make(tmp_path, model=Bag(kind, max_norm=1.0), **rule)
    assert "words.table" in str(error.value)
    assert "max_norm" in str(error.value)


@kinds
def test_max_norm_is_refused_where_the_settings_are_a_config(tmp_path: Path, kind: type) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        make(tmp_path, model=Bag(kind, max_norm=1.0), given={"xgrad_config": XGradConfig(steps=2.0)})


@kinds
@pytest.mark.parametrize("rule", RULES)
def test_max_norm_of_a_frozen_table_is_fine(tmp_path: Path, kind: type, rule: Any) -> None:
    model = Bag(kind, max_norm=0.5)
    model.words.requires_grad_(False)
    trainer = make(tmp_path, model=model, **rule)
    trainer.train()
    assert training_logs(trainer)[-1]["xgrad/active"] == 1.0
    # Of the rows that were looked up.
    assert float(model.words["table"].weight.norm(dim=1).min()) <= 0.5 + 1e-5


@kinds
@pytest.mark.parametrize("off", OFF)
def test_switched_off_max_norm_is_the_plain_trainers(tmp_path: Path, kind: type, off: Any) -> None:
    runs = []
    for cls, settings in ((Trainer, {}), (XGradTrainer, off)):
        trainer = make(tmp_path, cls, Bag(kind, max_norm=0.5), **{**CLOSED_FORM, **settings})
        trainer.train()
        runs.append((history(trainer), [w.tolist() for w in tiny.weights(trainer.model).values()]))
    assert runs[0] == runs[1]


def test_a_table_without_max_norm_is_fine(tmp_path: Path) -> None:
    make(tmp_path, model=Bag(nn.Embedding)).train()


# ---- weights stepped inside backward, by hooks of the user's own ----


class Nothing(torch.optim.Optimizer):
    """What one hands the Trainer where the hooks do all the work."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    def step(self, closure: Any = None) -> None:
        pass


def stepped_in_backward(params: Any, *, keep_gradients: bool) -> None:
    """Every weight is stepped as soon as its gradient is there."""

    def step_as_soon_as_possible(p: nn.Parameter) -> None:
        optimizer = torch.optim.Adam([p], lr=0.05)

        def step(_: Tensor) -> None:
            optimizer.step()
            if not keep_gradients:
                optimizer.zero_grad()

        p.register_post_accumulate_grad_hook(step)

    for p in params:
        step_as_soon_as_possible(p)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"xgrad_steps": 1.0}, id="default-rule"),
        pytest.param({"xgrad_steps": 1.0, "xgrad_rule": "last_update"}, id="last_update"),
    ],
)
def test_hooks_that_step_all_weights_are_an_error(tmp_path: Path, settings: Any) -> None:
    model = Regression()
    stepped_in_backward(model.parameters(), keep_gradients=False)
    trainer = make(tmp_path, model=model, given={"optimizers": (Nothing(model.parameters()), None)}, **settings)
    message, true = failing(trainer)
    assert message.startswith("XGrad")
    assert any(name in message for name, _ in model.named_parameters())
    assert trainer.state.global_step == 1
    assert tiny.same(tiny.weights(model), true[-1])
    assert not tiny.same(true[0], true[1]), "the first step moved nothing"


@pytest.mark.parametrize("rule", RULES)
def test_hooks_that_step_some_weights_beside_an_optimizer_are_an_error(tmp_path: Path, rule: Any) -> None:
    model = Regression()
    stepped_in_backward([model.words.weight], keep_gradients=True)
    trainer = make(tmp_path, model=model, **rule)
    message, true = failing(trainer)
    assert message.startswith("XGrad")
    assert "words.weight" in message
    assert trainer.state.global_step == 1
    assert tiny.same(tiny.weights(model), true[-1])


@pytest.mark.parametrize("off", OFF)
def test_switched_off_hooks_may_step_weights(tmp_path: Path, off: Any) -> None:
    runs = []
    for cls, settings in ((Trainer, {}), (XGradTrainer, off)):
        model = Regression()
        stepped_in_backward(model.parameters(), keep_gradients=False)
        trainer = make(tmp_path, cls, model, given={"optimizers": (Nothing(model.parameters()), None)}, **settings)
        trainer.train()
        runs.append((history(trainer), [w.tolist() for w in tiny.weights(model).values()]))
    assert runs[0] == runs[1]
