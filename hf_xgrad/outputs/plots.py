"""Pictures of runs, from the logs that they leave: losses, a metric, and what XGrad measured, over optimizer steps."""

from __future__ import annotations

import difflib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_xgrad.outputs.files import SETTINGS_FILE, STATE_FILE

History = Sequence[Mapping[str, Any]]
"""What a Trainer's state has as `log_history`."""

DEFAULT_METRIC = "eval_loss"
# The colours of Okabe and Ito, which colour-blind readers can tell apart; the kinds of line serve print. 7 and 4 have
# no divisor in common, so that no two styles share both.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_LINES = ("-", "--", "-.", ":")
STYLES = tuple((_COLORS[i % 7], _LINES[i % 4]) for i in range(28))

_LOSS, _COSINE, _STEPS = "loss", "xgrad/cosine", "xgrad/steps"
_DPI = 120
# A panel cannot show more points than this, and a line through all of a noisy log hides where it goes.
_POINTS = 300
# Up to so many each is marked.
_FEW_POINTS = 12
# The greatest number of float32. Axes overflow long before those of Python do.
_GREATEST = 3.4028234663852886e38
# Characters of a name, and notes, in a picture.
_LONGEST_NAME, _MOST_NOTES = 48, 6
# What pictures have among their first bytes, by the ends of their names.
_SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<svg"}

_SEEDS = ("seed", "data_seed")
# Settings that readers know by other names, or without one.
_SHORT = {"method": "", "optim": "", "learning_rate": "lr", "per_device_train_batch_size": "batch"}

# What one run logged under one name, by step.
_Values = dict[int, float]


class PlotError(ValueError):
    """What was asked for cannot be drawn; the text is one line that says why."""


# ---- drawing ----


def plot_runs(
    groups: Mapping[str, Sequence[History]],
    path: str | Path,
    *,
    title: str | None = None,
    metric: str = DEFAULT_METRIC,
    loss_unit: str | None = None,
) -> None:
    """Draws training loss, `metric`, `xgrad/cosine` and `xgrad/steps` over optimizer steps: what of it was logged.

    Each group is a line through the median of its runs, with a band from the least to the greatest behind it, at the
    steps that all of them logged. In long logs a point stands for several steps. Where a value is not finite there is
    a gap. Notes under the panels say so.

    Args:
        groups: the logs of runs that differ in their seed only, by the name that the legend gives them.
        path: ends in .png or .svg. A picture that is there already is replaced, another file is not.
        metric: its name in the logs.
        loss_unit: unit of the losses, as "nats per token".

    Raises:
        PlotError: there is nothing to draw, or more than can be told apart, or `path` cannot be written.
        ImportError: matplotlib is not installed.
    """
    path = Path(path)
    _check_picture(path)
    if len(groups) > len(STYLES):
        raise PlotError(f"{len(groups)} lines cannot be told apart, {len(STYLES)} can: draw fewer runs at a time")
    unit = f" ({loss_unit})" if loss_unit else ""
    known = {
        _LOSS: f"training loss{unit}",
        DEFAULT_METRIC: f"evaluation loss{unit}",
        _COSINE: "cosine of predicted and made step",
        _STEPS: "s (steps predicted ahead)",
    }
    labels = {name: known.get(name, _in_words(name)) for name in (_LOSS, metric, _COSINE, _STEPS)}
    logged = {name: {group: _logged(runs, name) for group, runs in groups.items()} for name in labels}
    logged = {name: of_groups for name, of_groups in logged.items() if any(of_groups.values())}
    if not any(len(set(run.values())) > 1 for runs in logged.get(_STEPS, {}).values() for run in runs):
        logged.pop(_STEPS, None)  # a fixed s is no curve
    if not logged:
        raise PlotError(f"nothing to draw: no run has logged {' or '.join(labels)}")
    names = {group: _legend_name(group, len(runs)) for group, runs in groups.items()}
    notes = []
    if any(len(runs) > 1 for runs in groups.values()):
        notes.append("Line: median of the runs; band: from the least to the greatest.")
    if any(len(run) > _POINTS for of_groups in logged.values() for runs in of_groups.values() for run in runs):
        notes.append(
            "Long logs: a point is the median of several logged steps, the band goes from the least to the greatest."
        )
    with _own_style():
        figure, panels = new_figure(len(logged))
        for panel, (name, of_groups) in zip(panels, logged.items(), strict=True):
            for (group, runs), (color, line) in zip(of_groups.items(), STYLES, strict=False):
                if runs:
                    said = _draw(panel, runs, len(groups[group]), color, line)
                    notes += [f"{names[group]}, {labels[name]}: {note}." for note in said]
            panel.set(xlabel="optimizer step", ylabel=labels[name])
            if panel is not panels[0]:
                panel.sharex(panels[0])
            panel.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            if name in (_COSINE, _STEPS):
                panel.axhline(0, color="#888888", linewidth=0.8)
            if name == _COSINE:
                panel.set_ylim(top=1)
        if title is not None:
            figure.suptitle(title)
        _write_below(figure, list(names.values()), notes)
        picture = io.BytesIO()
        kind = path.suffix[1:].lower()
        # Without the date, so that the same runs make the same bytes.
        figure.savefig(picture, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror}") from error


def new_figure(panels: int, width: float = 9.0) -> tuple[Any, Sequence[Any]]:
    """A figure for a file, so many inches wide, and its panels."""
    with _needing_matplotlib():
        # Not pyplot, which wants a screen.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    columns = 2 if panels == 4 else panels
    rows = panels // columns
    figure = Figure(figsize=(width, 3.2 * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes


@contextmanager
def _needing_matplotlib() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error


def _own_style() -> AbstractContextManager[None]:
    """Whatever the user's settings of matplotlib are, a picture is the same. A name with "$" in it is no formula."""
    with _needing_matplotlib():
        import matplotlib.style

    style = {"svg.hashsalt": "hf_xgrad", "text.parse_math": False}
    context: AbstractContextManager[None] = matplotlib.style.context(["default", style])
    return context


def _check_picture(path: Path) -> None:
    if path.suffix.lower() not in _SIGNATURES:
        raise PlotError(f"{path} is no name of a picture: it must end in {' or '.join(_SIGNATURES)}")
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except FileNotFoundError:
        return
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror}") from error
    if start and _SIGNATURES[path.suffix.lower()] not in start:
        raise PlotError(f"{path} is there already and no picture: name another file")


def _in_words(metric: str) -> str:
    start, words = ("evaluation ", metric[5:]) if metric.startswith("eval_") else ("", metric)
    return start + words.replace("_", " ")


def _logged(runs: Sequence[History], name: str) -> list[_Values]:
    """What those of the runs that logged `name` logged under it."""
    return [values for run in runs if (values := _values(run, name))]


def _values(history: History, name: str) -> _Values:
    kept: list[tuple[int, Any]] = []
    for entry in history:
        step = entry["step"]
        if kept and step < kept[-1][0]:
            # The log goes back: from here on it tells the run anew.
            while kept and kept[-1][0] >= step:
                kept.pop()
        kept.append((step, entry.get(name)))
    values: _Values = {}
    for step, value in kept:
        if _is_number(value):
            # The first one: an evaluation after training stands at the last step too, but may be of the best weights.
            values.setdefault(step, float(value) if abs(value) <= _GREATEST else math.nan)
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _draw(panel: Any, runs: Sequence[_Values], size: int, color: str, line: str) -> list[str]:
    """Draws those runs of a group of this size that have values, and returns what is to be said of it."""
    import numpy as np

    notes = []
    if len(runs) < size:
        notes.append(f"logged by {len(runs)} of {size} runs")
    steps = sorted(set(runs[0]).intersection(*runs[1:]))
    every = len(set().union(*runs))
    if len(steps) < every:
        notes.append(f"drawn at the {len(steps)} of {every} steps that all runs logged")
    if not steps:
        return notes
    values = np.array([[run[step] for step in steps] for run in runs])
    if gaps := int(np.isnan(values).any(axis=0).sum()):
        notes.append(f"not finite at {gaps} of {len(steps)} steps")
    width = math.ceil(len(steps) / _POINTS)
    windows = [slice(start, start + width) for start in range(0, len(steps), width)]
    middle = [steps[window][len(steps[window]) // 2] for window in windows]
    median, least, greatest = (
        np.array([of(values[:, window]) for window in windows]) for of in (np.median, np.min, np.max)
    )
    # A point between gaps has no line; where there are few, all are marked.
    gap = np.isnan(np.concatenate([[np.nan], median, [np.nan]]))
    marked = np.full(len(median), True) if len(median) <= _FEW_POINTS else gap[:-2] & gap[2:]
    panel.plot(middle, median, line, color=color, marker="o", markersize=3.5, markevery=marked)
    if len(runs) > 1 or width > 1:
        panel.fill_between(middle, least, greatest, color=color, alpha=0.2, linewidth=0)
    return notes


def _printable(text: str) -> str:
    """`text` without what no picture can have: control characters, and what is not UTF-8 in the name of a folder."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _legend_name(group: str, runs: int) -> str:
    group = _printable(group)
    half = _LONGEST_NAME // 2
    name = group if len(group) <= _LONGEST_NAME else f"{group[:half]}…{group[1 - half :]}"
    return name if runs == 1 else f"{name} ({runs} runs)"


def _write_below(figure: Any, names: Sequence[str], notes: Sequence[str]) -> None:
    """Adds the legend and the notes, in room of their own."""
    more = len(notes) - _MOST_NOTES
    text = "\n".join([*map(_printable, notes[:_MOST_NOTES]), *([f"And {more} more."] if more > 0 else [])])
    written = figure.text(0.01, 0, text, size="small", color="#444444", verticalalignment="bottom", wrap=True)
    styles = zip(names, STYLES, strict=False)
    handles = [figure.axes[0].plot([], [], line, color=color)[0] for _, (color, line) in styles]
    for columns in range(min(len(names), 6), 0, -1):
        legend = figure.legend(handles, names, ncols=columns, loc="upper center", handlelength=3, frameon=False)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    # In inches, with a little air.
    of_notes, of_legend = (part.get_window_extent().height / figure.dpi + 0.05 for part in (written, legend))
    width, height = figure.get_size_inches()
    height += of_notes + of_legend
    figure.set_size_inches(width, height)
    below = (of_notes + of_legend) / height
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below))
    legend.set_bbox_to_anchor((0.5, below))
    written.set_y(0.02 / height)


# ---- reading ----


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
    def method(self) -> str:
        """XGrad or not, as readers call it."""
        if not self.settings.get("xgrad") or self.settings.get("xgrad_steps") == 0:
            return "plain"
        return f"s = {_number_text(self.settings.get('xgrad_steps'))}"

    @property
    def training(self) -> dict[str, Any]:
        """The settings without the seeds; for the plain optimizer also without those of XGrad."""
        left_out = (*_SEEDS, "xgrad", "xgrad_steps")
        kept = {name: value for name, value in self.settings.items() if name not in left_out}
        if self.method == "plain":
            kept = {name: value for name, value in kept.items() if not name.startswith("xgrad_")}
        return {"method": self.method, **kept, "max_steps": self.state.get("max_steps")}


def plot_folders(runs: Sequence[str], path: str | Path, metric: str | None = None) -> None:
    """Draws runs, as `plot_runs` does, from the files that they left.

    Args:
        runs: of each run its output folder, one of its checkpoints, or a trainer_state.json; NAME=RUN gives it a name,
            and runs of one name are a group. Of the others those are a group which our scripts trained with the same
            settings and different seeds.
        path: as of `plot_runs`.
        metric: as of `plot_runs`, or without `eval_`. By default that by which the best checkpoint of the runs was
            chosen, if it shows, else the loss.

    Raises:
        PlotError, ImportError: as `plot_runs`; or a run cannot be read, or no run has logged the metric.
    """
    named = [_name_and_run(text) for text in runs]
    files = [run.file.resolve() for _, run in named]
    for text, file in zip(runs, files, strict=True):
        if files.count(file) > 1:
            raise PlotError(f"{text}: this run is named twice")
    found = [run for _, run in named]
    chosen = _best_metric(found) if metric is None else _known_metric(metric, found)
    groups = {name: [run.history for run in group] for name, group in group_runs(named).items()}
    plot_runs(groups, path, metric=chosen)


def _name_and_run(text: str) -> tuple[str | None, Run]:
    # Names of folders may have a "=" too.
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
    states = [state for state in path.glob(f"checkpoint-*/{STATE_FILE}") if _number(state.parent) is not None]
    problem = PlotError(f"{path} holds no {STATE_FILE}, nor a checkpoint with one")
    for state in sorted(states, key=lambda state: -(_number(state.parent) or 0)):
        try:
            return _read_state(state)
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


def _known_metric(asked: str, runs: Sequence[Run]) -> str:
    known = {name for run in runs for entry in run.history for name, value in entry.items() if _is_number(value)}
    known -= {"step"}
    for name in (asked, f"eval_{asked}"):
        if name in known:
            return name
    close = difflib.get_close_matches(asked, known, n=3) or sorted(name for name in known if name.startswith("eval_"))
    hint = f"; there are {', '.join(close)}" if close else ""
    raise PlotError(f"metric {asked}: no run has logged it{hint}")


def _best_metric(runs: Sequence[Run]) -> str:
    """The metric by which all runs chose their best checkpoint: the one that was then as the best is said to be."""
    found = set()
    for run in runs:
        best, step = run.state.get("best_metric"), run.state.get("best_global_step")
        of_best = (entry for entry in run.history if entry["step"] == step)
        names = {
            name for entry in of_best for name, value in entry.items() if name.startswith("eval_") and value == best
        }
        found.add(names.pop() if len(names) == 1 else DEFAULT_METRIC)
    return found.pop() if len(found) == 1 else DEFAULT_METRIC


# ---- groups ----


def group_runs(runs: Sequence[tuple[str | None, Run]]) -> dict[str, list[Run]]:
    """Runs, with the names that they were given if they were, in groups as `plot_folders` has it, by their names."""
    keyed: dict[tuple[str, str], list[Run]] = {}
    for name, run in runs:
        if name is not None:
            key = ("name", name)
        elif run.settings:
            key = ("training", json.dumps(run.training, sort_keys=True))
        else:
            key = ("file", str(run.file))
        keyed.setdefault(key, []).append(run)
    found: list[tuple[str | None, list[Run]]] = []
    for (kind, name), members in keyed.items():
        if kind == "training" and len({str(run.seeds) for run in members}) < len(members):
            # What they differ in, nothing says: but it is not the seed.
            found += [(None, [run]) for run in members]
        else:
            found.append((name if kind == "name" else None, members))
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
    """The folders of runs, without the parts that all have at the start or at the end."""
    paths = [run.file.resolve().parent.parts for run in runs]
    shortest = min(map(len, paths), default=1)
    start = 0
    while start < shortest - 1 and len({path[start] for path in paths}) == 1:
        start += 1
    end = 0
    while end < shortest - start - 1 and len({path[-1 - end] for path in paths}) == 1:
        end += 1
    return ["/".join(path[start : len(path) - end]) for path in paths]


def _number_text(value: Any) -> str:
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
