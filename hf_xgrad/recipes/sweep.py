"""Runs one of the training scripts for several s (steps predicted ahead), learning rates and seeds, and compares them.

    hf-xgrad sweep --xgrad_steps 0 1 2 3 --learning_rates 1e-3 2e-3 --seeds 1 2 3 --output_dir outputs/sweep
    hf-xgrad sweep glue --xgrad_steps 0 1 --learning_rates 2e-5 5e-5 --seeds 1 2 3 \\
        --output_dir outputs/sweep-cola -- --model_name_or_path google-bert/bert-base-cased --task_name cola \\
        --do_train --do_eval

What stands after `--` goes to the recipe, clm if none is named. s = 0 is the plain optimizer; with `auto` s is
chosen while training. A sweep that was cut off goes on where it was when it is started again.
"""

import argparse
import importlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from hf_xgrad import XGradConfig
from hf_xgrad.core.config import AUTO_STEPS
from hf_xgrad.outputs.plots import STYLES, new_figure
from hf_xgrad.recipes import RECIPES
from hf_xgrad.recipes.arguments import read_config_file, split_config
from hf_xgrad.recipes.input_errors import InputError, describe_choices, run_script
from hf_xgrad.recipes.results import format_table, read_json, steps_text, write_json

PROG = "hf-xgrad sweep"
SWEEPABLE = ("clm", "mlm", "glue")
# The files in scripts/ that are these recipes, for those who know them by those names.
SCRIPTS = {f"run_{name}.py": name for name in SWEEPABLE}
# Flags that the sweep itself sets for each run, or that would undo them.
SWEPT = ("seed", "learning_rate", "xgrad", "no_xgrad", "xgrad_steps", "output_dir", "baseline")


class Point(NamedTuple):
    """The settings of one run."""

    learning_rate: float
    steps: float | str
    seed: int

    def __str__(self) -> str:
        return f"lr={self.learning_rate:g},s={steps_text(self.steps)},seed={self.seed}"


Values = Mapping[Point, float]


def _recipe(text: str) -> str:
    name = SCRIPTS.get(text, text)
    if name not in SWEEPABLE:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(SWEEPABLE)}")
    return name


def _steps(text: str) -> float | str:
    try:
        return XGradConfig.from_args(argparse.Namespace(xgrad_steps=text)).steps
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad sweep` and return its exit status. `prog` is what the user called."""
    return run_script(prog, lambda words: _run(words, prog), arguments)


def _run(arguments: list[str], prog: str) -> None:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = arguments[end + 1 :]
    parser = argparse.ArgumentParser(prog, description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "recipe", nargs="?", type=_recipe, default="clm", metavar="{clm,mlm,glue}", help="(default: %(default)s)"
    )
    parser.add_argument("--xgrad_steps", nargs="+", type=_steps, default=[0.0, 1.0, 2.0], metavar="S")
    parser.add_argument("--learning_rates", nargs="+", type=float, required=True, metavar="LR")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument("--metric", default="loss", help="metric of the evaluation (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the runs and what is said of them")
    known = parser.parse_args(arguments[:end])
    points = [Point(*values) for values in itertools.product(known.learning_rates, known.xgrad_steps, known.seeds)]
    # By their folders, whose names have six digits.
    if len(set(map(str, points))) < len(points):
        raise InputError("--learning_rates, --xgrad_steps and --seeds must not name a value twice")
    _check_flags(flags)
    folder: Path = known.output_dir
    _check_sweep(folder, {"recipe": known.recipe, "flags": flags})
    recipe = importlib.import_module(f"hf_xgrad.recipes.{RECIPES[known.recipe][0]}")
    values = {}
    for number, point in enumerate(points, start=1):
        print(f"Run {number} of {len(points)}: {point}", flush=True)
        values[point] = _value(recipe, point, folder, known.metric, flags)
    _show(values, known.metric, folder)


def _check_flags(flags: list[str]) -> None:
    """Refuse flags for the script which the sweep decides."""
    names = [word[2:].split("=")[0] for word in flags if word.startswith("--")]
    config, _ = split_config(flags)
    if config is not None:
        names += read_config_file(config)
    for name in names:
        if name in SWEPT:
            raise InputError(f"--{name} is not for the flags after `--`: the sweep decides it")


def _check_sweep(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with runs of another script or with other flags: they would be compared with these."""
    path = folder / "sweep_settings.json"
    if path.is_file() and read_json(path) != settings:
        raise InputError(f"--output_dir {folder} holds a sweep with other settings ({path.name}); name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written: {error.strerror}") from error


def _value(recipe: Any, point: Point, folder: Path, metric: str, flags: list[str]) -> float:
    run_folder = folder / str(point)
    results = run_folder / "eval_results.json"
    if not results.is_file():
        status = recipe.main(
            [
                *flags,
                *("--learning_rate", str(point.learning_rate), "--xgrad_steps", str(point.steps)),
                *("--seed", str(point.seed), "--output_dir", str(run_folder)),
            ]
        )
        if status:
            raise SystemExit(status)
    found = read_json(results)
    name = f"eval_{metric}"
    if name not in found:
        known = [key.removeprefix("eval_") for key in found]
        raise InputError(f"--metric {metric}: the evaluation has none{describe_choices(metric, known)} ({results})")
    return float(found[name])


def _show(values: Values, metric: str, folder: Path) -> None:
    write_json(folder / "sweep.json", [{**point._asdict(), metric: value} for point, value in values.items()])
    header = ("learning rate", "s", f"{metric}, mean", "least", "greatest", "against s = 0", "lower at")
    print(format_table(header, _rows(values)))
    plot = folder / "sweep.png"
    _plot(values, metric, plot)
    print(f"\nPlot: {plot}")


def _rows(values: Values) -> list[list[str | float | None]]:
    rows = []
    for (rate, steps), of_seed in _by_setting(values).items():
        plain = {seed: values.get(Point(rate, 0.0, seed)) for seed in of_seed}
        differences = [value - base for seed, value in of_seed.items() if (base := plain[seed]) is not None]
        lower = sum(difference < 0 for difference in differences)
        compared = bool(differences) and steps != 0
        rows.append(
            [
                *(f"{rate:g}", steps_text(steps)),
                *(mean(of_seed.values()), min(of_seed.values()), max(of_seed.values())),
                f"{mean(differences):+.4f}" if compared else None,
                f"{lower} of {len(differences)} seeds" if compared else None,
            ]
        )
    return rows


def _by_setting(values: Values) -> dict[tuple[float, float | str], dict[int, float]]:
    settings: dict[tuple[float, float | str], dict[int, float]] = {}
    for point, value in values.items():
        settings.setdefault((point.learning_rate, point.steps), {})[point.seed] = value
    return settings


def _plot(values: Values, metric: str, path: Path) -> None:
    """Draw the metric over s: a line for each learning rate through the means, from least to greatest behind it.

    What "auto" came to has no s to stand over: it is a thin line across.
    """
    figure, (panel,) = new_figure(1, width=5)
    settings = _by_setting(values)
    rates = sorted({rate for rate, _ in settings})
    for rate, (color, line) in zip(rates, itertools.cycle(STYLES), strict=False):
        steps = sorted(s for r, s in settings if r == rate and not isinstance(s, str))
        of_seeds = [settings[rate, s].values() for s in steps]
        panel.fill_between(steps, [min(v) for v in of_seeds], [max(v) for v in of_seeds], color=color, alpha=0.15)
        panel.plot(steps, [mean(v) for v in of_seeds], line, marker="o", color=color, label=f"learning rate {rate:g}")
        if (rate, AUTO_STEPS) in settings:
            level = mean(settings[rate, AUTO_STEPS].values())
            panel.axhline(level, linestyle=":", linewidth=1, color=color, label=f"learning rate {rate:g}, s = auto")
    panel.set(xlabel="s (steps predicted ahead; 0: plain optimizer)", ylabel=f"evaluation {metric}")
    panel.legend()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
