"""Tiny models and data for the tests: made from configs and seeds, nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, TrainingArguments

VOCABULARY = 48
LENGTH = 12


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
