"""Models, tokenizers and runs that do not fit each other, under the Trainer and in the loop alike."""

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, GPT2Config, PreTrainedConfig, PreTrainedTokenizerFast, RobertaConfig

from hf_xgrad import XGradTrainer
from hf_xgrad.recipes.classification import glue as run_glue
from hf_xgrad.recipes.language.tokenizer import train_tokenizer
from hf_xgrad.recipes.loop import glue as run_glue_no_trainer
from hf_xgrad.recipes.loop import training
from run_files import history, read, same_weights

WORDS = ("good", "bad", "fine", "poor")
ROWS = [{"text": f"{WORDS[n % 4]} " * (1 + n % 3), "label": "ab"[n % 2]} for n in range(12)]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
POSITIONS = 12

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(params=[run_glue, run_glue_no_trainer], ids=["trainer", "loop"])
def script(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing to a text, states no limit and has no padding token of its own."""
    made = train_tokenizer([" ".join(WORDS)] * 2, 270, masked=False, model_max_length=10**30)
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token=made.eos_token)


def gpt2(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> GPT2Config:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    return GPT2Config(**{**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **settings})


def stored(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return the flags that name a new model."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ("--config_name", str(folder), "--tokenizer_name", str(folder))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flags(data: str, out: Path, *more: str) -> list[str]:
    settings = ("--disable_tqdm", "true", "--use_cpu", "--report_to", "none", "--logging_steps", "1", "--max_steps",
                "2", "--per_device_train_batch_size", "4", "--learning_rate", "0.01")  # fmt: skip
    return ["--train_file", data, "--validation_file", data, "--output_dir", str(out), *settings, *more]


def run(script: ModuleType, model: tuple[str, ...], data: str, out: Path, *more: str) -> dict[str, Any]:
    """Train and evaluate, unless `more` says otherwise, and return the results of the evaluation."""
    assert script.main([*model, *flags(data, out, "--do_train", "--do_eval"), *more]) == 0
    return read(out / "eval_results.json")


def evaluated(script: ModuleType, model: Path, data: str, out: Path, batch: int) -> float:
    named = ("--model_name_or_path", str(model), "--do_eval", "--per_device_eval_batch_size", str(batch))
    assert script.main([*named, *flags(data, out)]) == 0
    return float(read(out / "eval_results.json")["eval_loss"])


def refused(
    script: ModuleType,
    model: tuple[str, ...],
    data: str,
    out: Path,
    *more: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Return the one line of an error that comes before any training."""
    with monkeypatch.context() as patch:
        patch.setattr(XGradTrainer, "training_step", lambda *_, **__: pytest.fail("trained"))
        patch.setattr(training.WeightPredictor, "predicted", lambda *_: pytest.fail("trained"))
        capsys.readouterr()
        assert script.main([*model, *flags(data, out, "--do_train", "--do_eval"), *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    return line


# Models and tokenizers


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_texts_are_cut_off_at_what_the_model_takes(
    tmp_path: Path, script: ModuleType, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level()
    # RoBERTa's positions begin behind the number of its padding token: here, at 4.
    roberta = RobertaConfig(vocab_size=270, max_position_embeddings=POSITIONS + 4, pad_token_id=3, **TINY)
    model = stored(tmp_path / "model", gpt2(tokenizer) if kind == "gpt2" else roberta, tokenizer)
    data = write(tmp_path / "data.jsonl", [{**row, "text": row["text"] * 30} for row in ROWS])
    caplog.set_level(logging.WARNING)
    run(script, model, data, tmp_path / "out")
    assert f"--max_seq_length 128 is more than the model takes; using {POSITIONS}" in caplog.text


def test_no_room_for_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, 270, masked=True, model_max_length=10**30)
    model = stored(tmp_path / "model", BertConfig(vocab_size=270, max_position_embeddings=8, **TINY), tokenizer)
    data = write(tmp_path / "data.jsonl", ROWS)
    said = refused(run_glue, model, data, tmp_path / "out", "--max_seq_length", "2",
                   capsys=capsys, monkeypatch=monkeypatch)  # fmt: skip
    assert "--max_seq_length 2 has no room for a text beside 2 special tokens" in said


def test_there_is_room_for_every_token(tmp_path: Path, script: ModuleType) -> None:
    tokenizer = byte_level()
    config = gpt2(tokenizer)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    data = write(tmp_path / "data.jsonl", ROWS)
    run(script, stored(tmp_path / "model", config, tokenizer), data, tmp_path / "out")
    config = PreTrainedConfig.from_pretrained(tmp_path / "out")
    assert (config.vocab_size, config.pad_token_id) == (known + 1, known)
    by_one, by_eight = (evaluated(script, tmp_path / "out", data, tmp_path / f"e{n}", n) for n in (1, 8))
    assert by_one == pytest.approx(by_eight, abs=1e-5)


def test_the_padding_token_is_the_tokenizers(tmp_path: Path) -> None:
    """Whichever the configuration names: the evaluation does not depend on the batches, and the loop is the twin."""
    tokenizer = byte_level()
    model = stored(tmp_path / "model", gpt2(tokenizer, pad_token_id=7), tokenizer)
    data = write(tmp_path / "data.jsonl", ROWS)
    ours = {}
    for script in (run_glue, run_glue_no_trainer):
        out = tmp_path / script.__name__
        ours[script] = run(script, model, data, out)["eval_loss"]
        assert read(out / "config.json")["pad_token_id"] == tokenizer.eos_token_id
        by_one, by_eight = (evaluated(script, out, data, tmp_path / f"e{n}", n) for n in (1, 8))
        assert by_one == pytest.approx(by_eight, abs=1e-5)
    assert ours[run_glue] == pytest.approx(ours[run_glue_no_trainer], abs=1e-5)


@pytest.mark.parametrize("padding", [(), ("--pad_to_max_length",)], ids=["longest", "all"])
def test_an_empty_text_is_read_as_a_blank(tmp_path: Path, script: ModuleType, padding: tuple[str, ...]) -> None:
    tokenizer = byte_level()
    model = stored(tmp_path / "model", gpt2(tokenizer), tokenizer)
    rows = [*ROWS[:6], {"text": "", "label": "a"}, {"text": "", "label": "b"}]
    empty = run(script, model, write(tmp_path / "empty.jsonl", rows), tmp_path / "empty", *padding)
    rows = [{**row, "text": row["text"] or " "} for row in rows]
    blank = run(script, model, write(tmp_path / "blank.jsonl", rows), tmp_path / "blank", *padding)
    assert empty["eval_loss"] == blank["eval_loss"]
    assert same_weights(tmp_path / "empty", tmp_path / "blank")


def test_an_empty_text_that_makes_no_token_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(("[PAD]", *WORDS))}, "[PAD]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[PAD]")
    model = stored(tmp_path / "model", gpt2(tokenizer), tokenizer)
    data = write(tmp_path / "data.jsonl", [*ROWS[:5], {"text": " ", "label": "a"}])
    said = refused(run_glue, model, data, tmp_path / "out", capsys=capsys, monkeypatch=monkeypatch)
    assert "row 6 of train is empty to the tokenizer" in said


# Runs

OTHERS = {
    "one more": ("abc", "was trained for a, b, but the data have a, b, c now"),
    "another name": ("az", "was trained for a, b, but the data have a, z now"),
    "scores": ((0.5, 1.5), "was trained for a, b, but the data have a score now"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_head_is_not_taken_for_one_of_other_classes(
    tmp_path: Path,
    script: ModuleType,
    other: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = stored(tmp_path / "model", gpt2(byte_level()), byte_level())
    data, out = write(tmp_path / "data.jsonl", ROWS), tmp_path / "out"
    saving = ("--save_strategy", "steps", "--save_steps", "2")
    run(script, model, data, out, *saving)
    labels, named = OTHERS[other]
    write(tmp_path / "data.jsonl", [{**row, "label": labels[n % len(labels)]} for n, row in enumerate(ROWS)])
    for steps in ("2", "4"):
        said = refused(script, model, data, out, *saving, "--max_steps", steps, capsys=capsys, monkeypatch=monkeypatch)
        assert f"{out / 'checkpoint-2'} {named}" in said
    write(tmp_path / "data.jsonl", ROWS)
    run(script, model, data, out, *saving, "--max_steps", "4")
    assert read(out / "trainer_state.json")["global_step"] == 4


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (
            ("--dataloader_drop_last", "--per_device_train_batch_size", "13"),
            "nothing to train on: 12 rows do not make",
        ),
        (("--prediction_loss_only", "--do_predict"), "--prediction_loss_only leaves nothing to write"),
        (("--prediction_loss_only", "--metric_for_best_model", "accuracy"), "accuracy is not one of loss"),
    ],
)
def test_what_comes_to_nothing_is_refused(
    tmp_path: Path,
    more: tuple[str, ...],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = stored(tmp_path / "model", gpt2(byte_level()), byte_level())
    data = write(tmp_path / "data.jsonl", ROWS)
    said = refused(run_glue, model, data, tmp_path / "out", "--test_file", data, *more,
                   capsys=capsys, monkeypatch=monkeypatch)  # fmt: skip
    assert named in said
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_it_tells_its_losses_and_nothing_of_its_own_making(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stored(tmp_path / "model", gpt2(byte_level()), byte_level())
    data = write(tmp_path / "data.jsonl", ROWS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(script, model, data, tmp_path / "out")
    assert not [warning for warning in caught if "pin_memory" in str(warning.message)]
    shown = capsys.readouterr().out
    logged = [entry for entry in history(tmp_path / "out") if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert f"'loss': '{entry['loss']:.4g}'" in shown
    assert shown.count("'xgrad/") >= 2
    assert "'train_loss': " in shown
