"""Loads what the model flags name: configuration, tokenizer, weights; what cannot be loaded is named in one line."""

from contextlib import AbstractContextManager
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_xgrad.recipes.arguments import ModelArguments
from hf_xgrad.recipes.input_errors import InputError, as_input_error


def _loading(what: str, name: str) -> AbstractContextManager[None]:
    return as_input_error(OSError, ValueError, ImportError, prefix=f"cannot load the {what} {name}: ")


def _hub_settings(model_args: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Load the model's configuration."""
    name = model_args.config_name or model_args.model_name_or_path or ""
    with _loading("configuration", name):
        return AutoConfig.from_pretrained(name, **_hub_settings(model_args))


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer."""
    name = model_args.tokenizer_name or model_args.model_name_or_path or ""
    with _loading("tokenizer", name):
        return AutoTokenizer.from_pretrained(name, **_hub_settings(model_args))


def ensure_padding(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give tokenizer and configuration a padding token where they have none."""
    ensure_padding_token(tokenizer)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def ensure_padding_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a padding token where it has none."""
    if tokenizer.pad_token is None:
        # GPT-2 and its like were trained without padding. The attention mask hides it, whichever token it is.
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token


def load_model(auto_class: Any, model_args: ModelArguments, config: PreTrainedConfig, **settings: Any) -> Any:
    """Load the weights, or make new ones where no model is named, by one of Transformers' AutoModel classes.

    `settings` are further ones that `from_pretrained` and `from_config` both take.

    They are float32 unless --dtype says otherwise: checkpoints stored in 16 bits would be loaded so, and a predicted
    move is mostly smaller than what 16-bit weights resolve.
    """
    if model_args.model_name_or_path is None:
        kind = {} if model_args.dtype == "auto" else {"dtype": model_args.dtype}
        # New weights: the model is no version of the one whose configuration this is.
        config._name_or_path = ""
        with as_input_error(ValueError, ImportError, prefix="cannot make the model: "):
            return auto_class.from_config(config, trust_remote_code=model_args.trust_remote_code, **kind, **settings)
    with _loading("model", model_args.model_name_or_path):
        return auto_class.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            dtype=model_args.dtype,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            **settings,
            **_hub_settings(model_args),
        )
