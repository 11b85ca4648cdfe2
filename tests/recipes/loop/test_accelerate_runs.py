"""run_glue_no_trainer.py and its loop: the twin of run_glue.py, whole runs of a tiny model in this process."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import LoggerType
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

import tiny_models
from hf_xgrad import WeightPredictor, XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs.stock_card import TAGS
from hf_xgrad.recipes.arguments import ScriptParser
from hf_xgrad.recipes.classification import glue as run_glue
from hf_xgrad.recipes.corpora.acceptability import make_config, make_rows, make_tokenizer, write_rows
from hf_xgrad.recipes.loop import glue as run_glue_no_trainer
from hf_xgrad.recipes.loop import results as loop_results
from hf_xgrad.recipes.loop.arguments import LoopArguments, make_optimizer
from hf_xgrad.recipes.results import write_json
from run_files import history, read, same_weights, untimed, with_hub

TRAIN, VALIDATION = make_rows(20, 12, seed=0)
QUIET = ("--disable_tqdm", "true", "--use_cpu", "--dataloader_pin_memory", "false", "--max_seq_length", "32")
# 37 rows in batches of 4: ten batches an epoch, the last of one row; in windows of 4, 4 and 2 batches.
SHARED = ("--do_train", "--do_eval", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "5",
          "--max_train_samples", "37", "--learning_rate", "1e-2", "--weight_decay", "0.1", "--logging_steps", "1",
          "--lr_scheduler_type", "cosine")  # fmt: skip


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(autouse=True)
def _log_is_read(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the flags that name a tiny model, with dropout, and its data."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = make_tokenizer(str(row["sentence"]) for row in TRAIN + VALIDATION)
    tiny_config(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_rows(TRAIN, folder / "train.jsonl")
    write_rows(VALIDATION, folder / "validation.jsonl")
    data = ("--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "validation.jsonl"))
    return ("--config_name", str(folder), "--tokenizer_name", str(folder), *data)


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Any:
    config = make_config(tokenizer)
    config.update({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16})
    config.update({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    return config


def run(*flags: str, status: int = 0, script: Any = run_glue_no_trainer) -> None:
    assert script.main([*flags, *QUIET]) == status


# The Trainer's twin


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "flags",
    [
        ("--xgrad_rule", "closed_form", "--xgrad_steps", "2"),
        ("--xgrad_rule", "last_update", "--xgrad_steps", "1", "--data_seed", "7", "--warmup_steps", "0.3"),
        ("--no_xgrad", "--max_grad_norm", "0.1", "--warmup_steps", "3"),
        ("--bf16", "--max_grad_norm", "0", "--optim", "sgd", "--optim_args", "momentum=0.9"),
    ],
    ids=["closed_form", "last_update", "off", "bf16"],
)
def test_losses_weights_and_files_are_those_of_the_trainer(
    tmp_path: Path, files: tuple[str, ...], accumulation: int, flags: tuple[str, ...]
) -> None:
    common = (*files, *SHARED, *flags, "--gradient_accumulation_steps", str(accumulation), "--num_train_epochs", "2",
              "--eval_strategy", "steps", "--eval_steps", "4", "--do_predict", "--test_file", files[-1])  # fmt: skip
    run(*common, "--output_dir", str(tmp_path / "trainer"), script=run_glue)
    run(*common, "--output_dir", str(tmp_path / "loop"))
    theirs, ours = history(tmp_path / "trainer"), history(tmp_path / "loop")
    steps = 2 * math.ceil(10 / accumulation)
    assert [entry["step"] for entry in ours if "loss" in entry] == list(range(1, steps + 1))
    assert ours == theirs
    assert any(entry.get("xgrad/active") for entry in ours) == ("--no_xgrad" not in flags)
    assert same_weights(tmp_path / "loop", tmp_path / "trainer")
    for kind in ("train", "eval", "all"):
        name = f"{kind}_results.json"
        assert read(tmp_path / "loop" / name).keys() == read(tmp_path / "trainer" / name).keys()
        assert untimed(read(tmp_path / "loop" / name)) == untimed(read(tmp_path / "trainer" / name))
    for name in ("predict_results.tsv", "config.json", "tokenizer.json"):
        assert (tmp_path / "loop" / name).read_bytes() == (tmp_path / "trainer" / name).read_bytes()
    # The Trainer has more flags.
    settings, more = (read(tmp_path / name / "xgrad_settings.json") for name in ("loop", "trainer"))
    assert settings == {name: more[name] for name in settings}


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_logs_evaluations_and_checkpoints_fall_on_the_trainers_steps(
    tmp_path: Path, files: tuple[str, ...], strategy: str
) -> None:
    """A run that ends within an epoch, and shares of all steps as intervals."""
    intervals = ("--logging_steps", "0.5", "--eval_steps", "0.4", "--save_steps", "4")
    strategies = (flag for kind in ("logging", "eval", "save") for flag in (f"--{kind}_strategy", strategy))
    common = (*files, *SHARED, *intervals, *strategies, "--max_steps", "13", "--logging_first_step")
    run(*common, "--output_dir", str(tmp_path / "trainer"), script=run_glue)
    run(*common, "--output_dir", str(tmp_path / "loop"))
    assert history(tmp_path / "loop") == history(tmp_path / "trainer")
    found, wanted = ({path.name for path in (tmp_path / name).glob("checkpoint-*")} for name in ("loop", "trainer"))
    assert found == wanted
    assert len(wanted) > 1


def test_scores_are_regressed_as_by_the_trainer(tmp_path: Path, files: tuple[str, ...]) -> None:
    rows = [f"{row['sentence']},{number / 4}" for number, row in enumerate(TRAIN)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    common = (*files[:4], "--train_file", str(tmp_path / "rows.csv"), *SHARED, "--max_steps", "5")
    run(*common, "--output_dir", str(tmp_path / "trainer"), script=run_glue)
    run(*common, "--output_dir", str(tmp_path / "loop"))
    assert history(tmp_path / "loop") == history(tmp_path / "trainer")
    results = untimed(read(tmp_path / "loop" / "eval_results.json"))
    assert results == untimed(read(tmp_path / "trainer" / "eval_results.json"))
    assert "eval_pearson" in results


def test_a_trained_model_is_evaluated_without_training(tmp_path: Path, files: tuple[str, ...]) -> None:
    run(*files, *SHARED, "--max_steps", "2", "--output_dir", str(tmp_path / "out"))
    flags = ("--model_name_or_path", str(tmp_path / "out"), *files[6:], "--do_eval")
    run(*flags, "--per_device_eval_batch_size", "5", "--output_dir", str(tmp_path / "later"))
    trained, later = (read(tmp_path / name / "eval_results.json") for name in ("out", "later"))
    assert later["eval_loss"] == trained["eval_loss"]
    assert not (tmp_path / "later" / "model.safetensors").exists()
    assert not (tmp_path / "later" / "README.md").exists()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optim", "adamw_torch", "--adam_beta1", "0.8", "--adam_epsilon", "1e-6"),
        ("--optim", "sgd", "--optim_args", "momentum=0.9,nesterov=true"),
        ("--optim", "adam3", "--adam_beta2", "0.99"),
        ("--optim", "adafactor"),
        ("--optim", "rmsprop", "--optim_args", "alpha=0.9"),
    ],
)
def test_the_optimizer_is_the_trainers(tmp_path: Path, flags: tuple[str, ...]) -> None:
    words = [*flags, "--learning_rate", "3e-4", "--weight_decay", "0.1", "--output_dir", str(tmp_path), "--use_cpu"]
    model = tiny_models.bert()
    model.bert.embeddings.requires_grad_(False)
    (theirs,) = ScriptParser(XGradTrainingArguments, prog="", description="").parse(words)
    (ours,) = ScriptParser(LoopArguments, prog="", description="").parse(words)
    expected: Any = XGradTrainer(model=model, args=theirs).create_optimizer()
    made: Any = make_optimizer(model, ours)
    assert type(made) is type(expected)
    for group, wanted in zip(made.param_groups, expected.param_groups, strict=True):
        assert [id(weight) for weight in group.pop("params")] == [id(weight) for weight in wanted.pop("params")]
        assert group == wanted
    assert {group["weight_decay"] for group in made.param_groups} == {0.1, 0.0}


def test_flags_have_the_trainers_defaults() -> None:
    theirs = XGradTrainingArguments.__dataclass_fields__
    ours = LoopArguments(output_dir="out")
    # None stands for False or for nothing in these of the Trainer's.
    vague = {"output_dir", "gradient_checkpointing", "disable_tqdm", "report_to"}
    assert vars(ours).keys() <= theirs.keys()
    for name in vars(ours).keys() - vague - {"eval_steps"}:
        assert getattr(ours, name) == theirs[name].default, name
    assert ours.eval_steps == ours.logging_steps
    assert not ours.do_eval
    assert LoopArguments(eval_strategy="epoch").do_eval
    assert LoopArguments(eval_on_start=True).do_eval


# Stopping and resuming


def stop_at(call: int) -> Callable[[WeightPredictor], Any]:
    """Return a `predicted` that is interrupted when it is called for the so many-th time."""
    original, calls = WeightPredictor.predicted, iter(range(1, call + 1))

    def predicted(self: WeightPredictor) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(self)

    return predicted


@pytest.mark.parametrize("save_steps", [2, 3], ids=["in an epoch", "at its end"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adagrad"], ids=["closed_form", "last_update"])
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path,
    files: tuple[str, ...],
    optim: str,
    save_steps: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Three steps an epoch, of 4, 4 and 2 batches; stopped in the sixth, at its second batch.
    common = (*files, *SHARED, "--gradient_accumulation_steps", "4", "--max_steps", "8", "--optim", optim,
              "--xgrad_steps", "1", "--save_steps", str(save_steps), "--eval_strategy", "steps",
              "--eval_steps", "2")  # fmt: skip
    run(*common, "--output_dir", str(tmp_path / "whole"))
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(WeightPredictor, "predicted", stop_at(10 + 4 + 4 + 2))
        run(*common, "--output_dir", str(parts), status=130)
    last = 5 // save_steps * save_steps
    kept = sorted(path.name for path in parts.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{step}" for step in range(save_steps, 6, save_steps)]
    # A checkpoint that was cut off while it was written: without its state, which comes last.
    (parts / "checkpoint-5").mkdir(exist_ok=True)
    run(*common, "--output_dir", str(parts))
    assert f"Resuming from {parts / f'checkpoint-{last}'} (step {last} of 8)" in caplog.text
    assert same_weights(parts, tmp_path / "whole")
    whole, resumed = history(tmp_path / "whole"), history(parts)
    assert resumed[:-2] == whole[:-2]
    assert resumed[-2]["train_loss"] != whole[-2]["train_loss"]  # that of the last part
    assert read(parts / "train_results.json")["train_resumed_at_step"] == last
    evaluated = [untimed(read(folder / "eval_results.json")) for folder in (parts, tmp_path / "whole")]
    assert evaluated[0] == evaluated[1]


def test_what_is_remembered_of_the_last_update_can_be_read_safely(tmp_path: Path, files: tuple[str, ...]) -> None:
    flags = ("--xgrad_rule", "last_update", "--max_steps", "2", "--output_dir", str(tmp_path))
    run(*files, *SHARED, *flags)
    state = torch.load(tmp_path / "checkpoint-2" / "custom_checkpoint_1.pkl", weights_only=True)
    assert state["holds"] == "previous"


def test_a_complete_run_is_only_evaluated_again(
    tmp_path: Path, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Eleven steps: the last one stands in the middle of the second epoch.
    common = (*files, *SHARED, "--max_steps", "11", "--save_steps", "4", "--output_dir", str(tmp_path / "out"))
    run(*common)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.name != "eval_results.json"
              and path.is_file()}  # fmt: skip
    evaluated = untimed(read(tmp_path / "out" / "eval_results.json"))
    with monkeypatch.context() as patch:
        patch.setattr(WeightPredictor, "predicted", lambda _: pytest.fail("trained"))
        run(*common)
    assert "Training is complete" in caplog.text
    assert untimed(read(tmp_path / "out" / "eval_results.json")) == evaluated
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed <= {"all_results.json", "README.md"}  # the time that the evaluation took
    run(*common, "--max_steps", "12")  # more steps than before: the run goes on
    assert "(step 11 of 12)" in caplog.text


def test_the_newest_checkpoints_are_kept(tmp_path: Path, files: tuple[str, ...]) -> None:
    flags = ("--max_steps", "11", "--save_steps", "3", "--save_total_limit", "2", "--output_dir", str(tmp_path))
    run(*files, *SHARED, *flags)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-11"}


def test_neither_takes_up_the_others_checkpoints(
    tmp_path: Path, files: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*files, *SHARED, "--max_steps", "2", "--save_steps", "1", *QUIET)
    for name, script, other in (
        ("trainer", run_glue, run_glue_no_trainer),
        ("loop", run_glue_no_trainer, run_glue),
    ):
        out = str(tmp_path / name)
        assert script.main([*common, "--output_dir", out]) == 0
        given = ["--output_dir", str(tmp_path / f"{name}2"), "--resume_from_checkpoint", f"{out}/checkpoint-1"]
        for flags in (["--output_dir", out], given):
            capsys.readouterr()
            assert other.main([*common, *flags]) == 2
            assert "was written by a script with" in capsys.readouterr().err


# Beside the training


def test_the_baseline_is_the_trainers_and_is_shown_beside(
    tmp_path: Path, files: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*files, *SHARED, "--max_steps", "6", "--baseline")
    run(*common, "--output_dir", str(tmp_path / "trainer"), script=run_glue)
    run(*common, "--output_dir", str(tmp_path / "loop"))
    assert read(tmp_path / "loop" / "comparison.json") == read(tmp_path / "trainer" / "comparison.json")
    assert same_weights(tmp_path / "loop-baseline", tmp_path / "trainer-baseline")
    assert not same_weights(tmp_path / "loop-baseline", tmp_path / "loop")
    assert "baseline" in capsys.readouterr().out


@pytest.mark.parametrize("name", [None, "team/model"])
def test_everything_is_written_before_the_one_push(
    tmp_path: Path, files: tuple[str, ...], name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Any]] = []

    def create(repo_id: str, **settings: Any) -> SimpleNamespace:
        if not done:
            assert not (tmp_path / "out" / "trainer_state.json").exists()
        done.append((repo_id, settings))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload(*, repo_id: str, folder_path: Path, ignore_patterns: list[str], **_: Any) -> SimpleNamespace:
        done.append((repo_id, {path.name for path in folder_path.iterdir()}))
        assert "checkpoint-*" in ignore_patterns
        return SimpleNamespace(repo_url="there")

    tokens = with_hub(monkeypatch, create_repo=create, upload_folder=upload)
    named = () if name is None else ("--hub_model_id", name)
    run(*files, *SHARED, "--max_steps", "2", "--do_predict", "--test_file", files[-1], "--baseline", "--push_to_hub",
        *named, "--hub_token", "secret", "--hub_private_repo", "true",
        "--output_dir", str(tmp_path / "out"))  # fmt: skip
    *created, pushed = done
    settings = {"private": True, "exist_ok": True}
    # Before the training, and for the push.
    assert created == [(name or "out", settings), (name or "me/out", settings)]
    assert tokens == ["secret", "secret"]
    assert pushed[0] == (name or "me/out")
    kinds = ("all", "train", "eval")
    wanted = {"README.md", "model.safetensors", "predict_results.tsv", *(f"{kind}_results.json" for kind in kinds)}
    assert wanted <= pushed[1]
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_hub_that_refuses_is_one_line_before_any_training(
    tmp_path: Path, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no token\nanywhere")

    with_hub(monkeypatch, create_repo=refuse)
    monkeypatch.setattr(run_glue_no_trainer, "train", lambda *_, **__: pytest.fail("trained"))
    flags = [*files, *SHARED, "--push_to_hub", "--output_dir", str(tmp_path / "out"), *QUIET]
    assert run_glue_no_trainer.main(flags) == 2
    assert "error: --push_to_hub: cannot make out: no token anywhere" in capsys.readouterr().err


@pytest.mark.parametrize(("base", "named"), [("team/model", "team/model"), ("here", None), (None, None)])
def test_the_card(tmp_path: Path, base: str | None, named: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "eval_results.json").write_text('{"eval_accuracy": 0.75, "eval_runtime": 2.0, "epoch": 3.0}')
    write_json(tmp_path / "trainer_state.json", {"log_history": [{"step": 1, "loss": 0.5, "xgrad/cosine": 0.25}]})
    args = LoopArguments(output_dir=str(tmp_path), do_train=True, xgrad_steps=2.0)
    card = {"tasks": "text-classification", "tags": ["xgrad"], "dataset": "GLUE MRPC", "dataset_tags": "nyu-mll/glue"}
    model = tiny_models.bert()
    model.config._name_or_path = base or ""
    loop_results.write_card(args, model, None, base, card)
    written = ModelCard.load(tmp_path / "README.md")
    assert written.data.base_model == named
    assert written.data.pipeline_tag == "text-classification"
    assert written.data.library_name == "transformers"
    assert (written.data.datasets, written.data.tags) == (["nyu-mll/glue"], [*TAGS])
    (result,) = written.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.75, "nyu-mll/glue")
    assert written.data.license is None
    for line in ("- Accuracy: 0.75", "- learning_rate: 5e-05", "ahead, s | 2 |", "closed form of AdamW |"):
        assert line in written.text
    origin = {
        "team/model": "is a fine-tuned version of [team/model](https://huggingface.co/team/model)",
        "here": "was fine-tuned from a model that is not on the Hub,",
        None: "was trained from scratch",
    }[base]
    assert f"This model {origin} on the GLUE MRPC dataset." in written.text
    assert "here](" not in written.text
    assert f'BertForSequenceClassification.from_pretrained("{tmp_path.name}")' in written.text


def test_trackers_get_settings_and_log(
    tmp_path: Path, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    class FakeTracker(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True

        def __init__(self, run_name: str, logging_dir: Any, **_: Any) -> None:
            super().__init__()
            told.append((run_name, Path(logging_dir)))

        @property
        def tracker(self) -> None:
            return None

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            told.append(values)

        @on_main_process
        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            told.append((step, values))

        @on_main_process
        def finish(self) -> None:
            told.append("finished")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", FakeTracker)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    tracking = ("--report_to", "tensorboard", "--project", "ours", "--hub_token", "secret")
    run(*files, *SHARED, "--max_steps", "2", *tracking, "--output_dir", str(tmp_path))
    (name, folder), settings, *logged, last = told
    assert (name, folder) == ("ours", tmp_path / "runs")
    assert settings["learning_rate"] == 1e-2
    assert "secret" not in str(settings)
    # The last evaluation comes after the training, which has ended what trackers get.
    *entries, evaluated = read(tmp_path / "trainer_state.json")["log_history"]
    assert "eval_loss" in evaluated
    assert [step for step, _ in logged] == [entry["step"] for entry in entries] == [1, 2, 2]
    assert [values.get("train/loss") for _, values in logged] == [entry.get("loss") for entry in entries]
    assert last == "finished"


# What cannot be run

FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "flag of the Trainer only": (("--torch_compile",), "unknown argument --torch_compile"),
    "optimizer": (("--optim", "lomo"), "invalid choice: 'lomo'"),
    "optimizer's setting": (("--optim", "adam3", "--optim_args", "speed=2"), "--optim adam3: optim_args='speed=2'"),
    "betas": (("--adam_beta1", "1.5"), "--optim adamw_torch_fused: Invalid beta"),
    "closed form": (("--xgrad_rule", "closed_form", "--optim", "adagrad"), "closed_form"),
    "rule": (("--xgrad_rule", "guess"), "xgrad_rule='guess'"),
    "steps ahead": (("--xgrad_steps", "-1"), "error: xgrad_steps='-1': must be a number"),
    "schedule": (("--lr_scheduler_type", "reduce_lr_on_plateau"), "invalid choice: 'reduce_lr_on_plateau'"),
    "schedule's setting": (
        ("--lr_scheduler_type", "cosine_with_min_lr"),
        "--lr_scheduler_type cosine_with_min_lr: ",
    ),
    "JSON": (("--lr_scheduler_kwargs", "{min_lr"), "--lr_scheduler_kwargs '{min_lr' is not JSON"),
    "batch size": (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size must be 1 or more, not 0"),
    "accumulation": (("--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps must be 1 or more"),
    "learning rate": (("--learning_rate", "-1"), "--learning_rate must be a number from 0, not -1.0"),
    "epochs": (("--max_steps", "-1", "--num_train_epochs", "0"), "--num_train_epochs must be more than 0"),
    "interval": (("--save_steps", "2.5"), "--save_steps must be a number of steps, or a share"),
    "two precisions": (("--fp16", "--bf16"), "--fp16 and --bf16 exclude each other"),
    "fp16 on a CPU": (("--fp16",), "--fp16 does nothing on a CPU"),
    "tracker": (("--report_to", "papertrail"), "--report_to papertrail: not installed, or not known"),
    "nothing to do": (("--do_train", "false", "--do_eval", "false"), "nothing to do"),
    "baseline of nothing": (("--baseline", "--no_xgrad"), "--baseline runs with XGrad on and off"),
    "checkpoint": (("--resume_from_checkpoint", "nowhere"), "--resume_from_checkpoint nowhere is not a checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_input_is_one_line_before_any_training(
    tmp_path: Path,
    files: tuple[str, ...],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_glue_no_trainer, "train", lambda *_, **__: pytest.fail("trained"))
    flags, named = FAULTS[fault]
    words = [*files, *SHARED, "--max_steps", "2", "--output_dir", str(tmp_path / "out"), *QUIET, *flags]
    assert run_glue_no_trainer.main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("hf-xgrad glue-loop: error: ")
    assert named in errors[0]


def test_other_engines_than_ddp_are_refused(
    tmp_path: Path, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    assert run_glue_no_trainer.main([*files, *SHARED, "--output_dir", str(tmp_path / "out"), *QUIET]) == 2
    assert "under DDP, not under FSDP" in capsys.readouterr().err


# Devices and processes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["--fp16", "--bf16"])
def test_mixed_precision_on_a_gpu_as_under_the_trainer(tmp_path: Path, files: tuple[str, ...], precision: str) -> None:
    """A GradScaler skips the first steps of fp16, which it starts with too large a scale."""
    common = (*files, *SHARED, precision, "--gradient_accumulation_steps", "4", "--num_train_epochs", "3",
              "--use_cpu", "false")  # fmt: skip
    for name, script in (("trainer", run_glue), ("loop", run_glue_no_trainer)):
        assert script.main([*QUIET, *common, "--output_dir", str(tmp_path / name)]) == 0
    ours, theirs = (read(tmp_path / name / "trainer_state.json")["log_history"] for name in ("loop", "trainer"))
    assert len(ours) == len(theirs) == 10
    for our, their in zip(ours[:-1], theirs[:-1], strict=True):
        assert our["loss"] == pytest.approx(their["loss"], abs=1e-5)
        assert our["learning_rate"] == their["learning_rate"]


def launch(script: ModuleType, *flags: str) -> None:
    paths = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*launcher, "-m", script.__name__, *flags, *QUIET], env=os.environ | paths, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_two_processes_are_those_of_the_trainer_and_resume(tmp_path: Path, files: tuple[str, ...]) -> None:
    common = (*files, *SHARED, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4",
              "--xgrad_rule", "last_update", "--xgrad_steps", "1", "--max_steps", "8", "--save_steps", "4",
              "--do_predict", "--test_file", files[-1], "--eval_strategy", "steps", "--eval_steps", "3")  # fmt: skip
    for name, module in (("trainer", run_glue), ("loop", run_glue_no_trainer)):
        launch(module, *common, "--output_dir", str(tmp_path / name))
    checkpoint = ("--resume_from_checkpoint", str(tmp_path / "loop" / "checkpoint-4"))
    launch(run_glue_no_trainer, *common, *checkpoint, "--output_dir", str(tmp_path / "resumed"))
    assert history(tmp_path / "loop") == history(tmp_path / "trainer")
    assert history(tmp_path / "resumed")[:-2] == history(tmp_path / "loop")[:-2]
    for name in ("trainer", "resumed"):
        assert same_weights(tmp_path / "loop", tmp_path / name)
        kinds = ("predict_results.tsv", "config.json")
        assert all((tmp_path / "loop" / kind).read_bytes() == (tmp_path / name / kind).read_bytes() for kind in kinds)
        evaluated = [untimed(read(tmp_path / each / "eval_results.json")) for each in ("loop", name)]
        assert evaluated[0] == evaluated[1]
