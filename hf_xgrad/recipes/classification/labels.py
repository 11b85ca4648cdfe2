"""Labels of a task: which there are, how a data set's values are read as them, and a model's own order of them."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from hf_xgrad.recipes.input_errors import InputError

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
CLASSES: ProblemType = "single_label_classification"
SETS: ProblemType = "multi_label_classification"
SCORES: ProblemType = "regression"
# As programs write numbers. What Python reads as one beyond that is a name: 1_1, 1e1, nan, digits of other scripts.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]\d{1,3})?", re.ASCII)


# Not datasets.ClassLabel: it numbers by the names as text (10 before 2), takes None and 1_0 for classes, and has no
# score, no set of classes and no row to name.
@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes in the order of their numbers; no classes at all stand for a score to be predicted (regression).

    `numbered`: a value may be a class's number instead of its name. `span`: the least and the greatest score allowed.
    `sets`: a row has a list of classes (multi-label), as numbers a 1.0 for each of them and a 0.0 for each other.
    """

    names: tuple[str, ...] = ()
    numbered: bool = False
    span: tuple[float, float] = (-math.inf, math.inf)
    sets: bool = False

    @property
    def regression(self) -> bool:
        return not self.names

    @property
    def problem_type(self) -> ProblemType:
        """What Transformers calls it."""
        return SCORES if self.regression else SETS if self.sets else CLASSES

    def encode(self, values: Sequence[Any], source: str) -> list[Any]:
        """Return each value's class number, set or score; the first one that is none is named in an error."""
        if self.regression:
            return [self._score(value, source, row) for row, value in enumerate(values, start=1)]
        numbers = {str(number): number for number in range(len(self.names))} if self.numbered else {}
        numbers |= {name: number for number, name in enumerate(self.names)}
        encoded: list[Any] = []
        for row, value in enumerate(values, start=1):
            if self.sets and not isinstance(value, list):
                raise InputError(f"{source}, row {row}: label {value!r} is not a list of classes")
            for each in value if self.sets else (value,):
                if spelling(each) not in numbers:
                    raise InputError(f"{source}, row {row}: label {each!r} is not one of {self._described()}")
            if self.sets:
                chosen = {numbers[spelling(each)] for each in value}
                encoded.append([float(number in chosen) for number in range(len(self.names))])
            else:
                encoded.append(numbers[spelling(value)])
        return encoded

    def decode(self, values: Iterable[Any]) -> list[str] | list[float]:
        """Return the name of each class number (of a set, a JSON list); a score with as many decimals as matter."""
        if self.regression:
            return [round(float(value), 4) for value in values]
        if self.sets:
            return [json.dumps([self.names[n] for n in np.flatnonzero(row)], ensure_ascii=False) for row in values]
        return [self.names[int(value)] for value in values]

    def for_model(self, encoded: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
        """Return what encode() gave in the numbers that a model has for the classes."""
        if self.regression:
            return list(encoded)
        return [[row[n] for n in np.argsort(numbers)] if self.sets else numbers[row] for row in encoded]

    def of_model(self, outputs: Any, numbers: Sequence[int], *, logits: bool = True) -> np.ndarray:
        """Return what a model's logits (or its labels) say, in our numbers."""
        if self.regression:
            return np.squeeze(outputs, axis=-1) if logits else outputs
        if self.sets:
            return (outputs[:, list(numbers)] > 0).astype(int)
        ours: np.ndarray = np.argsort(numbers)[np.argmax(outputs, axis=-1) if logits else outputs]
        return ours

    def numbers_in(self, id2label: Mapping[int, str]) -> list[int]:
        """Return, for each class, its number in a model: the model's own where it knows the same names, else ours."""
        theirs = {spelling(name).lower(): number for number, name in id2label.items()}
        ours = [name.lower() for name in self.names]
        if sorted(theirs) == sorted(ours):
            return [theirs[name] for name in ours]
        return list(range(len(ours)))

    def _score(self, value: Any, source: str, row: int) -> float:
        number = _number(value)
        score = math.nan if number is None else float(number)
        if not (math.isfinite(score) and self.span[0] <= score <= self.span[1]):
            open_ended = f"; --problem_type {CLASSES} makes classes of such labels"
            limits = open_ended if math.isinf(self.span[0]) else f" from {self.span[0]:g} to {self.span[1]:g}"
            raise InputError(f"{source}, row {row}: label {value!r} is not a number{limits}")
        return score

    def _described(self, most: int = 10) -> str:
        names = [f"{n} ({name})" if self.numbered else name for n, name in enumerate(self.names[:most])]
        return ", ".join(names) + (", ..." if len(self.names) > most else "")


def find_labels(values: Sequence[Any], source: str, problem_type: str | None = None) -> tuple[Labels, str]:
    """Return the labels that training data hold, and why: scores if numbers with a fraction are the most, or classes.

    Classes are in the order of their numbers, if all are numbers, or else of their names. What is no label (a blank,
    or not a number among scores) is left to encode(), which names its row.
    """
    given = [value for value in values if not _is_blank(value)]
    for row, value in enumerate(values, start=1):
        if not all(isinstance(each, str | int | float | Decimal) for each in _listed(value) if not _is_blank(value)):
            raise InputError(f"{source}, row {row}: label {value!r} is neither text nor a number")
        if isinstance(value, list) and problem_type != SETS:
            way_out = f"--problem_type {SETS} trains on lists of classes"
            raise InputError(f"{source}, row {row}: label {value!r} is a list; {way_out}")
    why = "--problem_type says so"
    if problem_type is None:
        numbers = [number for value in given if (number := _number(value)) is not None]
        fraction = next((number for number in numbers if number != number.to_integral_value()), None)
        if fraction is not None and 2 * len(numbers) > len(given):
            share = "all" if len(numbers) == len(given) else "most"
            return Labels(), f"{share} labels are numbers, and {fraction} has a fraction"
        why = "no label is a number with a fraction" if fraction is None else "most labels are no numbers"
    if problem_type == SCORES:
        return Labels(), why
    names = {spelling(each) for value in given for each in _listed(value)} - {""}
    if len(names) < 2:
        raise InputError(f"{source}: classification needs two labels at least, but all rows have {names or None}")
    numeric = all(map(_NUMBER.fullmatch, names))
    # By the text as well: 1, +1 and 01 are names of three classes, but one number.
    ordered = sorted(names, key=(lambda name: (Decimal(name), name)) if numeric else None)
    return Labels(tuple(ordered), sets=problem_type == SETS), why


def labels_of_model(id2label: Mapping[int, str], problem_type: str | None = None) -> Labels:
    """Return the labels that a fine-tuned model was trained for."""
    names = tuple(spelling(id2label[number]) for number in sorted(id2label))
    return Labels(names, numbered=True, sets=problem_type == SETS) if len(names) > 1 else Labels()


def spelling(value: Any) -> str:
    """Return the name of a class, which is one line without tabs: 1.0 and True are the class 1."""
    number = None if isinstance(value, str) else _number(value)
    if number is not None and number == number.to_integral_value():
        return str(int(number))
    return re.sub(r"[^\S ]+", " ", str(value)).strip()


def _is_blank(value: Any) -> bool:
    """Whether there is no label: nothing, only white space, or not a number."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _number(value: Any) -> Decimal | None:
    """Return a number, or None for what is none."""
    text = str(int(value) if isinstance(value, bool) else value).strip()
    return Decimal(text) if isinstance(value, str | int | float | Decimal) and _NUMBER.fullmatch(text) else None
