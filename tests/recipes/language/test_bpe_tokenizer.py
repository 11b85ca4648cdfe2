"""The tokenizer that is trained on the spot: it loses nothing, leaves nothing to chance, and comes back from disk."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, DataCollatorForLanguageModeling, GPT2Config

import hf_xgrad
from hf_xgrad.recipes.input_errors import InputError
from hf_xgrad.recipes.language.tokenizer import train_tokenizer

TEXTS = [
    "Return the largest item of an iterable, or the largest of its arguments.\n\n    >>> max(3, 7)\n    7\n",
    "Return the smallest item of an iterable.  Items are compared as they are, naïvely: größer — kleiner.\r\n",
    "class Interpreter:\n\tdef interpret(self, *arguments: int) -> None: ...\n" * 3,
]
ODD_TEXTS = (
    *(
        "",
        " ",
        "  two",
        "end ",
        "\t\n\r\n \x00",
        "\u00a0\u3000\u200b",
        "don't  Stop.Now",
        "12 345,67",
        "e\u0301 \u00e9",
    ),
    *(
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        "日本語のテキスト",
        "\ufeffmark",
        "\U0010ffff",
        "a , b .",
        "##ing Ġ Ċ ▁",
        "<s></s><mask><pad>",
        "[MASK]",
    ),
    *("<|endoftext|>", " <|mask|> <|pad|>", "<|startoftext|>x", "<|endoftext"),
)
BOTH = pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])


def trained(masked: bool, vocab_size: int = 330, texts: list[str] = TEXTS) -> Any:
    return train_tokenizer(texts, vocab_size, masked=masked, model_max_length=64)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = ((0, 0x7F), (0x80, 0x2FF), (0x300, 0xD7FF), (0xE000, 0x10FFFF), (0x1F300, 0x1F6FF), (0x9, 0x20))

    def character() -> str:
        return chr(rng.randint(*rng.choice(ranges)))

    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(count)]


@BOTH
@pytest.mark.parametrize("vocab_size", [260, 330])
def test_every_text_comes_back(masked: bool, vocab_size: int) -> None:
    tokenizer = trained(masked, vocab_size)
    for text in (*TEXTS, *ODD_TEXTS, *random_texts(400)):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        if "<|" not in text:
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def many_trained() -> str:
    """Both tokenizers, of enough texts for ties and for work to be shared among threads."""
    texts = TEXTS + random_texts(400)
    return "\n".join(trained(masked, 600, texts).backend_tokenizer.to_str() for masked in (False, True))


@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_texts_alone_decide_in_any_process(threads: str) -> None:
    code = "import test_bpe_tokenizer; print(test_bpe_tokenizer.many_trained())"
    folders = os.pathsep.join(map(str, (Path(__file__).parent, Path(hf_xgrad.__file__).parents[1])))
    hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": hashes, "PYTHONPATH": folders, "PYTHONUTF8": "1"}
    environment["RAYON_NUM_THREADS"] = threads
    run = [sys.executable, "-c", code]
    output = subprocess.run(run, check=True, env=environment, capture_output=True, encoding="utf-8").stdout
    assert output == many_trained() + "\n"


@BOTH
def test_it_comes_back_from_its_folder(masked: bool, tmp_path: Path) -> None:
    tokenizer = trained(masked)
    config = BertConfig if masked else GPT2Config
    tokenizer.save_pretrained(tmp_path / "alone")
    tokenizer.save_pretrained(tmp_path / "model")
    config().save_pretrained(tmp_path / "model")
    stored = tokenizer.backend_tokenizer.to_str()
    for folder in ("alone", "model"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert loaded.backend_tokenizer.to_str() == stored
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.model_max_length == 64
        for text in (*TEXTS, *ODD_TEXTS):
            assert dict(loaded(text)) == dict(tokenizer(text))
            assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
        assert dict(loaded(["a", "a b"], padding=True)) == dict(tokenizer(["a", "a b"], padding=True))


def test_causal_special_tokens() -> None:
    tokenizer = trained(False)
    ids = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.get_vocab()["<|endoftext|>"],
    }
    assert ids == {0}
    assert tokenizer.mask_token is None
    assert 0 not in tokenizer.encode("the end")
    assert tokenizer.encode("the end<|endoftext|>") == [*tokenizer.encode("the end"), 0]


def test_masked_special_tokens() -> None:
    tokenizer = trained(True)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert len({cls, sep, tokenizer.pad_token_id, tokenizer.mask_token_id}) == 4
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("the end", "items"))
    assert tokenizer.encode("the end") == [cls, *first, sep]
    pair = tokenizer("the end", "items", return_special_tokens_mask=True, return_token_type_ids=True)
    assert pair["input_ids"] == [cls, *first, sep, *second, sep]
    assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert pair["special_tokens_mask"] == [1] + [0] * len(first) + [1] + [0] * len(second) + [1]
    assert tokenizer.encode("a<|mask|>")[-2] == tokenizer.mask_token_id


@BOTH
def test_words(masked: bool) -> None:
    tokenizer = trained(masked)
    encoding = tokenizer("Interpreters interpret größer, naïvely", add_special_tokens=False)
    words: dict[int, list[int]] = {}
    for token, word in zip(encoding["input_ids"], encoding.word_ids(), strict=True):
        words.setdefault(word, []).append(token)
    assert [tokenizer.decode(ids) for ids in words.values()] == [
        "Interpreters",
        " interpret",
        " größer",
        ",",
        " naïvely",
    ]
    assert max(map(len, words.values())) > 1
    offsets = tokenizer(" on  it", return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    assert "".join(" on  it"[start:end] for start, end in offsets) == "onit"


def test_whole_word_masking() -> None:
    tokenizer = trained(True)
    text = "unbelievable interpreters zigzag across unlikely iterables"
    encoding = tokenizer(text, return_special_tokens_mask=True, return_offsets_mapping=True)
    words = torch.tensor([-1 if word is None else word for word in encoding.word_ids()])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, whole_word_mask=True, seed=0)
    masked = torch.stack([collator([dict(encoding)])["labels"][0] != -100 for _ in range(20)])
    assert not masked[:, words == -1].any()
    chosen = [masked[:, words == word] for word in range(6)]
    assert len({tuple(pieces[:, 0].tolist()) for pieces in chosen}) == 6
    for pieces in chosen:
        assert pieces.shape[1] > 1
        assert torch.equal(pieces.any(1), pieces.all(1))
        assert 0 < pieces.all(1).sum() < 20


@BOTH
def test_special_tokens_in_the_texts_stay_special(masked: bool) -> None:
    names = ("<|endoftext|>", "<|startoftext|>", "<|pad|>", "<|mask|>")
    tokenizer = trained(masked, 400, [f"One {name} two{name}three {name}{name}\n" for name in names] * 20)
    special = tokenizer.all_special_tokens
    # A learned token of the same name would have taken over the number of the special one.
    assert [tokenizer.get_vocab()[token] for token in special] == tokenizer.all_special_ids
    assert sorted(tokenizer.all_special_ids) == list(range(4 if masked else 1))
    for name in names:
        ids = tokenizer.encode(f"One {name} two", add_special_tokens=False)
        found = [tokenizer.decode(number) for number in ids if number in tokenizer.all_special_ids]
        assert found == [name] * (name in special)


@BOTH
def test_the_vocabulary_is_as_large_as_asked_for(masked: bool, capfd: pytest.CaptureFixture[str]) -> None:
    smallest = 260 if masked else 257
    assert len(trained(masked, smallest)) == smallest
    assert len(trained(masked, 300)) == 300
    # As far as the texts go.
    assert len(train_tokenizer(iter(["no"]), 1000, masked=masked, model_max_length=8)) == smallest
    assert len(train_tokenizer([], 1000, masked=masked, model_max_length=8)) == smallest
    assert capfd.readouterr() == ("", "")


@BOTH
def test_a_vocabulary_without_room_for_all_bytes_is_refused(masked: bool) -> None:
    smallest = 260 if masked else 257
    with pytest.raises(
        InputError, match=rf"^vocab_size={smallest - 1}: must be at least {smallest}, 256 for the bytes"
    ):
        trained(masked, smallest - 1)
