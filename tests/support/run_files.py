"""What runs of the scripts read and leave: small texts, and the results without what a clock decides."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import trainer as transformers_trainer

from hf_xgrad.outputs import hub
from hf_xgrad.recipes.loop import results as loop_results

WORDS = ("the", "a", "boy", "girl", "dog", "sees", "likes", "runs", "sleeps", "and", "or", "but", "never", "often")
# The Trainer of the language models counts the tokens of its input, the loop does not.
_UNLIKE = ("_runtime", "_preparation_time", "_per_second", "total_flos", "num_input_tokens_seen")


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith(_UNLIKE)}


def history(folder: Path) -> list[dict[str, Any]]:
    return [untimed(entry) for entry in read(folder / "trainer_state.json")["log_history"]]


def same_weights(first: Path, second: Path, name: str = "model.safetensors") -> bool:
    one, other = load_file(first / name), load_file(second / name)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def write_texts(folder: Path) -> tuple[str, ...]:
    """Write small training and validation texts, and return the flags that name them."""
    draw = random.Random(0)
    for name, count in (("train", 20), ("validation", 12)):
        lines = (" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(count))
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return ("--train_file", str(folder / "train.txt"), "--validation_file", str(folder / "validation.txt"))


def with_hub(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> list[Any]:
    """Put these methods in place of the Hub's; return the tokens that it will be given."""
    tokens: list[Any] = []

    def create(name: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=f"me/{name}")

    stand_in = SimpleNamespace(**{"create_repo": create, **methods})

    def api(token: str | None) -> SimpleNamespace:
        tokens.append(token)
        return stand_in

    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: stand_in)
    for module in (hub, loop_results):
        monkeypatch.setattr(module, "HfApi", api)
    return tokens
