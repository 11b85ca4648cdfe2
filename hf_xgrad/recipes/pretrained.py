"""Loads what the model flags name: configuration, tokenizer, weights; what cannot be loaded is named in one line."""

import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_xgrad.recipes.arguments import ModelArguments
from hf_xgrad.recipes.input_errors import InputError, as_input_error

# Tokenizers that know of no limit have a huge number there.
NO_LIMIT = 10**6


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


def fit_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model room for every token of its tokenizer, and the same padding token.

    A classifier that does not embed a padding token looks for it by its number: for another one's it would take
    padding for the end of a text. The Trainer sees to that, too, but in `train` only.
    """
    if lacks_tokens(model, tokenizer):
        model.resize_token_embeddings(_tokens(tokenizer))
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = tokenizer.pad_token_id


def lacks_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer has tokens that the model does not know."""
    return _tokens(tokenizer) > known_tokens(model)


def known_tokens(model: Any) -> int:
    """Return how many tokens a model embeds; sys.maxsize where it has no table of them."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        weight = None
    # Under ZeRO-3 a weight is empty, and remembers its shape.
    return sys.maxsize if weight is None else int(getattr(weight, "ds_shape", weight.shape)[0])


def _tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    # Numbers may have been left out: then it has fewer tokens than the greatest of them tells.
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def most_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, model: nn.Module | None = None) -> int:
    """Return how many tokens a row may have, by the tokenizer and the model of this configuration; or NO_LIMIT."""
    limits = (tokenizer.model_max_length, positions(config, model))
    return min((limit for limit in limits if limit is not None and 0 < limit < NO_LIMIT), default=NO_LIMIT)


def positions(config: PreTrainedConfig, model: nn.Module | None = None) -> int | None:
    """Return how many tokens a model has positions for, None for any number.

    RoBERTa and its like begin to count behind the number of their padding token: those before it are no use.
    """
    count: int | None = getattr(config, "max_position_embeddings", None)
    if count is None or count < 1:
        return None
    if model is None:
        # The code of a model that brings its own is not run for this.
        if hasattr(config, "auto_map"):
            return count
        with as_input_error(ValueError, KeyError, ImportError, prefix="cannot make the model: "), torch.device("meta"):
            model = AutoModel.from_config(config)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return count - module.padding_idx - 1
    return count
