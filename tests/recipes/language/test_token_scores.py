"""Scores over tokens against sums that are made token by token."""

import math

import pytest
import torch
from torch import Tensor

from hf_xgrad.recipes.language.batches import IGNORED
from hf_xgrad.recipes.language.scores import TokenScores, mean_loss, score_rows

ROWS, WIDTH, VOCABULARY = 7, 9, 11


def example(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits, and labels that are few in some rows and none in one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(ROWS, WIDTH, VOCABULARY, generator=generator)
    labels = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=generator)
    # Some guesses must be right.
    labels[:, ::3] = logits[:, ::3].argmax(-1)
    labels[1:, 1:][torch.arange(2, WIDTH + 1) > torch.arange(1, ROWS)[:, None]] = IGNORED
    labels[3] = IGNORED
    return logits.to(dtype), labels


def one_by_one(logits: Tensor, labels: Tensor, shifted: bool) -> dict[str, float]:
    """The definition: sums over all predicted tokens, divided by their number."""
    loss, tokens, right = 0.0, 0, 0
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - shifted):
            token = int(labels[row, place + shifted])
            if token == IGNORED:
                continue
            scores = logits[row, place].double().tolist()
            most = max(scores)
            loss -= scores[token] - most - math.log(sum(math.exp(score - most) for score in scores))
            tokens += 1
            right += scores.index(most) == token
    return {"loss": loss / tokens, "perplexity": math.exp(loss / tokens), "accuracy": right / tokens, "tokens": tokens}


def scores_of(logits: Tensor, labels: Tensor, size: int, shifted: bool) -> dict[str, float]:
    scores = TokenScores()
    for first in range(0, len(labels), size):
        scores.add(score_rows(logits[first : first + size], labels[first : first + size], shifted=shifted))
    return scores.result()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_definition_whatever_the_batches(seed: int, shifted: bool) -> None:
    logits, labels = example(seed)
    expected = one_by_one(logits, labels, shifted)
    assert 0 < expected["accuracy"] < 1
    for size in (1, 2, ROWS):
        for order in (torch.arange(ROWS), torch.arange(ROWS).flip(0)):
            found = scores_of(logits[order], labels[order], size, shifted)
            assert found == pytest.approx(expected, rel=1e-6)
            assert (found["tokens"], found["accuracy"]) == (expected["tokens"], expected["accuracy"])


def test_rows_of_padding_change_nothing() -> None:
    logits, labels = example()
    wider = torch.cat([logits, torch.randn(ROWS, 4, VOCABULARY)], 1)
    padded = torch.cat([labels, torch.full((ROWS, 4), IGNORED)], 1)
    for shifted in (False, True):
        assert scores_of(wider, padded, ROWS, shifted) == scores_of(logits, labels, ROWS, shifted)


def test_sixteen_bit_logits_are_scored_in_single_precision() -> None:
    logits, labels = example(dtype=torch.bfloat16)
    expected = one_by_one(logits, labels, True)
    assert scores_of(logits, labels, 2, True) == pytest.approx(expected, rel=1e-6)


def test_a_mean_of_batch_means_is_something_else() -> None:
    logits, labels = example()
    means = [
        one_by_one(logits[row : row + 1], labels[row : row + 1], False)["loss"] for row in range(ROWS) if row != 3
    ]
    assert abs(sum(means) / len(means) - scores_of(logits, labels, 1, False)["loss"]) > 0.01


def test_no_tokens_and_a_loss_beyond_all_bounds() -> None:
    nothing = TokenScores().result()
    assert nothing.pop("tokens") == 0
    assert all(map(math.isnan, nothing.values()))
    logits = torch.zeros(1, 1, 2)
    logits[..., 1] = 1e4
    result = scores_of(logits, torch.zeros(1, 1, dtype=torch.long), 1, False)
    assert result == {"loss": 1e4, "perplexity": math.inf, "accuracy": 0.0, "tokens": 1}


@pytest.mark.parametrize("shifted", [False, True])
def test_the_training_loss_is_divided_by_the_tokens_of_the_window(shifted: bool) -> None:
    logits, labels = example()
    labels[:, 0] = -100
    expected = one_by_one(logits, labels, shifted)
    assert mean_loss(logits, labels, None, shifted=shifted).item() == pytest.approx(expected["loss"], rel=1e-6)
    for tokens in (expected["tokens"], torch.tensor(expected["tokens"])):
        parts = [mean_loss(logits[r], labels[r], tokens, shifted=shifted) for r in torch.arange(ROWS).split(3)]
        assert sum(parts).item() == pytest.approx(expected["loss"], rel=1e-6)


def test_scores_leave_no_gradient() -> None:
    logits, labels = example()
    assert not score_rows(logits.requires_grad_(), labels, shifted=True).requires_grad
    assert mean_loss(logits, labels, None, shifted=False).requires_grad
