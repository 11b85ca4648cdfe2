"""A tokenizer trained on the spot: byte-level BPE, which gives every text back exactly as it was."""

from collections.abc import Iterable

from tokenizers import ByteLevelBPETokenizer, Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_xgrad.recipes.input_errors import InputError

# Written so that no ordinary text has them: `<s>` would be found in every text on HTML.
END_OF_TEXT = "<|endoftext|>"
MASKED_TOKENS = {
    "cls_token": "<|startoftext|>",
    "sep_token": END_OF_TEXT,
    "pad_token": "<|pad|>",
    "mask_token": "<|mask|>",
}
# Nothing is padded where texts are cut into blocks; a causal model needs no padding token of its own.
CAUSAL_TOKENS = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, masked: bool, model_max_length: int
) -> PreTrainedTokenizerFast:
    """Return a tokenizer for a masked or a causal language model whose vocabulary is learned from the texts.

    The same texts give the same vocabulary. Few texts give one smaller than `vocab_size`: a pair of tokens becomes a
    new token only if it occurs twice. For a masked model a text is encoded between a token that starts and one that
    ends it, for a causal model without either.

    Raises:
        InputError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    special_tokens = MASKED_TOKENS if masked else CAUSAL_TOKENS
    names = list(dict.fromkeys(special_tokens.values()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(names)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size={vocab_size}: must be at least {smallest}, {len(alphabet)} for the bytes and {len(names)} "
            "for the special tokens"
        )
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size, show_progress=False, special_tokens=names)
    tokenizer = Tokenizer.from_str(trained.to_str())
    # Offsets leave out the space before a word: who maps tokens to the text wants the words.
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    if masked:
        start, end = MASKED_TOKENS["cls_token"], MASKED_TOKENS["sep_token"]
        template = processors.TemplateProcessing(
            single=f"{start} $A {end}",
            pair=f"{start} $A {end} $B:1 {end}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (start, end)],
        )
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=model_max_length, **special_tokens)
