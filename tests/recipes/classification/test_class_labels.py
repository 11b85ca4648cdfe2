"""Labels: which there are, and how values are read as them."""

import datetime
import itertools
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from hf_xgrad.recipes.classification.labels import CLASSES, SCORES, SETS, Labels, find_labels, labels_of_model
from hf_xgrad.recipes.input_errors import InputError

PAIR = Labels(("not_equivalent", "equivalent"), numbered=True)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([0, 1], [0, 1]),
        (["0", " 1 "], [0, 1]),
        (["equivalent", " not_equivalent\n"], [1, 0]),
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


STSB = Labels(span=(0.0, 5.0))


def test_scores() -> None:
    assert STSB.regression
    assert STSB.encode([0, "2.5", 5.0], "x.csv") == [0.0, 2.5, 5.0]
    assert Labels().encode([-1e9], "x.csv") == [-1e9]


@pytest.mark.parametrize(
    "value", [5.1, -0.1, "much", None, "", float("nan"), "inf", "1_1", "1e0", "٣", [1.0], "9" * 400]
)
def test_scores_outside_the_span_are_named(value: Any) -> None:
    with pytest.raises(InputError) as caught:
        STSB.encode([1, value], "x.csv")
    assert str(caught.value) == f"x.csv, row 2: label {value!r} is not a number from 0 to 5"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["good", "bad", "good"], Labels(("bad", "good"))),
        (["b\ta", "a\r\nb", " c\u2028c "], Labels(("a b", "b a", "c c"))),
        (["a  b", "b"], Labels(("a  b", "b"))),
        ([1, 2, 10, 1], Labels(("1", "2", "10"))),
        (["10", "2", "1"], Labels(("1", "2", "10"))),
        ([True, False], Labels(("0", "1"))),
        ([True, 0, 1.0], Labels(("0", "1"))),
        ([0.0, 1.0, 1], Labels(("0", "1"))),
        ([0.0, float("nan"), 1.0], Labels(("0", "1"))),
        (["0.0", "1.0"], Labels(("0.0", "1.0"))),
        (["1_1", "2_1", "1_2"], Labels(("1_1", "1_2", "2_1"))),
        (["1e1", "2E5", "1e2"], Labels(("1e1", "1e2", "2E5"))),
        (["infinity", "nan", "inf"], Labels(("inf", "infinity", "nan"))),
        (["٣", "2", "10"], Labels(("10", "2", "٣"))),
        (["1", "x", "y", "0.5"], Labels(("0.5", "1", "x", "y"))),
        (["1", "x", "0.5"], Labels()),
        ([0.5, 1.0, 2], Labels()),
        ([0, 1.5], Labels()),
        ([Decimal("0.5"), Decimal(1)], Labels()),
        (["0", "1e-05"], Labels()),
        (["0", "-.5"], Labels()),
        (["a", None, "b", "", " \t"], Labels(("a", "b"))),
        (["1", "", "2"], Labels(("1", "2"))),
        (["0.5", "", "2"], Labels()),
        ([0.5, float("nan"), 3.5], Labels()),
        (["0.5", "nan", "3.5"], Labels()),
    ],
)
def test_labels_are_found_in_the_data(values: list[Any], labels: Labels) -> None:
    assert find_labels(values, "x.csv")[0] == labels


@pytest.mark.parametrize("values", [["1", "+1", "01", "-1", "1.", "2"], [2, "1", 10]])
def test_the_order_of_classes_depends_on_the_data_alone(values: list[Any]) -> None:
    found = {find_labels(order, "x.csv")[0] for order in itertools.permutations(values)}
    assert found == {Labels(("-1", "+1", "01", "1", "1.", "2"))} or found == {Labels(("1", "2", "10"))}


@pytest.mark.parametrize("odd", [float("nan"), "nan", "n/a", None, " ", float("inf"), "1_5"])
def test_what_is_no_score_among_scores_is_named(odd: Any) -> None:
    values = [0.5, 1.5, odd] if not isinstance(odd, str) else ["0.5", "1.5", odd]
    with pytest.raises(InputError, match=r"^x\.csv, row 3: label .* is not a number; --problem_type single_label_"):
        find_labels(values, "x.csv")[0].encode(values, "x.csv")


@pytest.mark.parametrize("blank", ["", "  ", "\t\n", "\u00a0", None])
def test_a_blank_is_no_class(blank: Any) -> None:
    values = ["a", "b", blank]
    with pytest.raises(InputError, match=r"^x\.csv, row 3: label .* is not one of a, b$"):
        find_labels(values, "x.csv")[0].encode(values, "x.csv")


@pytest.mark.parametrize("odd", [{"a": 1}, b"a", datetime.date(2021, 3, 1), [["a"]]])
def test_what_is_no_label_at_all_is_named(odd: Any) -> None:
    with pytest.raises(InputError, match=r"^x\.csv, row 2: label .* is neither text nor a number$"):
        find_labels(["a", odd], "x.csv")


def test_it_is_told_why() -> None:
    assert find_labels([0.5, 1], "x.csv")[1] == "all labels are numbers, and 0.5 has a fraction"
    assert find_labels(["x", "2", "2.50"], "x.csv")[1] == "most labels are numbers, and 2.50 has a fraction"
    assert find_labels([0.0, 1], "x.csv")[1] == "no label is a number with a fraction"
    assert find_labels(["0.5", "x"], "x.csv")[1] == "most labels are no numbers"


def test_the_type_may_be_given() -> None:
    why = "--problem_type says so"
    assert find_labels([0, 1], "x.csv", SCORES) == (Labels(), why)
    assert find_labels(["10.5", "9"], "x.csv", CLASSES) == (Labels(("9", "10.5")), why)


LISTS = [["b", "a"], ["a"], [], ["c", 1]]


def test_lists_are_trained_on_where_they_are_asked_for() -> None:
    labels, _ = find_labels(LISTS, "x.jsonl", SETS)
    assert labels == Labels(("1", "a", "b", "c"), sets=True)
    assert labels.problem_type == SETS
    encoded = labels.encode(LISTS, "x.jsonl")
    assert encoded == [[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0] * 4, [1.0, 0.0, 0.0, 1.0]]
    assert labels.decode(np.array(encoded)) == ['["a", "b"]', '["a"]', "[]", '["1", "c"]']
    numbers = [2, 0, 3, 1]
    models = np.array(labels.for_model(encoded, numbers))
    assert models[0].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert labels.of_model(models, numbers, logits=False).tolist() == encoded
    assert labels.of_model(models - 0.5, numbers).tolist() == encoded
    with pytest.raises(InputError, match=r"^y\.jsonl, row 2: label 'd' is not one of 1, a, b, c$"):
        labels.encode([["a"], ["a", "d"]], "y.jsonl")
    for other in ("a", None):
        with pytest.raises(InputError, match=r"^y\.jsonl, row 1: label .* is not a list of classes$"):
            labels.encode([other], "y.jsonl")
    assert labels_of_model(dict(enumerate(labels.names)), SETS).sets


@pytest.mark.parametrize("problem_type", [None, CLASSES, SCORES])
def test_lists_are_not_taken_for_classes(problem_type: Any) -> None:
    with pytest.raises(
        InputError, match=r"^x\.jsonl, row 1: label \['b', 'a'\] is a list; --problem_type multi_label_cl"
    ):
        find_labels(LISTS, "x.jsonl", problem_type)


@pytest.mark.parametrize("values", [["a", "a"], [1], [None, None], [1, 1.0, True]])
def test_a_single_class_is_refused(values: list[Any]) -> None:
    # One label would make Transformers train a regression.
    with pytest.raises(InputError, match=r"x\.csv: classification needs two labels at least"):
        find_labels(values, "x.csv")


def test_a_label_unseen_in_training_is_not_taken_for_a_number() -> None:
    with pytest.raises(InputError, match="label 0 is not one of bad, good"):
        find_labels(["good", "bad"], "train.csv")[0].encode([0], "validation.csv")


def test_decoding_reverses_encoding() -> None:
    values = ["equivalent", "not_equivalent", "equivalent"]
    assert PAIR.decode(PAIR.encode(values, "x.csv")) == values
    assert STSB.decode([0.12345678, 3]) == [0.1235, 3.0]


def test_a_models_own_order_is_respected() -> None:
    mnli = Labels(("entailment", "neutral", "contradiction"), numbered=True)
    assert mnli.numbers_in({0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}) == [2, 1, 0]
    assert mnli.numbers_in({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}) == [0, 1, 2]
    assert mnli.numbers_in({0: "entailment", 1: "neutral"}) == [0, 1, 2]
    assert Labels(("A", "a")).numbers_in({0: "a", 1: "A"}) == [0, 1]  # not told apart by their letters alone


def test_labels_of_a_model() -> None:
    assert labels_of_model({1: "good", 0: "bad"}) == Labels(("bad", "good"), numbered=True)
    assert labels_of_model({0: "LABEL_0"}) == Labels()
