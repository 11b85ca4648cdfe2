"""Trains a small model on the embedded data set, with XGrad and without, and shows both side by side.

    hf-xgrad demo                  (what `make demo` runs: a minute or two, on one processor core)
    hf-xgrad demo --seed 2         (further flags go to `hf-xgrad glue`)

One pair of runs shows how the two are compared, not which is better: from seed to seed the accuracy varies by several
points in both. The settings were chosen for time and for a level between guessing and 100 %.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_xgrad.outputs.plots import plot_runs
from hf_xgrad.recipes.classification import glue as run_glue
from hf_xgrad.recipes.classification.tasks import TextMetric
from hf_xgrad.recipes.corpora.acceptability import LABEL_NAMES, write_data_set
from hf_xgrad.recipes.corpora.files import read_rows
from hf_xgrad.recipes.input_errors import InputError, run_script
from hf_xgrad.recipes.results import format_table, last_logged, read_json, read_log
from hf_xgrad.recipes.runs import baseline_folder

PROG = "hf-xgrad demo"
# Written first into the output folder: a folder that has it is a demonstration's, finished or not, and is replaced.
MARK = "made_by_demo.txt"
METRICS = ("accuracy", "matthews_correlation")
DATA = {"train_pairs": 4000, "validation_pairs": 500, "seed": 0}
SETTINGS = {
    "num_train_epochs": 12,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "max_seq_length": 64,
    "logging_steps": 50,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad demo` and return its exit status. `prog` is what the user called."""
    return run_script(prog, lambda words: _run(words, prog), arguments, again="; the same command starts over")


def _run(arguments: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog, description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="(default: %(default)s)")
    known, further = parser.parse_known_args(arguments)
    # For so small a model a second thread brings nothing, and where other processes want the core it costs a lot.
    torch.set_num_threads(1)
    folder: Path = known.output_dir
    _clear(folder)
    data = folder / "data"
    write_data_set(data, **DATA)
    run_folder = folder / "xgrad"
    status = run_glue.main(_flags(data, run_folder) + further)
    if status:
        raise SystemExit(status)
    _show(data, {"XGrad": run_folder, "plain optimizer": Path(baseline_folder(str(run_folder)))}, folder / "loss.png")


def _clear(folder: Path) -> None:
    if (folder / MARK).is_file():
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output_dir {folder} is not empty and not an earlier demonstration's")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text("The next run of `hf-xgrad demo` replaces this folder.\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written: {error.strerror}") from error


def _flags(data: Path, run_folder: Path) -> list[str]:
    model = str(data / "model")
    return [
        *("--config_name", model, "--tokenizer_name", model),
        *("--train_file", str(data / "train.jsonl"), "--validation_file", str(data / "validation.jsonl")),
        *("--text_column", "sentence", "--metrics", *METRICS),
        *("--do_train", "--do_eval", "--baseline", "--output_dir", str(run_folder)),
        *(f"--{name}={value}" for name, value in SETTINGS.items()),
    ]


def _show(data: Path, runs: dict[str, Path], plot: Path) -> None:
    histories = {name: read_log(folder) for name, folder in runs.items()}
    plot_runs(
        {name: [history] for name, history in histories.items()},
        plot,
        title="Acceptability of sentences, small BERT from scratch",
        loss_unit="nats per sentence",
    )
    rows: list[list[str | float | None]] = []
    for name, folder in runs.items():
        results = read_json(folder / "eval_results.json")
        scores = [results[f"eval_{metric}"] for metric in METRICS]
        rows.append([name, last_logged(histories[name], "loss"), results["eval_loss"], *scores])
    rows.append(["majority guess", None, None, *_majority_scores(data)])
    print()
    print(format_table(("", "final train loss", "eval loss", "accuracy", "Matthews"), rows))
    print("\nOne run each: with another --seed either may come out ahead.")
    print(f"Loss curves: {plot}")


def _majority_scores(data: Path) -> list[float]:
    """Return what always guessing the training data's most frequent label gets."""
    labels = [LABEL_NAMES.index(row["label"]) for row in read_rows(str(data / "train.jsonl"))]
    references = [LABEL_NAMES.index(row["label"]) for row in read_rows(str(data / "validation.jsonl"))]
    guess = max(sorted(set(labels)), key=labels.count)
    scores = TextMetric(METRICS).compute(predictions=[guess] * len(references), references=references)
    return [scores[metric] for metric in METRICS]


if __name__ == "__main__":
    sys.exit(main())
