"""Labels of a task: which there are, how a data set's values are read as them, and a model's own order of them."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_xgrad.recipes.input_errors import InputError


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes in the order of their numbers; no classes at all stand for a score to be predicted (regression).

    `numbered`: a value may be a class's number instead of its name. `span`: the least and the greatest score allowed.
    """

    names: tuple[str, ...] = ()
    numbered: bool = False
    span: tuple[float, float] = (-math.inf, math.inf)

    @property
    def regression(self) -> bool:
        return not self.names

    def encode(self, values: Sequence[Any], source: str) -> list[int] | list[float]:
        """Return each value's class number, or its score; the first one that is neither is named in an error."""
        if self.regression:
            return [self._score(value, source, row) for row, value in enumerate(values, start=1)]
        numbers = {str(number): number for number in range(len(self.names))} if self.numbered else {}
        numbers |= {name: number for number, name in enumerate(self.names)}
        for row, value in enumerate(values, start=1):
            if _spelling(value) not in numbers:
                raise InputError(f"{source}, row {row}: label {value!r} is not one of {self._described()}")
        return [numbers[_spelling(value)] for value in values]

    def decode(self, values: Iterable[float]) -> list[str] | list[float]:
        """Return the name of each class number; a score with as many decimals as can matter."""
        if self.regression:
            return [round(float(value), 4) for value in values]
        return [self.names[int(value)] for value in values]

    def numbers_in(self, id2label: Mapping[int, str]) -> list[int]:
        """Return, for each class, its number in a model: the model's own where it knows the same names, else ours."""
        theirs = {name.lower(): number for number, name in id2label.items()}
        ours = [name.lower() for name in self.names]
        if sorted(theirs) == sorted(ours):
            return [theirs[name] for name in ours]
        return list(range(len(ours)))

    def _score(self, value: Any, source: str, row: int) -> float:
        score = _as_float(value)
        if score is None or not self.span[0] <= score <= self.span[1]:
            limits = "" if math.isinf(self.span[0]) else f" from {self.span[0]:g} to {self.span[1]:g}"
            raise InputError(f"{source}, row {row}: label {value!r} is not a number{limits}")
        return score

    def _described(self, most: int = 10) -> str:
        names = [f"{n} ({name})" if self.numbered else name for n, name in enumerate(self.names[:most])]
        return ", ".join(names) + (", ..." if len(self.names) > most else "")


def find_labels(values: Sequence[Any], source: str) -> Labels:
    """Return the labels that training data hold: scores if any is a fraction, or else the classes, sorted."""
    # A row without a label is left to encode(), which names it.
    present = [value for value in values if value is not None and value != ""]
    if all(isinstance(value, str) for value in present):
        regression = all(_as_float(value) is not None for value in present) and not all(map(_is_integer, present))
    else:
        regression = any(isinstance(value, float) for value in present)
    if regression:
        return Labels()
    spellings = {_spelling(value) for value in present}
    if len(spellings) < 2:
        raise InputError(f"{source}: classification needs two labels at least, but all rows have {spellings or None}")
    in_order = sorted(spellings, key=int) if all(map(_is_integer, spellings)) else sorted(spellings)
    return Labels(tuple(in_order))


def labels_of_model(id2label: Mapping[int, str]) -> Labels:
    """Return the labels that a fine-tuned model was trained for."""
    names = tuple(id2label[number] for number in sorted(id2label))
    return Labels(names, numbered=True) if len(names) > 1 else Labels()


def _spelling(value: Any) -> str:
    if isinstance(value, bool | int | float) and value == value // 1:
        return str(int(value))
    return str(value).strip()


def _as_float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _is_integer(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()
