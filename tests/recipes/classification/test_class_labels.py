"""Labels: which there are, and how values are read as them."""

from typing import Any

import pytest

from hf_xgrad.recipes.classification.labels import Labels, find_labels, labels_of_model
from hf_xgrad.recipes.input_errors import InputError

PAIR = Labels(("not_equivalent", "equivalent"), numbered=True)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([0, 1], [0, 1]),
        (["0", " 1 "], [0, 1]),
        (["equivalent", "not_equivalent"], [1, 0]),
        ([1.0, "equivalent", True], [1, 1, 1]),
    ],
)
def test_values_are_names_or_numbers(values: list[Any], numbers: list[int]) -> None:
    assert PAIR.encode(values, "x.csv") == numbers


@pytest.mark.parametrize(
    "value", [2, -1, "2", "equal", "", None, 0.5, "Equivalent ish", [1], float("nan"), float("inf")]
)
def test_other_values_are_named_with_file_and_row(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        PAIR.encode([0, 1, value], "x.csv")
    expected = f"x.csv, row 3: label {value!r} is not one of 0 (not_equivalent), 1 (equivalent)"
    assert str(caught.value) == expected


def test_long_lists_of_labels_are_cut() -> None:
    with pytest.raises(InputError, match=r"not one of a0, .*, a9, \.\.\.$"):
        Labels(tuple(f"a{n}" for n in range(30))).encode(["b"], "x.csv")


SCORES = Labels(span=(0.0, 5.0))


def test_scores() -> None:
    assert SCORES.regression
    assert SCORES.encode([0, "2.5", 5.0], "x.csv") == [0.0, 2.5, 5.0]
    assert Labels().encode([-1e9], "x.csv") == [-1e9]


@pytest.mark.parametrize("value", [5.1, -0.1, "much", None, float("nan"), "inf"])
def test_scores_outside_the_span_are_named(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        SCORES.encode([1, value], "x.csv")
    assert str(caught.value) == f"x.csv, row 2: label {value!r} is not a number from 0 to 5"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["good", "bad", "good"], Labels(("bad", "good"))),
        ([1, 2, 10, 1], Labels(("1", "2", "10"))),
        (["10", "2", "1"], Labels(("1", "2", "10"))),
        ([True, False], Labels(("0", "1"))),
        (["1", "x", "0.5"], Labels(("0.5", "1", "x"))),
        ([0.5, 1.0, 2], Labels()),
        ([0, 1.0], Labels()),
        (["0", "0.5"], Labels()),
        (["a", None, "b", ""], Labels(("a", "b"))),
        (["1", "", "2"], Labels(("1", "2"))),
        (["0.5", "", "2"], Labels()),
    ],
)
def test_labels_are_found_in_the_data(values: list[Any], labels: Labels) -> None:
    assert find_labels(values, "x.csv") == labels


@pytest.mark.parametrize("values", [["a", "a"], [1], [None, None]])
def test_a_single_class_is_refused(values: list[Any]) -> None:
    # One label would make Transformers train a regression.
    with pytest.raises(InputError, match=r"x\.csv: classification needs two labels at least"):
        find_labels(values, "x.csv")


def test_a_label_unseen_in_training_is_not_taken_for_a_number() -> None:
    with pytest.raises(InputError, match="label 0 is not one of bad, good"):
        find_labels(["good", "bad"], "train.csv").encode([0], "validation.csv")


def test_decoding_reverses_encoding() -> None:
    values = ["equivalent", "not_equivalent", "equivalent"]
    assert PAIR.decode(PAIR.encode(values, "x.csv")) == values
    assert SCORES.decode([0.12345678, 3]) == [0.1235, 3.0]


def test_a_models_own_order_is_respected() -> None:
    mnli = Labels(("entailment", "neutral", "contradiction"), numbered=True)
    assert mnli.numbers_in({0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}) == [2, 1, 0]
    assert mnli.numbers_in({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}) == [0, 1, 2]
    assert mnli.numbers_in({0: "entailment", 1: "neutral"}) == [0, 1, 2]
    assert Labels(("A", "a")).numbers_in({0: "a", 1: "A"}) == [0, 1]  # not told apart by their letters alone


def test_labels_of_a_model() -> None:
    assert labels_of_model({1: "good", 0: "bad"}) == Labels(("bad", "good"), numbered=True)
    assert labels_of_model({0: "LABEL_0"}) == Labels()
