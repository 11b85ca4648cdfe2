"""Rows become batches: padding, labels, and which tokens are masked."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from hf_xgrad.recipes.language.batches import IGNORED, CausalCollator, MaskingCollator
from hf_xgrad.recipes.language.data import NO_WORD

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[END]"]
PAD, CLS, SEP, MASK, END = range(5)
VOCABULARY = 60


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {token: number for number, token in enumerate([*SPECIAL, *(f"w{n}" for n in range(5, VOCABULARY))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w5")),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        additional_special_tokens=["[END]"],
    )


def rows_of(lengths: Sequence[int], seed: int = 0, words: bool = False) -> list[dict[str, list[int]]]:
    """Return rows of so many ordinary tokens between two special ones; with `words`, words have up to three tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist()
        steps = torch.rand(length, generator=generator) < (0.4 if words else 1.1)
        # Words are numbered from where the text had come to when the row began.
        numbers = (1000 * len(rows) + steps.cumsum(0)).tolist()
        rows.append({"input_ids": [CLS, *ids, SEP], "word_ids": [NO_WORD, *numbers, NO_WORD]})
    return rows


# Causal


def test_causal_labels_are_the_tokens_that_something_predicts(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = CausalCollator(tokenizer)([{"input_ids": [7, 8, 9]}, {"input_ids": [9, 7]}, {"input_ids": [5, 6, 7, 8]}])
    assert batch["input_ids"].tolist() == [[7, 8, 9, PAD], [9, 7, PAD, PAD], [5, 6, 7, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 8, 9, IGNORED], [IGNORED, 7, IGNORED, IGNORED], [IGNORED, 6, 7, 8]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padding_token_that_ends_texts_is_learned_where_it_ends_one(
    tokenizer: PreTrainedTokenizerFast, side: str
) -> None:
    ends = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="[END]", eos_token="[END]", padding_side=side
    )
    batch = CausalCollator(ends)([{"input_ids": [7, END, END]}, {"input_ids": [END, 8, 9, 8, END]}])
    assert batch["input_ids"].tolist() == [[7, END, END, END, END], [END, 8, 9, 8, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[IGNORED, END, END, IGNORED, IGNORED], [IGNORED, 8, 9, 8, END]]


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (4, 8), (5, 5)])
def test_the_width_of_a_causal_batch(tokenizer: PreTrainedTokenizerFast, multiple: int | None, width: int) -> None:
    batch = CausalCollator(tokenizer, multiple)([{"input_ids": [7] * 3}, {"input_ids": [8] * 5}])
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, width)}


# Masked


def parts(batch: dict[str, Tensor], rows: Sequence[Any], collator: MaskingCollator) -> tuple[Tensor, Tensor]:
    """Return the original tokens of a batch and which of them were chosen."""
    width = batch["input_ids"].shape[1]
    original = torch.tensor([row["input_ids"] + [PAD] * (width - len(row["input_ids"])) for row in rows])
    return original, batch["labels"] != IGNORED


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.9])
def test_what_is_masked_and_what_is_left_alone(
    tokenizer: PreTrainedTokenizerFast, probability: float, words: bool
) -> None:
    rows = rows_of([1, 3, 30, 12, 7, 2], words=words)
    for seed in range(20):
        collator = MaskingCollator(tokenizer, probability, seed)
        batch = collator(rows)
        original, chosen = parts(batch, rows, collator)
        assert torch.equal(batch["labels"][chosen], original[chosen])
        assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
        assert torch.equal(batch["attention_mask"], (original != PAD).long())
        assert not chosen[(original == CLS) | (original == SEP) | (original == PAD)].any()
        assert chosen.any(1).all()
        seen = batch["input_ids"][chosen]
        assert bool(((seen == MASK) | (seen >= len(SPECIAL))).all())
        for row, of_row in zip(rows, chosen, strict=True):
            by_word: dict[int, set[bool]] = {}
            for word, is_chosen in zip(row["word_ids"], of_row.tolist(), strict=False):
                by_word.setdefault(word, set()).add(is_chosen)
            assert all(len(found) == 1 for found in by_word.values())


def test_a_row_without_words_stays_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"input_ids": [CLS, SEP], "word_ids": [NO_WORD, NO_WORD]}
    batch = MaskingCollator(tokenizer, 0.9, 0)([row, *rows_of([3])])
    assert batch["labels"][0].tolist() == [IGNORED] * 5
    assert batch["input_ids"][0].tolist() == [CLS, SEP, PAD, PAD, PAD]


@pytest.mark.parametrize("words", [False, True])
def test_how_many_are_masked_and_how(tokenizer: PreTrainedTokenizerFast, words: bool) -> None:
    rows = rows_of([400] * 50, words=words)
    collator = MaskingCollator(tokenizer, 0.15, seed=1)
    batch = collator(rows)
    original, chosen = parts(batch, rows, collator)
    count = int(chosen.sum())
    # 20 000 tokens, or 8 000 words: five standard deviations, of words of 2.5 tokens and more.
    assert abs(count / 20_000 - 0.15) < (0.025 if words else 0.0127)
    seen, true = batch["input_ids"][chosen], original[chosen]
    hidden, kept = int((seen == MASK).sum()), int((seen == true).sum())
    # About 3000 fates; a random replacement is the token itself once in 55 times.
    assert abs(hidden / count - 0.8) < 0.04
    assert abs(kept / count - (0.1 + 0.1 / 55)) < 0.03
    assert abs((count - hidden - kept) / count - 0.1) < 0.03
    replaced = seen[(seen != MASK) & (seen != true)]
    assert set(replaced.tolist()) <= set(range(len(SPECIAL), VOCABULARY))
    assert len(set(replaced.tolist())) > 45


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_masks_follow_from_the_seed_and_the_batch_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of([20] * 4)
    batch = MaskingCollator(tokenizer, 0.3, seed=5)(rows)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    collator = MaskingCollator(tokenizer, 0.3, seed=5)
    collator(rows[::-1])
    assert same(collator(rows), batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(MaskingCollator(tokenizer, 0.3, seed=6)(rows), batch)
    # In another company a row is masked anew.
    for others in (rows[:2], rows[:1], [rows[0], *rows_of([20] * 3, seed=9)]):
        assert not torch.equal(collator(others)["labels"][0], batch["labels"][0])
    for seed in (0, -1, 2**62):
        assert MaskingCollator(tokenizer, 0.3, seed)(rows)["labels"].shape == (4, 22)


def test_masks_are_the_same_in_worker_processes(tokenizer: PreTrainedTokenizerFast) -> None:
    data = Dataset.from_list(rows_of([9, 4, 7, 5, 8]))
    collator = MaskingCollator(tokenizer, 0.3, seed=5)
    here, there = (
        list(DataLoader(data, batch_size=2, collate_fn=collator, num_workers=workers))  # type: ignore[arg-type]
        for workers in (0, 2)
    )
    assert len(here) == 3
    assert all(same(*pair) for pair in zip(here, there, strict=True))


@pytest.mark.parametrize(
    ("settings", "width"),
    [({}, 11), ({"pad_to_multiple_of": 8}, 16), ({"pad_to_length": 20}, 20)],
)
@pytest.mark.parametrize("once", [False, True])
def test_the_width_of_a_masked_batch(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, int], width: int, once: bool
) -> None:
    collator = MaskingCollator(tokenizer, 0.2, 0, **settings)
    data = Dataset.from_list(rows_of([5, 9]))
    rows = list(collator.mask_once(data) if once else data)
    batch = collator(rows)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(2, width)}
    assert batch["attention_mask"].sum(1).tolist() == [7, 11]
    assert not (batch["labels"] != IGNORED)[batch["attention_mask"] == 0].any()


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_masked_once_stays_masked_so(tokenizer: PreTrainedTokenizerFast, streaming: bool) -> None:
    rows = rows_of([9, 4, 7, 5, 8, 30, 40, 35, 50, 45], words=True)
    data = Dataset.from_list(rows)
    collator = MaskingCollator(tokenizer, 0.6, seed=5, pad_to_multiple_of=8)
    once = list(collator.mask_once(data.to_iterable_dataset() if streaming else data))
    assert all(row.keys() == {"input_ids", "labels"} for row in once)
    alone = [MaskingCollator(tokenizer, 0.6, seed=5)([row]) for row in rows]
    for row, of_row in zip(once, alone, strict=True):
        assert row == {name: of_row[name][0].tolist() for name in ("input_ids", "labels")}
    for size in (1, 2, 5):
        labels = []
        for first in range(0, len(rows), size):
            batch = collator(once[first : first + size])
            assert batch["input_ids"].shape[1] % 8 == 0
            labels += [
                of_row[: int(length)].tolist()
                for of_row, length in zip(batch["labels"], batch["attention_mask"].sum(1), strict=True)
            ]
        assert labels == [row["labels"] for row in once]
