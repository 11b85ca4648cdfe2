"""A whole loop under Accelerate: windows, clipping, schedule, short last window, checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader

import tiny_models as tiny
from hf_xgrad import WeightPredictor, XGradConfig
from reference import predicted_weights

RULES = ["closed_form", "last_update"]
MICRO_BATCHES = 3
# Seven batches an epoch: windows of 3, 3 and 1.
WINDOWS = [3, 3, 1] * 2
CLIP = 0.1


class Loop:
    """Two epochs of an accumulating loop; `predictor` is None for the loop of somebody who never heard of XGrad."""

    def __init__(
        self, config: XGradConfig | None, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO_BATCHES)
        model = tiny.bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout).to(dtype)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        # A learning rate of its own for every step, and never 0: the last-update rule has a ratio to get wrong.
        schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1.0 / (1 + step))
        # With a generator of its own: an iterator made anew when a run resumes takes nothing from the dropout's.
        dataloader = DataLoader(tiny.Sentences(28), batch_size=4, generator=torch.Generator())
        self.model, self.optimizer, self.dataloader, self.scheduler = self.accelerator.prepare(
            model, inner, dataloader, schedule
        )
        self.predictor = None if config is None else WeightPredictor(self.optimizer, config)
        if self.predictor is not None:
            self.accelerator.register_for_checkpointing(self.predictor)
        self.forwards = tiny.Forwards(self.model)
        self.true: list[dict[str, Tensor]] = []  # what stands outside the prediction, before each micro-batch
        self.expected: list[list[Tensor]] = []  # the slow twin's prediction, where there is a closed form
        self.lrs: list[float] = []
        self.losses: list[float] = []
        torch.manual_seed(7)

    def run(self, *, skip: int = 0, save_at: int | None = None, folder: Path | None = None) -> Loop:
        """All micro-batches but the first `skip`; saves into `folder` when `save_at` of them are done."""
        self.model.train()
        batches = len(self.dataloader)
        for epoch in range(skip // batches, 2):
            done = epoch * batches
            dataloader = skip_first_batches(self.dataloader, skip - done) if skip > done else self.dataloader
            for i, batch in enumerate(dataloader, start=max(done, skip) + 1):
                self._micro_batch(batch)
                if i == save_at:
                    self.accelerator.save_state(str(folder))
        self.random_number = float(torch.rand(()))
        return self

    def _micro_batch(self, batch: dict[str, Tensor]) -> None:
        self.true.append(tiny.weights(self.model))
        self.lrs.append(self.optimizer.param_groups[0]["lr"])
        if self.predictor is not None:
            self.expected.append(predicted_weights(self.predictor.optimizer, self.predictor.config.steps))
        with self.accelerator.accumulate(self.model):
            if self.predictor is None:
                self._forward_and_backward(batch)
            else:
                with self.predictor.predicted():
                    self._forward_and_backward(batch)
            assert tiny.same(tiny.weights(self.model), self.true[-1])
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def _forward_and_backward(self, batch: dict[str, Tensor]) -> None:
        loss = self.model(**batch).loss
        self.accelerator.backward(loss)
        self.losses.append(loss.item())

    def outcome(self) -> tuple[Any, ...]:
        weights = [w.tolist() for w in tiny.weights(self.model).values()]
        state = [t.tolist() for t in tiny.optimizer_state(self)]
        return weights, state, self.scheduler.get_last_lr(), self.random_number


class AtWeights(Loop):
    """A plain loop whose every forward and backward run at given weights."""

    def __init__(self, given: list[dict[str, Tensor]]) -> None:
        super().__init__(None)
        self._given = iter(given)

    def _forward_and_backward(self, batch: dict[str, Tensor]) -> None:
        self.model.load_state_dict(next(self._given), strict=False)
        super()._forward_and_backward(batch)
        self.model.load_state_dict(self.true[-1], strict=False)


def windows(items: list[Any]) -> list[list[Any]]:
    """Items, one a micro-batch, by window."""
    iterator = iter(items)
    result = [list(itertools.islice(iterator, size)) for size in WINDOWS]
    assert not list(iterator)
    return result


@pytest.mark.parametrize("rule", RULES)
def test_one_window_sees_one_prediction(rule: str) -> None:
    loop = Loop(XGradConfig(steps=1.0, rule=rule), dropout=0.1).run()
    seen, true = windows(loop.forwards.weights), windows(loop.true)
    for ours, outside in zip(seen, true, strict=True):
        assert all(tiny.same(ours[0], other) for other in ours)
        assert all(tiny.same(outside[0], other) for other in outside)
    # The first window has nothing to predict from; every other one is ahead of its true weights.
    assert [not tiny.same(ours[0], outside[0]) for ours, outside in zip(seen, true, strict=True)] == [False] + [
        True
    ] * 5
    assert not any(tiny.same(a[0], b[0]) for a, b in itertools.pairwise(true))


@pytest.mark.parametrize("s", [1.0, 2.5])
@pytest.mark.parametrize("rule", RULES)
def test_the_prediction_is_that_of_the_equations(rule: str, s: float) -> None:
    loop = Loop(XGradConfig(steps=s, rule=rule), dtype=torch.float64).run()
    seen, true, lrs = windows(loop.forwards.weights), windows(loop.true), [w[0] for w in windows(loop.lrs)]
    assert len(set(lrs)) == len(WINDOWS)
    for t in range(1, len(WINDOWS)):
        now, before = true[t][0], true[t - 1][0]
        if rule == "closed_form":
            expected = dict(zip(now, windows(loop.expected)[t][0], strict=True))
        else:
            expected = {name: w + s * lrs[t] / lrs[t - 1] * (w - before[name]) for name, w in now.items()}
        for name, w in seen[t][0].items():
            torch.testing.assert_close(w, expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_the_update_is_that_of_the_gradient_at_the_predicted_weights(rule: str) -> None:
    """A plain loop, given the weights that the forwards saw, makes the same updates bit for bit."""
    loop = Loop(XGradConfig(steps=1.0, rule=rule)).run()
    plain = AtWeights(loop.forwards.weights).run()
    assert plain.losses == loop.losses
    assert plain.outcome() == loop.outcome()


@pytest.mark.parametrize(
    "config", [XGradConfig(steps=0), XGradConfig(enabled=False, steps=1.0)], ids=["steps=0", "off"]
)
def test_switched_off_is_the_loop_without_predictor(config: XGradConfig) -> None:
    plain = Loop(None, dropout=0.1).run()
    ours = Loop(config, dropout=0.1).run()
    assert ours.losses == plain.losses
    assert ours.outcome() == plain.outcome()


@pytest.mark.parametrize("save_at", [3, 6, 7, 10])
@pytest.mark.parametrize("rule", RULES)
def test_resumed_is_the_uninterrupted_loop(tmp_path: Path, rule: str, save_at: int) -> None:
    """After a window in the middle of an epoch, at its end, and in the second epoch; with dropout."""
    config = XGradConfig(steps=1.0, rule=rule)
    uninterrupted = Loop(config, dropout=0.1).run(save_at=save_at, folder=tmp_path)
    resumed = Loop(config, dropout=0.1)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(skip=save_at)
    assert resumed.losses == uninterrupted.losses[save_at:]
    assert resumed.outcome() == uninterrupted.outcome()
    # It took up a prediction, not the plain optimizer.
    assert not tiny.same(resumed.forwards.weights[0], resumed.true[0])
