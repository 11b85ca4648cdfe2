"""torch.compile of the model: a prediction compiles nothing anew, and changes nothing of what is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Trainer

import tiny_models as tiny
from hf_xgrad import WeightPredictor, XGradConfig, XGradTrainer, XGradTrainingArguments


class Bag(nn.Module):
    """A classifier of sentences that is traced in a moment."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(tiny.VOCABULARY, 16)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


SETTINGS = [
    pytest.param({}, id="closed_form"),
    pytest.param({"xgrad_rule": "last_update", "xgrad_steps": 1.0}, id="last_update"),
    pytest.param({"xgrad_steps": "auto"}, id="auto"),
    pytest.param({"xgrad_steps": "auto", "xgrad_rule": "last_update", "gradient_accumulation_steps": 2}, id="all"),
    pytest.param({"gradient_accumulation_steps": 2, "bf16": True}, id="accumulation-bf16"),
    pytest.param({"eval_strategy": "steps", "eval_steps": 2}, id="evaluation"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled(fresh_accelerator: None) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Run:
    """A run, and how many graphs had been compiled by the end of each of its steps."""

    def __init__(self, folder: Path, cls: type[Trainer], model: nn.Module, **settings: Any) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.model: Any = model
        args = tiny.arguments(folder, XGradTrainingArguments, **settings)
        self.trainer: Any = cls(
            model=self.model, args=args, train_dataset=tiny.Sentences(), eval_dataset=tiny.Sentences(8, seed=1)
        )
        self.graphs: list[int] = []
        self.trainer.add_callback(tiny.EveryEvent(self._count))
        self.trainer.train()

    def _count(self, event: str, **_: Any) -> None:
        if event == "step_end":
            self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *(pytest.param(Bag, *setting.values, id=setting.id) for setting in SETTINGS),
        pytest.param(lambda: tiny.bert(num_hidden_layers=1), {"gradient_accumulation_steps": 2}, id="bert"),
    ],
)
def test_nothing_is_compiled_anew(tmp_path: Path, make: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    """Graph for graph and step for step what the plain Trainer compiles, and all of it by the second step."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", **settings}
    plain, ours = Run(tmp_path, Trainer, make(), **compiled), Run(tmp_path, XGradTrainer, make(), **compiled)
    assert isinstance(ours.trainer.model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert ours.graphs == plain.graphs
    assert len(ours.graphs) == 6
    assert ours.graphs[0] > 0
    if "eval_steps" not in settings:  # an evaluation has graphs of its own
        assert ours.graphs[1] == ours.graphs[-1]
    assert not tiny.same(tiny.weights(ours.model), tiny.weights(plain.model))
    # This backend runs the very operations that it has traced.
    uncompiled = Run(tmp_path, XGradTrainer, make(), **settings)
    assert not uncompiled.graphs[-1]
    assert tiny.same(tiny.weights(ours.model), tiny.weights(uncompiled.model))


@pytest.mark.parametrize("settings", [{"steps": 2.0, "rule": "last_update"}, {"steps": "auto"}], ids=str)
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_compiled_step_of_the_optimizer_is_noticed(settings: Any) -> None:
    """In a loop of one's own, by rules that have to know of each step: all as after steps that are not compiled."""
    states, finals = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        predictor = WeightPredictor(optimizer, XGradConfig(**settings))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for x in torch.randn(5, 4, 6).double():
            with predictor.predicted():
                model(x).square().mean().backward()
            step()
            optimizer.zero_grad()
        assert counters["stats"]["unique_graphs"] > 0 or not compiled
        states.append({name: value for name, value in predictor.state_dict().items() if name != "holds"})
        finals.append([p.detach().clone() for p in model.parameters()])
    assert states[0]
    torch.testing.assert_close(states[1], states[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-9, atol=1e-11)


# ---- CUDA graphs ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["closed_form", "last_update"])
@pytest.mark.parametrize("steps", [2.0, "auto"])
def test_cuda_graphs_of_the_compiler(tmp_path: Path, rule: str, steps: Any) -> None:
    """They read the weights where they lie; none is given up, or compiled anew, because of a prediction."""
    settings = {"use_cpu": False, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}
    ours = {"xgrad_rule": rule, "xgrad_steps": steps, **settings}
    compiled = {"torch_compile": True, "torch_compile_backend": "inductor", "torch_compile_mode": "reduce-overhead"}
    # No dropout: compiled kernels draw their random numbers otherwise.
    plain = Run(tmp_path, Trainer, Bag(0.0), **settings, **compiled)
    skipped = counters["inductor"]["cudagraph_skips"]
    graphed = Run(tmp_path, XGradTrainer, Bag(0.0), **ours, **compiled)
    assert graphed.graphs == plain.graphs
    assert graphed.graphs[0] > 0
    assert counters["inductor"]["cudagraph_skips"] == skipped
    uncompiled = tiny.weights(Run(tmp_path, XGradTrainer, Bag(0.0), **ours).model)
    for name, w in tiny.weights(graphed.model).items():
        torch.testing.assert_close(w, uncompiled[name], rtol=1e-4, atol=1e-6)
    apart = {name: (w - uncompiled[name]).abs().max() for name, w in tiny.weights(plain.model).items()}
    assert all(distance > 1e-4 for distance in apart.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["closed_form", "last_update"])
@pytest.mark.parametrize("steps", [2.0, "auto"])
def test_cuda_graphs_of_ones_own(rule: str, steps: float | str) -> None:
    """A replayed forward and backward see the predicted weights: the run is that of the model without graphs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).cuda().double()
    data = torch.randn(6, 16, 6).cuda().double()
    finals = []
    for graphed in (False, True):
        copied = copy.deepcopy(model)
        run = torch.cuda.make_graphed_callables(copied, (data[0].clone(),)) if graphed else copied
        optimizer = torch.optim.AdamW(copied.parameters(), lr=0.01, fused=True)
        predictor = WeightPredictor(optimizer, XGradConfig(steps=steps, rule=rule))
        for x in data:
            optimizer.zero_grad(set_to_none=False)
            with predictor.predicted():
                run(x).square().mean().backward()
            optimizer.step()
        finals.append([p.detach().clone() for p in copied.parameters()])
    for a, b in zip(*finals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
