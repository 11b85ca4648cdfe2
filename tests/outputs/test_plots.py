"""Pictures of runs: what is drawn, what is said, what is refused."""

from __future__ import annotations

import builtins
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_xgrad import XGradTrainer, XGradTrainingArguments
from hf_xgrad import cli as command_line
from hf_xgrad.outputs import plots
from hf_xgrad.outputs.files import SETTINGS_FILE, STATE_FILE
from hf_xgrad.outputs.plots import STYLES, plot_folders, plot_runs
from hf_xgrad.outputs.run_logs import PlotError, group_runs, read_run
from tiny_models import Sentences, arguments, bert

ROOT = Path(plots.__file__).resolve().parent.parent.parent
Log = list[dict[str, Any]]


class Drawn:
    """The figure that was last written: its panels by their label, and what each shows."""

    def __init__(self) -> None:
        self.figure: Any = None

    @property
    def panels(self) -> dict[str, Any]:
        return {panel.get_ylabel(): panel for panel in self.figure.axes}

    def lines(self, label: str) -> list[Any]:
        """The lines of groups, and no others: those of the legend and of axes have no points of a run."""
        return [line for line in self.panels[label].lines if line.get_marker() == "o"]

    def points(self, label: str, number: int = 0) -> list[tuple[float, float]]:
        line = self.lines(label)[number]
        return list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))

    def band(self, label: str, number: int = 0) -> list[tuple[float, float, float]]:
        """Step, least and greatest."""
        (path,) = self.panels[label].collections[number].get_paths()
        found: dict[float, list[float]] = {}
        for step, value in path.vertices:
            found.setdefault(float(step), []).append(float(value))
        return [(step, min(values), max(values)) for step, values in sorted(found.items())]

    @property
    def names(self) -> list[str]:
        return [text.get_text() for text in self.figure.legends[0].get_texts()]

    @property
    def notes(self) -> list[str]:
        return self.figure.texts[-1].get_text().splitlines()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    found = Drawn()
    make = plots.new_figure

    def new_figure(panels: int) -> tuple[Any, Any]:
        found.figure, axes = make(panels)
        return found.figure, axes

    monkeypatch.setattr(plots, "new_figure", new_figure)
    return found


def log(*values: float, name: str = "loss", every: int = 1) -> Log:
    return [{"step": every * number, name: value} for number, value in enumerate(values, start=1)]


# ---- what is drawn ----


def test_a_group_is_the_median_and_the_range_of_its_runs(drawn: Drawn, tmp_path: Path) -> None:
    runs = [log(5.0, 1.0, 4.0), log(2.0, 8.0, 4.5), log(3.0, 6.0, 4.25)]
    plot_runs({"XGrad": runs, "plain": [log(7.0, 6.5, 6.0)]}, tmp_path / "a.png")
    assert drawn.points("training loss") == [(1, 3.0), (2, 6.0), (3, 4.25)]
    assert drawn.band("training loss") == [(1, 2.0, 5.0), (2, 1.0, 8.0), (3, 4.0, 4.5)]
    assert drawn.points("training loss", 1) == [(1, 7.0), (2, 6.5), (3, 6.0)]
    assert len(drawn.panels["training loss"].collections) == 1
    assert drawn.names == ["XGrad (3 runs)", "plain"]
    assert drawn.notes == ["Line: median of the runs; band: from the least to the greatest."]


def test_what_no_run_logged_has_no_panel(drawn: Drawn, tmp_path: Path) -> None:
    history = [
        {"step": 1, "loss": 2.0, "xgrad/cosine": 0.5, "xgrad/steps": 1.5, "learning_rate": 1.0},
        {"step": 1, "eval_loss": 3.0, "eval_accuracy": 0.25},
        {"step": 2, "xgrad/steps": 1.75},
    ]
    ours = ["cosine of predicted and made step", "s (steps predicted ahead)"]
    plot_runs({"a": [history]}, tmp_path / "a.png")
    assert list(drawn.panels) == ["training loss", "evaluation loss", *ours]
    assert {panel.get_xlabel() for panel in drawn.panels.values()} == {"optimizer step"}
    plot_runs({"a": [history]}, tmp_path / "a.png", metric="eval_accuracy", loss_unit="nats", title="Of a")
    assert list(drawn.panels) == ["training loss (nats)", "evaluation accuracy", *ours]
    assert drawn.figure.get_suptitle() == "Of a"
    for number, points in enumerate(([(1, 2.0)], [(1, 0.25)], [(1, 0.5)], [(1, 1.5), (2, 1.75)])):
        assert drawn.points(list(drawn.panels)[number]) == points
    plot_runs({"a": [history]}, tmp_path / "a.png", metric="learning_rate", loss_unit="nats")
    assert "learning rate" in drawn.panels
    plot_runs({"a": [log(1.0)], "b": [log(2.0, name="eval_loss")]}, tmp_path / "a.png", loss_unit="nats")
    assert list(drawn.panels) == ["training loss (nats)", "evaluation loss (nats)"]
    assert drawn.lines("evaluation loss (nats)")[0].get_color() == STYLES[1][0]
    with pytest.raises(PlotError, match="nothing to draw: no run has logged loss or eval_f1 or"):
        plot_runs({"a": [[{"step": 1, "eval_loss": 1.0}], []]}, tmp_path / "b.png", metric="eval_f1")
    assert not (tmp_path / "b.png").exists()


def test_a_fixed_s_is_no_curve(drawn: Drawn, tmp_path: Path) -> None:
    """It is logged at each step; drawn only where a run has chosen it, for comparison then too."""
    fixed, chosen = (
        [{"step": step, "loss": 2.0, "xgrad/steps": s} for step, s in enumerate(steps, start=1)]
        for steps in ((1.0, 1.0, 1.0), (0.0, 0.5, 0.25))
    )
    plot_runs({"a": [fixed], "b": [fixed, fixed]}, tmp_path / "a.png")
    assert list(drawn.panels) == ["training loss"]
    plot_runs({"a": [fixed], "b": [chosen]}, tmp_path / "a.png")
    assert list(drawn.panels) == ["training loss", "s (steps predicted ahead)"]
    assert drawn.points("s (steps predicted ahead)", 0) == [(1, 1.0), (2, 1.0), (3, 1.0)]
    assert drawn.points("s (steps predicted ahead)", 1) == [(1, 0.0), (2, 0.5), (3, 0.25)]


def test_panels_share_their_steps_and_cosine_is_seen_against_zero_and_one(drawn: Drawn, tmp_path: Path) -> None:
    history = [*log(1.0, 0.5, every=10), {"step": 500, "eval_loss": 1.0}, {"step": 500, "xgrad/cosine": 0.9}]
    plot_runs({"a": [history]}, tmp_path / "a.png")
    assert len({panel.get_xlim() for panel in drawn.panels.values()}) == 1
    bottom, top = drawn.panels["cosine of predicted and made step"].get_ylim()
    assert bottom <= 0
    assert top == 1


def test_only_steps_that_all_runs_of_a_group_logged(drawn: Drawn, tmp_path: Path) -> None:
    """Else the median would jump where a run joins or leaves."""
    runs = [log(1.0, 2.0, 3.0, 4.0), log(2.0, 4.0, every=2), [{"step": 9, "eval_loss": 1.0}]]
    plot_runs({"a": runs, "b": [log(5.0), log(5.0, every=2)]}, tmp_path / "a.png")
    assert drawn.points("training loss") == [(2, 2.0), (4, 4.0)]
    assert drawn.notes[1:] == [
        "a (3 runs), training loss: logged by 2 of 3 runs.",
        "a (3 runs), training loss: drawn at the 2 of 4 steps that all runs logged.",
        "b (2 runs), training loss: drawn at the 0 of 2 steps that all runs logged.",
        "a (3 runs), evaluation loss: logged by 1 of 3 runs.",
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39, -(10**400)])
def test_what_is_not_finite_is_a_gap(drawn: Drawn, tmp_path: Path, bad: float) -> None:
    """Also where another run of the group is finite: that one's value would pass for the median."""
    plot_runs({"a": [log(1.0, bad, 3.0, 4.0), log(2.0, 2.0, bad, 6.0)]}, tmp_path / "a.png")
    values = [value for _, value in drawn.points("training loss")]
    assert [values[0], values[3]] == [1.5, 5.0]
    assert np.isnan(values[1:3]).all()
    assert drawn.notes[1:] == ["a (2 runs), training loss: not finite at 2 of 4 steps."]
    plot_runs({"a": [log(bad, bad)]}, tmp_path / "a.png")
    assert drawn.notes == ["a, training loss: not finite at 2 of 2 steps."]


def test_a_point_without_a_line_is_marked(drawn: Drawn, tmp_path: Path) -> None:
    plot_runs({"a": [log(1.0)]}, tmp_path / "a.png")
    assert list(drawn.lines("training loss")[0].get_markevery()) == [True]
    plot_runs({"a": [log(*range(12))], "b": [log(*range(13))]}, tmp_path / "a.png")
    assert [sum(line.get_markevery()) for line in drawn.lines("training loss")] == [12, 0]
    values = [1.0] * 100
    values[49] = values[51] = math.nan
    plot_runs({"a": [log(*values)]}, tmp_path / "a.png")
    assert np.flatnonzero(drawn.lines("training loss")[0].get_markevery()).tolist() == [50]
    values[0] = values[2] = math.nan
    plot_runs({"a": [log(*values)]}, tmp_path / "a.png")
    assert np.flatnonzero(drawn.lines("training loss")[0].get_markevery()).tolist() == [1, 50]


def test_a_log_that_starts_again_counts_from_there(drawn: Drawn, tmp_path: Path) -> None:
    history = [*log(9.0, 8.0, 7.0, every=10), {"step": 30, "eval_loss": 9.0}]
    history += [{"step": 20, "loss": 4.0}, {"step": 40, "loss": 2.0}, {"step": 40, "eval_loss": 1.0}]
    plot_runs({"a": [history]}, tmp_path / "a.png")
    assert drawn.points("training loss") == [(10, 9.0), (20, 4.0), (40, 2.0)]
    assert drawn.points("evaluation loss") == [(40, 1.0)]


def test_an_evaluation_after_training_is_no_point_of_the_curve(drawn: Drawn, tmp_path: Path) -> None:
    """With load_best_model_at_end it is of other weights than those of the last step."""
    history = [{"step": 5, "eval_loss": 2.0}, {"step": 5, "train_loss": 1.0}, {"step": 5, "eval_loss": 1.0}]
    plot_runs({"a": [history]}, tmp_path / "a.png")
    assert drawn.points("evaluation loss") == [(5, 2.0)]


def test_of_a_run_that_was_evaluated_at_its_end_only_that_is_shown(drawn: Drawn, tmp_path: Path) -> None:
    history = [{"step": 5, "loss": 2.0}, {"step": 5, "train_loss": 1.0}, {"step": 5, "eval_loss": 1.0}]
    plot_runs({"a": [history]}, tmp_path / "a.png")
    assert drawn.points("evaluation loss") == [(5, 1.0)]
    # Evaluated at other steps, the last evaluation may be of the weights of one of these.
    plot_runs({"a": [[{"step": 3, "eval_loss": 3.0}, *history]]}, tmp_path / "a.png")
    assert drawn.points("evaluation loss") == [(3, 3.0)]
    # A second training goes on.
    history += [{"step": 8, "eval_loss": 0.5}]
    plot_runs({"a": [history]}, tmp_path / "a.png")
    assert drawn.points("evaluation loss") == [(5, 1.0), (8, 0.5)]


def test_texts_and_truth_values_are_no_measurements(drawn: Drawn, tmp_path: Path) -> None:
    history = [
        {"step": 1, "loss": "1.0"},
        {"step": 2, "loss": True},
        {"step": 3, "loss": None},
        {"step": 4, "loss": 2},
    ]
    plot_runs({"a": [history]}, tmp_path / "a.png")
    assert drawn.points("training loss") == [(4, 2.0)]


def test_long_logs_are_windows(drawn: Drawn, tmp_path: Path) -> None:
    """A picture of 200,000 entries is no larger than one of a few hundred, and holds each of them."""
    values = np.random.default_rng(0).normal(size=200_000)
    plot_runs({"a": [log(*values.tolist())]}, tmp_path / "a.svg")
    points, band = drawn.points("training loss"), drawn.band("training loss")
    width = 667
    windows = [values[start : start + width].tolist() for start in range(0, len(values), width)]
    assert [value for _, value in points] == [median(window) for window in windows]
    assert [(low, high) for _, low, high in band] == [(min(window), max(window)) for window in windows]
    assert [step for step, _ in points[:2]] == [334, 334 + width]
    assert len(points) == 300
    assert (tmp_path / "a.svg").stat().st_size < 200_000
    assert drawn.notes[0].startswith("Long logs: a point is the median of several logged steps")
    plot_runs({"a": [log(*values[:300].tolist())]}, tmp_path / "a.svg")
    assert [value for _, value in drawn.points("training loss")] == values[:300].tolist()
    assert drawn.notes == []


def test_more_groups_than_can_be_told_apart(drawn: Drawn, tmp_path: Path) -> None:
    groups = {f"run {number}": [log(1.0, float(number))] for number in range(len(STYLES) + 1)}
    with pytest.raises(PlotError, match="29 lines cannot be told apart, 28 can"):
        plot_runs(groups, tmp_path / "a.png")
    del groups["run 0"]
    plot_runs(groups, tmp_path / "a.png")
    looks = [(line.get_color(), line.get_linestyle()) for line in drawn.lines("training loss")]
    assert looks == list(STYLES)
    assert len(set(looks)) == 28
    shown = drawn.figure.legends[0].get_lines()
    assert [(line.get_color(), line.get_linestyle()) for line in shown] == looks
    assert drawn.names == list(groups)


# ---- how it looks ----


@pytest.mark.parametrize(
    ("panels", "groups", "length"), [(1, 1, 1), (2, 2, 25), (3, 28, 1), (4, 9, 300), (1, 28, 300), (4, 28, 25)]
)
def test_legend_and_notes_cover_nothing(drawn: Drawn, tmp_path: Path, panels: int, groups: int, length: int) -> None:
    names = ("loss", "eval_loss", "xgrad/cosine", "xgrad/steps")[:panels]
    history = [{"step": step, name: 0.5} for step in (1, 2) for name in names] + [{"step": 3, names[-1]: math.nan}]
    runs = {f"{number:02d}{'m' * length}": [history] * (1 + number % 2) for number in range(groups)}
    plot_runs(runs, tmp_path / "a.png")
    figure = drawn.figure
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    legend, notes = (part.get_window_extent(renderer) for part in (figure.legends[0], figure.texts[-1]))
    lowest = min(panel.get_tightbbox(renderer).y0 for panel in figure.axes)
    assert legend.y1 <= lowest
    assert notes.y1 <= legend.y0
    assert notes.y0 >= 0
    for box in (legend, notes):
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
    assert len(drawn.notes) <= 8


def test_there_are_never_more_than_a_few_notes(drawn: Drawn, tmp_path: Path) -> None:
    plot_runs({str(number): [log(math.nan, 1.0)] for number in range(9)}, tmp_path / "a.png")
    assert len(drawn.notes) == 7
    assert drawn.notes[-1] == "And 3 more."


@pytest.mark.parametrize("name", ["$x_1$", "$x_{", "_hidden", "a\\b%&#", "é→λ"])
def test_names_are_shown_as_they_are(drawn: Drawn, tmp_path: Path, name: str) -> None:
    plot_runs({name: [log(1.0, math.nan)]}, tmp_path / "a.svg", title=name)
    assert drawn.names == [name]
    assert not drawn.figure.legends[0].get_texts()[0].get_parse_math()
    assert drawn.notes == [f"{name}, training loss: not finite at 1 of 2 steps."]


@pytest.mark.parametrize(("name", "shown"), [("a\nb\x08", "a\ufffdb\ufffd"), (os.fsdecode(b"caf\xe9"), "caf\ufffd")])
@pytest.mark.parametrize("ending", ["png", "svg"])
def test_names_that_cannot_be_written(drawn: Drawn, tmp_path: Path, name: str, shown: str, ending: str) -> None:
    plot_runs({name: [log(1, math.nan)], "other": [log(2, 3)]}, tmp_path / f"x.{ending}")
    assert drawn.names[0] == shown
    if ending == "svg":
        ElementTree.parse(tmp_path / "x.svg")


def test_a_name_that_is_too_long_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(PlotError, match="name too long"):
        plot_folders(["x" * 300], tmp_path / "x.png")


def test_long_names_are_cut_in_the_middle(drawn: Drawn, tmp_path: Path) -> None:
    plot_runs({"a" * 48: [log(1.0)], "b" * 50 + "c" * 50: [log(1.0)]}, tmp_path / "a.png")
    assert drawn.names == ["a" * 48, "b" * 24 + "…" + "c" * 23]


def test_long_names_that_differ_in_the_middle_only(drawn: Drawn, tmp_path: Path) -> None:
    runs = {f"{'a' * 40}{number}{'b' * 40}": [log(1.0)] * number for number in (1, 2)}
    plot_runs(runs, tmp_path / "a.png")
    assert drawn.names == ["…1" + "b" * 40, "…2" + "b" * 40 + " (2 runs)"]


@pytest.mark.parametrize("ending", ["png", "svg", "PNG"])
def test_the_same_runs_make_the_same_bytes(tmp_path: Path, ending: str) -> None:
    """Whatever the user's own settings of matplotlib are; and these stay."""
    groups = {"a": [log(1.0, 2.0), log(2.0, 1.0)]}
    plot_runs(groups, tmp_path / f"a.{ending}", title="t")
    with mpl.rc_context({"lines.linewidth": 9, "font.size": 20, "svg.hashsalt": "mine"}):
        plot_runs(groups, tmp_path / f"b.{ending}", title="t")
        assert mpl.rcParams["font.size"] == 20
    content = (tmp_path / f"a.{ending}").read_bytes()
    assert content == (tmp_path / f"b.{ending}").read_bytes()
    assert b"dc:date" not in content
    plot_runs({"a": [log(1.0, 2.5)]}, tmp_path / f"b.{ending}", title="t")
    assert content != (tmp_path / f"b.{ending}").read_bytes()


# ---- where it goes ----


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_replaced_and_nothing_else(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    for values in ((1.0, 2.0), (3.0, 1.0)):
        plot_runs({"a": [log(*values)]}, path)
    first = path.read_bytes()
    path.write_bytes(b"")
    plot_runs({"a": [log(3.0, 1.0)]}, path)
    assert path.read_bytes() == first
    path.write_text("my notes")
    with pytest.raises(PlotError, match="is there already and no picture"):
        plot_runs({"a": [log(1.0)]}, path)
    assert path.read_text() == "my notes"
    other = tmp_path / "folder" / f"a.{ending}"
    with pytest.raises(PlotError, match=r"folder/a\.\w+ cannot be written: No such file or directory"):
        plot_runs({"a": [log(1.0)]}, other)
    other.mkdir(parents=True)
    with pytest.raises(PlotError, match="cannot be written: Is a directory"):
        plot_runs({"a": [log(1.0)]}, other)


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", "a.png.txt"])
def test_other_kinds_of_file_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PlotError, match=r"must end in \.png or \.svg"):
        plot_runs({"a": [log(1.0)]}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(PlotError, match=r"a\.png cannot be written: No space left on device"):
        plot_runs({"a": [log(1.0)]}, tmp_path / "a.png")


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    run = write_run(tmp_path / "run", log(1.0))
    assert command_line.main(["plot", str(run), "-o", str(tmp_path / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "hf-xgrad: error: No module named 'matplotlib'"
    assert not (tmp_path / "a.png").exists()


# ---- runs on the disk ----


def write_run(folder: Path, history: Any, settings: dict[str, Any] | None = None, **state: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text(json.dumps({"log_history": history, "max_steps": 9, **state}))
    if settings is not None:
        (folder / SETTINGS_FILE).write_text(json.dumps(settings))
    return folder


def losses(path: Path) -> list[float]:
    return [entry["loss"] for entry in read_run(path).history]


def test_a_run_is_a_folder_a_checkpoint_or_a_file(tmp_path: Path) -> None:
    settings = {"seed": 1}
    run = write_run(tmp_path / "run", log(1.0, 2.0), settings)
    checkpoint = write_run(run / "checkpoint-1", log(1.0))
    for path in (run, run / "trainer_state.json", checkpoint, checkpoint / "trainer_state.json"):
        assert losses(path) == ([1.0] if checkpoint in (path, path.parent) else [1.0, 2.0])
        assert read_run(path).settings == settings
    # Not every folder with a number is a checkpoint.
    assert read_run(write_run(run / "1", log(1.0))).settings == {}


def test_of_a_run_that_goes_on_the_last_whole_checkpoint(tmp_path: Path) -> None:
    for number in (9, 80, 20):
        write_run(tmp_path / f"checkpoint-{number}", log(float(number)))
    write_run(tmp_path / "checkpoint-best", log(0.0))
    (tmp_path / "checkpoint-300").mkdir()
    assert losses(tmp_path) == [80.0]
    (write_run(tmp_path / "checkpoint-200", []) / "trainer_state.json").write_text('{"log_history": [{"st')
    assert losses(tmp_path) == [80.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"log_history": [', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no JSON object"),
        ("{}", "is not the state of a Trainer"),
        ('{"log_history": {"step": 1}}', "is not the state of a Trainer"),
        ('{"log_history": [1]}', "is not the state of a Trainer"),
        ('{"log_history": [{"loss": 1}]}', "is not the state of a Trainer"),
        ('{"log_history": [{"step": "1"}]}', "is not the state of a Trainer"),
        ('{"log_history": [{"step": NaN}]}', "is not the state of a Trainer"),
        (f'{{"log_history": [{{"step": {10**400}}}]}}', "is not the state of a Trainer"),
        ('{"log_history": []}', "has logged nothing yet"),
    ],
)
def test_files_that_are_none_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, said: str
) -> None:
    file = tmp_path / "checkpoint-1" / "trainer_state.json"
    file.parent.mkdir()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for path in (file, file.parent, tmp_path):
        assert command_line.main(["plot", str(path), "-o", str(tmp_path / "a.png")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"hf-xgrad: error: {file}")
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", log(1.0))
    (run / SETTINGS_FILE).write_text("{")
    with pytest.raises(PlotError, match=r"xgrad_settings\.json is not JSON"):
        read_run(run)


@pytest.mark.parametrize("text", ["nothing", "a=nothing", "=run", "a=", "", "empty", "a=empty"])
def test_there_must_be_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), log(1.0))
    Path("empty").mkdir()
    with pytest.raises(PlotError, match="holds no" if "empty" in text else "no such file or folder"):
        plot_folders([text], "a.png")
    assert not Path("a.png").exists()


def test_a_run_is_drawn_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", log(1.0))
    with pytest.raises(PlotError, match="named twice"):
        plot_folders([str(run), f"a={run}/trainer_state.json"], tmp_path / "a.png")


# ---- metrics ----


def test_the_metric_that_is_asked_for(drawn: Drawn, tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run", [{"step": 1, "eval_accuracy": 0.5, "grad_norm": 2.0, "loss": 1.0}]))
    for asked, label in (
        ("eval_accuracy", "evaluation accuracy"),
        ("accuracy", "evaluation accuracy"),
        ("grad_norm", "grad norm"),
        (None, "training loss"),
    ):
        plot_folders([run], tmp_path / "a.png", asked)
        assert list(drawn.panels)[-1] == label
    plot_folders([run], tmp_path / "a.png", "loss")
    assert list(drawn.panels) == ["training loss"]
    for asked, hint in (("eval_acuracy", "there are eval_accuracy"), ("f1", "eval_accuracy"), ("step", "")):
        with pytest.raises(PlotError, match=f"metric {asked}: no run has logged it.*{hint}"):
            plot_folders([run], tmp_path / "b.png", asked)


def test_the_metric_that_chose_the_best_checkpoint(drawn: Drawn, tmp_path: Path) -> None:
    history = [
        {"step": 1, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.5},
        {"step": 2, "eval_loss": 0.75, "eval_accuracy": 0.25, "eval_f1": 0.125},
        {"step": 3, "eval_loss": 0.75, "eval_accuracy": 0.5, "eval_f1": 0.75},
    ]

    def label(*best: dict[str, Any]) -> str:
        runs = [write_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", history, **state) for state in best]
        plot_folders(list(map(str, runs)), tmp_path / "a.png")
        return next(iter(drawn.panels))

    by_accuracy = {"best_metric": 0.25, "best_global_step": 2}
    assert label(by_accuracy) == label(by_accuracy, by_accuracy) == "evaluation accuracy"
    assert label({"best_metric": 0.75, "best_global_step": 2}) == "evaluation loss"
    # Two metrics have that value, runs chose by different ones, some did not choose.
    assert label({"best_metric": 0.5, "best_global_step": 1}) == "evaluation loss"
    assert label({"best_metric": 0.75, "best_global_step": 3}) == "evaluation loss"
    assert label(by_accuracy, {"best_metric": 0.125, "best_global_step": 2}) == "evaluation loss"
    assert label(by_accuracy, {}) == "evaluation loss"
    assert label({"best_metric": None, "best_global_step": 2}) == "evaluation loss"


# ---- groups and their names ----

XGRAD = {"xgrad": True, "xgrad_steps": 1.0, "xgrad_rule": "auto", "seed": 1, "data_seed": None, "learning_rate": 1e-4}


def groups_of(tmp_path: Path, *settings: dict[str, Any] | None, **state: Any) -> dict[str, list[int]]:
    """Groups of runs with these settings, as their numbers."""
    runs = [write_run(tmp_path / "runs" / str(number), log(1.0), each) for number, each in enumerate(settings)]
    found = group_runs([(None, read_run(run)) for run in runs])
    return {name: [int(run.file.parent.name) for run in group] for name, group in found.items()}


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ([{}], {"s = 1": [0]}),
        ([{"xgrad": False}], {"plain": [0]}),
        ([{}, {"seed": 2}, {"data_seed": 3}], {"s = 1": [0, 1, 2]}),
        (
            [{}, {"xgrad": False}, {"seed": 2, "xgrad_steps": 0.0}, {"seed": 2}, {"xgrad_steps": "auto"}],
            {"s = 1": [0, 3], "plain": [1, 2], "s = auto": [4]},
        ),
        # What XGrad would have done if it were on makes no difference.
        ([{"xgrad": False}, {"xgrad": False, "seed": 2, "xgrad_rule": "last_update"}], {"plain": [0, 1]}),
        ([{}, {"learning_rate": 2e-3, "xgrad_steps": 0.5}], {"s = 1, lr 0.0001": [0], "s = 0.5, lr 0.002": [1]}),
        ([{}, {"learning_rate": 1e-5}], {"lr 0.0001": [0], "lr 1e-5": [1]}),
        ([{}, {"xgrad_rule": "last_update"}], {"rule auto": [0], "rule last_update": [1]}),
        (
            [{"optim": "adamw_torch", "bf16": True}, {"optim": "adam3", "bf16": False}],
            {"adamw_torch, bf16": [0], "adam3, no bf16": [1]},
        ),
        (
            [{"per_device_train_batch_size": n, "task_name": name} for n, name in ((8, None), (16, "cola"))],
            {"batch 8, no task name": [0], "batch 16, task name cola": [1]},
        ),
        (
            [{"model_name_or_path": "/data/models/a/"}, {"model_name_or_path": "google/b"}],
            {"model name or path a": [0], "model name or path b": [1]},
        ),
    ],
)  # fmt: skip
def test_runs_that_differ_in_their_seed_only_are_a_group(
    tmp_path: Path, changes: list[dict[str, Any]], groups: dict[str, list[int]]
) -> None:
    assert groups_of(tmp_path, *({**XGRAD, **change} for change in changes)) == groups


def test_runs_of_other_length_are_another_group(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(n), log(1.0), {**XGRAD, "seed": n}, max_steps=100 * (1 + n // 2)) for n in range(4)
    ]
    found = group_runs([(None, read_run(run)) for run in runs])
    assert {name: len(group) for name, group in found.items()} == {"max steps 100": 2, "max steps 200": 2}


def test_where_the_settings_do_not_tell_runs_apart_folders_do(tmp_path: Path) -> None:
    """The same seed twice, or runs of other programs."""
    assert groups_of(tmp_path / "a", XGRAD, XGRAD) == {"0": [0], "1": [1]}
    assert groups_of(tmp_path / "b", XGRAD, None) == {"0": [0], "1": [1]}
    assert groups_of(tmp_path / "c", None, None) == {"0": [0], "1": [1]}
    assert groups_of(tmp_path / "d", None) == {"0": [0]}
    # A setting that only one of them has.
    assert groups_of(tmp_path / "e", XGRAD, {**XGRAD, "fp16": True}) == {"0": [0], "1": [1]}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["xgrad"], ["xgrad"]),
        (["x/xgrad", "x/xgrad-baseline"], ["xgrad", "xgrad-baseline"]),
        (["a/run", "b/run"], ["a", "b"]),
        (["a/1/run", "b/2/run"], ["a/1", "b/2"]),
        (["a", "a/checkpoint-1"], ["a", "a/checkpoint-1"]),
        (["a/a", "a"], ["a/a", "a"]),
        (["a/b/c/d", "a/d"], ["b/c/d", "d"]),
        ([f"a/{'long/' * 12}1/run", f"b/{'long/' * 12}2/run"], ["1", "2"]),
        ([f"a/{'long/' * 12}1", f"b/{'long/' * 12}1"], ["a", "b"]),
        ([f"a/{'long/' * 12}1", f"b/{'path/' * 12}1", f"c/{'path/' * 12}2"], ["long/1", "path/1", "path/2"]),
    ],
)
def test_folders_are_named_by_what_tells_them_apart(tmp_path: Path, folders: list[str], names: list[str]) -> None:
    for folder in sorted(folders, reverse=True):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps({"log_history": log(1.0)}))
    assert list(group_runs([(None, read_run(tmp_path / folder)) for folder in folders])) == names


def test_two_states_in_one_folder(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps({"log_history": log(1.0)}))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    assert list(group_runs([(None, read_run(file)) for file in files])) == list(map(str, files))


def test_given_names_make_groups(drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("lr=1,s=0"), log(3.0), {**XGRAD, "xgrad": False})
    write_run(Path("lr=1,s=1"), log(1.0), XGRAD)
    write_run(Path("other"), log(2.0))
    plot_folders(["XGrad=lr=1,s=1", "lr=1,s=0", "XGrad=other"], "a.png")
    assert drawn.names == ["XGrad (2 runs)", "plain"]
    assert [drawn.points("training loss", number) for number in (0, 1)] == [[(1, 1.5)], [(1, 3.0)]]
    # A name that another group would have got by itself.
    plot_folders(["plain=other", "lr=1,s=0"], "a.png")
    assert drawn.names == ["plain", "lr=1,s=0"]


# ---- as users run it ----


def test_a_run_of_the_trainer(drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every number in the picture is one of its log."""
    args = arguments(
        tmp_path / "run", XGradTrainingArguments, xgrad_steps="auto", max_steps=6, logging_steps=1, eval_steps=2,
        eval_strategy="steps",
    )  # fmt: skip
    trainer = XGradTrainer(bert(), args, train_dataset=Sentences(16), eval_dataset=Sentences(8))
    trainer.train()
    trainer.save_state()
    capsys.readouterr()
    assert command_line.main(["plot", str(tmp_path / "run"), "-o", str(tmp_path / "a.svg")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.svg'}\n"
    labels = ("training loss", "evaluation loss", "cosine of predicted and made step", "s (steps predicted ahead)")
    for label, name in zip(labels, ("loss", "eval_loss", "xgrad/cosine", "xgrad/steps"), strict=True):
        logged = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
        assert len(logged) >= 3
        assert drawn.points(label) == logged
    assert drawn.names == ["run"]


def test_the_command_alone(tmp_path: Path) -> None:
    """In a process of its own, in another folder: the picture's name is its output, and nothing wants a screen."""
    write_run(tmp_path / "run", log(1.0, 2.0))
    code = (
        "import sys, hf_xgrad.__main__ as m; assert 'matplotlib' not in sys.modules; "
        "assert m.main(sys.argv[1:]) == 0; assert not {'matplotlib.pyplot', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "plot", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "xgrad_runs.png\n"), done.stderr
    assert (tmp_path / "xgrad_runs.png").read_bytes().startswith(b"\x89PNG")
