"""Loss, perplexity and accuracy over tokens.

    loss = (sum of -log p(token) over all predicted tokens of all batches) / (number of these tokens)

Each token counts the same, whatever row and batch it stands in. A mean of the batches' means would give those of a
short row, or of a batch with fewer masks, more weight.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from hf_xgrad.recipes.language.batches import IGNORED


@torch.no_grad()
def score_rows(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """Return what TokenScores adds up: (sum of -log p, number of tokens, number of right guesses) of each row.

    Args:
        logits: [rows, tokens, vocabulary].
        labels: [rows, tokens]; -100 is passed over.
        shifted: whether a token's logits are for the token after it, as in causal models.
    """
    scores = []
    # Row by row: in single precision the logits of a whole batch may be many times the size of the model.
    for row_logits, row_labels in zip(logits, labels, strict=True):
        if shifted:
            row_logits, row_labels = row_logits[:-1], row_labels[1:]
        counted = row_labels != IGNORED
        row_logits, row_labels = row_logits[counted].float(), row_labels[counted]
        loss = functional.cross_entropy(row_logits, row_labels, reduction="sum")
        right = (row_logits.argmax(-1) == row_labels).sum()
        scores.append(torch.stack([loss, counted.sum(), right]))
    return torch.stack(scores)


def mean_loss(logits: Tensor, labels: Tensor, tokens: Tensor | int | None, *, shifted: bool) -> Tensor:
    """Return the loss to train on, divided by `tokens`.

    Not the model's own: some models do not know of accumulation windows, some do not shift their labels.

    Args:
        logits: [rows, tokens, vocabulary].
        labels: [rows, tokens]; -100 is passed over.
        tokens: the number of predicted ones in the whole accumulation window; None stands for those of this batch.
        shifted: whether a token's logits are for the token after it, as in causal models.
    """
    if shifted:
        labels = functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    total = functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels.ne(IGNORED).sum() if tokens is None else tokens)


class TokenScores:
    """Adds up the scores of rows."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.tokens = 0
        self.right = 0

    def add(self, rows: Tensor) -> None:
        """Take in what score_rows gave, of all processes."""
        loss, tokens, right = rows.double().cpu().sum(0).tolist()
        self.loss += loss
        self.tokens += int(tokens)
        self.right += int(right)

    def result(self) -> dict[str, float]:
        """Return loss (nats per token), perplexity, accuracy and the number of tokens."""
        loss = self.loss / self.tokens if self.tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.inf if loss > 700 else math.exp(loss),
            "accuracy": self.right / self.tokens if self.tokens else math.nan,
            "tokens": self.tokens,
        }
