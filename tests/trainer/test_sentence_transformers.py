"""XGradMixin and enable_xgrad over the trainers of Sentence Transformers; offline, with models from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)

import hf_xgrad
import tiny_models as tiny
from hf_xgrad import XGradConfig, XGradMixin
from small_runs import history, training_logs

st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = {word: i for i, word in enumerate((*SPECIAL, *map(str, range(tiny.VOCABULARY - len(SPECIAL)))))}
PAIRS = 24


# ---- models, data and trainers ----


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the Hub all the same is an error."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def saved(folder: Path, kind: type) -> str:
    """The folder of a BERT of one layer with dropout, and of its tokenizer: one token a word."""
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=1,
    )
    path = folder / kind.__name__
    if not path.exists():
        torch.manual_seed(0)
        kind(config).save_pretrained(path)
        BertTokenizer(vocab=WORDS).save_pretrained(path)
    # Whatever is made around it begins at the same random numbers.
    torch.manual_seed(0)
    return str(path)


def bi_encoder(folder: Path) -> Any:
    transformer = st.base.modules.Transformer(saved(folder, BertModel))
    pooling = st.sentence_transformer.modules.Pooling(transformer.get_embedding_dimension())
    return st.SentenceTransformer(modules=[transformer, pooling], device="cpu")


def texts(seed: int) -> list[str]:
    ids = torch.randint(tiny.VOCABULARY - len(SPECIAL), (PAIRS, 4), generator=torch.Generator().manual_seed(seed))
    return [" ".join(map(str, row)) for row in ids.tolist()]


def pairs(*, labels: bool) -> Dataset:
    columns: dict[str, Any] = {"anchor": texts(0), "positive": texts(1)}
    if labels:
        columns["label"] = [float(i % 2) for i in range(PAIRS)]
    return Dataset.from_dict(columns)


def ranking(model: Any) -> nn.Module:
    return st.sentence_transformer.losses.MultipleNegativesRankingLoss(model)


def similarity(model: Any) -> nn.Module:
    return st.sentence_transformer.losses.CosineSimilarityLoss(model)


class Method(NamedTuple):
    """A trainer of Sentence Transformers and what it needs."""

    name: str  # its class is <name>Trainer, that of its arguments <name>TrainingArguments
    model: Callable[[Path], Any]
    labels: bool = False
    loss: Callable[[Any], nn.Module] | None = None

    @property
    def trainer(self) -> Any:
        return getattr(st, f"{self.name}Trainer")


METHODS = {
    "ranking": Method("SentenceTransformer", bi_encoder, loss=ranking),
    "similarity": Method("SentenceTransformer", bi_encoder, True, similarity),
    "cross-encoder": Method(
        "CrossEncoder",
        lambda folder: st.CrossEncoder(saved(folder, BertForSequenceClassification), device="cpu", num_labels=1),
        True,
    ),
    "sparse-encoder": Method(
        "SparseEncoder", lambda folder: st.SparseEncoder(saved(folder, BertForMaskedLM), device="cpu")
    ),
    "multi-vector-encoder": Method(
        "MultiVectorEncoder", lambda folder: st.MultiVectorEncoder(saved(folder, BertModel), device="cpu")
    ),
}
# Those that this version has.
METHODS = {name: method for name, method in METHODS.items() if hasattr(st, f"{method.name}Trainer")}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
ONE = METHODS["ranking"]


def over(base: type) -> type:
    return type(f"XGrad{base.__name__}", (XGradMixin, base), {})


def make(
    method: Method,
    folder: Path,
    config: XGradConfig | None = None,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """The trainer of `method`; with `config` under the mixin."""
    model = method.model(folder)
    args = tiny.arguments(
        folder / "run",
        getattr(st, f"{method.name}TrainingArguments"),
        **{"max_steps": 4, "optim": "adamw_torch", "lr_scheduler_type": "constant", **settings},
    )
    given = {**(given or {}), **({} if config is None else {"xgrad_config": config})}
    cls = method.trainer if config is None else over(method.trainer)
    loss = None if method.loss is None else method.loss(model)
    return cls(model=model, args=args, train_dataset=pairs(labels=method.labels), loss=loss, **given)


def outcome(trainer: Any, since: int = 0) -> tuple[Any, ...]:
    """Log, weights and random numbers, without what only XGrad logs."""
    log = [
        {key: value for key, value in entry.items() if not key.startswith("xgrad/")}
        for entry in history(trainer)
        if entry["step"] > since and "train_loss" not in entry
    ]
    return log, {name: w.tolist() for name, w in tiny.weights(trainer.model).items()}, float(torch.rand(()))


class Watch:
    """The weights that forwards in training see, and the true ones at the beginning of each step."""

    def __init__(self, trainer: Any) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.true: list[dict[str, Tensor]] = []
        model = trainer.model
        # Of a module inside, as a loss may call the model in parts.
        embeddings = next(module for module in model.modules() if isinstance(module, nn.Embedding))
        embeddings.register_forward_pre_hook(
            lambda *_: self.seen.append(tiny.weights(model)) if torch.is_grad_enabled() else None
        )
        callback, events = tiny.recorder(model)
        trainer.add_callback(callback)
        self.events = events
        begins = tiny.EveryEvent(
            lambda event, **_: self.true.append(tiny.weights(model)) if event == "step_begin" else None
        )
        trainer.add_callback(begins)


# ---- nothing predicted ----


@methods
def test_switched_off_it_is_that_trainer(tmp_path: Path, method: Method) -> None:
    runs = []
    for config in (None, XGradConfig(steps=0), XGradConfig(enabled=False)):
        trainer = make(method, tmp_path, config, gradient_accumulation_steps=2)
        trainer.train()
        runs.append((outcome(trainer), training_logs(trainer)))
    assert runs[0] == runs[1] == runs[2]


# ---- predicted ----


@methods
@pytest.mark.parametrize("rule", ["closed_form", "last_update"])
def test_forwards_see_predicted_weights_and_callbacks_the_true_ones(tmp_path: Path, method: Method, rule: str) -> None:
    trainer = make(method, tmp_path, XGradConfig(steps=1.0, rule=rule))
    watch = Watch(trainer)
    trainer.train()
    per_step = len(watch.seen) // 4
    assert len(watch.true) == 4
    assert len(watch.seen) == 4 * per_step
    for t, true in enumerate(watch.true):
        seen = watch.seen[t * per_step : (t + 1) * per_step]
        assert all(tiny.same(seen[0], other) for other in seen)
        assert tiny.same(seen[0], true) == (t == 0)
        if t > 0 and rule == "last_update":
            for name, w in true.items():
                assert torch.allclose(seen[0][name], 2 * w - watch.true[t - 1][name], rtol=0, atol=1e-6)
    assert tiny.changes(watch.events) == {"optimizer_step"}
    logs = training_logs(trainer)
    assert len(logs) == 4
    assert [entry["xgrad/active"] for entry in logs] == [0.0, 1.0, 1.0, 1.0]
    assert all(-1 <= entry["xgrad/cosine"] <= 1 for entry in logs[1:])


@methods
def test_it_learns(tmp_path: Path, method: Method) -> None:
    trainer = make(method, tmp_path, XGradConfig(), max_steps=20, learning_rate=3e-3)
    trainer.train()
    losses = [entry["loss"] for entry in training_logs(trainer)]
    assert sum(losses[-6:]) < sum(losses[:6])


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    for rule in ("auto", "last_update"):
        config = XGradConfig(steps=1.0, rule=rule)
        whole = make(ONE, tmp_path, config, save_strategy="steps", save_steps=2)
        whole.train()
        expected = outcome(whole, 2)
        resumed = make(ONE, tmp_path, config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert outcome(resumed, 2) == expected


def test_its_loss_may_have_weights(tmp_path: Path) -> None:
    """The optimizer has them too, and they are predicted with the others."""

    class Scaled(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model
            self.inner = ranking(model)
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, features: Any, labels: Any) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(float(self.scale.detach()))
            return self.scale * self.inner(features, labels)

    method = ONE._replace(loss=Scaled)
    seen: list[float] = []
    true: list[float] = []
    trainer = make(method, tmp_path, XGradConfig(steps=1.0))
    scale = trainer.loss.scale
    trainer.add_callback(
        tiny.EveryEvent(lambda event, **_: true.append(float(scale.detach())) if event == "step_begin" else None)
    )
    trainer.train()
    assert len(true) == 4
    assert [a != b for a, b in zip(seen, true, strict=True)] == [False, True, True, True]
    assert len(set(true)) == 4


# ---- enable_xgrad ----


@methods
def test_enable_xgrad_is_the_mixin(tmp_path: Path, method: Method) -> None:
    by_mixin = make(method, tmp_path, XGradConfig(steps=2.0))
    by_mixin.train()
    expected = outcome(by_mixin)
    trainer = make(method, tmp_path)
    assert hf_xgrad.enable_xgrad(trainer, steps=2.0) is trainer
    assert isinstance(trainer, XGradMixin)
    assert isinstance(trainer, method.trainer)
    trainer.train()
    assert outcome(trainer) == expected
    assert training_logs(trainer)[-1]["xgrad/active"] == 1.0


@methods
def test_enable_xgrad_switched_off_is_that_trainer(tmp_path: Path, method: Method) -> None:
    runs = []
    for enable in (False, True):
        trainer = make(method, tmp_path)
        if enable:
            hf_xgrad.enable_xgrad(trainer, steps=0)
        trainer.train()
        runs.append((outcome(trainer), training_logs(trainer)))
    assert runs[0] == runs[1]
