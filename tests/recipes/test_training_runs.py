"""How runs are planned and finished, with the Trainer and without it: tiny language models, in this process or two."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from huggingface_hub.errors import HTTPError

from hf_xgrad.outputs import hub
from hf_xgrad.recipes.language import clm as run_clm
from hf_xgrad.recipes.language import modeling as language_modeling
from hf_xgrad.recipes.loop import clm as run_clm_no_trainer
from hf_xgrad.recipes.results import write_json
from run_files import history, read, same_weights, with_hub, write_texts

MODEL = ("--model_type", "gpt2", "--new_tokenizer_size", "270", "--block_size", "13", "--config_overrides",
         "n_embd=16,n_layer=1,n_head=2,n_positions=16,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0")  # fmt: skip
SHARED = (*MODEL, "--do_train", "--do_eval", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2",
          "--logging_steps", "1", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2")  # fmt: skip
QUIET = ("--disable_tqdm", "true", "--use_cpu", "--dataloader_pin_memory", "false", "--report_to", "none")


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(params=[run_clm, run_clm_no_trainer], ids=["trainer", "loop"])
def script(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the flags that name training and validation texts."""
    return write_texts(tmp_path_factory.mktemp("texts"))


def run(script: Any, *flags: str, status: int = 0) -> None:
    assert script.main([*flags, *QUIET]) == status


def refused(script: Any, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the one line of an error."""
    capsys.readouterr()
    assert script.main([*QUIET, *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    start = f"{script.PROG}: error: "
    assert line.startswith(start)
    return line.removeprefix(start)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Going on


def test_the_checkpoint_that_is_resumed_from_may_be_removed(
    tmp_path: Path, script: ModuleType, texts: tuple[str, ...]
) -> None:
    common = (*SHARED, *texts, "--lr_scheduler_type", "constant")
    run(script, *common, "--max_steps", "4", "--output_dir", str(tmp_path / "whole"))
    out = ("--output_dir", str(tmp_path / "parts"), "--save_total_limit", "1")
    run(script, *common, *out)
    run(script, *common, *out, "--max_steps", "4")
    assert {path.name for path in (tmp_path / "parts").glob("checkpoint-*")} == {"checkpoint-4"}
    assert same_weights(tmp_path / "parts", tmp_path / "whole")
    assert read(tmp_path / "parts" / "train_results.json")["train_resumed_at_step"] == 2


def test_a_run_that_was_killed_at_its_end_gets_its_files(
    tmp_path: Path, script: ModuleType, texts: tuple[str, ...]
) -> None:
    common = (*SHARED, *texts, "--eval_on_start", "--output_dir", str(tmp_path))
    run(script, *common)
    before = history(tmp_path)
    evaluated = read(tmp_path / "eval_results.json")
    for name in ("trainer_state.json", "train_results.json", "eval_results.json", "model.safetensors"):
        (tmp_path / name).unlink()
    run(script, *common)
    # The metrics of the training as a whole went with the process.
    assert history(tmp_path) == [entry for entry in before if "train_loss" not in entry]
    for name in ("eval_loss", "eval_perplexity_at_start"):
        assert read(tmp_path / "eval_results.json")[name] == evaluated[name]


def test_the_last_evaluation_is_in_the_log_once(tmp_path: Path, script: ModuleType, texts: tuple[str, ...]) -> None:
    """So that a picture of the run shows it, also of a run that is started again when it is complete."""
    for _ in range(3):
        run(script, *SHARED, *texts, "--output_dir", str(tmp_path))
        logged = [entry["eval_loss"] for entry in history(tmp_path) if "eval_loss" in entry]
        assert logged == [read(tmp_path / "eval_results.json")["eval_loss"]]


def test_the_card_of_a_run_that_is_only_finished_again_is_the_same(tmp_path: Path, texts: tuple[str, ...]) -> None:
    common = (*SHARED, *texts, "--eval_strategy", "steps", "--eval_steps", "1", "--output_dir", str(tmp_path))
    run(run_clm, *common)
    card = (tmp_path / "README.md").read_text()
    assert "| rule | closed form of AdamW |" in card
    assert "### Training results" in card
    run(run_clm, *common)
    assert (tmp_path / "README.md").read_text() == card


OTHER = {
    "seed": ("1", "42", "1"),
    "data_seed": ("5", "None", "5"),
    "learning_rate": ("5e-2", "0.01", "0.05"),
    "optim": ("adam3", "adamw_torch_fused", "adam3"),
    "optim_args": ("eps=1e-3", "None", "eps=1e-3"),
    "lr_scheduler_type": ("cosine", "linear", "cosine"),
    "weight_decay": ("0.1", "0.0", "0.1"),
    "warmup_steps": ("1", "0", "1.0"),
    "per_device_train_batch_size": ("2", "4", "2"),
    "gradient_accumulation_steps": ("2", "1", "2"),
    "bf16": ("true", "False", "True"),
    "xgrad_steps": ("2", "default", "2.0"),
    "block_size": ("12", "13", "12"),
    "max_train_samples": ("9", "None", "9"),
    "lora_rank": ("4", "8", "4"),
    "config_overrides": ("n_layer=2", MODEL[-1], "n_layer=2"),
}


def test_a_run_is_not_taken_up_as_another_one(
    tmp_path: Path, script: ModuleType, texts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = (*SHARED, *texts, "--output_dir", str(out))
    run(script, *common)
    before = contents(out)
    for name, (given, theirs, ours) in OTHER.items():
        said = refused(script, capsys, *common, f"--{name}={given}")
        assert said.startswith(
            f"--output_dir {out} holds a run with {name}={theirs}, not {ours}; name a new folder"
        ), said
    assert contents(out) == before
    # On purpose.
    checkpoint = ("--resume_from_checkpoint", str(out / "checkpoint-2"))
    run(script, *common, *checkpoint, "--learning_rate", "5e-2", "--max_steps", "3")
    assert read(out / "xgrad_settings.json")["learning_rate"] == 0.05


def test_a_run_may_become_longer_and_tell_more(tmp_path: Path, script: ModuleType, texts: tuple[str, ...]) -> None:
    common = (*SHARED, *texts, "--output_dir", str(tmp_path))
    run(script, *common)
    run(script, *common, "--max_steps", "3", "--logging_steps", "2", "--save_steps", "3", "--eval_strategy", "steps",
        "--eval_steps", "3", "--per_device_eval_batch_size", "2", "--dataloader_num_workers", "1",
        "--max_eval_samples", "5", "--preprocessing_num_workers", "1")  # fmt: skip
    assert read(tmp_path / "trainer_state.json")["global_step"] == 3
    assert read(tmp_path / "train_results.json")["train_resumed_at_step"] == 2


def test_of_an_older_file_what_it_has_is_compared(
    tmp_path: Path, script: ModuleType, texts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*SHARED, *texts, "--xgrad_steps", "1", "--output_dir", str(tmp_path))
    run(script, *common)
    write_json(tmp_path / "xgrad_settings.json", {"xgrad": True, "xgrad_steps": 1.0})
    assert "holds a run with xgrad=True, not False" in refused(script, capsys, *common, "--no_xgrad")
    run(script, *common, "--max_grad_norm", "2")


# Starting


def test_no_process_writes_before_all_have_looked(
    tmp_path: Path, script: ModuleType, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "out", tmp_path / "out-baseline"]
    seen: list[list[Path]] = []

    def prepare(*_: Any) -> None:
        assert seen == [[], []]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialState, "wait_for_everyone", lambda _: seen.extend(list(f.iterdir()) for f in folders))
        # Before data are read.
        patch.setattr(language_modeling, "prepare", prepare)
        run(script, *SHARED, *texts, "--no_resume", "--baseline", "--output_dir", str(folders[0]), status=130)
    # What came to nothing does not stand in the way.
    run(script, *SHARED, *texts, "--no_resume", "--baseline", "--output_dir", str(folders[0]))


def test_settings_alone_are_no_run(tmp_path: Path, script: ModuleType, texts: tuple[str, ...]) -> None:
    write_json(tmp_path / "xgrad_settings.json", {"seed": 1})
    run(script, *SHARED, *texts, "--no_resume", "--output_dir", str(tmp_path))
    assert read(tmp_path / "xgrad_settings.json")["seed"] == 42


def launch(script: Any, *flags: str) -> None:
    paths = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [*launcher, "-m", script.__name__, *flags, *QUIET], env=os.environ | paths, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batches(
    tmp_path: Path, script: ModuleType, texts: tuple[str, ...]
) -> None:
    common = (*SHARED, *texts, "--max_steps", "5", "--no_resume", "--baseline")
    run(script, *common, "--output_dir", str(tmp_path / "one"))
    launch(script, *common, "--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two"))
    for kind in ("", "-baseline"):
        one, two = (read(tmp_path / f"{name}{kind}" / "eval_results.json") for name in ("one", "two"))
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], abs=1e-6)
        losses = [[e["loss"] for e in history(tmp_path / f"{n}{kind}") if "loss" in e] for n in ("one", "two")]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert (tmp_path / "two" / "comparison.json").exists()


# What cannot be run

FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "learning rate": (("--learning_rate", "-1"), "--learning_rate must be a number from 0, not -1.0"),
    "no learning rate": (("--learning_rate", "nan"), "--learning_rate must be a number from 0, not nan"),
    "batch": (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size must be 1 or more, not 0"),
    "evaluation": (("--per_device_eval_batch_size", "0"), "--per_device_eval_batch_size must be 1 or more, not 0"),
    "accumulation": (("--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps must be 1 or more, not 0"),
    "workers": (("--dataloader_num_workers", "-1"), "--dataloader_num_workers must be a number from 0, not -1"),
    "seed": (("--seed", "-1"), "--seed must be a number from 0 to 4294967295, not -1"),
    "data seed": (("--data_seed", "-1"), "--data_seed must be a number from 0 to 4294967295, not -1"),
    "epochs": (("--max_steps", "-1", "--num_train_epochs", "0"), "--num_train_epochs must be more than 0, not 0.0"),
    "betas": (("--adam_beta1", "1.5"), "--optim adamw_torch_fused: Invalid beta"),
    "epsilon": (("--adam_epsilon", "-1"), "--optim adamw_torch_fused: Invalid epsilon"),
    "schedule": (("--lr_scheduler_type", "cosine_with_min_lr"), "--lr_scheduler_type cosine_with_min_lr: "),
    "closed form": (("--xgrad_rule", "closed_form", "--optim", "adagrad"), "--optim adagrad: "),
    "precision": (("--fp16",), "--fp16 does nothing on a CPU: give --bf16"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_numbers_are_one_line_before_anything_is_read(
    tmp_path: Path,
    script: ModuleType,
    texts: tuple[str, ...],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(language_modeling, "prepare", lambda *_: pytest.fail("read"))
    flags, named = FAULTS[fault]
    out = tmp_path / "out"
    assert refused(script, capsys, *SHARED, *texts, "--output_dir", str(out), *flags).startswith(named)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--do_eval", "false", "--eval_on_start"), "--eval_on_start needs data to evaluate on: give --do_eval"),
        (("--use_liger_kernel",), "--use_liger_kernel needs the package liger-kernel"),
    ],
)
def test_what_only_the_trainer_has(
    tmp_path: Path,
    texts: tuple[str, ...],
    flags: tuple[str, ...],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("hf_xgrad.recipes.runs.is_liger_kernel_available", lambda: False)
    assert refused(run_clm, capsys, *SHARED, *texts, "--output_dir", str(tmp_path), *flags).startswith(named)


def test_schedules_and_optimizers_of_the_trainer_alone_are_not_refused(
    tmp_path: Path, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*SHARED, *texts, "--eval_strategy", "steps", "--eval_steps", "1")
    run(run_clm, *common, "--lr_scheduler_type", "reduce_lr_on_plateau", "--output_dir", str(tmp_path / "a"))
    run(run_clm, *common, "--optim", "rmsprop", "--fp16_full_eval", "--output_dir", str(tmp_path / "b"))
    assert torch.isfinite(torch.tensor(read(tmp_path / "a" / "eval_results.json")["eval_loss"]))


# Pushing


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--do_eval", "--push_to_hub"), "--push_to_hub pushes what is trained: give --do_train"),
        (("--do_train", "--baseline", "--xgrad_steps", "0"), "it excludes --xgrad_steps 0"),
    ],
)
def test_what_makes_no_sense_together(
    tmp_path: Path,
    script: ModuleType,
    texts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    said: str,
) -> None:
    assert said in refused(script, capsys, *MODEL, *texts, *flags, "--output_dir", str(tmp_path / "out"))


def test_the_code_of_a_card_loads_from_where_the_model_is_pushed(
    tmp_path: Path, script: ModuleType, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_hub(monkeypatch, upload_folder=lambda **_: SimpleNamespace(repo_url="there"))
    run(script, *SHARED, *texts, "--output_dir", str(tmp_path / "out"))
    assert '.from_pretrained("out")' in (tmp_path / "out" / "README.md").read_text()
    assert "fine-tuned" not in (tmp_path / "out" / "README.md").read_text()
    hub.push(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count('.from_pretrained("me/out")') == 2
    assert '.from_pretrained("out")' not in card


@pytest.mark.parametrize("error", [OSError, HTTPError])
def test_a_push_that_fails_costs_nothing_else(
    tmp_path: Path,
    script: ModuleType,
    texts: tuple[str, ...],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def upload(**_: Any) -> None:
        raise error("no\nroute")

    with_hub(monkeypatch, upload_folder=upload)
    out = tmp_path / "out"
    said = refused(script, capsys, *SHARED, *texts, "--baseline", "--push_to_hub", "--output_dir", str(out))
    named = " --hub_model_id me/out" if script is run_clm_no_trainer else ""
    assert said == (
        f"--push_to_hub: {out} is complete but not pushed (no route); to push it: hf-xgrad push {out}{named}"
    )
    for folder in (out, tmp_path / "out-baseline"):
        assert {"README.md", "model.safetensors", "eval_results.json"} <= {path.name for path in folder.iterdir()}
    compared = read(out / "comparison.json")["metrics"]
    for column, folder in (("xgrad", out), ("baseline", tmp_path / "out-baseline")):
        assert compared["eval_loss"][column] == read(folder / "eval_results.json")["eval_loss"]
        assert compared["train_loss"][column] == read(folder / "train_results.json")["train_loss"]


@pytest.mark.parametrize("error", [OSError, HTTPError])
def test_a_hub_out_of_reach_is_said_before_any_training(
    tmp_path: Path,
    script: ModuleType,
    texts: tuple[str, ...],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def create(*_: Any, **__: Any) -> None:
        raise error("offline\nhere")

    with_hub(monkeypatch, create_repo=create)
    for module in (language_modeling, run_clm_no_trainer):
        monkeypatch.setattr(module, "train", lambda *_, **__: pytest.fail("trained"))
    assert "offline here" in refused(script, capsys, *SHARED, *texts, "--push_to_hub", "--output_dir", str(tmp_path))
