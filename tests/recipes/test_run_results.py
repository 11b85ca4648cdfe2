"""The files and tables that runs leave."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_xgrad.recipes.classification.classifier import describe_for_card
from hf_xgrad.recipes.classification.data import DataArguments
from hf_xgrad.recipes.results import (
    compare,
    format_comparison,
    format_table,
    last_logged,
    read_json,
    write_comparison,
    write_predictions,
)

XGRAD = {"train_loss": 0.5, "eval_loss": 0.25, "eval_f1": 0.75, "eval_samples": 9, "eval_runtime": 1.0, "epoch": 3.0}
BASELINE = {"train_loss": 0.75, "eval_loss": 0.5, "eval_f1": 0.5, "eval_samples": 9, "eval_runtime": 2.0, "epoch": 3.0}


def test_two_runs_are_compared_metric_by_metric() -> None:
    rows = [("train_loss", 0.5, 0.75, -0.25), ("eval_f1", 0.75, 0.5, 0.25), ("eval_loss", 0.25, 0.5, -0.25)]
    assert compare(XGRAD, BASELINE) == rows


def test_what_one_run_lacks_is_not_compared() -> None:
    assert [row[0] for row in compare(XGRAD, {"eval_loss": 0.5})] == ["eval_loss"]


def test_a_resumed_runs_part_of_the_loss_is_not_compared() -> None:
    resumed = {**BASELINE, "train_resumed_at_step": 5}
    assert [row[0] for row in compare(XGRAD, resumed)] == ["eval_f1", "eval_loss"]
    assert [row[0] for row in compare(resumed, XGRAD)] == ["eval_f1", "eval_loss"]


def test_tables_are_aligned() -> None:
    assert format_table(("name", "a", "bcdefgh"), [["x", 1, -0.25], ["longer", None, math.nan]]).splitlines() == [
        "name         a  bcdefgh",
        "-----------------------",
        "x       1.0000  -0.2500",
        "longer       -      nan",
    ]
    assert "XGrad  baseline  difference" in format_comparison(compare(XGRAD, BASELINE))


def test_a_comparison_is_written(tmp_path: Path) -> None:
    write_comparison(tmp_path / "comparison.json", compare(XGRAD, BASELINE), {"seed": 3})
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["metrics"]["eval_f1"] == {"xgrad": 0.75, "baseline": 0.5, "difference": 0.25}
    assert written["settings"] == {"seed": 3}


def test_predictions_are_numbered_from_zero(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.tsv", ["a", 0.5])
    assert (tmp_path / "p.tsv").read_text() == "index\tprediction\n0\ta\n1\t0.5\n"


def test_metrics_of_a_run_that_left_none(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") == {}


def test_the_last_logged_value() -> None:
    assert last_logged([{"loss": 2.0}, {"loss": 1.0}, {"eval_loss": 3.0}], "loss") == 1.0
    assert math.isnan(last_logged([], "loss"))


@pytest.mark.parametrize(
    ("settings", "dataset", "tags"),
    [
        ({"task_name": "mrpc"}, "GLUE MRPC", "nyu-mll/glue"),
        ({"dataset_name": "me/mine"}, "me/mine", None),
        ({"train_file": "a/train.csv", "validation_file": "dev.csv", "test_file": "test.csv"}, "train.csv", None),
        ({"task_name": "mrpc", "train_file": "my.tsv", "validation_file": "dev.tsv"}, "my.tsv (as GLUE MRPC)", None),
        ({"task_name": "mrpc", "validation_file": "dev.tsv"}, None, None),
    ],
)
def test_a_card_names_what_the_model_was_trained_on(
    settings: dict[str, str], dataset: str | None, tags: str | None
) -> None:
    """Neither what it was evaluated on, nor a data set of the Hub where the rows came from files."""
    card = describe_for_card(DataArguments(**settings), SimpleNamespace(xgrad=True))
    assert (card["dataset"], card.get("dataset_tags")) == (dataset, tags)
    assert ("dataset_args" in card) == (tags is not None)
