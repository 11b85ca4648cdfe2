"""run_clm.py and run_mlm.py from their flags to the files that they leave: whole runs of tiny models."""

import dataclasses
import gzip
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BartConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from hf_xgrad import XGradTrainer, XGradTrainingArguments
from hf_xgrad.recipes.arguments import ScriptParser
from hf_xgrad.recipes.corpora import python_documentation
from hf_xgrad.recipes.language import clm as run_clm
from hf_xgrad.recipes.language import mlm as run_mlm
from hf_xgrad.recipes.language import modeling as language_modeling
from hf_xgrad.recipes.language.batches import CausalCollator, MaskingCollator
from hf_xgrad.recipes.language.clm import sample_text
from hf_xgrad.recipes.language.data import BlockCutter
from hf_xgrad.recipes.language.modeling import LanguageModelTrainer, parse_flags
from hf_xgrad.recipes.language.models import LanguageModelArguments
from hf_xgrad.recipes.language.tokenizer import train_tokenizer
from run_files import with_hub
from tiny_models import gpt2

WORDS = ("Alan", "saw", "the", "unbelievable", "thing", "and", "did", "not", "say", "what", "it", "was", "when", ".")
QUIET = ("--disable_tqdm", "true", "--use_cpu", "--dataloader_pin_memory", "false", "--report_to", "none")
SHORT = ("--max_steps", "3", "--save_strategy", "no", "--per_device_train_batch_size", "4")
SHARED = Path(__file__).parents[4] / "shared" / "data"


@dataclasses.dataclass(frozen=True)
class Script:
    """One of the two scripts, and the flags of a tiny new model of its kind, with dropout, on rows of 16 tokens."""

    module: ModuleType
    auto_class: Any
    masked: bool
    task: str
    new: tuple[str, ...]
    length: str

    @property
    def flags(self) -> tuple[str, ...]:
        return (*self.new, "--new_tokenizer_size", "290", self.length, "16")


BERT = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,max_position_embeddings=24"
SCRIPTS = {
    "clm": Script(
        run_clm,
        AutoModelForCausalLM,
        False,
        "text-generation",
        ("--model_type", "gpt2", "--config_overrides", "n_embd=16,n_layer=1,n_head=2,n_positions=24"),
        "--block_size",
    ),
    "mlm": Script(
        run_mlm,
        AutoModelForMaskedLM,
        True,
        "fill-mask",
        ("--model_type", "bert", "--config_overrides", BERT),
        "--max_seq_length",
    ),
}


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> Script:
    return SCRIPTS[request.param]


def make_lines(count: int, seed: int) -> list[str]:
    """Return lines of up to 12 words; one in a dozen is empty."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(12))) + "\n" for _ in range(count)]


TRAIN, VALIDATION = make_lines(60, 0), make_lines(20, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the flags that name training and validation files."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.txt").write_text("".join(TRAIN))
    (folder / "validation.txt").write_text("".join(VALIDATION))
    return ("--train_file", str(folder / "train.txt"), "--validation_file", str(folder / "validation.txt"))


@pytest.fixture(scope="module", autouse=True)
def _cached_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(autouse=True)
def _logs_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def run(script: Script, *flags: str, status: int = 0) -> None:
    assert script.module.main([*flags, *QUIET]) == status


def results(folder: Path, kind: str = "eval") -> dict[str, Any]:
    return dict(json.loads((folder / f"{kind}_results.json").read_text()))


def history(folder: Path, name: str) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(next(folder.glob("*model.safetensors"))))


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def pretrained(script: Script, data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a run with a new model left."""
    out = tmp_path_factory.mktemp("pretrained") / "out"
    run(script, *script.flags, *data, *SHORT, "--do_train", "--do_eval", "--max_steps", "20", "--learning_rate",
        "3e-2", "--output_dir", str(out))  # fmt: skip
    return out


def evaluated(script: Script, model: Path, out: Path, data: tuple[str, ...], *flags: str) -> dict[str, Any]:
    run(script, "--model_name_or_path", str(model), *data, script.length, "16", "--do_eval", "--output_dir", str(out),
        *flags)  # fmt: skip
    return results(out)


# What a run leaves


def validation_rows(script: Script, tokenizer: Any, seed: int = 42) -> list[dict[str, list[int]]]:
    """Return the rows of the validation texts, those of masked models masked."""
    cutter = BlockCutter(tokenizer, "text", 16, masked=script.masked)
    rows = Dataset.from_dict(cutter({"text": VALIDATION}))
    return list(MaskingCollator(tokenizer, 0.15, seed).mask_once(rows) if script.masked else rows)


def scores_one_by_one(script: Script, folder: Path) -> dict[str, float]:
    """Return the scores of the model in `folder`, from one token after the other."""
    model = script.auto_class.from_pretrained(folder).eval()
    losses, right = [], 0
    for row in validation_rows(script, AutoTokenizer.from_pretrained(folder)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        labels = row["labels"] if script.masked else row["input_ids"]
        for place, label in enumerate(labels):
            if label == -100 or (place == 0 and not script.masked):
                continue
            scores = logits[place if script.masked else place - 1].log_softmax(-1)
            losses.append(-scores[label].item())
            right += int(scores.argmax()) == label
    loss = sum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": right / len(losses), "tokens": len(losses)}


def test_the_scores_in_the_results_are_those_of_every_token(script: Script, pretrained: Path) -> None:
    found = results(pretrained)
    expected = scores_one_by_one(script, pretrained)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found["eval_perplexity"] == math.exp(found["eval_loss"])
    tokenizer, train = AutoTokenizer.from_pretrained(pretrained), results(pretrained, "train")
    rows = BlockCutter(tokenizer, "text", 16, masked=script.masked)({"text": TRAIN})
    assert train["train_samples"] == len(rows["input_ids"])
    read = round(train["train_tokens_per_second"] * train["train_runtime"])
    assert read == train["num_input_tokens_seen"]
    read = round(found["eval_tokens_per_second"] * found["eval_runtime"])
    assert read == sum(len(row["input_ids"]) for row in validation_rows(script, tokenizer))
    assert found.items() <= results(pretrained, "all").items()
    assert train.items() <= results(pretrained, "all").items()


def test_the_scores_do_not_depend_on_the_batches_as_the_trainers_own_do(
    tmp_path: Path, script: Script, data: tuple[str, ...], pretrained: Path
) -> None:
    expected = results(pretrained)
    for size in ("1", "7"):
        found = evaluated(script, pretrained, tmp_path / size, data[2:], "--per_device_eval_batch_size", size)
        for name in ("loss", "perplexity", "accuracy", "tokens"):
            assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    args = XGradTrainingArguments(
        str(tmp_path / "x"), per_device_eval_batch_size=7, use_cpu=True, remove_unused_columns=False, disable_tqdm=True
    )
    plain = Trainer(
        script.auto_class.from_pretrained(pretrained),
        args,
        data_collator=MaskingCollator(tokenizer, 0.15, 0) if script.masked else CausalCollator(tokenizer),
        eval_dataset=Dataset.from_list(validation_rows(script, tokenizer)),
    )
    assert abs(plain.evaluate()["eval_loss"] - expected["eval_loss"]) > 1e-3


def test_the_card_and_the_tokenizer(pretrained: Path, script: Script) -> None:
    card = (pretrained / "README.md").read_text()
    header = card.split("---")[1]
    assert f"- {script.task}\n" in header
    assert "- xgrad\n" in header
    assert "trained from scratch on the train.txt dataset" in card
    assert "[](" not in card
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    text = "".join(TRAIN)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert not (pretrained / "comparison.json").exists()


def test_fine_tuning_goes_on_from_the_folder_of_a_run(
    tmp_path: Path, script: Script, data: tuple[str, ...], pretrained: Path
) -> None:
    run(script, "--model_name_or_path", str(pretrained), *data, *SHORT, "--do_train", "--do_eval", "--eval_on_start",
        script.length, "16", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    found = results(tmp_path / "out")
    assert found["eval_perplexity_at_start"] == pytest.approx(results(pretrained)["eval_perplexity"], rel=1e-6)
    assert found["eval_perplexity"] != found["eval_perplexity_at_start"]
    expected = scores_one_by_one(script, tmp_path / "out")
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert weights(tmp_path / "out").keys() == weights(pretrained).keys()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_weights_attention_and_mixed_precision(
    tmp_path: Path, script: Script, data: tuple[str, ...], pretrained: Path, kind: str
) -> None:
    run(script, "--model_name_or_path", str(pretrained), *data, *SHORT, "--do_train", "--do_eval", "--dtype", kind,
        "--attn_implementation", "eager", "--low_cpu_mem_usage", *(("--bf16",) if kind == "float32" else ()),
        "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {getattr(torch, kind)}
    assert not same_weights(tmp_path / "out", pretrained)
    assert math.isfinite(results(tmp_path / "out")["eval_loss"])


def test_flags_from_a_file(tmp_path: Path, script: Script, data: tuple[str, ...], pretrained: Path) -> None:
    settings = {
        "model_name_or_path": str(pretrained),
        "train_file": data[1],
        "validation_file": data[3],
        script.length[2:]: 16,
        "do_train": True,
        "max_steps": 3,
        "save_strategy": "no",
        "seed": 5,
        "xgrad_steps": 2.0,
        "output_dir": str(tmp_path / "file"),
    }
    (tmp_path / "settings.yaml").write_text("\n".join(f"{name}: {json.dumps(v)}" for name, v in settings.items()))
    run(script, str(tmp_path / "settings.yaml"), "--learning_rate", "1e-3")
    words = [f"--{name}={value}" for name, value in settings.items()]
    run(script, *words, "--learning_rate", "1e-3", "--output_dir", str(tmp_path / "words"))
    assert same_weights(tmp_path / "file", tmp_path / "words")


# XGrad and the plain optimizer


def test_no_steps_ahead_is_the_plain_optimizer(
    tmp_path: Path, script: Script, data: tuple[str, ...], pretrained: Path
) -> None:
    common = ("--model_name_or_path", str(pretrained), script.length, "16", *data, *SHORT, "--do_train", "--do_eval")
    for name, flags in (("zero", ("--xgrad_steps", "0")), ("off", ("--no_xgrad",)), ("on", ())):
        run(script, *common, *flags, "--learning_rate", "1e-2", "--output_dir", str(tmp_path / name))
    assert same_weights(tmp_path / "zero", tmp_path / "off")
    assert results(tmp_path / "zero")["eval_loss"] == results(tmp_path / "off")["eval_loss"]
    assert not same_weights(tmp_path / "on", tmp_path / "off")
    assert "- xgrad\n" not in (tmp_path / "off" / "README.md").read_text()


def test_the_baseline_starts_alike_and_is_shown_beside(
    tmp_path: Path,
    script: Script,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    starts: list[dict[str, Tensor]] = []
    batches: list[list[Any]] = [[], []]

    def train(self: XGradTrainer, **settings: Any) -> Any:
        starts.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        return original_train(self, **settings)

    def step(self: XGradTrainer, model: Any, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        batches[len(starts) - 1].append({name: tensor.tolist() for name, tensor in inputs.items()})
        return original_step(self, model, inputs, *rest)

    original_train, original_step = XGradTrainer.train, XGradTrainer.training_step
    monkeypatch.setattr(XGradTrainer, "train", train)
    monkeypatch.setattr(XGradTrainer, "training_step", step)
    out, baseline = tmp_path / "out", tmp_path / "out-baseline"
    run(script, *script.flags, *data, *SHORT, "--do_train", "--do_eval", "--baseline", "--seed", "3",
        "--learning_rate", "1e-2", "--output_dir", str(out))  # fmt: skip
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert len(batches[0]) == 3
    assert batches[0] == batches[1]
    assert not same_weights(out, baseline)
    comparison = json.loads((out / "comparison.json").read_text())
    for metric in ("train_loss", "eval_loss", "eval_perplexity", "eval_accuracy"):
        row = comparison["metrics"][metric]
        assert (row["xgrad"], row["baseline"]) == (results(out, "all")[metric], results(baseline, "all")[metric])
    assert not any("tokens" in name or "second" in name for name in comparison["metrics"])
    assert comparison["settings"]["seed"] == 3
    assert f"{comparison['metrics']['eval_loss']['baseline']:.4f}" in capsys.readouterr().out


# The training loss


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.found: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append([p.grad.clone() for p in kwargs["model"].parameters() if p.grad is not None])


def bart_config(vocabulary: int) -> BartConfig:
    return BartConfig(
        vocab_size=vocabulary, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
        encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, max_position_embeddings=32, dropout=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("bart", [False, True])
def test_every_token_of_an_accumulation_window_counts_the_same(tmp_path: Path, script: Script, bart: bool) -> None:
    """BART, as a causal model, knows of no accumulation and does not shift its labels."""
    if bart and script.masked:
        pytest.skip("causal models only")
    tokenizer = train_tokenizer(TRAIN, 290, masked=script.masked, model_max_length=10**6)
    lengths = (15, 3, 9, 6, 2, 14, 8, 11)
    rows = [
        {"input_ids": tokenizer("".join(TRAIN), add_special_tokens=False)["input_ids"][length : 2 * length]}
        for length in lengths
    ]
    collator: Any = CausalCollator(tokenizer)
    data = Dataset.from_list(rows)
    if script.masked:
        collator = MaskingCollator(tokenizer, 0.4, 0)
        data = collator.mask_once(data.map(lambda row: {"word_ids": list(range(len(row["input_ids"])))}))
    model = (
        gpt2(vocab_size=len(tokenizer))
        if not script.masked
        else AutoModelForMaskedLM.from_config(bert_config(len(tokenizer)))
    )
    if bart:
        model = AutoModelForCausalLM.from_config(bart_config(len(tokenizer)))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def train(batch: int, accumulation: int) -> tuple[list[list[Tensor]], list[float]]:
        model.load_state_dict(start)
        gradients = Gradients()
        args = XGradTrainingArguments(
            str(tmp_path / "out"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            logging_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = LanguageModelTrainer(
            shifted=not script.masked,
            model=model,
            args=args,
            train_dataset=data,
            data_collator=collator,
            callbacks=[gradients],
        )
        trainer.train()
        return gradients.found, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, whole_losses = train(4, 1)
    for batch, accumulation in ((1, 4), (2, 2)):
        parts, losses = train(batch, accumulation)
        assert len(parts) == len(whole) == 2
        assert losses == pytest.approx(whole_losses, rel=1e-5)
        for one, other in zip(chain(*parts), chain(*whole), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def bert_config(vocabulary: int) -> Any:
    from transformers import BertConfig

    torch.manual_seed(0)
    names = dict(pair.split("=") for pair in BERT.split(","))
    return BertConfig(
        vocab_size=vocabulary,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{name: int(value) for name, value in names.items()},
    )


# The best model


@pytest.mark.parametrize(("metric", "best"), [("perplexity", min), ("accuracy", max), ("eval_loss", min)])
def test_the_best_model_is_that_of_the_least_perplexity_or_greatest_accuracy(
    tmp_path: Path, data: tuple[str, ...], metric: str, best: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = iter([3.0, 2.0, 5.0, 4.0, 9.0])

    def result(self: Any) -> dict[str, float]:
        value = next(made_up)
        return {"loss": value, "perplexity": value, "accuracy": value, "tokens": 1}

    monkeypatch.setattr(language_modeling.TokenScores, "result", result)
    out = tmp_path / "out"
    run(SCRIPTS["clm"], *SCRIPTS["clm"].flags, *data, "--do_train", "--do_eval", "--max_steps", "4", "--eval_strategy",
        "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "--metric_for_best_model",
        metric, "--output_dir", str(out))  # fmt: skip
    step = 1 + [3.0, 2.0, 5.0, 4.0].index(best(3.0, 2.0, 5.0, 4.0))
    assert json.loads((out / "trainer_state.json").read_text())["best_global_step"] == step
    assert same_weights(out, out / f"checkpoint-{step}")
    assert not same_weights(out, out / "checkpoint-4")


# Stopping and resuming

RESUMABLE = ("--max_steps", "7", "--save_steps", "2", "--per_device_train_batch_size", "2", "--logging_steps", "1",
             "--gradient_accumulation_steps", "2", "--do_train", "--do_eval", "--learning_rate", "1e-2")  # fmt: skip


def stop_at(step: int) -> Callable[..., Tensor]:
    original = XGradTrainer.training_step

    def training_step(self: XGradTrainer, *arguments: Any, **settings: Any) -> Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *arguments, **settings)

    return training_step


def stop_and_resume(script: Script, out: Path, flags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(XGradTrainer, "training_step", stop_at(5))
        run(script, *flags, "--output_dir", str(out), status=130)
    run(script, *flags, "--output_dir", str(out))
    train = results(out, "train")
    assert train["train_resumed_at_step"] == 4
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    seen = [entry["num_input_tokens_seen"] for entry in log if "loss" in entry]
    assert round(train["train_tokens_per_second"] * train["train_runtime"]) == seen[6] - seen[3]


@pytest.mark.parametrize(
    "further", [("--optim", "adamw_torch"), ("--optim", "nadam", "--streaming")], ids=["", "stream"]
)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path,
    script: Script,
    data: tuple[str, ...],
    further: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = (*script.flags, *data, *RESUMABLE, *further)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(script, *flags, "--output_dir", str(whole))
    stop_and_resume(script, parts, flags, monkeypatch)
    assert same_weights(parts, whole)
    assert history(parts, "loss") == history(whole, "loss")
    assert len(set(history(whole, "loss"))) == 7
    scores = [f"eval_{name}" for name in ("loss", "perplexity", "accuracy", "tokens")]
    assert [results(parts)[name] for name in scores] == [results(whole)[name] for name in scores]


def test_a_complete_run_is_only_evaluated_again(
    tmp_path: Path,
    script: Script,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    flags = (*script.flags, *data, *RESUMABLE, "--eval_on_start", "--output_dir", str(out))
    run(script, *flags)
    before, trained, found = weights(out), results(out, "train"), results(out)
    monkeypatch.setattr(XGradTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    run(script, *flags)
    assert "Training is complete" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    assert results(out, "train") == trained
    scores = ("loss", "perplexity", "accuracy", "tokens", "perplexity_at_start")
    assert [results(out)[f"eval_{name}"] for name in scores] == [found[f"eval_{name}"] for name in scores]


# Adapters


def test_only_adapters_are_trained_saved_and_resumed(
    tmp_path: Path, script: Script, data: tuple[str, ...], pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = weights(pretrained)
    flags = ("--model_name_or_path", str(pretrained), script.length, "16", *data, *RESUMABLE, "--lora", "--lora_rank",
             "2", "--lora_dropout", "0.1")  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(script, *flags, "--output_dir", str(whole))
    stop_and_resume(script, parts, flags, monkeypatch)
    assert same_weights(parts, whole)
    assert all("lora_" in name for name in weights(whole))
    assert any(tensor.any() for name, tensor in weights(whole).items() if "lora_B" in name)
    assert not (whole / "model.safetensors").exists()
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights(pretrained).items())
    found = results(whole)
    assert found["eval_loss"] != results(pretrained)["eval_loss"]
    with monkeypatch.context() as patch:
        patch.setattr(XGradTrainer, "train", lambda *_, **__: pytest.fail("trained"))
        run(script, *flags, "--output_dir", str(whole))
    assert same_weights(parts, whole)
    assert results(whole)["eval_loss"] == found["eval_loss"]
    assert script.task in (whole / "README.md").read_text()


# Data


def test_streaming(tmp_path: Path, script: Script, data: tuple[str, ...], pretrained: Path) -> None:
    common = ("--model_name_or_path", str(pretrained), script.length, "16", *data, *SHORT, "--do_train", "--do_eval")
    run(script, *common, "--streaming", "--shuffle_buffer_size", "4", "--output_dir", str(tmp_path / "stream"))
    run(script, *common, "--output_dir", str(tmp_path / "whole"))
    stream, whole = results(tmp_path / "stream"), results(tmp_path / "whole")
    assert stream["eval_tokens"] == whole["eval_tokens"]
    for kind, name in (("eval", "eval_tokens_per_second"), ("train", "train_tokens_per_second")):
        assert results(tmp_path / "stream", kind)[name] > 0
    only_evaluated = evaluated(script, pretrained, tmp_path / "e", data[2:], "--streaming")
    expected = results(pretrained)
    for name in ("loss", "accuracy", "tokens"):
        assert only_evaluated[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)


def test_a_stream_goes_on_in_the_pass_that_it_was_in(
    tmp_path: Path, script: Script, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer than 14 batches a pass, in another order in each."""
    common = (*script.flags, *data[:2], "--streaming", "--shuffle_buffer_size", "8", "--do_train", "--max_steps", "20",
              "--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "14",
              "--logging_steps", "1")  # fmt: skip
    run(script, *common, "--output_dir", str(tmp_path / "whole"))
    passes = history(tmp_path / "whole", "epoch")
    assert passes[13] > 1
    with monkeypatch.context() as patch:
        patch.setattr(XGradTrainer, "training_step", stop_at(17))
        run(script, *common, "--output_dir", str(tmp_path / "parts"), status=130)
    run(script, *common, "--output_dir", str(tmp_path / "parts"))
    assert results(tmp_path / "parts", "train")["train_resumed_at_step"] == 14
    assert history(tmp_path / "parts", "loss") == history(tmp_path / "whole", "loss")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")


def test_models_with_hardly_any_positions(tmp_path: Path, script: Script, data: tuple[str, ...]) -> None:
    sizes = ("--config_overrides", script.new[-1].replace("=24", "=4"), "--new_tokenizer_size", "290")
    run(script, *script.new[:2], *sizes, *data, *SHORT, "--do_train", "--do_eval", "--output_dir", str(tmp_path))
    assert math.isfinite(results(tmp_path)["eval_loss"])


def test_streaming_in_worker_processes(tmp_path: Path, data: tuple[str, ...]) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress("".join(TRAIN * 2).encode()))
    script = SCRIPTS["clm"]
    run(script, *script.flags, "--train_file", str(folder), "--streaming", *SHORT, "--do_train", "--do_eval",
        "--dataloader_num_workers", "2", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert results(tmp_path / "out")["eval_tokens"] > 0


def test_held_out_texts_samples_and_processes(tmp_path: Path, script: Script, data: tuple[str, ...]) -> None:
    run(script, *script.flags, *data[:2], *SHORT, "--do_train", "--do_eval", "--validation_split_percentage", "20",
        "--preprocessing_num_workers", "2", "--max_train_samples", "9", "--max_eval_samples", "3", "--output_dir",
        str(tmp_path / "out"))  # fmt: skip
    assert results(tmp_path / "out", "train")["train_samples"] == 9
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert results(tmp_path / "out")["eval_samples_per_second"] > 0
    if not script.masked:
        assert results(tmp_path / "out")["eval_tokens"] == 3 * 15
    # Trained on what was not held out.
    expected = train_tokenizer(TRAIN[:48], 290, masked=script.masked, model_max_length=10**6)
    assert tokenizer.get_vocab() == expected.get_vocab()


def seen_batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    batches = []
    original = XGradTrainer.training_step

    def step(self: XGradTrainer, model: Any, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
        batches.append(inputs)
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(XGradTrainer, "training_step", step)
    return batches


def test_lines_whole_words_and_padding_of_masked_models(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, batches = SCRIPTS["mlm"], seen_batches(monkeypatch)
    common = (*script.flags, *data[:2], *SHORT, "--do_train")
    run(script, *common, "--line_by_line", "--output_dir", str(tmp_path / "lines"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lines")
    lines = {
        tuple(ids) if len(ids) <= 16 else (*ids[:15], tokenizer.sep_token_id)
        for ids in tokenizer([line.strip() for line in TRAIN if line.strip()])["input_ids"]
    }
    for batch in batches:
        ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
        for row, mask in zip(ids, batch["attention_mask"], strict=True):
            assert tuple(row[mask == 1].tolist()) in lines
    assert {batch["input_ids"].shape[1] for batch in batches} <= {8, 16}
    batches.clear()
    run(script, *common, "--line_by_line", "--pad_to_max_length", "--whole_word_masking", "--mlm_probability", "0.9",
        "--output_dir", str(tmp_path / "padded"))  # fmt: skip
    assert {batch["input_ids"].shape[1] for batch in batches} == {16}
    chosen = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    ordinary = sum(int(batch["attention_mask"].sum()) - 2 * len(batch["labels"]) for batch in batches)
    assert 0.75 < chosen / ordinary <= 1


def test_masks_come_from_the_seed(tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    script, batches = SCRIPTS["mlm"], seen_batches(monkeypatch)
    labels = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        batches.clear()
        run(script, *script.flags, *data[:2], *SHORT, "--do_train", "--seed", seed, "--data_seed", "7",
            "--output_dir", str(tmp_path / name))  # fmt: skip
        labels.append([batch["labels"].tolist() for batch in batches])
    assert labels[0] == labels[1] != labels[2]


def test_blocks_longer_than_the_model_are_shortened_and_said_so(
    tmp_path: Path, script: Script, data: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    flags = (*script.new, "--new_tokenizer_size", "290", script.length, "99")
    run(script, *flags, *data, *SHORT, "--do_train", "--output_dir", str(tmp_path / "out"))
    assert "blocks of 99 tokens are more than the model takes; using 24" in caplog.text


# The Hub


def test_data_and_model_of_the_hub_and_one_push_of_everything(
    tmp_path: Path, script: Script, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    pushed: list[tuple[str, set[str]]] = []

    def load(*names: Any, **settings: Any) -> datasets.DatasetDict:
        asked.append((names, settings))
        return datasets.DatasetDict(
            train=Dataset.from_dict({"text": TRAIN}), validation=Dataset.from_dict({"text": VALIDATION})
        )

    def upload(*, folder_path: str, repo_id: str, **settings: Any) -> SimpleNamespace:
        pushed.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
        return SimpleNamespace(repo_url="there")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with_hub(monkeypatch, upload_folder=upload)
    out = tmp_path / "out"
    run(script, "--model_name_or_path", str(pretrained), "--dataset_name", "me/texts", "--dataset_config_name", "raw",
        "--cache_dir", "c", "--token", "t", script.length, "16", *SHORT[:2], "--save_steps", "1", "--do_train",
        "--do_eval", "--baseline", "--push_to_hub", "--output_dir", str(out))  # fmt: skip
    assert asked == [(("me/texts", "raw"), {"streaming": False, "cache_dir": "c", "token": "t"})]
    assert [repo for repo, _ in pushed] == ["me/out"]
    assert {"README.md", "model.safetensors", "all_results.json", "eval_results.json"} <= pushed[0][1]
    card = (out / "README.md").read_text()
    assert "datasets:\n- me/texts\n" in card
    assert f"type: {script.task}" in card


# The sample


def test_a_sample_of_text(tmp_path: Path, data: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    script = SCRIPTS["clm"]
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(script, *script.flags, *data, *SHORT, "--do_train", "--sample_length", "9", "--sample_prompt", "Alan saw",
            "--seed", seed, "--output_dir", str(tmp_path / name))  # fmt: skip
        texts.append((tmp_path / name / "sample.txt").read_text())
        assert texts[-1].startswith("Alan saw")
        assert texts[-1] in capsys.readouterr().out
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("is_main", [True, False])
def test_every_process_takes_part_in_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_main: bool
) -> None:
    """Each may hold a part of the model only; one of them tells."""
    taking_part = []
    monkeypatch.setattr(run_clm, "sample_text", lambda *_: taking_part.append(True) or "so it goes")
    accelerator: Any = SimpleNamespace(is_main_process=is_main, unwrap_model=lambda model: model)
    args = SimpleNamespace(output_dir=tmp_path, seed=1)
    tokenizer: Any = None
    run_clm.write_sample(accelerator, gpt2(), tokenizer, run_clm.SampleArguments(sample_length=3), args)
    assert taking_part == [True]
    assert ("so it goes" in capsys.readouterr().out) is (tmp_path / "sample.txt").exists() is is_main


def test_a_sample_leaves_the_random_state_and_the_mode_alone() -> None:
    tokenizer = train_tokenizer(["a"], 257, masked=False, model_max_length=10**6)
    model = gpt2(vocab_size=len(tokenizer)).train()
    state = torch.get_rng_state()
    texts = [sample_text(model, tokenizer, prompt, 5, seed) for prompt, seed in (("", 0), ("", 0), ("", 1), ("ab", 0))]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert texts[0] == texts[1] != texts[2]
    assert texts[3].startswith("ab")


def test_a_sample_needs_no_start_and_has_no_end_in_its_prompt() -> None:
    """A tokenizer without a token that starts or ends texts; one that ends every text."""
    bare = train_tokenizer(["b"], 257, masked=False, model_max_length=10**6)
    model = gpt2(vocab_size=300)
    bare.bos_token = bare.eos_token = None
    assert sample_text(model, bare, "", 3, 0) == sample_text(model, bare, "", 3, 0)
    ends = train_tokenizer(["b"], 260, masked=True, model_max_length=10**6)
    seen: list[list[int]] = []
    model.generate = lambda ids, **settings: seen.append(ids[0].tolist()) or ids
    sample_text(model, ends, "b", 3, 0)
    assert seen == [[ends.cls_token_id, *ends("b", add_special_tokens=False)["input_ids"]]]


@pytest.mark.parametrize(("prompt", "length", "start"), [("a", 99, 1), ("a" * 20, 12, 20), ("a" * 99, 9, 31)])
def test_a_sample_ends_where_the_models_positions_end(
    prompt: str, length: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["b"], 257, masked=False, model_max_length=10**6)
    model, written = gpt2(vocab_size=len(tokenizer)), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *ids, **kw: written.append(generate(*ids, **kw)) or written[-1])
    assert sample_text(model, tokenizer, prompt, length, 0).startswith("a" * start)
    assert written[0].shape == (1, 32)


# The embedded default


def test_without_arguments_a_model_is_trained_on_the_documentation(
    tmp_path: Path,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if script.masked:
        # The language reference alone: reading all docstrings takes seconds.
        monkeypatch.setattr(python_documentation, "_docstrings", lambda _: {})
    else:
        monkeypatch.setattr(language_modeling, "load_texts", lambda: (TRAIN, VALIDATION))
    monkeypatch.chdir(tmp_path)
    tiny = dict(zip(script.flags[::2], script.flags[1::2], strict=True))
    small = {"max_steps": 2, "max_train_samples": 8, "max_eval_samples": 8, "save_steps": 2, "warmup_steps": 0}
    changed = {**{name[2:]: value for name, value in tiny.items()}, **small}
    if not script.masked:
        changed["sample_length"] = 5
    embedded = {**script.module.EMBEDDED, **changed}
    monkeypatch.setattr(script.module, "EMBEDDED", embedded)
    name = "MASKED" if script.masked else "CAUSAL"
    objective = dataclasses.replace(getattr(script.module, name), embedded=embedded)
    monkeypatch.setattr(script.module, name, objective)
    run(script)
    out = tmp_path / embedded["output_dir"]
    found = results(out)
    shown = capsys.readouterr().out
    before, after = found["eval_perplexity_at_start"], found["eval_perplexity"]
    assert f"Perplexity: {before:.1f} before training, {after:.2f} after" in shown
    assert before != after
    card = (out / "README.md").read_text()
    assert "on the Python documentation dataset" in card
    assert "null" not in card
    if not script.masked:
        assert (out / "sample.txt").read_text().rstrip("\n") in shown
    if not script.masked:
        run(script, "--xgrad_steps", "2", "--output_dir", str(tmp_path / "other"))
        assert not same_weights(out, tmp_path / "other")


# What cannot be run


def without_mask_token(path: Path) -> str:
    tokenizer = train_tokenizer(TRAIN, 290, masked=False, model_max_length=10**6)
    tokenizer.save_pretrained(path / "causal")
    return str(path / "causal")


FAULTS: dict[str, tuple[str, Callable[[Path], tuple[str, ...]], str]] = {
    "file": ("", lambda _: ("--train_file", "nowhere.txt"), "cannot read nowhere.txt: No such file or directory"),
    "streamed file": (
        "",
        lambda _: ("--train_file", "nowhere.txt", "--streaming"),
        "cannot read nowhere.txt: No such file or directory",
    ),
    "column": ("", lambda _: ("--text_column", "body"), "has no column 'body'; its columns are text"),
    "model": ("", lambda _: ("--model_type", "gpt22"), "--model_type 'gpt22' is no type of model"),
    "overrides": ("", lambda _: ("--config_overrides", "n_embdd=3"), "--config_overrides n_embdd=3: key n_embdd"),
    "attention": ("", lambda _: ("--attn_implementation", "quick"), 'attn_implementation="quick"'),
    "tokenizer": ("", lambda _: ("--new_tokenizer_size", "100"), "--new_tokenizer_size: "),
    "adapters": ("", lambda _: ("--lora",), "--lora saves adapters only, for a model that is stored"),
    "endless": ("", lambda _: ("--streaming", "--max_steps", "-1"), "it needs --max_steps"),
    "processes": ("", lambda _: ("--streaming", "--preprocessing_num_workers", "2"), "exclude each other"),
    "smoothing": ("", lambda _: ("--label_smoothing_factor", "0.1"), "--label_smoothing_factor is not supported"),
    "best": ("", lambda _: ("--metric_for_best_model", "f1"), "f1 is not one of loss, perplexity, accuracy"),
    "nothing": ("", lambda _: ("--do_train", "false"), "nothing to do: give --do_train or --do_eval"),
    "flag": ("", lambda _: ("--blok_size", "8"), "unknown argument --blok_size"),
    "optimizer": ("", lambda _: ("--optim", "schedule_free_adamw"), "schedule_free_adamw"),
    "steps": ("", lambda _: ("--xgrad_steps", "-1"), "xgrad_steps"),
    "baseline": ("", lambda _: ("--baseline", "--no_xgrad"), "it excludes --no_xgrad"),
    "dtype": ("", lambda _: ("--dtype", "float8"), "--dtype"),
    "samples": ("", lambda _: ("--max_eval_samples", "0"), "--max_eval_samples must be 1 or more, not 0"),
    "block": ("clm", lambda _: ("--block_size", "1"), "--block_size must be 2 or more, not 1"),
    "sample": ("clm", lambda _: ("--sample_length", "0"), "--sample_length must be 1 or more, not 0"),
    "length": ("mlm", lambda _: ("--max_seq_length", "3"), "--max_seq_length must be 4 or more, not 3"),
    "share": ("mlm", lambda _: ("--mlm_probability", "1"), "--mlm_probability must be above 0 and below 1, not 1.0"),
    "other's flag": ("clm", lambda _: ("--mlm_probability", "0.2"), "unknown argument --mlm_probability"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_input_is_one_line_before_any_training(
    tmp_path: Path,
    data: tuple[str, ...],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, make, named = FAULTS[fault]
    script = SCRIPTS[kind or "clm"]
    check_refused(script, (*script.flags, *data, *make(tmp_path)), named, tmp_path, monkeypatch, capsys)


def check_refused(
    script: Script,
    flags: Sequence[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(XGradTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    arguments = ["--do_train", *SHORT, "--output_dir", str(tmp_path / "out"), *QUIET, *flags]
    assert script.module.main(arguments) == 2
    shown = capsys.readouterr()
    errors = [line for line in shown.err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"{script.module.PROG}: error: ")
    assert named in errors[0]
    assert shown.out == ""
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_models_and_tokenizers_that_do_not_fit(
    tmp_path: Path,
    data: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = without_mask_token(tmp_path)
    mlm, clm = SCRIPTS["mlm"], SCRIPTS["clm"]
    cases = (
        (mlm, (*mlm.new, "--tokenizer_name", tokenizer, *data), "has no mask token: it is not for masked models"),
        (clm, (*clm.new, *data), "a new model needs a tokenizer"),
        (clm, data, "no model: give --model_name_or_path, or --model_type for a new one"),
        (clm, clm.flags, "no data: give --dataset_name or --train_file"),
        (clm, ("--streaming",), "--streaming needs data to stream"),
        (clm, ("--model_name_or_path", "/no/where", *data), "cannot load the tokenizer /no/where: "),
    )
    for script, flags, named in cases:
        check_refused(script, flags, named, tmp_path, monkeypatch, capsys)


def test_a_masked_model_whose_tokenizer_has_no_padding(tmp_path: Path, data: tuple[str, ...]) -> None:
    full = train_tokenizer(TRAIN, 290, masked=True, model_max_length=10**6)
    bare = PreTrainedTokenizerFast(
        tokenizer_object=full.backend_tokenizer,
        mask_token=full.mask_token,
        cls_token=full.cls_token,
        sep_token=full.sep_token,
        eos_token=full.sep_token,
    )
    bare.save_pretrained(tmp_path / "tokenizer")
    script = SCRIPTS["mlm"]
    run(script, *script.new, "--tokenizer_name", str(tmp_path / "tokenizer"), script.length, "16", *data, *SHORT,
        "--do_train", "--do_eval", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert math.isfinite(results(tmp_path / "out")["eval_loss"])


def test_a_bug_is_not_taken_for_wrong_input(
    tmp_path: Path, data: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **settings: Any) -> None:
        raise ValueError("a bug")

    for place, name in ((XGradTrainer, "training_step"), (language_modeling, "score_rows")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            with pytest.raises(ValueError, match="a bug"):
                run(SCRIPTS["clm"], *SCRIPTS["clm"].flags, *data, *SHORT, "--do_train", "--do_eval", "--output_dir",
                    str(tmp_path / name))  # fmt: skip


# Real text


def test_shakespeare(tmp_path: Path) -> None:
    file = SHARED / "tinyshakespeare" / "input.txt.gz"
    if not file.is_file():
        pytest.skip(f"needs {file.relative_to(SHARED.parents[1])}, which is no part of the repository")
    script = SCRIPTS["clm"]
    run(script, *script.flags, "--train_file", str(file), "--streaming", "--max_eval_samples", "50", "--max_steps",
        "20", "--save_strategy", "no", "--do_train", "--do_eval", "--eval_on_start", "--learning_rate", "1e-2",
        "--output_dir", str(tmp_path / "out"))  # fmt: skip
    found = results(tmp_path / "out")
    assert found["eval_perplexity"] < 0.8 * found["eval_perplexity_at_start"]
    text = gzip.decompress(file.read_bytes()).decode()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer(text[:2000])["input_ids"]) == text[:2000]


def test_embedded_defaults_are_there_before_anything_is_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the Trainer's own save_steps of 500 these flags would exclude each other."""

    class Parsed(Exception):  # noqa: N818
        pass

    def stop(*args: Any) -> None:
        raise Parsed

    monkeypatch.setattr(language_modeling, "set_up_logging", stop)
    flags = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "200", "--use_cpu"]
    for script in (run_clm, run_mlm):
        monkeypatch.setitem(script.EMBEDDED, "save_steps", 400)
        with pytest.raises(Parsed):
            script.main([*flags, "--output_dir", str(tmp_path)])


def test_a_given_flag_counts_before_its_embedded_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ScriptParser(
        LanguageModelArguments, run_clm.CausalDataArguments, XGradTrainingArguments, prog="test", description=""
    )
    quiet = ["--use_cpu", "--report_to", "none"]
    embedded = {**run_clm.EMBEDDED}
    del embedded["sample_length"], embedded["sample_prompt"]
    model_args, _, args = parse_flags(parser, [*quiet, "--num_train_epochs", "1", "--tokenizer_name=t"], embedded)
    assert (args.num_train_epochs, args.max_steps) == (1, -1)
    assert (model_args.tokenizer_name, model_args.new_tokenizer_size) == ("t", None)
