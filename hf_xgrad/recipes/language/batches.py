"""Collators for language models: rows of tokens become batches with the tokens to predict as labels."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_xgrad.recipes.language.data import NO_WORD, TextData

# What the losses of Transformers and torch pass over.
IGNORED = -100
# Of the tokens to predict, 80 % are hidden, 10 % are replaced and 10 % stay: Devlin et al., BERT, arXiv 1810.04805.
_HIDDEN, _REPLACED = 0.8, 0.1

Row = Mapping[str, Any]


def _pad(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], multiple: int | None, length: int | None
) -> dict[str, Tensor]:
    ids = {"input_ids": [list(row["input_ids"]) for row in rows]}
    padded = tokenizer.pad(
        ids,
        padding="max_length" if length else True,
        max_length=length,
        padding_side="right",
        pad_to_multiple_of=multiple,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}


def _pad_values(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


class CausalCollator:
    """Makes a batch whose labels are its own tokens, but for the first of each row: nothing predicts that.

    Padding is told by its place, not by its token, which in many models also ends a text.

    Args:
        tokenizer: has the padding token.
        pad_to_multiple_of: batches get a width that this divides.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = _pad(self.tokenizer, rows, self.pad_to_multiple_of, None)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        labels[:, 0] = IGNORED
        return {**batch, "labels": labels}


class MaskingCollator:
    """Makes a batch for masked language models: some words are chosen, their tokens hidden, and these are the labels.

    Which ones follows from the seed and the batch alone, not from a random state: a run that was resumed, or reads
    ahead, or in several worker processes, masks as any other. In each epoch a row stands in another batch and is
    masked anew (not so in batches of one). Each row has one chosen word at least.

    DataCollatorForLanguageModeling(seed=...) draws from one generator call by call, of each worker process: a run
    that was resumed gets the masks of the start again, other workers give others, a short row may have none, and
    with whole words none is replaced or left as it is.

    Args:
        tokenizer: has the mask and padding tokens.
        probability: how likely a word (`word_ids`) is chosen.
        seed: another one gives other masks.
        pad_to_multiple_of: batches get a width that this divides.
        pad_to_length: batches get this width, whatever the rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        probability: float,
        seed: int,
        pad_to_multiple_of: int | None = None,
        pad_to_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.probability = probability
        self.seed = seed
        self.pad_to_multiple_of = pad_to_multiple_of
        self.pad_to_length = pad_to_length
        self._ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = _pad(self.tokenizer, rows, self.pad_to_multiple_of, self.pad_to_length)
        ids = batch["input_ids"]
        if "labels" in rows[0]:
            return {**batch, "labels": _pad_values([row["labels"] for row in rows], ids.shape[1], IGNORED)}
        words = _pad_values([row["word_ids"] for row in rows], ids.shape[1], NO_WORD)
        generator = torch.Generator().manual_seed(self._seed_of(rows))
        chosen = _choose(words, self.probability, generator)
        labels = ids.masked_fill(~chosen, IGNORED)
        fate = torch.rand(ids.shape, generator=generator)
        others = self._ordinary[torch.randint(len(self._ordinary), ids.shape, generator=generator)]
        replaced = chosen & (fate >= _HIDDEN) & (fate < _HIDDEN + _REPLACED)
        hidden = ids.masked_fill(chosen & (fate < _HIDDEN), self.tokenizer.mask_token_id)
        return {**batch, "input_ids": torch.where(replaced, others, hidden), "labels": labels}

    def mask_once(self, data: TextData) -> TextData:
        """Mask each row once and for all: every evaluation then asks for the same tokens, whatever the batch size."""
        unpadded = MaskingCollator(self.tokenizer, self.probability, self.seed)
        return data.map(unpadded._masked_row, remove_columns=["word_ids"])

    def _masked_row(self, row: Row) -> dict[str, list[int]]:
        batch = self([row])
        return {name: batch[name][0].tolist() for name in ("input_ids", "labels")}

    def _seed_of(self, rows: Sequence[Row]) -> int:
        digest = hashlib.blake2b(self.seed.to_bytes(8, "little", signed=True), digest_size=8)
        for row in rows:
            digest.update(torch.tensor(row["input_ids"]).numpy().tobytes())
        # torch takes seeds below 2^63 on every device.
        return int.from_bytes(digest.digest(), "little") >> 1


def _choose(words: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return which tokens belong to a chosen word."""
    # A row's words may begin with any number: it was cut from the middle of a text.
    ordinary = words != NO_WORD
    first = words.masked_fill(~ordinary, torch.iinfo(words.dtype).max).amin(1, keepdim=True)
    places = (words - first).masked_fill(~ordinary, 0)
    draws = torch.rand(len(words), int(places.max()) + 1, generator=generator).gather(1, places)
    draws = draws.masked_fill(~ordinary, 2.0)
    return ordinary & ((draws < probability) | (draws == draws.amin(1, keepdim=True)))
