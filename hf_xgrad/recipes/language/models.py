"""The model of the language modelling scripts: its flags, a new configuration and tokenizer, LoRA adapters."""

import copy
import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from hf_xgrad.recipes.arguments import ModelArguments
from hf_xgrad.recipes.input_errors import InputError, as_input_error, check_positive, describe_choices
from hf_xgrad.recipes.language.data import Texts
from hf_xgrad.recipes.language.tokenizer import train_tokenizer
from hf_xgrad.recipes.pretrained import (
    NO_LIMIT,
    ensure_padding_token,
    fit_tokenizer,
    known_tokens,
    lacks_tokens,
    load_config,
    load_model,
    load_tokenizer,
    most_tokens,
    positions,
)

# Flags that name a model.
MODEL_SOURCES = ("model_name_or_path", "config_name", "model_type")
_MOST_TOKENS = 1024


@dataclasses.dataclass
class LanguageModelArguments(ModelArguments):
    """Which model; or a new one, and how large."""

    model_type: str | None = dataclasses.field(
        default=None, metadata={"help": "Pretrain a new model of this type (gpt2, llama, bert...)."}
    )
    config_overrides: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Settings of a new model that differ from its type's: n_embd=128,n_layer=4,n_head=4."},
    )
    new_tokenizer_size: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Train a byte-level BPE tokenizer with so many tokens on the training texts, instead of loading "
            "one; --model_type only."
        },
    )
    attn_implementation: str | None = dataclasses.field(
        default=None, metadata={"help": "Attention: eager, sdpa, flash_attention_2... Left out: the model's default."}
    )
    low_cpu_mem_usage: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Load the weights without a second copy of them in memory. Transformers 5 does so in any case: "
            "the flag is here for command lines that have it. --dtype bfloat16 halves what remains."
        },
    )
    lora: bool = dataclasses.field(
        default=False, metadata={"help": "Train LoRA adapters (peft) and leave the model's own weights alone."}
    )
    lora_rank: int = dataclasses.field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = dataclasses.field(
        default=16, metadata={"help": "The adapters' output is multiplied by alpha / rank."}
    )
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Modules that get adapters, or all-linear. Left out: peft's choice for the type of model."},
    )

    def __post_init__(self) -> None:
        if self.model_type is not None and (self.model_name_or_path or self.config_name):
            raise ValueError("--model_type makes a new model: it excludes --model_name_or_path and --config_name")
        if self.model_type is not None and self.model_type not in CONFIG_MAPPING:
            close = describe_choices(self.model_type, list(CONFIG_MAPPING))
            raise ValueError(f"--model_type {self.model_type!r} is no type of model that Transformers knows{close}")
        if self.config_overrides and self.model_name_or_path:
            raise ValueError("--config_overrides is for new models: it excludes --model_name_or_path")
        if self.config_overrides and not all("=" in pair for pair in self.config_overrides.split(",")):
            raise ValueError(f"--config_overrides is name=value,name=value..., not {self.config_overrides!r}")
        if self.new_tokenizer_size is not None and self.tokenizer_name:
            raise ValueError("--new_tokenizer_size and --tokenizer_name exclude each other: give one of the two")
        if self.new_tokenizer_size is not None and self.model_type is None:
            raise ValueError("--new_tokenizer_size makes a vocabulary for a new model: it needs --model_type")
        check_positive("lora_rank", self.lora_rank)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must be from 0 to below 1, not {self.lora_dropout}")
        if self.lora_target_modules and not self.lora:
            raise ValueError("--lora_target_modules needs --lora")

    def check(self) -> None:
        """Refuse what does not make a model."""
        if not any(getattr(self, name) for name in MODEL_SOURCES):
            raise InputError("no model: give --model_name_or_path, or --model_type for a new one")
        if self.model_name_or_path is None and self.tokenizer_name is None and self.new_tokenizer_size is None:
            raise InputError("a new model needs a tokenizer: give --tokenizer_name or --new_tokenizer_size")
        if self.lora:
            if self.model_name_or_path is None:
                raise InputError("--lora saves adapters only, for a model that is stored: give --model_name_or_path")
            with as_input_error(ImportError, prefix="--lora needs the peft library (pip install peft): "):
                import peft  # noqa: F401


def make_tokenizer(model_args: LanguageModelArguments, texts: Texts, *, masked: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train one on the texts."""
    if model_args.new_tokenizer_size is None:
        return load_tokenizer(model_args)
    with as_input_error(InputError, prefix="--new_tokenizer_size: "):
        return train_tokenizer(
            texts.for_tokenizer(), model_args.new_tokenizer_size, masked=masked, model_max_length=NO_LIMIT
        )


def make_config(model_args: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Load the configuration, or make one of the type asked for that fits the tokenizer."""
    overrides = model_args.config_overrides
    kind = None if model_args.model_type is None else CONFIG_MAPPING[model_args.model_type]
    config = load_config(model_args) if kind is None else kind()
    ensure_padding_token(tokenizer)
    if config.pad_token_id == tokenizer.eos_token_id:
        # Many models learn nothing of the token that pads, and this one also ends the texts.
        config.pad_token_id = None
    if overrides:
        with as_input_error(ValueError, TypeError, prefix=f"--config_overrides {overrides}: "):
            config.update_from_string(overrides)
    if kind is None:
        return config
    # The overrides are read as the types of the settings that they replace; made anew, the configuration works out
    # from them what follows from them (the size of an attention head, say).
    names = [pair.partition("=")[0] for pair in (overrides or "").split(",") if pair]
    with as_input_error(
        ValueError, TypeError, prefix=f"cannot make a configuration of type {model_args.model_type}: "
    ):
        return kind(**_vocabulary(config, tokenizer) | {name: getattr(config, name) for name in names})


def _vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the settings of a configuration that its tokenizer decides."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names if hasattr(config, name)}
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokens["pad_token_id"] = None
    return {"vocab_size": len(tokenizer), **tokens}


def check_kind(auto_class: Any, config: PreTrainedConfig) -> None:
    """Refuse a configuration that `auto_class` makes no model of."""
    if type(config) not in auto_class._model_mapping and not hasattr(config, "auto_map"):
        kind = auto_class.__name__.removeprefix("AutoModelFor")
        raise InputError(f"a model of type {config.model_type} is no {kind}: Transformers has no such model")


def check_looks_back(model: Any) -> None:
    """Refuse a causal model that sees the tokens which it is to predict."""
    if model.config._attn_implementation not in ("eager", "sdpa"):
        # The others may need a device that the model is not on yet.
        return
    row = torch.arange(min(8, positions(model.config, model) or 8))
    rows = torch.stack([row, row.clone()]) % known_tokens(model)
    rows[1, -1] = rows[0, 0]
    everything = torch.ones_like(rows, device=model.device)
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=rows.to(model.device), attention_mask=everything).logits
    model.train(was_training)
    # More than a difference in rounding, which grouping tokens by experts, say, can make.
    tolerance = 64 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if (logits[0, :-1] - logits[1, :-1]).abs().max() > tolerance:
        raise InputError(
            f"a model of type {model.config.model_type} sees the tokens that it is to predict: train it by `mlm` "
            "(or make a new one that looks back only: --config_overrides is_decoder=true, where its type has that)"
        )


def make_model(
    auto_class: Any,
    model_args: LanguageModelArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    """Load the weights or make new ones, with room for every token; with --lora, add the adapters."""
    attention = model_args.attn_implementation
    settings = {} if attention is None else {"attn_implementation": attention}
    # A copy, as a new vocabulary changes it: the next model is to be made from what this one was.
    model = load_model(auto_class, model_args, copy.deepcopy(config), **settings)
    if model_args.lora and lacks_tokens(model, tokenizer):
        raise InputError("--lora trains no embeddings: the tokenizer has tokens that the model does not know")
    # For whoever generates, the padding token, too.
    fit_tokenizer(model, tokenizer)
    return _with_adapters(model, model_args) if model_args.lora else model


def _with_adapters(model: Any, model_args: LanguageModelArguments) -> Any:
    import peft

    modules: Any = model_args.lora_target_modules
    config = peft.LoraConfig(
        r=model_args.lora_rank,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
    )
    with as_input_error(ValueError, prefix="--lora: "):
        return peft.get_peft_model(model, config)


def block_size(asked: int | None, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """Return how many tokens a block has: those asked for, or as many as the model takes, 1024 at most.

    The second value says whether more were asked for than the model takes.
    """
    most = most_tokens(tokenizer, config)
    if asked is None:
        return min(most, _MOST_TOKENS), False
    return min(asked, most), asked > most
