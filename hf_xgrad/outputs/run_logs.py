"""The logs that runs leave: read from a folder, a checkpoint or a file, and grouped where only the seed differs."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from hf_xgrad.outputs.files import SETTINGS_FILE, STATE_FILE

History = Sequence[Mapping[str, Any]]
"""What a Trainer's state has as `log_history`."""

DEFAULT_METRIC = "eval_loss"
# Characters of a name in a legend.
LONGEST_NAME = 48
# The greatest number of float32. Axes overflow long before those of Python do.
_GREATEST = 3.4028234663852886e38
_SEEDS = ("seed", "data_seed")
# Settings that readers know by other names, or without one.
_SHORT = {"method": "", "optim": "", "learning_rate": "lr", "per_device_train_batch_size": "batch"}


class PlotError(ValueError):
    """What was asked for cannot be drawn; the text is one line that says why."""


@dataclass(frozen=True)
class Run:
    """What a run has left.

    Attributes:
        file: where its state is.
        state: the state of its Trainer, or of the loop that writes the same.
        settings: what our scripts write of how it was trained; empty where another program trained.
    """

    file: Path
    state: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def history(self) -> History:
        history: History = self.state["log_history"]
        return history

    @property
    def seeds(self) -> tuple[Any, ...]:
        return tuple(self.settings.get(name) for name in _SEEDS)

    @property
    def training(self) -> dict[str, Any]:
        """The settings without the seeds; for the plain optimizer also without those of XGrad."""
        steps = self.settings.get("xgrad_steps")
        plain = not self.settings.get("xgrad") or steps == 0
        left_out = (*_SEEDS, "xgrad", "xgrad_steps")
        kept = {
            name: value
            for name, value in self.settings.items()
            if name not in left_out and not (plain and name.startswith("xgrad_"))
        }
        method = "plain" if plain else f"s = {_number_text(steps)}"
        return {"method": method, **kept, "max_steps": self.state.get("max_steps")}


# ---- reading ----


def read_named_run(text: str) -> tuple[str | None, Run]:
    """A run that the command line names, as RUN or NAME=RUN. Names of folders may have a "=" too."""
    name: str | None
    name, separator, path = text.partition("=")
    try:
        if not separator or Path(text).exists():
            name, path = None, text
        found = name != "" and path != "" and Path(path).exists()
    except OSError as error:
        raise PlotError(f"{text}: {error.strerror}") from error
    if not found:
        raise PlotError(f"{text}: no such file or folder")
    return name, read_run(Path(path))


def read_run(path: Path) -> Run:
    """What an output folder holds (while the run goes on, its last whole checkpoint), or a checkpoint, or a file."""
    if path.is_file():
        return _read_state(path)
    if (path / STATE_FILE).is_file():
        return _read_state(path / STATE_FILE)
    states = {_number(state.parent): state for state in path.glob(f"checkpoint-*/{STATE_FILE}")}
    problem = PlotError(f"{path} holds no {STATE_FILE}, nor a checkpoint with one")
    for number in sorted((number for number in states if number is not None), reverse=True):
        try:
            return _read_state(states[number])
        except PlotError as error:
            # A run that was killed may have been writing this one.
            problem = error
    raise problem


def _number(checkpoint: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(found[1]) if found else None


def _read_state(path: Path) -> Run:
    state = _read_json(path)
    history = state.get("log_history")
    if not isinstance(history, list) or not all(map(_is_entry, history)):
        raise PlotError(f"{path} is not the state of a Trainer: it has no log_history with a step in each entry")
    if not history:
        raise PlotError(f"{path}: the run has logged nothing yet")
    folder = path.parent
    settings = (folder if _number(folder) is None else folder.parent) / SETTINGS_FILE
    return Run(path, state, _read_json(settings) if settings.is_file() else {})


def _is_entry(value: object) -> bool:
    step = value.get("step") if isinstance(value, dict) else None
    # Greater ones are no numbers to an axis.
    return isinstance(step, int) and 0 <= step < 2**53


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlotError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise PlotError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise PlotError(f"{path} is not what a run writes: no JSON object")
    return content


# ---- values ----


def logged_by(runs: Sequence[History], name: str) -> list[dict[int, float]]:
    """What those of the runs that logged anything under a name logged under it."""
    return [values for run in runs if (values := _values(run, name))]


def _values(history: History, name: str) -> dict[int, float]:
    """What a run logged under a name, by step; what is not finite is not a number.

    Where the log goes back, it tells the run anew from there on. An evaluation after the training, which may be of the
    best weights, counts only where there was none before.
    """
    values: dict[int, float] = {}
    last, ended = 0, False
    for entry in history:
        step, value = entry["step"], entry.get(name)
        if step < last:
            values = {before: kept for before, kept in values.items() if before < step}
        ended = "train_loss" in entry or (ended and step == last)
        last = step
        if is_number(value) and step not in values and not (ended and values):
            values[step] = float(value) if abs(value) <= _GREATEST else math.nan
    return values


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def known_metric(asked: str, runs: Sequence[Run]) -> str:
    """The name in the logs of a metric, which may lack its `eval_`."""
    known = {name for run in runs for entry in run.history for name, value in entry.items() if is_number(value)}
    known -= {"step"}
    for name in (asked, f"eval_{asked}"):
        if name in known:
            return name
    close = difflib.get_close_matches(asked, known, n=3) or sorted(name for name in known if name.startswith("eval_"))
    hint = f"; there are {', '.join(close)}" if close else ""
    raise PlotError(f"metric {asked}: no run has logged it{hint}")


def best_metric(runs: Sequence[Run]) -> str:
    """The metric by which all runs chose their best checkpoint: the one that was then as the best is said to be."""
    found = set()
    for run in runs:
        best, step = run.state.get("best_metric"), run.state.get("best_global_step")
        of_best = [item for entry in run.history if entry["step"] == step for item in entry.items()]
        names = {name for name, value in of_best if name.startswith("eval_") and value == best}
        found.add(names.pop() if len(names) == 1 else DEFAULT_METRIC)
    return found.pop() if len(found) == 1 else DEFAULT_METRIC


# ---- groups ----


def group_runs(runs: Sequence[tuple[str | None, Run]]) -> dict[str, list[Run]]:
    """Runs in groups, by name: those of one given name, and of the others those that differ in the seed only."""
    keyed: dict[tuple[str, str], list[Run]] = {}
    for name, run in runs:
        key = ("training", json.dumps(run.training, sort_keys=True)) if run.settings else ("file", str(run.file))
        keyed.setdefault(key if name is None else ("name", name), []).append(run)
    found: list[tuple[str | None, list[Run]]] = []
    for (kind, name), members in keyed.items():
        # What runs of one seed differ in, nothing says.
        apart = kind == "training" and len({str(run.seeds) for run in members}) < len(members)
        groups = [[run] for run in members] if apart else [members]
        found += [(name if kind == "name" else None, group) for group in groups]
    given = [name for name, _ in found if name is not None]
    others = [members[0] for name, members in found if name is None]
    for names in (_differences(others), _short_paths(others), [str(run.file) for run in others]):
        if len({*given, *names}) == len(found):
            break
    of_others = iter(names)
    return {next(of_others) if name is None else name: members for name, members in found}


def _differences(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ, of those of which they are known."""
    trainings = [run.training for run in runs if run.settings]
    names = dict.fromkeys(name for training in trainings for name in training)
    values = {name: {str(training[name]) for training in trainings if name in training} for name in names}
    differing = [name for name in names if len(values[name]) > 1] or ["method"]
    return [", ".join(_setting(name, each[name]) for name in differing if name in each) for each in trainings]


def _setting(name: str, value: Any) -> str:
    words = _SHORT.get(name, name.removeprefix("xgrad_").replace("_", " "))
    if value is None or isinstance(value, bool):
        return words if value else f"no {words}"
    if isinstance(value, str):
        # A path or an id of the Hub: its end.
        value = value.rstrip("/").rpartition("/")[2]
    return f"{words} {_number_text(value)}".strip()


def _short_paths(runs: Sequence[Run]) -> list[str]:
    """The folders of runs, without the parts that all have at the start or at the end; of long ones what differs."""
    paths = [run.file.resolve().parent.parts for run in runs]
    for side in (1, -1):
        paths = [path[::side] for path in paths]
        while min(map(len, paths), default=1) > 1 and len({path[0] for path in paths}) == 1:
            paths = [path[1:] for path in paths]
        paths = [path[::side] for path in paths]
    names = ["/".join(path) for path in paths]
    if max(map(len, names), default=0) > LONGEST_NAME:
        for parts in range(1, max(map(len, paths))):
            ends = ["/".join(path[-parts:]) for path in paths]
            if len(set(ends)) == len(ends):
                return ends
    return names


def _number_text(value: Any) -> str:
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
