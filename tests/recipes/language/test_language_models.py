"""The model that the flags ask for: a new configuration and tokenizer, weights, LoRA adapters, room for the blocks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    XLNetConfig,
)

from hf_xgrad.recipes.input_errors import InputError
from hf_xgrad.recipes.language.data import texts_from
from hf_xgrad.recipes.language.models import (
    LanguageModelArguments,
    block_size,
    check_kind,
    check_looks_back,
    make_config,
    make_model,
    make_tokenizer,
)
from hf_xgrad.recipes.language.tokenizer import train_tokenizer

GPT2 = "n_embd=16,n_layer=1,n_head=2,n_positions=24"
OTHERS = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=16,max_position_embeddings=24"
MASKED = ("bert", "roberta", "mpnet", "modernbert")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Alan saw the saw"] * 2, 270, masked=True, model_max_length=10**6)


def new(model_type: str | None = "gpt2", **settings: Any) -> LanguageModelArguments:
    overrides = settings.pop("config_overrides", GPT2 if model_type == "gpt2" else OTHERS)
    return LanguageModelArguments(model_type=model_type, config_overrides=overrides, **settings)


def made(
    arguments: LanguageModelArguments, tokenizer: PreTrainedTokenizerFast, auto_class: Any = AutoModelForCausalLM
) -> Any:
    torch.manual_seed(0)
    return make_model(auto_class, arguments, make_config(arguments, tokenizer), tokenizer)


@pytest.fixture
def trained(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the folder of a GPT-2 whose weights are 16-bit."""
    made(new(dtype="bfloat16"), tokenizer).save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    return str(tmp_path / "trained")


# Configurations


def test_a_new_configuration_fits_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    causal = train_tokenizer(["the saw"], 260, masked=False, model_max_length=10**6)
    for model_type in ("gpt2", "llama"):
        config = make_config(new(model_type), causal)
        assert config.vocab_size == len(causal)
        assert config.bos_token_id == config.eos_token_id == causal.eos_token_id == causal.pad_token_id
        assert config.pad_token_id is None
    config = make_config(new("modernbert"), tokenizer)
    assert (config.vocab_size, config.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)
    assert (config.cls_token_id, config.sep_token_id) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_overrides_are_read_as_what_they_replace(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"{GPT2},resid_pdrop=0.25,scale_attn_weights=false,activation_function=relu"
    config = make_config(new(config_overrides=text), tokenizer)
    expected: dict[str, Any] = {
        "n_embd": 16,
        "n_positions": 24,
        "resid_pdrop": 0.25,
        "scale_attn_weights": False,
        "activation_function": "relu",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    plain = make_config(new(config_overrides=None), tokenizer)
    assert plain.to_dict() == GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=tokenizer.pad_token_id
    ).to_dict()  # fmt: skip


def test_what_follows_from_an_override_follows(tokenizer: PreTrainedTokenizerFast) -> None:
    assert LlamaConfig().head_dim == 128
    config = make_config(new("llama"), tokenizer)
    assert (config.head_dim, config.num_key_value_heads) == (8, 2)
    assert make_config(new("llama", config_overrides=f"{OTHERS},head_dim=4"), tokenizer).head_dim == 4


def test_a_stored_configuration(tokenizer: PreTrainedTokenizerFast, trained: str) -> None:
    assert make_config(LanguageModelArguments(config_name=trained), tokenizer).n_embd == 16
    assert make_config(LanguageModelArguments(model_name_or_path=trained), tokenizer).n_embd == 16
    config = make_config(LanguageModelArguments(config_name=trained, config_overrides="n_layer=3"), tokenizer)
    assert (config.n_embd, config.n_layer) == (16, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("n_embdd=3", "--config_overrides n_embdd=3: key n_embdd isn't in"),
        ("n_layer=one", "--config_overrides n_layer=one: invalid literal"),
        ("scale_attn_weights=perhaps", "--config_overrides scale_attn_weights=perhaps: can't derive"),
        ("n_inner=4", "--config_overrides n_inner=4: You can only update"),
    ],
)
def test_overrides_that_make_no_configuration(
    tokenizer: PreTrainedTokenizerFast, trained: str, overrides: str, message: str
) -> None:
    for source in ({"model_type": "gpt2"}, {"config_name": trained}):
        with pytest.raises(InputError, match=message):
            make_config(LanguageModelArguments(config_overrides=overrides, **source), tokenizer)


# Models


def test_weights_are_single_precision_unless_asked(tokenizer: PreTrainedTokenizerFast, trained: str) -> None:
    stored = {"model_name_or_path": trained}
    for settings, dtype in (
        ({"model_type": "gpt2"}, torch.float32),
        ({"model_type": "gpt2", "dtype": "bfloat16"}, torch.bfloat16),
        (stored, torch.float32),
        ({**stored, "dtype": "auto", "low_cpu_mem_usage": True}, torch.bfloat16),
        ({**stored, "dtype": "float16"}, torch.float16),
    ):
        overrides = GPT2 if "model_type" in settings else None
        model = made(LanguageModelArguments(config_overrides=overrides, **settings), tokenizer)  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_attention(tokenizer: PreTrainedTokenizerFast, trained: str) -> None:
    for settings in ({"config_overrides": GPT2, "model_type": "gpt2"}, {"model_name_or_path": trained}):
        for name in ("eager", "sdpa"):
            model = made(LanguageModelArguments(attn_implementation=name, **settings), tokenizer)
            assert model.config._attn_implementation == name
        with pytest.raises(InputError, match=r'cannot (make|load) the model.*attn_implementation="quick"'):
            made(LanguageModelArguments(attn_implementation="quick", **settings), tokenizer)


def test_there_is_room_for_every_token(tokenizer: PreTrainedTokenizerFast, trained: str) -> None:
    larger = train_tokenizer(["Alan saw the unbelievable saw"] * 2, 280, masked=True, model_max_length=10**6)
    model = made(LanguageModelArguments(model_name_or_path=trained), larger)
    assert len(larger) > len(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(larger)
    smaller = train_tokenizer(["a"], 260, masked=True, model_max_length=10**6)
    assert made(LanguageModelArguments(model_name_or_path=trained), smaller).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("t5", None, "cannot make the model: Unrecognized configuration class"),
        ("gpt2", "n_embd=16,n_layer=1,n_head=3", "cannot make the model: `embed_dim` must be divisible"),
    ],
)
def test_what_makes_no_model(
    tokenizer: PreTrainedTokenizerFast, model_type: str, overrides: str | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        made(new(model_type, config_overrides=overrides), tokenizer)


def test_a_tokenizer_is_trained_or_loaded(tokenizer: PreTrainedTokenizerFast, trained: str) -> None:
    texts = texts_from({"train": ["Alan saw the saw"] * 2, "validation": ["unbelievable"] * 9})
    for masked in (False, True):
        made_here = make_tokenizer(new(new_tokenizer_size=265), texts, masked=masked)
        assert len(made_here) == 265
        assert (made_here.mask_token is not None) == masked
        assert len(made_here("unbelievable", add_special_tokens=False)["input_ids"]) == len("unbelievable")
    assert len(make_tokenizer(LanguageModelArguments(tokenizer_name=trained), texts, masked=True)) == len(tokenizer)
    with pytest.raises(InputError, match=r"^--new_tokenizer_size: .*100"):
        make_tokenizer(new(new_tokenizer_size=100), texts, masked=True)
    with pytest.raises(InputError, match=r"^cannot load the tokenizer /no/where: "):
        make_tokenizer(LanguageModelArguments(model_name_or_path="/no/where"), texts, masked=True)


# Adapters


@pytest.mark.parametrize(
    ("targets", "expected"), [(None, {"c_attn"}), (["c_fc"], {"c_fc"}), (["all-linear"], {"c_attn", "c_proj", "c_fc"})]
)
def test_only_adapters_are_trained(
    tokenizer: PreTrainedTokenizerFast, trained: str, targets: list[str] | None, expected: set[str]
) -> None:
    settings = {"lora": True, "lora_rank": 3, "lora_alpha": 12, "lora_dropout": 0.5, "lora_target_modules": targets}
    model = made(LanguageModelArguments(model_name_or_path=trained, **settings), tokenizer)  # type: ignore[arg-type]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert {name.split(".")[-4] for name in names} == expected
    (adapter,) = model.peft_config.values()
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (3, 12, 0.5)


def test_adapters_for_modules_that_are_not_there(tokenizer: PreTrainedTokenizerFast, trained: str) -> None:
    for targets in (["nothing"], ["c_attn.bias"]):
        arguments = LanguageModelArguments(model_name_or_path=trained, lora=True, lora_target_modules=targets)
        with pytest.raises(InputError, match=r"^--lora: .*not found in the base model"):
            made(arguments, tokenizer)


# Lengths


@pytest.mark.parametrize("asked", [None, 8, 24, 25, 4096])
def test_no_block_is_longer_than_the_model_takes(tokenizer: PreTrainedTokenizerFast, asked: int | None) -> None:
    config = make_config(new(), tokenizer)
    assert block_size(asked, config, tokenizer) == (min(asked or 24, 24), (asked or 0) > 24)


def test_a_length_of_the_tokenizer_and_a_model_without_any(tokenizer: PreTrainedTokenizerFast) -> None:
    short = train_tokenizer(["the saw"], 260, masked=True, model_max_length=10)
    assert block_size(None, make_config(new(), short), short) == (10, False)
    bloom = make_config(new("bloom", config_overrides="hidden_size=16,n_layer=1,n_head=2"), tokenizer)
    assert block_size(None, bloom, tokenizer) == (1024, False)
    assert block_size(5000, bloom, tokenizer) == (5000, False)


@pytest.mark.parametrize("model_type", MASKED)
def test_the_longest_block_goes_through_the_model(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    arguments = new(model_type)
    size, _ = block_size(None, make_config(arguments, tokenizer), tokenizer)
    assert 20 <= size <= 24
    model = made(arguments, tokenizer, AutoModelForMaskedLM)
    ids = torch.full((1, size), tokenizer.convert_tokens_to_ids("a"))
    assert model(input_ids=ids).logits.shape == (1, size, len(tokenizer))


# Flags


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2", "model_name_or_path": "m"}, "--model_type makes a new model"),
        ({"model_type": "gpt2", "config_name": "m"}, "--model_type makes a new model"),
        ({"model_type": "gpt22"}, "--model_type 'gpt22' is no type of model .*; did you mean gpt2"),
        ({"model_name_or_path": "m", "config_overrides": "a=1"}, "--config_overrides is for new models"),
        ({"model_type": "gpt2", "config_overrides": "n_embd"}, "--config_overrides is name=value.*, not 'n_embd'"),
        ({"model_type": "gpt2", "new_tokenizer_size": 300, "tokenizer_name": "t"}, "exclude each other"),
        ({"model_name_or_path": "m", "new_tokenizer_size": 300}, "it needs --model_type"),
        ({"lora": True, "lora_rank": 0}, "--lora_rank must be 1 or more, not 0"),
        ({"lora": True, "lora_dropout": 1.0}, "--lora_dropout must be from 0 to below 1, not 1.0"),
        ({"lora_target_modules": ["q"]}, "--lora_target_modules needs --lora"),
    ],
)
def test_flags_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModelArguments(**settings)


def test_flags_that_make_no_model() -> None:
    with pytest.raises(InputError, match="no model: give --model_name_or_path, or --model_type for a new one"):
        LanguageModelArguments(tokenizer_name="t").check()
    for settings in ({"model_type": "gpt2"}, {"config_name": "c"}):
        with pytest.raises(InputError, match="a new model needs a tokenizer"):
            LanguageModelArguments(**settings).check()
    with pytest.raises(InputError, match="--lora saves adapters only"):
        LanguageModelArguments(config_name="c", tokenizer_name="t", lora=True).check()
    for settings in ({"model_name_or_path": "m", "lora": True}, {"config_name": "c", "tokenizer_name": "t"}):
        LanguageModelArguments(**settings).check()  # type: ignore[arg-type]


def test_a_token_that_ends_texts_and_pads_is_learned() -> None:
    causal = train_tokenizer(["the saw"], 260, masked=False, model_max_length=10**6)
    arguments = new("llama", config_overrides="hidden_size=16,intermediate_size=16,num_hidden_layers=1,"
                    "num_attention_heads=2,num_key_value_heads=2")  # fmt: skip
    config = make_config(arguments, causal)
    for _ in range(2):
        model = make_model(AutoModelForCausalLM, arguments, config, causal)
        ids = torch.tensor([[5, causal.eos_token_id, 6]])
        model(input_ids=ids, labels=ids).loss.backward()
        assert model.get_input_embeddings().weight.grad[causal.eos_token_id].any()


def test_models_of_one_configuration_start_alike(tokenizer: PreTrainedTokenizerFast) -> None:
    """Though the first was given a larger vocabulary."""
    config = GPT2Config(vocab_size=len(tokenizer) - 9, n_embd=8, n_layer=1, n_head=1)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make_model(AutoModelForCausalLM, LanguageModelArguments(config_name="c"), config, tokenizer))
    assert config.vocab_size == len(tokenizer) - 9
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_adapters_need_the_models_vocabulary(tokenizer: PreTrainedTokenizerFast, trained: str) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([f"new{number}" for number in range(50)])
    with pytest.raises(InputError, match="--lora trains no embeddings"):
        made(LanguageModelArguments(model_name_or_path=trained, lora=True), tokenizer)


def small_bert(**settings: Any) -> BertConfig:
    return BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, **settings)


def test_a_causal_model_does_not_look_ahead() -> None:
    for config in (
        GPT2Config(n_embd=8, n_layer=1, n_head=1),
        # Fewer tokens than it is tried on.
        GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=3),
        small_bert(is_decoder=True),
        XLNetConfig(d_model=8, n_layer=1, n_head=1, d_inner=8),
        small_bert(),
    ):
        model = AutoModelForCausalLM.from_config(config)
        if getattr(config, "is_decoder", False) or config.model_type == "gpt2":
            check_looks_back(model)
            assert model.training
        else:
            with pytest.raises(InputError, match=f"{config.model_type} sees the tokens that it is to predict"):
                check_looks_back(model)


def test_a_kind_of_model_that_there_is_not() -> None:
    check_kind(AutoModelForCausalLM, GPT2Config())
    with pytest.raises(InputError, match="a model of type vit is no CausalLM"):
        check_kind(AutoModelForCausalLM, ViTConfig())
    with pytest.raises(InputError, match="a model of type gpt2 is no MaskedLM"):
        check_kind(AutoModelForMaskedLM, GPT2Config())
