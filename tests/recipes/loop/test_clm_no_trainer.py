"""run_clm_no_trainer.py, the twin of run_clm.py: whole runs of a tiny model in this process."""

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from hf_xgrad import WeightPredictor
from hf_xgrad.recipes.language import clm as run_clm
from hf_xgrad.recipes.language import modeling as language_modeling
from hf_xgrad.recipes.loop import clm as run_clm_no_trainer
from run_files import history, read, same_weights, untimed, write_texts

# Dropout is GPT-2's own, 0.1. 37 blocks in batches of 2: the last batch of an epoch has half as many tokens as others.
MODEL = ("--model_type", "gpt2", "--config_overrides", "n_embd=16,n_layer=1,n_head=2,n_positions=16",
         "--new_tokenizer_size", "270", "--block_size", "13")  # fmt: skip
SHARED = (*MODEL, "--do_train", "--do_eval", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "5",
          "--max_train_samples", "37", "--learning_rate", "1e-2", "--weight_decay", "0.1",
          "--logging_steps", "1")  # fmt: skip
QUIET = ("--disable_tqdm", "true", "--use_cpu", "--dataloader_pin_memory", "false")


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the flags that name training and validation texts."""
    return write_texts(tmp_path_factory.mktemp("texts"))


def run(*flags: str, status: int = 0, script: Any = run_clm_no_trainer) -> None:
    assert script.main([*flags, *QUIET]) == status


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "flags",
    [
        ("--xgrad_rule", "closed_form"),
        ("--xgrad_rule", "last_update", "--xgrad_steps", "1"),
        ("--no_xgrad",),
        ("--bf16", "--optim", "adam3"),
    ],
    ids=["closed_form", "last_update", "off", "bf16"],
)
def test_losses_weights_and_scores_are_those_of_the_trainer(
    tmp_path: Path, texts: tuple[str, ...], accumulation: int, flags: tuple[str, ...]
) -> None:
    common = (*SHARED, *texts, *flags, "--gradient_accumulation_steps", str(accumulation), "--num_train_epochs", "2",
              "--eval_strategy", "epoch", "--eval_on_start")  # fmt: skip
    run(*common, "--output_dir", str(tmp_path / "trainer"), script=run_clm)
    run(*common, "--output_dir", str(tmp_path / "loop"))
    ours = history(tmp_path / "loop")
    assert ours == history(tmp_path / "trainer")
    assert read(tmp_path / "loop" / "train_results.json")["train_samples"] == 37
    # With accumulation the last window of an epoch is a short one: 19 batches.
    assert sum("loss" in entry for entry in ours) == 2 * math.ceil(19 / accumulation)
    assert any(entry.get("xgrad/active") for entry in ours) == ("--no_xgrad" not in flags)
    assert same_weights(tmp_path / "loop", tmp_path / "trainer")
    for kind in ("train", "eval"):
        name = f"{kind}_results.json"
        assert untimed(read(tmp_path / "loop" / name)) == untimed(read(tmp_path / "trainer" / name))
    assert (tmp_path / "loop" / "config.json").read_bytes() == (tmp_path / "trainer" / "config.json").read_bytes()


def test_adapters_and_gradient_checkpointing_as_under_the_trainer(tmp_path: Path, texts: tuple[str, ...]) -> None:
    stored = str(tmp_path / "stored")
    run(*SHARED, *texts, "--max_steps", "1", "--output_dir", stored)
    flags = [flag for flag in SHARED if flag not in MODEL]
    common = (*flags, *texts, "--model_name_or_path", stored, "--block_size", "13", "--lora", "--lora_dropout", "0.1",
              "--gradient_checkpointing", "--max_steps", "5", "--gradient_accumulation_steps", "4")  # fmt: skip
    run(*common, "--output_dir", str(tmp_path / "trainer"), script=run_clm)
    run(*common, "--output_dir", str(tmp_path / "loop"))
    assert history(tmp_path / "loop") == history(tmp_path / "trainer")
    assert same_weights(tmp_path / "loop", tmp_path / "trainer", "adapter_model.safetensors")
    assert not (tmp_path / "loop" / "model.safetensors").exists()
    assert ModelCard.load(tmp_path / "loop" / "README.md").data.library_name == "peft"


@pytest.mark.parametrize("rule", ["closed_form", "last_update"])
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, texts: tuple[str, ...], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = (*SHARED, *texts, "--xgrad_rule", rule, "--xgrad_steps", "1", "--gradient_accumulation_steps", "4",
              "--max_steps", "6", "--save_steps", "2", "--eval_on_start")  # fmt: skip
    run(*common, "--output_dir", str(tmp_path / "whole"))
    original, calls = WeightPredictor.predicted, iter(range(1000))

    def predicted(self: WeightPredictor) -> Any:
        if next(calls) == 4 * 2 + 1:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(WeightPredictor, "predicted", predicted)
        run(*common, "--output_dir", str(tmp_path / "parts"), status=130)
    run(*common, "--output_dir", str(tmp_path / "parts"))
    assert same_weights(tmp_path / "parts", tmp_path / "whole")
    assert history(tmp_path / "parts")[:-2] == history(tmp_path / "whole")[:-2]
    assert read(tmp_path / "parts" / "train_results.json")["train_resumed_at_step"] == 2


def test_the_baseline_and_a_sample_are_the_trainers(
    tmp_path: Path, texts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    common = (*SHARED, *texts, "--max_steps", "4", "--baseline", "--sample_length", "5", "--sample_prompt", "the dog")
    run(*common, "--output_dir", str(tmp_path / "trainer"), script=run_clm)
    run(*common, "--output_dir", str(tmp_path / "loop"))
    assert read(tmp_path / "loop" / "comparison.json") == read(tmp_path / "trainer" / "comparison.json")
    sample = (tmp_path / "loop" / "sample.txt").read_text()
    assert sample.startswith("the dog")
    assert sample == (tmp_path / "trainer" / "sample.txt").read_text()
    assert sample in capsys.readouterr().out


def test_a_trained_model_is_evaluated_without_training(tmp_path: Path, texts: tuple[str, ...]) -> None:
    run(*SHARED, *texts, "--max_steps", "2", "--output_dir", str(tmp_path / "out"))
    flags = ("--model_name_or_path", str(tmp_path / "out"), *texts[2:], "--block_size", "13", "--do_eval")
    run(*flags, "--output_dir", str(tmp_path / "later"))
    trained, later = (read(tmp_path / name / "eval_results.json") for name in ("out", "later"))
    # Without a short last batch or with one: each token counts the same.
    assert later["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)
    assert later["eval_tokens"] == trained["eval_tokens"]


def test_without_any_flags_the_settings_are_the_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def prepare(*arguments: Any) -> None:
        asked.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_modeling, "prepare", prepare)
    run("--seed", "3", status=130)
    _, model_args, data_args, args = asked[0]
    settings = vars(model_args) | vars(data_args) | vars(args)
    changed = {"output_dir": "outputs/clm_no_trainer", "dataloader_pin_memory": False}
    for name, value in (run_clm.EMBEDDED | changed).items():
        if name in settings:
            assert settings[name] == value, name
    assert (args.seed, args.use_cpu) == (3, True)


FAULTS = {
    "nothing to do": (("--do_train", "false", "--do_eval", "false"), "nothing to do"),
    "stream": (("--streaming", "--max_steps", "2"), "--streaming is not for this loop"),
    "flag of the Trainer only": (("--include_num_input_tokens_seen", "all"), "unknown argument --include_num_input"),
    "no model": (("--model_type", "gpt9"), "gpt9"),
    "optimizer": (("--optim", "schedule_free_adamw"), "invalid choice: 'schedule_free_adamw'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_input_is_one_line_before_any_training(
    tmp_path: Path,
    texts: tuple[str, ...],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_clm_no_trainer, "train", lambda *_, **__: pytest.fail("trained"))
    flags, named = FAULTS[fault]
    words = [*SHARED, *texts, "--output_dir", str(tmp_path / "out"), *QUIET, *flags]
    assert run_clm_no_trainer.main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("hf-xgrad clm-loop: error: ")
    assert named in errors[0]
