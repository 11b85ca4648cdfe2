"""XGradMixin over TRL's trainers: what forward, callbacks, evaluation, checkpoints and generation see.

Offline: the models come from configs, the tokenizer and the data are made here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

import tiny_models as tiny
from hf_xgrad import XGradConfig, XGradMixin, XGradTrainer
from hf_xgrad.outputs.files import CARD_FILE
from hf_xgrad.outputs.stock_card import TAGS
from reference import predicted_weights
from small_runs import history

trl = pytest.importorskip("trl", reason="needs TRL: pip install '.[trl]'")

RULES = ["closed_form", "last_update"]
SAMPLES = 12


# ---- models, data and trainers ----


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: `<pad>`, `<eos>` and the numbers up to the size of the tiny models' vocabulary."""
    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, tiny.VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def texts(size: int, words: int, seed: int) -> list[str]:
    ids = torch.randint(2, tiny.VOCABULARY, (size, words), generator=torch.Generator().manual_seed(seed))
    return [" ".join(map(str, row)) for row in ids.tolist()]


def dataset(*columns: str, size: int = SAMPLES) -> Dataset:
    """Texts of a length and a seed of their own for each column."""
    return Dataset.from_dict({name: texts(size, 4 + i, seed=i) for i, name in enumerate(columns)})


def reward_model() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    config = tiny.gpt2().config
    config.num_labels, config.pad_token_id = 1, 0
    return GPT2ForSequenceClassification(config)


def distinct_words(completions: list[str], **kwargs: Any) -> list[float]:
    """A toy reward."""
    return [float(len(set(text.split()))) for text in completions]


class Method(NamedTuple):
    """A trainer of TRL and what it needs."""

    name: str  # its class is <name>Trainer, that of its arguments <name>Config
    model: Callable[[], nn.Module]
    columns: tuple[str, ...]
    given: Callable[[], dict[str, Any]] = dict
    generates: bool = False

    @property
    def trainer(self) -> Any:
        return getattr(trl, f"{self.name}Trainer")

    @property
    def arguments(self) -> Any:
        return getattr(trl, f"{self.name}Config")


# One batch in training and one in evaluation: four completions of two prompts, eight of four.
GENERATION = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "num_generations": 2,
    "max_completion_length": 4,
}
SFT = Method("SFT", tiny.gpt2, ("text",))
DPO = Method("DPO", tiny.gpt2, ("prompt", "chosen", "rejected"), lambda: {"ref_model": tiny.gpt2()})
REWARD = Method("Reward", reward_model, ("chosen", "rejected"))
GRPO = Method("GRPO", tiny.gpt2, ("prompt",), lambda: {"reward_funcs": distinct_words}, generates=True)
RLOO = Method("RLOO", tiny.gpt2, ("prompt",), lambda: {"reward_funcs": distinct_words}, generates=True)


def parameters(*methods: Method) -> list[Any]:
    return [pytest.param(method, id=method.name) for method in methods]


METHODS = parameters(SFT, DPO, REWARD, GRPO)
GENERATORS = parameters(GRPO, RLOO)


@functools.cache
def over(base: type) -> type:
    return type(f"XGrad{base.__name__}", (XGradMixin, base), {})


def make(
    method: Method,
    folder: Path,
    config: XGradConfig | None = None,
    *,
    model: nn.Module | None = None,
    cls: type | None = None,
    given: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """TRL's trainer with the mixin over it and `config`; without `config`, TRL's own (or `cls`)."""
    if config is not None:
        given = {**(given or {}), "xgrad_config": config}
        cls = over(method.trainer)
    defaults = {"bf16": False, "max_steps": 3, "per_device_train_batch_size": 2, "optim": "adamw_torch"}
    if method.generates:
        defaults |= {**GENERATION, "beta": 0.0}
    args = tiny.arguments(folder, method.arguments, **{**defaults, **settings})
    return (cls or method.trainer)(
        model=model or method.model(),
        args=args,
        train_dataset=dataset(*method.columns),
        eval_dataset=dataset(*method.columns, size=4),
        processing_class=tokenizer(),
        **{**method.given(), **(given or {})},
    )


def history_of_trl(trainer: Any) -> list[dict[str, Any]]:
    """The log, but for what tells the time and what only XGrad logs; as texts, as NaN is in it."""
    return [
        {key: repr(value) for key, value in entry.items() if not any(part in key for part in ("step_time", "xgrad"))}
        for entry in history(trainer)
    ]


def recording(call: Callable[..., Any], model: nn.Module) -> tuple[Callable[..., Any], list[dict[str, Tensor]]]:
    """`call`, and a list that gets the weights at which it was called."""
    seen: list[dict[str, Tensor]] = []

    def record_and_call(*args: Any, **kwargs: Any) -> Any:
        seen.append(tiny.weights(model))
        return call(*args, **kwargs)

    return record_and_call, seen


class StepBegin(TrainerCallback):
    """What stands before every step: the true weights, the slow twin's prediction, and the learning rate."""

    def __init__(self, model: nn.Module, s: float) -> None:
        self.model, self.s = model, s
        self.true: list[dict[str, Tensor]] = []
        self.twin: list[dict[str, Tensor]] = []
        self.lrs: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        names = {p: name for name, p in self.model.named_parameters()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        predicted = predicted_weights(optimizer.optimizer, self.s)
        self.true.append(tiny.weights(self.model))
        self.twin.append({names[p]: w for p, w in zip(params, predicted, strict=True)})
        self.lrs.append(optimizer.param_groups[0]["lr"])


@functools.cache
def at_weights(base: type) -> type:
    """TRL's own trainer, whose every training step runs at the next of the weights in `given_weights`."""

    class AtWeights(base):  # type: ignore[misc, valid-type]
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            true = tiny.weights(self.model)
            self.model.load_state_dict(next(self.given_weights), strict=False)
            try:
                return super().training_step(model, *args, **kwargs)
            finally:
                self.model.load_state_dict(true, strict=False)

    return AtWeights


# ---- the equations ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_forward_sees_the_weights_of_the_equations(tmp_path: Path, method: Method, rule: str) -> None:
    s = 1.5
    model = method.model().double()
    trainer = make(method, tmp_path, XGradConfig(steps=s, rule=rule), model=model)
    before = StepBegin(model, s)
    trainer.add_callback(before)
    trainer.compute_loss, seen = recording(trainer.compute_loss, model)
    trainer.train()
    assert len(seen) == len(before.true) == 3
    assert tiny.same(seen[0], before.true[0])
    for t in (1, 2):
        for name, w in before.true[t].items():
            expected = before.twin[t][name]
            if rule == "last_update":
                expected = w + s * before.lrs[t] / before.lrs[t - 1] * (w - before.true[t - 1][name])
            # All are predicted but one: a reward's last bias cancels out in the loss, in the last digit or for good.
            moved = not torch.equal(w, before.true[0][name])
            assert moved or name.endswith("ln_f.bias")
            assert torch.equal(seen[t][name], w) is not moved
            torch.testing.assert_close(seen[t][name], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_update_is_that_of_the_gradient_at_the_predicted_weights(tmp_path: Path, method: Method, rule: str) -> None:
    """TRL's own trainer, given the weights that the steps ran at, ends in the same weights and logs, bit for bit.

    For those that generate it also says that generation, scoring and old log-probabilities all are of these weights.
    """
    settings: dict[str, Any] = {"gradient_accumulation_steps": 2}
    if method is GRPO:
        # Completions are used for two updates each: their log-probabilities are kept from the first.
        settings |= {"num_iterations": 2, "steps_per_generation": 2}
    ours = make(method, tmp_path, XGradConfig(steps=1.0, rule=rule), max_steps=4, **settings)
    ours.accelerator.backward, at = recording(ours.accelerator.backward, ours.model)
    ours.train()
    assert len(at) == 4 * 2
    plain = make(method, tmp_path, cls=at_weights(method.trainer), max_steps=4, **settings)
    plain.given_weights = iter(at)
    plain.train()
    assert history_of_trl(ours) == history_of_trl(plain)
    assert tiny.same(tiny.weights(ours.model), tiny.weights(plain.model))
    assert not tiny.same(at[-1], at[0])


@pytest.mark.parametrize("config", [XGradConfig(steps=0), XGradConfig(enabled=False)], ids=["steps=0", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_switched_off_is_bit_for_bit_trls_own(tmp_path: Path, method: Method, config: XGradConfig) -> None:
    """With the dropout and the bf16 autocast that TRL has by default."""
    runs = []
    for given in (None, config):
        trainer = make(method, tmp_path, given, bf16=None, eval_strategy="steps", eval_steps=2)
        for module in trainer.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        trainer.train()
        runs.append((history_of_trl(trainer), tiny.weights(trainer.model), float(torch.rand(()))))
    (log, weights, number), (our_log, our_weights, our_number) = runs
    assert our_log == log
    assert any("eval_loss" in entry for entry in log)
    assert tiny.same(our_weights, weights)
    assert our_number == number


# ---- nobody outside the step ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_outside_the_step_nobody_sees_predicted_weights(tmp_path: Path, method: Method, rule: str) -> None:
    """No callback, evaluation (with its generation) or checkpoint; while every step but the first ran on others."""
    model = method.model()
    trainer = make(
        method,
        tmp_path,
        XGradConfig(steps=1.0, rule=rule),
        model=model,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    callback, events = tiny.recorder(model)
    trainer.add_callback(callback)
    trainer.accelerator.backward, at = recording(trainer.accelerator.backward, model)
    evaluated: list[bool] = []

    def record_in_evaluation(module: nn.Module, args: Any) -> None:
        if not module.training:
            evaluated.append(tiny.same(tiny.weights(model), events[-1][1]))

    model.register_forward_pre_hook(record_in_evaluation)
    trainer.train()
    assert tiny.changes(events) == {"optimizer_step"}
    assert {"evaluate", "save"} <= {event for event, _ in events}
    assert len(evaluated) >= 3
    assert all(evaluated)
    ever = [w for _, w in events]
    assert [any(tiny.same(w, t) for t in ever) for w in at] == [True] * 2 + [False] * 4
    for step, w in enumerate((w for event, w in events if event == "save"), start=1):
        file = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert len(file) > 20
        assert all(torch.equal(file[name], w[name]) for name in file)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", parameters(SFT, DPO, REWARD))
def test_resumed_is_uninterrupted(tmp_path: Path, method: Method, rule: str) -> None:
    config = XGradConfig(steps=1.0, rule=rule)
    uninterrupted = make(method, tmp_path, config, max_steps=5, save_strategy="steps", save_steps=2)
    uninterrupted.train()
    resumed = make(method, tmp_path, config, max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.same(tiny.weights(resumed.model), tiny.weights(uninterrupted.model))
    plain = make(method, tmp_path, max_steps=5)
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert not tiny.same(tiny.weights(plain.model), tiny.weights(uninterrupted.model))


# ---- reference models ----


class Reference(NamedTuple):
    """A way in which DPO keeps its reference."""

    model: Callable[[Path], nn.Module]
    given: Callable[[], dict[str, Any]] = lambda: {"ref_model": None}
    precomputed: bool = False


def loaded(folder: Path) -> nn.Module:
    """The tiny model, from a folder that a reference can be loaded from once more."""
    tiny.gpt2().save_pretrained(folder / "initial")
    return GPT2LMHeadModel.from_pretrained(folder / "initial")


def lora(**config: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **config)


def with_adapters(folder: Path) -> nn.Module:
    """The tiny model with adapters that already do something; TRL keeps a frozen copy of them."""
    config = lora(init_lora_weights=False)
    return pytest.importorskip("peft").get_peft_model(tiny.gpt2(), config)


def new_adapters() -> dict[str, Any]:
    return {"ref_model": None, "peft_config": lora()}


REFERENCES = {
    "given": Reference(lambda folder: tiny.gpt2(), lambda: {"ref_model": tiny.gpt2()}),
    "loaded": Reference(loaded),
    "precomputed": Reference(loaded, precomputed=True),
    "new-adapters": Reference(lambda folder: tiny.gpt2(), new_adapters),
    "new-adapters-precomputed": Reference(lambda folder: tiny.gpt2(), new_adapters, precomputed=True),
    "old-adapters": Reference(with_adapters),
    "old-adapters-precomputed": Reference(with_adapters, precomputed=True),
}


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("rule", RULES)
def test_dpo_compares_with_the_initial_weights(tmp_path: Path, rule: str, kind: str) -> None:
    """The log-probabilities that count as the reference's are those of a model that never trains."""
    reference, beta = REFERENCES[kind], 0.1
    settings = {"beta": beta, "precompute_ref_log_probs": reference.precomputed, "learning_rate": 0.05}
    sides = ("chosen", "rejected")

    def log_of(config: XGradConfig | None, **more: Any) -> list[dict[str, float]]:
        trainer = make(
            DPO, tmp_path, config, model=reference.model(tmp_path), given=reference.given(), **{**settings, **more}
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    ours = log_of(XGradConfig(steps=1.0, rule=rule))
    still = log_of(None, learning_rate=0.0)
    assert len(ours) == len(still) == 3
    for entry, initial in zip(ours, still, strict=True):
        for side in sides:
            reward = entry[f"rewards/{side}"]
            assert entry[f"logps/{side}"] - reward / beta == pytest.approx(initial[f"logps/{side}"], abs=1e-4)
    # Meanwhile the policy moves, on predicted weights.
    assert abs(ours[-1]["rewards/chosen"]) > 1e-3
    assert [entry["xgrad/active"] for entry in ours] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("method", parameters(DPO, GRPO))
@pytest.mark.parametrize("rule", RULES)
def test_a_reference_that_follows_takes_up_the_true_weights(tmp_path: Path, method: Method, rule: str) -> None:
    method.model().save_pretrained(tmp_path / "initial")
    model = type(method.model()).from_pretrained(tmp_path / "initial")
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "beta": 0.1}
    trainer = make(method, tmp_path, XGradConfig(steps=1.0, rule=rule), model=model, **settings)
    callback, after = tiny.recorder(model, "step_end")
    expected = tiny.weights(trainer.ref_model)
    trainer.add_callback(callback)
    trainer.train()
    for _, true in after:
        expected = {name: w * 0.5 + true[name] * 0.5 for name, w in expected.items()}
    assert len(after) == 3
    for name, w in tiny.weights(trainer.ref_model).items():
        torch.testing.assert_close(w, expected[name], rtol=1e-6, atol=1e-8)


# ---- trainers that generate ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", GENERATORS)
def test_who_acts_is_who_learns(tmp_path: Path, method: Method, rule: str) -> None:
    """In a step completions come from the predicted weights that the gradient is of, in evaluation from the true."""
    model = method.model()
    trainer = make(
        method,
        tmp_path,
        XGradConfig(steps=1.0, rule=rule),
        model=model,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    model.generate, generated = recording(model.generate, model)
    trainer.compute_loss, learned = recording(trainer.compute_loss, model)
    callback, true = tiny.recorder(model, "evaluate")
    trainer.add_callback(callback)
    trainer.train()
    # A window: one generation, two micro-batches; then an evaluation: one generation, one loss.
    assert (len(generated), len(learned), len(true)) == (6, 9, 3)
    for t in range(3):
        acted, evaluated = generated[2 * t : 2 * t + 2]
        first, second, of_evaluation = learned[3 * t : 3 * t + 3]
        assert tiny.same(acted, first)
        assert tiny.same(acted, second)
        assert tiny.same(evaluated, true[t][1])
        assert tiny.same(of_evaluation, true[t][1])
        assert t == 0 or not tiny.same(acted, true[t - 1][1])


@pytest.mark.parametrize("method", GENERATORS)
def test_an_engine_that_keeps_weights_is_refused_before_it_starts(tmp_path: Path, method: Method) -> None:
    with pytest.raises(ValueError, match=r"XGrad: use_vllm=True is refused: .*use_vllm=False.*xgrad=False"):
        make(method, tmp_path, XGradConfig(), use_vllm=True)


def test_an_engine_is_nothing_to_a_trainer_that_does_not_predict(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, trl.GRPOConfig, bf16=False, use_vllm=True, **GENERATION)
    XGradTrainer(model=tiny.gpt2(), args=args, xgrad_config=XGradConfig(enabled=False))
    with pytest.raises(ValueError, match="use_vllm"):
        XGradTrainer(model=tiny.gpt2(), args=args)


# ---- the model card ----


@pytest.mark.parametrize("method", METHODS)
def test_trls_card_is_completed(method: Method, tmp_path: Path) -> None:
    trainer = make(method, tmp_path, XGradConfig(steps=2.0))
    trainer.train()
    method.trainer.create_model_card(trainer, model_name="x")
    trls = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    trainer.create_model_card(model_name="x")
    card = (tmp_path / CARD_FILE).read_text(encoding="utf-8")
    _, head, text = card.split("---\n", 2)
    metadata, own = yaml.safe_load(head), yaml.safe_load(trls.split("---\n", 2)[1])
    assert set(own["tags"]) | set(TAGS) == set(metadata["tags"])
    assert "base_model" not in metadata
    assert "| steps predicted ahead, s | 2 |" in text
    assert text.index("## Quick start") < text.index("## Training procedure")
    # What TRL says of its own paper stays, and ours comes after it.
    assert text.count("guan2024xgrad") == text.count("## Citations") == 1
    assert "## How to use" not in text
    assert "This model was trained from scratch." in text
    rest = iter(text.splitlines())
    kept = [line for line in trls.split("---\n", 2)[2].splitlines() if line.strip() and "None" not in line]
    assert all(line in rest for line in kept)
