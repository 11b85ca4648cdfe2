"""The embedded data set: what it promises about its sentences, and that it is neither trivial nor unlearnable."""

import difflib
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_xgrad.recipes import demo
from hf_xgrad.recipes.corpora import acceptability
from hf_xgrad.recipes.corpora.acceptability import (
    LABEL_NAMES,
    Pair,
    generate_pairs,
    make_config,
    make_rows,
    make_tokenizer,
    write_data_set,
)

PAIRS = generate_pairs(2100, seed=5)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_seed_alone_decides_in_any_process(tmp_path: Path) -> None:
    code = "import pathlib, sys, acceptability; acceptability.write_data_set(pathlib.Path(sys.argv[1]), 60, 20, 7)"
    scripts = str(Path(acceptability.__file__).parent)
    hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = os.environ | {"PYTHONHASHSEED": hashes, "PYTHONPATH": scripts}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "1")], check=True, env=environment)
    write_data_set(tmp_path / "2", 60, 20, 7)
    assert digest(tmp_path / "1") == digest(tmp_path / "2")
    assert make_rows(60, 20, 7) != make_rows(60, 20, 8)


def is_minimal(pair: Pair) -> bool:
    """Whether one word was exchanged, added or dropped, or two were swapped."""
    good, bad = pair.acceptable.lower().split(), pair.unacceptable.lower().split()
    if len(good) != len(bad):
        changes = [
            c for c in difflib.SequenceMatcher(None, good, bad, autojunk=False).get_opcodes() if c[0] != "equal"
        ]
        return len(changes) == 1 and max(changes[0][2] - changes[0][1], changes[0][4] - changes[0][3]) == 1
    places = [place for place in range(len(good)) if good[place] != bad[place]]
    swapped = len(places) == 2 and [good[p] for p in places] == [bad[p] for p in reversed(places)]
    return len(places) == 1 or swapped


def test_every_violation_is_minimal() -> None:
    assert [pair for pair in PAIRS if not is_minimal(pair)] == []


def test_no_sentence_is_both_acceptable_and_not() -> None:
    good, bad = {pair.acceptable for pair in PAIRS}, {pair.unacceptable for pair in PAIRS}
    assert len(good) == len(bad) == len(PAIRS)
    assert not good & bad
    # Nor would more sentences of the grammar make one acceptable.
    assert not {pair.acceptable for pair in generate_pairs(20_000, seed=6)} & bad


def test_all_phenomena_are_there_equally() -> None:
    assert Counter(pair.phenomenon for pair in PAIRS) == dict.fromkeys(acceptability.RULES, 300)


def test_the_splits_are_balanced_and_share_no_sentence() -> None:
    train, validation = make_rows(400, 100, 0)
    for rows, pairs in ((train, 400), (validation, 100)):
        assert Counter(row["label"] for row in rows) == dict.fromkeys(LABEL_NAMES, pairs)
    train_sentences, validation_sentences = ({str(row["sentence"]).lower() for row in r} for r in (train, validation))
    assert not train_sentences & validation_sentences
    assert len(train_sentences | validation_sentences) == 1000


def test_the_tokenizer_and_the_model_come_back_from_their_folder(tmp_path: Path) -> None:
    write_data_set(tmp_path, 700, 100, 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    for row in rows:
        ids = tokenizer(row["sentence"])["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["sentence"].lower()
    pair = tokenizer("The boy .", "The girl .")
    assert pair["token_type_ids"] == [0] * 5 + [1] * 4
    model = AutoModelForSequenceClassification.from_config(make_config(tokenizer))
    assert model.config.vocab_size == len(tokenizer)
    assert make_tokenizer(["B a"]).get_vocab()["a"] < make_tokenizer(["B a"]).get_vocab()["b"]


def guess_from_words(train: list[dict[str, object]], validation: list[dict[str, object]]) -> float:
    """Return the accuracy of a logistic regression on which words there are."""
    words = CountVectorizer(token_pattern=r"\S+")
    seen = words.fit_transform(row["sentence"] for row in train)
    model = LogisticRegression(max_iter=2000).fit(seen, [row["label"] for row in train])
    held_out = words.transform(row["sentence"] for row in validation)
    return float(model.score(held_out, [row["label"] for row in validation]))


def test_the_words_alone_do_not_tell() -> None:
    # The majority gets 0.5.
    assert 0.45 < guess_from_words(*make_rows(2000, 500, 0)) < 0.62


@pytest.mark.slow
def test_a_small_model_learns_more_than_the_words_tell(tmp_path: Path) -> None:
    assert demo.main(["--output_dir", str(tmp_path)]) == 0
    for run in ("xgrad", "xgrad-baseline"):
        found = json.loads((tmp_path / run / "eval_results.json").read_text())["eval_accuracy"]
        words = guess_from_words(*make_rows(**demo.DATA))
        assert words + 0.12 < found < 1.0
