"""What a run leaves behind for its reader: predictions, results, the comparison of two runs."""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_xgrad.outputs.files import STATE_FILE

Row = tuple[str, float, float, float]
RESUMED = "train_resumed_at_step"
# Metrics of a Trainer which do not say how well the model does.
_BOOKKEEPING = ("_per_second", "_samples", "_tokens", "_runtime", "_preparation_time", "epoch", "total_flos")


def steps_text(steps: float | str) -> str:
    """`xgrad_steps` as readers write it: 2, 0.5, auto."""
    return steps if isinstance(steps, str) else f"{steps:g}"


def write_json(path: Path, content: Any) -> None:
    """Write `content`, readably."""
    path.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return what write_json wrote: the metrics in a results file, say; nothing where there is no such file."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def write_predictions(path: Path, predictions: Iterable[str | float]) -> None:
    """Write a tab-separated file of row numbers (from 0, as GLUE's submissions have them) and predictions."""
    lines = ["index\tprediction", *(f"{number}\t{value}" for number, value in enumerate(predictions))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(xgrad: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Row]:
    """Return (metric, with XGrad, without, difference) for the metrics that both runs have."""
    # A resumed run reports the loss and the time of its last part only.
    partial = RESUMED in xgrad or RESUMED in baseline
    rows = []
    for name, value in xgrad.items():
        skipped = any(part in name for part in _BOOKKEEPING) or (partial and name.startswith("train"))
        if name in baseline and not skipped:
            rows.append((name, float(value), float(baseline[name]), float(value) - float(baseline[name])))
    return sorted(rows, key=lambda row: (not row[0].startswith("train"), row[0]))


def format_table(header: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    """Return a table: text to the left, numbers with four decimals to the right, "-" for what is missing."""
    cells = [["-" if v is None else v if isinstance(v, str) else f"{v:.4f}" for v in row] for row in rows]
    # So wide that nothing is broken or cut, wherever it is read.
    columns = {title: {"justify": "right" if title != header[0] else "left"} for title in header}
    return text_table(columns, cells, width=10_000)


def text_table(columns: Mapping[str, Mapping[str, Any]], rows: Iterable[Sequence[str]], width: int) -> str:
    """Return plain text, so many characters wide at most; the settings of columns are those of rich."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table

    lines = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    table = Table(box=lines, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title, settings in columns.items():
        table.add_column(title, **{"overflow": "fold", **settings})
    for row in rows:
        table.add_row(*row)
    # Whatever the terminal can do: what is piped or logged has no colours.
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, markup=False, emoji=False, highlight=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def format_comparison(rows: Iterable[Row]) -> str:
    """Return the table of two runs side by side."""
    return format_table(("metric", "XGrad", "baseline", "difference"), rows)


def write_comparison(path: Path, rows: Iterable[Row], settings: Mapping[str, Any]) -> None:
    """Write two runs side by side, with the settings that they share."""
    metrics = {
        name: {"xgrad": with_xgrad, "baseline": without, "difference": difference}
        for name, with_xgrad, without, difference in rows
    }
    write_json(path, {"metrics": metrics, "settings": dict(settings)})


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the log of the run whose results are in `folder`."""
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    history: list[dict[str, Any]] = state["log_history"]
    return history


def until_trained(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a log without the evaluations after the training, which a complete run that is started again repeats."""
    ends = [number for number, entry in enumerate(history, start=1) if "train_loss" in entry]
    return list(history[: ends[-1]] if ends else history)


def first_logged(history: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return the first value that a run logged under `name`."""
    return float(next((entry[name] for entry in history if name in entry), math.nan))


def last_logged(history: Iterable[Mapping[str, Any]], name: str) -> float:
    """Return the last value that a run logged under `name`."""
    values = [entry[name] for entry in history if name in entry]
    return float(values[-1]) if values else math.nan
