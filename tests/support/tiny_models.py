"""Tiny models and data for the tests: made from configs and seeds, nothing is downloaded."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from functools import partialmethod
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 48
LENGTH = 12


@functools.cache
def leave_out_what_is_there() -> None:
    """Every train() collects garbage first: what the imports of all files of tests have made is not looked at again.

    A short run is over in a tenth of the time.
    """
    gc.collect()
    gc.freeze()


def bert(**config: Any) -> BertForSequenceClassification:
    """A BERT classifier of two layers, without dropout unless `config` sets it."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 2,
    }
    model = BertForSequenceClassification(BertConfig(**{**settings, **config}))
    # Its forward takes **kwargs, from which the Trainer concludes that it scales its loss by num_items_in_batch.
    model.accepts_loss_kwargs = False
    return model


def gpt2(**config: Any) -> GPT2LMHeadModel:
    """A GPT-2 of two layers; its input and output embeddings are tied."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**{**settings, **config}))


class Sentences(Dataset[dict[str, Tensor]]):
    """Random token ids with labels that a classifier can learn (whether the first token id is even)."""

    def __init__(self, size: int = 32, seed: int = 0, *, language_model: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)
        self.language_model = language_model

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "labels": ids.clone() if self.language_model else ids[0] % 2}


def arguments(output_dir: Any, cls: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
    """Training arguments for a short, silent, deterministic run on the CPU."""
    leave_out_what_is_there()
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "seed": 7,
    }
    return cls(**{**defaults, **settings})


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit the same tensors under the same names."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def t5(**config: Any) -> T5ForConditionalGeneration:
    """A T5 of one layer, without dropout unless `config` sets it."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config(**{**settings, **config}))


class Forwards:
    """Records what every forward in training mode sees: `weights` and `batches`, one entry per call."""

    def __init__(self, model: nn.Module) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.weights.append(weights(model))
            self.batches.append({name: value.clone() for name, value in kwargs.items() if isinstance(value, Tensor)})


class EveryEvent(TrainerCallback):
    """Calls `observe(event, **what the Trainer tells its callbacks)` at every event there is."""

    EVENTS = tuple(name for name in dir(TrainerCallback) if name.startswith("on_"))

    def __init__(self, observe: Callable[..., None]) -> None:
        self.observe = observe

    def _on(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.observe(event.removeprefix("on_"), args=args, state=state, control=control, **kwargs)


for _event in EveryEvent.EVENTS:
    setattr(EveryEvent, _event, partialmethod(EveryEvent._on, _event))


def recorder(model: nn.Module, *events: str) -> tuple[EveryEvent, list[tuple[str, dict[str, Tensor]]]]:
    """A callback and the list that it fills with `(event, weights)`, for `events` only if any are named."""
    seen: list[tuple[str, dict[str, Tensor]]] = []

    def observe(event: str, **kwargs: Any) -> None:
        if not events or event in events:
            seen.append((event, weights(model)))

    return EveryEvent(observe), seen


def changes(seen: list[tuple[str, dict[str, Tensor]]]) -> set[str]:
    """Events of a `recorder` at which the weights were no longer those of the event before."""
    return {event for (_, before), (event, after) in pairwise(seen) if not same(before, after)}


def optimizer_state(trainer: Any) -> list[Tensor]:
    """Copies of all tensors in the state of a trainer's optimizer, in a fixed order."""
    state = trainer.optimizer.state_dict()["state"]
    return [
        torch.as_tensor(value).clone()
        for _, entries in sorted(state.items())
        for _, value in sorted(entries.items())
        if value is not None
    ]
