"""Reads what a run of a script leaves, without what a clock decides."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# The Trainer of the language models counts the tokens of its input, the loop does not.
_UNLIKE = ("_runtime", "_per_second", "total_flos", "num_input_tokens_seen")


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def untimed(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if not name.endswith(_UNLIKE)}


def history(folder: Path) -> list[dict[str, Any]]:
    return [untimed(entry) for entry in read(folder / "trainer_state.json")["log_history"]]


def same_weights(first: Path, second: Path, name: str = "model.safetensors") -> bool:
    one, other = load_file(first / name), load_file(second / name)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
