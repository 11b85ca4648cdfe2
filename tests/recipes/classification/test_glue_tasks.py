"""The nine tasks, and their metrics against the textbook's formulas."""

import math

import evaluate
import numpy as np
import pytest

from hf_xgrad.recipes.classification.labels import SETS
from hf_xgrad.recipes.classification.tasks import CLASS_SCORES, REGRESSION_SCORES, TASKS, TextMetric

NAMES = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


def test_the_nine_tasks() -> None:
    assert list(TASKS) == NAMES
    assert [task.labels.regression for task in TASKS.values()].count(True) == 1
    assert {task.metrics for task in TASKS.values()} == {
        ("matthews_correlation",),
        ("accuracy",),
        ("accuracy", "f1"),
        ("pearson", "spearmanr"),
    }


def counts(predictions: np.ndarray, references: np.ndarray) -> tuple[int, int, int, int]:
    pairs = list(zip(predictions.tolist(), references.tolist(), strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))


def textbook_classes(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    tp, fp, fn, tn = counts(predictions, references)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": (tp + tn) / len(predictions),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0,
        "matthews_correlation": (tp * tn - fp * fn) / root if root else 0.0,
    }


def textbook_pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


def ranks(values: np.ndarray) -> np.ndarray:
    """Return each value's rank; equal values share the mean of theirs."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


@pytest.mark.parametrize("seed", range(5))
def test_class_scores_equal_the_textbooks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 2, 50)
    predictions = np.where(rng.random(50) < 0.7, references, 1 - references)
    found = TextMetric(tuple(CLASS_SCORES)).compute(predictions=predictions, references=references)
    assert found == pytest.approx(textbook_classes(predictions, references), abs=1e-12)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("prediction", [0, 1])
@pytest.mark.parametrize("reference", [0, 1])
def test_class_scores_of_a_constant_guess(prediction: int, reference: int) -> None:
    predictions, references = np.full(4, prediction), np.full(4, reference)
    found = TextMetric(tuple(CLASS_SCORES)).compute(predictions=predictions, references=references)
    # scikit-learn, and so GLUE, calls a perfect prediction of a single class a correlation of 0.
    assert found == textbook_classes(predictions, references)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_the_textbooks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    references = (rng.integers(0, 11, 40) / 2).astype(np.float32)  # with ties
    predictions = (references + rng.normal(0, 1, 40)).astype(np.float32)
    found = TextMetric(tuple(REGRESSION_SCORES)).compute(predictions=predictions, references=references)
    x, y = predictions.astype(float), references.astype(float)
    expected = {"pearson": textbook_pearson(x, y), "spearmanr": textbook_pearson(ranks(x), ranks(y))}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("predictions", [[1.0, 1.0, 1.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
def test_where_nothing_correlates_the_score_is_not_a_number(
    predictions: list[float], recwarn: pytest.WarningsRecorder
) -> None:
    found = TextMetric(("pearson", "spearmanr")).compute(predictions=predictions, references=[1.0, 2.0, 3.0])
    assert all(math.isnan(score) for score in found.values())
    assert not recwarn.list
    single = TextMetric(("pearson",)).compute(predictions=[1.0], references=[1.0])
    assert math.isnan(single["pearson"])


def test_three_classes() -> None:
    found = TextMetric(("accuracy", "matthews_correlation")).compute(predictions=[0, 1, 2, 2], references=[0, 1, 2, 1])
    # Gorodkin's correlation of k classes: c*s - sum(p*t) over sqrt((s*s - sum(p*p)) * (s*s - sum(t*t))).
    assert found == pytest.approx({"accuracy": 0.75, "matthews_correlation": 7 / 10})


def test_sets_of_classes() -> None:
    rows = {"predictions": [[1, 0, 1], [0, 1, 0], [0, 0, 0]], "references": [[1, 1, 0], [0, 1, 0], [0, 0, 0]]}
    found = TextMetric(("f1", "accuracy"), SETS).compute(**rows)
    assert found == pytest.approx({"f1": 2 * 2 / (2 * 2 + 1 + 1), "accuracy": 2 / 3})


def test_the_interface_is_that_of_evaluate() -> None:
    metric = TextMetric(("accuracy",))
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add(prediction=1, reference=1)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0}


def test_scores_leave_the_random_state_alone() -> None:
    metric = TextMetric(("accuracy",))
    np.random.seed(3)
    expected = np.random.random(2)
    np.random.seed(3)
    metric.compute(predictions=[1], references=[1])
    assert np.array_equal(np.random.random(2), expected)
