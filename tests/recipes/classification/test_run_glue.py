"""run_glue.py from its flags to the files that it leaves: whole runs of a tiny model, in this process unless said."""

import itertools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedTokenizerFast

from hf_xgrad import XGradTrainer
from hf_xgrad.recipes.classification import classifier
from hf_xgrad.recipes.classification import data as glue_data
from hf_xgrad.recipes.classification import glue as run_glue
from hf_xgrad.recipes.classification.tasks import TASKS
from hf_xgrad.recipes.corpora import files as text_datasets
from hf_xgrad.recipes.corpora.acceptability import make_config, make_rows, make_tokenizer, write_rows
from run_files import with_hub

TRAIN, VALIDATION = make_rows(20, 12, seed=0)
QUIET = ("--disable_tqdm", "true", "--use_cpu", "--dataloader_pin_memory", "false", "--max_seq_length", "32")
SHORT = ("--max_steps", "2", "--save_strategy", "no", "--per_device_train_batch_size", "4")
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(str(row["sentence"]) for row in TRAIN + VALIDATION)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the folder of a tiny encoder's configuration, with dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_config(tokenizer, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> BertConfig:
    config = make_config(tokenizer)
    config.update({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16})
    config.update(changes)
    return config


def new_model(folder: str) -> tuple[str, ...]:
    return ("--config_name", folder, "--tokenizer_name", folder)


@pytest.fixture
def data(tmp_path: Path) -> tuple[str, ...]:
    """Return the flags that name training and validation files."""
    write_rows(TRAIN, tmp_path / "train.jsonl")
    write_rows(VALIDATION, tmp_path / "validation.jsonl")
    return ("--train_file", str(tmp_path / "train.jsonl"), "--validation_file", str(tmp_path / "validation.jsonl"))


def run(*flags: str, status: int = 0) -> None:
    assert run_glue.main([*flags, *QUIET]) == status


def results(folder: Path, kind: str = "eval") -> dict[str, Any]:
    return dict(json.loads((folder / f"{kind}_results.json").read_text()))


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


# The tasks


def task_rows(name: str, count: int) -> Rows:
    """Return rows with a GLUE task's own columns."""
    task = TASKS[name]
    texts = [str(row["sentence"]) for row in TRAIN]
    rows = []
    for number in range(count):
        row: dict[str, Any] = {column: texts[number + place] for place, column in enumerate(task.text_columns)}
        label = number / 2 if task.labels.regression else number % len(task.labels.names)
        rows.append({**row, "label": label, "idx": number})
    return rows


@pytest.mark.parametrize("task", TASKS)
def test_each_task_trains_evaluates_and_predicts(tmp_path: Path, model: str, task: str) -> None:
    splits = ["train", "validation", "test"]
    splits += ["validation_mismatched", "test_mismatched"] if task == "mnli" else []
    files = []
    for number, split in enumerate(splits):
        write_rows(task_rows(task, 9 - number), tmp_path / f"{split}.jsonl")
        files += [f"--{split}_file", str(tmp_path / f"{split}.jsonl")]
    out = tmp_path / "out"
    run(*new_model(model), "--task_name", task, *files, *SHORT, "--do_train", "--do_eval", "--do_predict",
        "--output_dir", str(out))  # fmt: skip
    spec = TASKS[task]
    expected = {f"eval_{metric}" for metric in spec.metrics} | {"eval_loss"}
    expected |= {"eval_combined_score"} if len(spec.metrics) == 2 else set()
    expected |= {"eval_accuracy_mm", "eval_loss_mm", "eval_samples_mm"} if task == "mnli" else set()
    assert expected <= results(out).keys()
    assert results(out).items() <= results(out, "all").items()
    assert results(out, "train")["train_samples"] == 9
    assert (out / "README.md").is_file()
    assert not (out / "comparison.json").exists()
    predicted = {"": 7, "-mm": 5} if task == "mnli" else {"": 7}
    for suffix, count in predicted.items():
        header, *rows = lines(out / f"predict_results_{task}{suffix}.tsv")
        assert header == "index\tprediction"
        numbers, values = zip(*(row.split("\t") for row in rows), strict=True)
        assert list(numbers) == [str(number) for number in range(count)]
        assert all(map(float, values)) if spec.labels.regression else set(values) <= set(spec.labels.names)
    config = json.loads((out / "config.json").read_text())
    if spec.labels.regression:
        assert config["problem_type"] == "regression"
    else:
        assert config["id2label"] == {str(number): name for number, name in enumerate(spec.labels.names)}
        assert config["label2id"] == {name: number for number, name in enumerate(spec.labels.names)}


def hub_data(task: str, splits: Sequence[str]) -> datasets.DatasetDict:
    names = TASKS[task].labels.names
    found = datasets.DatasetDict()
    for split in splits:
        rows = task_rows(task, 6)
        if split.startswith("test"):
            rows = [{**row, "label": -1} for row in rows]  # as the Hub's test sets have it
        found[split] = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=list(names)))
    return found


@pytest.mark.parametrize("task", ["mnli", "mrpc"])
def test_without_files_a_task_comes_from_the_hub(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    parts = ["_matched", "_mismatched"] if task == "mnli" else [""]
    splits = ["train", *(f"{split}{part}" for split in ("validation", "test") for part in parts)]
    asked: list[Any] = []

    def load(*names: Any, **settings: Any) -> datasets.DatasetDict:
        asked.append((names, settings))
        return hub_data(task, splits)

    monkeypatch.setattr(text_datasets.datasets, "load_dataset", load)
    out = tmp_path / "out"
    run(*new_model(model), "--task_name", task, *SHORT, "--do_train", "--do_eval", "--do_predict", "--cache_dir", "c",
        "--token", "t", "--output_dir", str(out))  # fmt: skip
    assert asked == [(("nyu-mll/glue", task), {"cache_dir": "c", "token": "t"})]
    assert results(out)["eval_samples"] == 6
    assert len(list(out.glob("predict_results_*.tsv"))) == len(parts)
    assert f"GLUE {task.upper()}" in (out / "README.md").read_text()


def test_any_other_data_set_by_name(tmp_path: Path, model: str) -> None:
    (tmp_path / "set").mkdir()
    write_rows(TRAIN, tmp_path / "set" / "train.jsonl")
    write_rows(VALIDATION, tmp_path / "set" / "validation.jsonl")
    run(*new_model(model), "--dataset_name", str(tmp_path / "set"), "--cache_dir", str(tmp_path / "cache"), *SHORT,
        "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert results(tmp_path / "out")["eval_samples"] == len(VALIDATION)


def test_columns_and_metrics_named_by_flags(tmp_path: Path, model: str) -> None:
    rows = [{"first": row["sentence"], "second": "The boy .", "verdict": row["label"]} for row in TRAIN]
    write_rows(rows, tmp_path / "rows.json")
    file = str(tmp_path / "rows.json")
    run(*new_model(model), "--train_file", file, "--validation_file", file, "--text_column", "first",
        "--text_pair_column", "second", "--label_column", "verdict", "--metrics", "matthews_correlation", "f1", *SHORT,
        "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    scores = {name for name in results(tmp_path / "out") if name.startswith("eval_")}
    assert {"eval_matthews_correlation", "eval_f1"} <= scores
    assert not {"eval_accuracy", "eval_combined_score"} & scores


def test_scores_of_other_data_are_regressed(tmp_path: Path, model: str) -> None:
    lines_ = ["text,label", *(f"{row['sentence']},{number / 4}" for number, row in enumerate(TRAIN))]
    (tmp_path / "rows.csv").write_text("\n".join(lines_))
    run(*new_model(model), "--train_file", str(tmp_path / "rows.csv"), *SHORT, "--do_train", "--do_eval",
        "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert {"eval_pearson", "eval_spearmanr"} <= results(tmp_path / "out").keys()
    assert weights(tmp_path / "out")["classifier.weight"].shape[0] == 1


def test_lists_of_classes_are_trained_on_as_such(tmp_path: Path, model: str) -> None:
    rows = [
        {"text": row["sentence"], "label": [["a\tb", 10], [9], []][number % 3]} for number, row in enumerate(TRAIN)
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    out, file = tmp_path / "out", str(tmp_path / "rows.jsonl")
    flags = ("--do_eval", "--do_predict", "--output_dir", str(out))
    run(*new_model(model), "--train_file", file, "--test_file", file, *SHORT, "--do_train", *flags,
        "--problem_type", "multi_label_classification", "--metrics", "accuracy", "f1")  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["10", "9", "a b"]
    assert 0.4 < results(out)["eval_loss"] < 1  # that of each class for itself
    assert {"eval_accuracy", "eval_f1"} <= results(out).keys()
    predicted = [line.split("\t") for line in lines(out / "predict_results.tsv")[1:]]
    assert len(predicted) == len(rows)
    assert all(set(json.loads(names)) <= {"10", "9", "a b"} for _, names in predicted)
    # The model knows what it was trained on.
    evaluated = tmp_path / "evaluated"
    run(
        "--model_name_or_path",
        str(out),
        "--validation_file",
        file,
        *SHORT,
        "--do_eval",
        "--output_dir",
        str(evaluated),
    )
    assert results(evaluated)["eval_loss"] == pytest.approx(results(out)["eval_loss"], abs=0.3)


def test_predictions_of_odd_names_are_one_line_each(
    tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [
        {"text": row["sentence"], "label": ["good\tone", "bad\r\none"][number % 2]} for number, row in enumerate(TRAIN)
    ]
    write_rows(rows, tmp_path / "rows.jsonl")
    file = str(tmp_path / "rows.jsonl")
    run(*new_model(model), "--train_file", file, "--test_file", file, *SHORT, "--do_train", "--do_predict",
        "--output_dir", str(tmp_path / "out"))  # fmt: skip
    written = (tmp_path / "out" / "predict_results.tsv").read_text().splitlines()
    assert len(written) == 1 + len(rows)
    assert {line.split("\t")[1] for line in written[1:]} <= {"good one", "bad one"}
    why = "Labels: single_label_classification, 2 classes, since no label is a number with a fraction"
    assert caplog.messages.count(why) == 1


def test_without_validation_data_a_part_is_held_out(
    tmp_path: Path, model: str, data: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    for out in ("out", "again"):
        run(*new_model(model), *data[:2], "--validation_split_percentage", "20", *SHORT, "--do_train", "--do_eval",
            "--seed", "5", "--output_dir", str(tmp_path / out))  # fmt: skip
    assert "No validation data: held out 8 of the 40 rows" in caplog.text
    assert "seed 5, the same share of each label" in caplog.text
    assert results(tmp_path / "out", "train")["train_samples"] == 32
    assert results(tmp_path / "out")["eval_samples"] == 8
    assert results(tmp_path / "out")["eval_loss"] == results(tmp_path / "again")["eval_loss"]


def test_max_samples(tmp_path: Path, model: str, data: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    run(*new_model(model), *data, "--test_file", data[-1], *SHORT, "--do_train", "--do_eval", "--do_predict",
        "--max_train_samples", "9", "--max_eval_samples", "5", "--max_predict_samples", "3",
        "--output_dir", str(out))  # fmt: skip
    assert results(out, "train")["train_samples"] == 9
    assert results(out)["eval_samples"] == 5
    assert len(lines(out / "predict_results.tsv")) == 4


@pytest.mark.parametrize("pad", [False, True])
def test_padding_is_dynamic_unless_asked_for(
    tmp_path: Path, model: str, data: tuple[str, ...], pad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def step(self: XGradTrainer, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
        lengths.append((inputs["input_ids"].shape[1], int(inputs["attention_mask"].sum(1).max())))
        return original(self, model, inputs, *rest)

    original = XGradTrainer.training_step
    monkeypatch.setattr(XGradTrainer, "training_step", step)
    flags = ["--pad_to_max_length"] if pad else []
    run(*new_model(model), *data, *SHORT, "--do_train", "--output_dir", str(tmp_path / "out"), *flags)
    assert all(width == (32 if pad else longest) for width, longest in lengths)


# XGrad and the plain optimizer


def test_no_steps_ahead_is_the_plain_optimizer(tmp_path: Path, model: str, data: tuple[str, ...]) -> None:
    common = (*new_model(model), *data, "--max_steps", "6", "--save_strategy", "no", "--do_train", "--do_eval")
    run(*common, "--xgrad_steps", "0", "--output_dir", str(tmp_path / "zero"))
    run(*common, "--no_xgrad", "--output_dir", str(tmp_path / "off"))
    run(*common, "--output_dir", str(tmp_path / "on"))
    assert same_weights(tmp_path / "zero", tmp_path / "off")
    assert results(tmp_path / "zero")["eval_loss"] == results(tmp_path / "off")["eval_loss"]
    assert not same_weights(tmp_path / "on", tmp_path / "off")


def test_the_baseline_starts_alike_and_is_shown_beside(
    tmp_path: Path,
    model: str,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    batches: list[list[Any]] = [[], []]

    def train(self: XGradTrainer, **settings: Any) -> Any:
        starts.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return original_train(self, **settings)

    def step(self: XGradTrainer, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> torch.Tensor:
        batches[len(starts) - 1].append(inputs["input_ids"].tolist())
        return original_step(self, model, inputs, *rest)

    original_train, original_step = XGradTrainer.train, XGradTrainer.training_step
    monkeypatch.setattr(XGradTrainer, "train", train)
    monkeypatch.setattr(XGradTrainer, "training_step", step)
    out, baseline = tmp_path / "out", tmp_path / "out-baseline"
    run(*new_model(model), *data, "--max_steps", "6", "--do_train", "--do_eval", "--baseline", "--seed", "3",
        "--output_dir", str(out) + "/")  # fmt: skip
    assert len(starts) == 2
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert len(batches[0]) == 6
    assert batches[0] == batches[1]
    assert not same_weights(out, baseline)
    comparison = json.loads((out / "comparison.json").read_text())
    for metric in ("train_loss", "eval_loss", "eval_accuracy"):
        row = comparison["metrics"][metric]
        assert row["xgrad"] == results(out, "all")[metric]
        assert row["baseline"] == results(baseline, "all")[metric]
        assert row["difference"] == row["xgrad"] - row["baseline"]
    assert comparison["settings"]["seed"] == 3
    table = capsys.readouterr().out
    assert "metric" in table
    assert f"{comparison['metrics']['eval_loss']['baseline']:.4f}" in table
    assert not (baseline / "comparison.json").exists()


@pytest.mark.parametrize("xgrad", ["--xgrad", "--no_xgrad"])
def test_the_logged_loss_does_not_depend_on_accumulation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, data: tuple[str, ...], xgrad: str
) -> None:
    tiny_config(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    common = (*new_model(str(tmp_path / "model")), *data, "--max_steps", "5", "--logging_steps", "1", "--do_train",
              "--save_strategy", "no", "--learning_rate", "1e-3", xgrad)  # fmt: skip
    for batch, accumulation in ((8, 1), (2, 4)):
        run(*common, "--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation),
            "--output_dir", str(tmp_path / str(batch)))  # fmt: skip
    assert len(losses(tmp_path / "8")) == 5
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "8"), rel=1e-4)
    assert losses(tmp_path / "8")[0] == pytest.approx(math.log(2), rel=0.2)


# Stopping and resuming

# 40 rows in batches of 4: ten steps an epoch, so that the run is stopped, and ends, within an epoch.
RESUMABLE = ("--max_steps", "13", "--save_steps", "3", "--per_device_train_batch_size", "4", "--do_train", "--do_eval",
             "--learning_rate", "1e-2", "--logging_steps", "1")  # fmt: skip


def stop_at(step: int) -> Callable[..., torch.Tensor]:
    original = XGradTrainer.training_step

    def training_step(self: XGradTrainer, *arguments: Any, **settings: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *arguments, **settings)

    return training_step


@pytest.mark.parametrize(
    "flags",
    [("--optim", "adamw_torch"), ("--optim", "adagrad", "--xgrad_steps", "1"), ("--optim", "adagrad")],
    ids=["closed_form", "last_update", "chosen"],
)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path,
    model: str,
    data: tuple[str, ...],
    flags: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    common = (*new_model(model), *data, *RESUMABLE, *flags)
    run(*common, "--output_dir", str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(XGradTrainer, "training_step", stop_at(8))
        run(*common, "--output_dir", str(tmp_path / "parts"), status=130)
    # A checkpoint that was cut off while it was written: without its state, which comes last.
    (tmp_path / "parts" / "checkpoint-7").mkdir()
    run(*common, "--output_dir", str(tmp_path / "parts"))
    assert f"Resuming from {tmp_path / 'parts' / 'checkpoint-6'} (step 6 of 13)" in caplog.text
    assert same_weights(tmp_path / "parts", tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert results(tmp_path / "parts")["eval_loss"] == results(tmp_path / "whole")["eval_loss"]
    assert results(tmp_path / "parts", "train")["train_resumed_at_step"] == 6


def test_a_baseline_that_was_stopped_is_resumed_and_its_part_of_the_loss_not_compared(
    tmp_path: Path, model: str, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*new_model(model), *data, *RESUMABLE, "--baseline")
    run(*common, "--output_dir", str(tmp_path / "whole"))
    original = XGradTrainer.training_step
    stopping = stop_at(8)

    def only_the_baseline(self: XGradTrainer, *arguments: Any, **settings: Any) -> torch.Tensor:
        return (original if self.args.xgrad else stopping)(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(XGradTrainer, "training_step", only_the_baseline)
        run(*common, "--output_dir", str(tmp_path / "parts"), status=130)
    run(*common, "--output_dir", str(tmp_path / "parts"))
    for run_name in ("", "-baseline"):
        assert same_weights(tmp_path / f"parts{run_name}", tmp_path / f"whole{run_name}")
    whole, parts = (json.loads((tmp_path / n / "comparison.json").read_text())["metrics"] for n in ("whole", "parts"))
    assert "train_loss" in whole
    assert "train_loss" not in parts
    assert parts["eval_loss"] == whole["eval_loss"]


def test_a_complete_run_is_only_evaluated_again(
    tmp_path: Path,
    model: str,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    common = (*new_model(model), *data, *RESUMABLE, "--output_dir", str(out))
    run(*common)
    before, trained, evaluated = weights(out), results(out, "train"), results(out)
    (out / "eval_results.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(XGradTrainer, "train", lambda *_, **__: pytest.fail("trained"))
        run(*common)
    assert "Training is complete" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    assert results(out, "train") == trained
    assert results(out)["eval_loss"] == evaluated["eval_loss"]
    run(*common, "--max_steps", "15")  # more steps than before: the run goes on
    assert "(step 13 of 15)" in caplog.text


def test_a_run_is_not_resumed_under_other_settings_of_xgrad(
    tmp_path: Path, model: str, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*new_model(model), *data, *RESUMABLE)
    run(*common, "--output_dir", str(tmp_path / "out"))
    before = results(tmp_path / "out", "all")
    assert run_glue.main([*common, "--no_xgrad", "--output_dir", str(tmp_path / "out"), *QUIET]) == 2
    assert f"--output_dir {tmp_path / 'out'} holds a run with xgrad=True, not False" in capsys.readouterr().err
    assert results(tmp_path / "out", "all") == before
    checkpoint = str(tmp_path / "out" / "checkpoint-6")
    run(*common, "--no_xgrad", "--resume_from_checkpoint", checkpoint, "--output_dir", str(tmp_path / "other"))
    assert not same_weights(tmp_path / "out", tmp_path / "other")


def test_the_best_model_of_a_complete_run(
    tmp_path: Path, model: str, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    worse = (1 / number for number in itertools.count(1))
    monkeypatch.setattr(run_glue, "metrics_function", lambda *_: lambda _: {"accuracy": next(worse)})
    best = ("--eval_strategy", "steps", "--eval_steps", "3", "--load_best_model_at_end", "--metric_for_best_model")
    common = (*new_model(model), *data, *RESUMABLE, *best, "accuracy", "--output_dir", str(out))
    run(*common)
    assert json.loads((out / "trainer_state.json").read_text())["best_global_step"] == 3
    assert not same_weights(out, out / "checkpoint-13")
    before = weights(out)
    run(*common)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())


def test_no_resume_starts_in_an_empty_folder_only(
    tmp_path: Path, model: str, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = (*new_model(model), *data, *SHORT, "--do_train", "--output_dir", str(out))
    out.mkdir()
    run(*common, "--no_resume")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags in (("--no_resume",), ()):  # there is no checkpoint to resume from, either
        assert run_glue.main([*common, *flags, *QUIET]) == 2
        assert f"--output_dir {out}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_given_checkpoint(tmp_path: Path, model: str, data: tuple[str, ...]) -> None:
    common = (*new_model(model), *data, *RESUMABLE)
    run(*common, "--output_dir", str(tmp_path / "whole"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    run(*common, "--resume_from_checkpoint", checkpoint, "--output_dir", str(tmp_path / "other"))
    assert same_weights(tmp_path / "other", tmp_path / "whole")


# Models


def fine_tuned(folder: Path, tokenizer: PreTrainedTokenizerFast, names: Sequence[str], dtype: torch.dtype) -> str:
    torch.manual_seed(1)
    # Weights as large as this make a model that says now this, now that.
    config = tiny_config(tokenizer, initializer_range=0.5)
    config.update({"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}})
    AutoModelForSequenceClassification.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_models_own_label_order_changes_neither_metrics_nor_predictions(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, data: tuple[str, ...]
) -> None:
    rows = [{"sentence1": row["sentence"], "sentence2": "The boy .", "label": number % 3 % 2}
            for number, row in enumerate(TRAIN)]  # fmt: skip
    write_rows(rows, tmp_path / "rows.jsonl")
    source = Path(fine_tuned(tmp_path / "ours", tokenizer, ["not_equivalent", "equivalent"], torch.float32))
    turned = Path(fine_tuned(tmp_path / "turned", tokenizer, ["Equivalent", "Not_Equivalent"], torch.float32))
    tensors = weights(source)
    tensors |= {name: tensors[name].flip(0).contiguous() for name in ("classifier.weight", "classifier.bias")}
    save_file(tensors, turned / "model.safetensors", {"format": "pt"})
    flags = ("--task_name", "mrpc", "--validation_file", str(tmp_path / "rows.jsonl"), "--test_file",
             str(tmp_path / "rows.jsonl"), "--do_eval", "--do_predict")  # fmt: skip
    found = []
    for folder in (source, turned):
        out = tmp_path / f"{folder.name}-out"
        run("--model_name_or_path", str(folder), *flags, "--output_dir", str(out))
        metrics = {name: results(out)[f"eval_{name}"] for name in ("accuracy", "f1", "loss")}
        found.append((metrics, lines(out / "predict_results_mrpc.tsv")))
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    names = [line.split("\t")[1] for line in found[0][1][1:]]
    assert set(names) == {"equivalent", "not_equivalent"}
    pairs = [(name == "equivalent", row["label"] == 1) for name, row in zip(names, rows, strict=True)]
    hits, wrong = pairs.count((True, True)), pairs.count((True, False)) + pairs.count((False, True))
    assert found[1][0]["f1"] == pytest.approx(2 * hits / (2 * hits + wrong))


@pytest.mark.parametrize(("flags", "dtype"), [((), torch.float32), (("--dtype", "auto"), torch.bfloat16)])
def test_weights_stored_in_16_bits_are_trained_in_32(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    data: tuple[str, ...],
    flags: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    stored = fine_tuned(tmp_path / "model", tokenizer, ["acceptable", "unacceptable"], torch.bfloat16)
    run("--model_name_or_path", stored, *data, *SHORT, "--do_train", *flags, "--output_dir", str(tmp_path / "out"))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {dtype}


def test_a_head_for_other_labels_is_replaced_only_if_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    stored = fine_tuned(tmp_path / "model", tokenizer, ["a", "b", "c"], torch.float32)
    common = [
        "--model_name_or_path",
        stored,
        *data,
        *SHORT,
        "--do_train",
        "--output_dir",
        str(tmp_path / "out"),
        *QUIET,
    ]
    assert run_glue.main(common) == 2
    assert "fine-tuned for 3 labels, the data have 2" in capsys.readouterr().err
    assert run_glue.main([*common, "--ignore_mismatched_sizes"]) == 0
    assert weights(tmp_path / "out")["classifier.weight"].shape[0] == 2


def test_a_trained_model_predicts_without_its_training_data(tmp_path: Path, model: str, data: tuple[str, ...]) -> None:
    run(*new_model(model), *data, *SHORT, "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out"))
    run("--model_name_or_path", str(tmp_path / "out"), *data[2:], "--test_file", data[-1], "--do_eval", "--do_predict",
        "--output_dir", str(tmp_path / "later"))  # fmt: skip
    assert results(tmp_path / "later")["eval_loss"] == results(tmp_path / "out")["eval_loss"]
    assert {line.split("\t")[1] for line in lines(tmp_path / "later" / "predict_results.tsv")[1:]} <= {
        "acceptable",
        "unacceptable",
    }
    assert not (tmp_path / "later" / "model.safetensors").exists()


def test_a_model_without_padding_gets_its_end_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, data: tuple[str, ...]
) -> None:
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=3)
    config.save_pretrained(tmp_path / "gpt")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]")
    bare.save_pretrained(tmp_path / "gpt")
    run(
        *new_model(str(tmp_path / "gpt")),
        *data,
        *SHORT,
        "--do_train",
        "--do_eval",
        "--output_dir",
        str(tmp_path / "out"),
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 3


# Pushing


def test_everything_is_written_before_the_one_push(
    tmp_path: Path, model: str, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, set[str]]] = []

    def upload(*, folder_path: str, repo_id: str, **settings: Any) -> SimpleNamespace:
        pushed.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
        return SimpleNamespace(repo_url="there")

    with_hub(monkeypatch, upload_folder=upload)
    run(*new_model(model), *data, "--test_file", data[-1], *SHORT[:2], "--save_steps", "1", "--do_train", "--do_eval",
        "--do_predict", "--baseline", "--push_to_hub", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert [repo for repo, _ in pushed] == ["me/out"]
    files = ("all", "train", "eval")
    wanted = {"README.md", "model.safetensors", "predict_results.tsv", *(f"{kind}_results.json" for kind in files)}
    assert wanted <= pushed[0][1]
    assert {"comparison.json", "training_curves.png"} <= pushed[0][1]
    assert not any("baseline" in name for name in pushed[0][1])
    assert "## XGrad beside the plain optimizer" in (tmp_path / "out" / "README.md").read_text()
    assert "beside" not in (tmp_path / "out-baseline" / "README.md").read_text()


# What cannot be run


def bad(tmp_path: Path, name: str, content: str) -> str:
    (tmp_path / name).write_text(content)
    return str(tmp_path / name)


FAULTS: dict[str, Callable[[Path], tuple[tuple[str, ...], str]]] = {
    "task": lambda _: (
        ("--task_name", "colla"),
        "unknown task 'colla'; --task_name is one of cola, sst2, mrpc, stsb, ",
    ),
    "optimizer": lambda _: (("--optim", "adamm"), "adamm"),
    "refused optimizer": lambda _: (("--optim", "schedule_free_adamw"), "schedule_free_adamw"),
    "negative steps": lambda _: (("--xgrad_steps", "-1"), "xgrad_steps"),
    "nan steps": lambda _: (("--xgrad_steps", "nan"), "xgrad_steps"),
    "infinite steps": lambda _: (("--xgrad_steps", "inf"), "xgrad_steps"),
    "steps": lambda _: (("--xgrad_steps", "many"), "xgrad_steps='many'"),
    "rule": lambda _: (("--xgrad_rule", "guess"), "guess"),
    "closed form": lambda _: (("--xgrad_rule", "closed_form", "--optim", "adagrad"), "closed_form"),
    "optimizer's setting": lambda _: (("--optim", "adam3", "--optim_args", "speed=2"), "adam3 takes no 'speed'"),
    "missing file": lambda _: (("--train_file", "nowhere.csv"), "cannot read nowhere.csv: No such file"),
    "missing test file": lambda _: (("--test_file", "nowhere.csv"), "cannot read nowhere.csv: No such file"),
    "kind of file": lambda _: (("--train_file", "rows.xlsx"), "rows.xlsx: unknown kind of file"),
    "empty file": lambda path: (("--train_file", bad(path, "none.csv", "")), "none.csv is empty"),
    "malformed file": lambda path: (
        ("--train_file", bad(path, "bad.jsonl", '{"sentence": "a", "label": 0}\n{"sentence"\n')),
        "bad.jsonl, line 2: ",
    ),
    "column": lambda path: (
        ("--train_file", bad(path, "x.csv", "text,label\na,1\nb,0\n"), "--text_column", "sentence"),
        "x.csv has no column 'sentence'; its columns are text, label",
    ),
    "no text column": lambda path: (
        ("--train_file", bad(path, "x.csv", "words,label\na,1\nb,0\n")),
        "x.csv: which column is the text? Give --text_column, one of words, label",
    ),
    "label column": lambda _: (
        ("--label_column", "verdict"),
        "has no column 'verdict'; its columns are sentence, label,",
    ),
    "task's column": lambda _: (("--task_name", "mrpc"), "train.jsonl has no column 'sentence1'; its columns are"),
    "label": lambda path: (
        ("--task_name", "cola", "--train_file", bad(path, "x.csv", "sentence,label\na,1\nb,2\n")),
        "x.csv, row 2: label '2' is not one of 0 (unacceptable), 1 (acceptable)",
    ),
    "validation label": lambda path: (
        ("--validation_file", bad(path, "x.csv", "sentence,label\na,acceptable\nb,odd\n")),
        "x.csv, row 2: label 'odd' is not one of acceptable, unacceptable",
    ),
    "score": lambda path: (
        ("--task_name", "stsb", "--train_file", bad(path, "x.csv", "sentence1,sentence2,label\na,b,6\n")),
        "x.csv, row 1: label '6' is not a number from 0 to 5",
    ),
    "one label": lambda path: (
        ("--train_file", bad(path, "x.csv", "sentence,label\na,1\nb,1\n")),
        "x.csv: classification needs two labels at least",
    ),
    "output folder": lambda path: (
        ("--output_dir", bad(path, "file", "") + "/out"),
        "file/out cannot be written: Not a directory",
    ),
    "baseline's folder": lambda path: (
        ("--baseline", "--output_dir", bad(path, "out-baseline", "")[: -len("-baseline")]),
        "out-baseline cannot be written: File exists",
    ),
    "flag": lambda _: (("--learnin_rate", "1"), "unknown argument --learnin_rate; did you mean --learning_rate"),
    "nothing to do": lambda _: (("--do_train", "false"), "nothing to do"),
    "no test data": lambda _: (("--do_predict",), "--do_predict needs test data"),
    "best metric": lambda _: (
        ("--metric_for_best_model", "f1"),
        "--metric_for_best_model f1 is not one of loss, accuracy",
    ),
    "metric": lambda _: (
        ("--metrics", "pearson"),
        "--metrics pearson: for labels that are classes there are accuracy",
    ),
    "baseline of nothing": lambda _: (("--baseline", "--no_xgrad"), "--baseline"),
    "checkpoint": lambda _: (
        ("--resume_from_checkpoint", "nowhere"),
        "--resume_from_checkpoint nowhere is not a check",
    ),
    "both ways": lambda _: (
        ("--resume_from_checkpoint", "x", "--no_resume"),
        "--resume_from_checkpoint and --no_resume",
    ),
    "model": lambda _: (("--model_name_or_path", "/no/where", "--config_name", "/no/where"), "/no/where"),
    "length": lambda _: (("--max_seq_length", "0"), "--max_seq_length must be 1 or more, not 0"),
    "samples": lambda _: (("--max_train_samples", "-3"), "--max_train_samples must be 1 or more, not -3"),
    "share": lambda _: (("--validation_split_percentage", "100"), "--validation_split_percentage is from 1 to 99"),
    "two sources": lambda _: (("--dataset_name", "imdb"), "--dataset_name and data files exclude each other"),
    "pair": lambda _: (("--text_pair_column", "sentence"), "it needs --text_column"),
    "mismatched": lambda _: (("--test_mismatched_file", "x.csv"), "mismatched files are MNLI's"),
    "batch": lambda _: (("--per_device_train_batch_size", "two"), "--per_device_train_batch_size"),
    "precision": lambda _: (("--fp16", "--bf16"), "fp16 and bf16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_input_is_one_line_before_any_training(
    tmp_path: Path,
    model: str,
    data: tuple[str, ...],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(XGradTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    flags, named = FAULTS[fault](tmp_path)
    common = (*new_model(model), *data, *SHORT, "--do_train", "--output_dir", str(tmp_path / "out"), *QUIET)
    assert run_glue.main([*common, *flags]) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("hf-xgrad glue: error: ")
    assert named in errors[0]
    assert shown.out == ""
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "flags", [("--optim", "schedule_free_adamw"), ("--xgrad_rule", "closed_form", "--optim", "adafactor")]
)
def test_what_xgrad_refuses_is_said_before_a_model_is_loaded(
    tmp_path: Path, model: str, data: tuple[str, ...], flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "load_config", lambda *_: pytest.fail("loaded"))
    assert run_glue.main([*new_model(model), *data, "--do_train", "--output_dir", str(tmp_path), *flags, *QUIET]) == 2


def test_no_model_and_no_data(
    tmp_path: Path, model: str, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--do_train", "--output_dir", str(tmp_path / "out"))
    for flags, named in (((*data, *out), "no model: give "), ((*new_model(model), *out), "no data: give --task_name")):
        assert run_glue.main([*flags, *QUIET]) == 2
        assert named in capsys.readouterr().err


def test_a_bug_is_not_taken_for_wrong_input(
    tmp_path: Path, model: str, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **settings: Any) -> None:
        raise ValueError("a bug")

    for place, name in ((XGradTrainer, "training_step"), (glue_data, "_metrics")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            with pytest.raises(ValueError, match="a bug"):
                run(*new_model(model), *data, *SHORT, "--do_train", "--output_dir", str(tmp_path / name))


# As a command


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    paths = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-m", run_glue.__name__]
    return subprocess.run([*script, *arguments], capture_output=True, text=True, env=os.environ | paths, timeout=300)


def test_the_exit_status_of_the_command(tmp_path: Path, model: str, data: tuple[str, ...]) -> None:
    settings = {
        "max_steps": 2,
        "do_train": True,
        "do_eval": True,
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
    }
    text = "\n".join([*(f"{name}: {json.dumps(value)}" for name, value in settings.items()), "learning_rate: 1e-5"])
    file = bad(tmp_path, "settings.yaml", text)
    good = command(file, *new_model(model), *data, "--seed", "7")
    assert good.returncode == 0, good.stderr
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert (args.learning_rate, args.seed, args.max_steps) == (1e-5, 7, 2)
    wrong = command(file, *new_model(model), *data, "--task_name", "colla")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    tasks = "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli"
    assert (
        wrong.stderr.splitlines()[-1] == f"{run_glue.PROG}: error: unknown task 'colla'; --task_name is one of {tasks}"
    )
    assert wrong.stderr.count("error:") == 1
    assert "Traceback" not in wrong.stderr


@pytest.fixture(autouse=True)
def _logs_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
