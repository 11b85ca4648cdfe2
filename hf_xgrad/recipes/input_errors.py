"""Wrong input: one line that names it, on stderr, and the exit status 2."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hf_xgrad.outputs.files import CheckpointError


class InputError(Exception):
    """What the user gave cannot be used; the message is one line that names it."""


def one_line(error: object) -> str:
    """Return an error's message without line breaks, so that it can stand after `hf-xgrad: error:`."""
    return re.sub(r"\s+", " ", str(error)).strip()


@contextmanager
def as_input_error(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turn errors that are the caller's to mend into an InputError."""
    try:
        yield
    except kinds as error:
        raise InputError(prefix + one_line(error)) from error


def check_positive(name: str, value: int | None) -> None:
    """Refuse a number below 1."""
    if value is not None and value < 1:
        raise ValueError(f"--{name} must be 1 or more, not {value}")


def describe_choices(name: str, choices: Sequence[str]) -> str:
    """Return "; did you mean a, b?" for the choices that look like `name`, or nothing."""
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.7)
    return f"; did you mean {', '.join(close)}?" if close else ""


GO_ON = "; the same command goes on from the last checkpoint, if there is one"


def run_script(
    prog: str, body: Callable[[list[str]], None], arguments: Sequence[str] | None, again: str = GO_ON
) -> int:
    """Run a recipe and return its exit status.

    Wrong input, or a full disk, becomes one line on stderr and the status 2; Ctrl-C one line, which ends in `again`,
    and 130.
    """
    try:
        body(list(sys.argv[1:] if arguments is None else arguments))
    except (InputError, CheckpointError) as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped{again}", file=sys.stderr)
        return 130
    return 0
