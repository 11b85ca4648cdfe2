"""The nine GLUE tasks (https://gluebenchmark.com): their text columns, labels and metrics.

The metrics have the interface of `evaluate` and give what its "glue" metric gives, but are computed here, so that
nothing is downloaded.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from hf_xgrad.recipes.classification.labels import CLASSES, SCORES, SETS, Labels, ProblemType

HUB_NAME = "nyu-mll/glue"


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task's data look like and how it is scored."""

    text_columns: tuple[str, ...]
    labels: Labels
    metrics: tuple[str, ...]
    title: str


def _classes(*names: str) -> Labels:
    return Labels(names, numbered=True)


_PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    "cola": Task(("sentence",), _classes("unacceptable", "acceptable"), ("matthews_correlation",), "CoLA"),
    "sst2": Task(("sentence",), _classes("negative", "positive"), ("accuracy",), "SST-2"),
    "mrpc": Task(_PAIR, _classes("not_equivalent", "equivalent"), ("accuracy", "f1"), "MRPC"),
    "stsb": Task(_PAIR, Labels(span=(0.0, 5.0)), ("pearson", "spearmanr"), "STS-B"),
    "qqp": Task(("question1", "question2"), _classes("not_duplicate", "duplicate"), ("accuracy", "f1"), "QQP"),
    "mnli": Task(("premise", "hypothesis"), _classes("entailment", "neutral", "contradiction"), ("accuracy",), "MNLI"),
    "qnli": Task(("question", "sentence"), _classes("entailment", "not_entailment"), ("accuracy",), "QNLI"),
    "rte": Task(_PAIR, _classes("entailment", "not_entailment"), ("accuracy",), "RTE"),
    "wnli": Task(_PAIR, _classes("not_entailment", "entailment"), ("accuracy",), "WNLI"),
}

Score = Callable[[np.ndarray, np.ndarray], float]


def _correlation(correlate: Callable[..., tuple[float, float]]) -> Score:
    def score(predictions: np.ndarray, references: np.ndarray) -> float:
        # Not a number, rather than the end of a training run, where nothing can be correlated.
        if len(predictions) < 2 or not np.isfinite(predictions).all():
            return math.nan
        with warnings.catch_warnings():
            # Where all predictions are equal scipy warns and gives NaN, and so does the official metric.
            warnings.simplefilter("ignore")
            return float(correlate(predictions, references)[0])

    return score


CLASS_SCORES: dict[str, Score] = {
    "accuracy": lambda predictions, references: float(accuracy_score(references, predictions)),
    "f1": lambda predictions, references: float(f1_score(references, predictions, zero_division=0.0)),
    "matthews_correlation": lambda predictions, references: float(matthews_corrcoef(references, predictions)),
}
SET_SCORES: dict[str, Score] = {
    "f1": lambda predictions, references: float(f1_score(references, predictions, average="micro", zero_division=0.0)),
    "accuracy": CLASS_SCORES["accuracy"],
}
REGRESSION_SCORES: dict[str, Score] = {"pearson": _correlation(pearsonr), "spearmanr": _correlation(spearmanr)}
# By problem type; and those that are reported where no task says which.
SCORES_OF = {CLASSES: CLASS_SCORES, SETS: SET_SCORES, SCORES: REGRESSION_SCORES}
DEFAULT_SCORES = {CLASSES: ("accuracy",), SETS: ("f1",), SCORES: tuple(REGRESSION_SCORES)}


class TextMetric(evaluate.Metric):
    """Scores by name: `TextMetric(("accuracy", "f1")).compute(predictions=[0, 1], references=[1, 1])`.

    f1 takes class 1 as the positive one, as GLUE does; of sets of classes it counts all of them together, and accuracy
    the sets that are right as a whole. Rows are kept in memory: runs share no cache file.
    """

    def __init__(self, names: Sequence[str], problem_type: ProblemType | None = None) -> None:
        possible = SCORES_OF[problem_type] if problem_type else CLASS_SCORES | REGRESSION_SCORES
        self.scores = {name: possible[name] for name in names}
        self.sets = problem_type == SETS
        super().__init__(config_name="-".join(names), keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        # float32 as in the official metric, whose numbers these are to be.
        value = datasets.Value("float32" if self.scores.keys() <= REGRESSION_SCORES.keys() else "int64")
        row = datasets.List(value) if self.sets else value
        return evaluate.MetricInfo(
            description="Scores of classification or regression, computed by scikit-learn and scipy.",
            citation="",
            inputs_description="predictions and references: lists of class numbers or of scores.",
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        arrays = np.asarray(predictions), np.asarray(references)
        return {name: score(*arrays) for name, score in self.scores.items()}
