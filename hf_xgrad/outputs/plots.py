"""Pictures of runs, from the logs that they leave: losses, a metric, and what XGrad measured, over optimizer steps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_xgrad.outputs.run_logs import (
    DEFAULT_METRIC,
    LONGEST_NAME,
    History,
    PlotError,
    best_metric,
    group_runs,
    known_metric,
    logged_by,
    read_named_run,
)

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
# Notes in a picture.
_MOST_NOTES = 6
# What pictures have among their first bytes, by the ends of their names.
_SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<svg"}


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
    """
    import matplotlib.style

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
    logged = {name: {group: logged_by(runs, name) for group, runs in groups.items()} for name in labels}
    logged = {name: of_groups for name, of_groups in logged.items() if any(of_groups.values())}
    if not any(len(set(run.values())) > 1 for runs in logged.get(_STEPS, {}).values() for run in runs):
        logged.pop(_STEPS, None)  # a fixed s is no curve
    if not logged:
        raise PlotError(f"nothing to draw: no run has logged {' or '.join(labels)}")
    names = _legend_names(groups)
    notes = []
    if any(len(runs) > 1 for runs in groups.values()):
        notes.append("Line: median of the runs; band: from the least to the greatest.")
    if any(len(run) > _POINTS for of_groups in logged.values() for runs in of_groups.values() for run in runs):
        notes.append(
            "Long logs: a point is the median of several logged steps, the band goes from the least to the greatest."
        )
    # Whatever the user's settings of matplotlib are, a picture is the same. A name with "$" in it is no formula.
    with matplotlib.style.context(["default", {"svg.hashsalt": "hf_xgrad", "text.parse_math": False}]):
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
        PlotError: as `plot_runs`; or a run cannot be read, or no run has logged the metric.
    """
    named = [read_named_run(text) for text in runs]
    files = [run.file.resolve() for _, run in named]
    for text, file in zip(runs, files, strict=True):
        if files.count(file) > 1:
            raise PlotError(f"{text}: this run is named twice")
    found = [run for _, run in named]
    chosen = best_metric(found) if metric is None else known_metric(metric, found)
    groups = {name: [run.history for run in group] for name, group in group_runs(named).items()}
    plot_runs(groups, path, metric=chosen)


def new_figure(panels: int, width: float = 9.0) -> tuple[Any, Sequence[Any]]:
    """A figure for a file, so many inches wide, and its panels."""
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


def _draw(panel: Any, runs: Sequence[Mapping[int, float]], size: int, color: str, line: str) -> list[str]:
    """Draws those runs of a group of this size that have values, and returns what is to be said of it.

    Seaborn's median and range leave no gap where a value is not finite, and take whatever runs there are at a step.
    """
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


def _legend_names(groups: Mapping[str, Sequence[History]]) -> dict[str, str]:
    """Names that are not too long: cut in the middle, or, where that leaves no difference, up to where they differ."""
    names = list(map(_printable, groups))
    shown = list(map(_cut, names))
    if len(set(shown)) < len(set(names)):
        start = next((i for i, column in enumerate(zip(*names, strict=False)) if len(set(column)) > 1), 0)
        shown = [_cut(f"…{name[start:]}") for name in names]
    sizes = (f" ({len(runs)} runs)" if len(runs) > 1 else "" for runs in groups.values())
    return dict(zip(groups, map("".join, zip(shown, sizes, strict=True)), strict=True))


def _cut(name: str) -> str:
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}…{name[1 - half :]}"


def _write_below(figure: Any, names: Sequence[str], notes: Sequence[str]) -> None:
    """Adds the legend and the notes, in room of their own.

    What matplotlib's constrained layout has for that lays one over the other, and makes the panels smaller.
    """
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
