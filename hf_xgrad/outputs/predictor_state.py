"""XGrad's own file in a checkpoint: what a predictor remembers beside the optimizer's state."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from hf_xgrad.predictor import WeightPredictor

_STEM = "xgrad"
# The names of these files.
STATE_NAMES = re.compile(rf"{_STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors")
_STEPS_PREFIX = "steps."
_METADATA = {"holds", "lrs"}
_STILL = "still"


def state_name(process: Sequence[int] | None) -> str:
    """Name of a predictor's file in a checkpoint; of sharded weights each process `(rank, processes)` has one."""
    part = "" if process is None else f"-{process[0] + 1:05d}-of-{process[1]:05d}"
    return f"{_STEM}{part}.safetensors"


def state_names(checkpoint: str) -> list[str]:
    """Names of all such files in a checkpoint."""
    names = os.listdir(checkpoint) if os.path.isdir(checkpoint) else []
    return sorted(filter(STATE_NAMES.fullmatch, names))


def write_state(state: Mapping[str, Any], checkpoint: str) -> None:
    """Writes what a predictor's `state_dict` gave, all of it or nothing."""
    tensors = {name: weight.contiguous() for name, weight in state.get("weights", {}).items()}
    tensors |= {f"{_STEPS_PREFIX}{name}": tensor for name, tensor in state.get("steps", {}).items()}
    metadata = None
    if "holds" in state:
        metadata = {"holds": state["holds"], "lrs": json.dumps(state["lrs"]), _STILL: json.dumps(state[_STILL])}
    path = Path(checkpoint, state_name(state.get("process")))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whatever has the name is replaced, even a link, which is not followed.
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    save_file(tensors, unfinished, metadata)
    unfinished.replace(path)


def load_state(predictor: WeightPredictor, checkpoint: str) -> set[str]:
    """Gives a predictor what a checkpoint has for it, and returns which keys of its `state_dict` those were.

    Raises:
        ValueError: the file cannot be used; nothing was loaded.
    """
    process = predictor.process
    path = Path(checkpoint, state_name(process))
    if not os.path.lexists(path):
        return set()
    try:
        _check_place(path)
        state = _read_state(path) | ({"process": process} if process else {})
        predictor.load_state_dict(state)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"XGrad: {path} cannot be used ({' '.join(str(error).split())}). Resume from another checkpoint, or "
            "remove the file: the prediction then starts anew."
        ) from error
    return set(state)


def _check_place(path: Path) -> None:
    """Refuses what is no file, or a link out of the checkpoint; those of the Hub's cache lead to its blobs."""
    real, folder = path.resolve(), path.parent.resolve()
    places = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    if not any(real.is_relative_to(place) for place in places):
        raise ValueError(f"it is a link out of the checkpoint, to {real}")
    if not real.is_file():
        raise ValueError("it is not a file")


def _read_state(path: Path) -> dict[str, Any]:
    """The state of a predictor, as `write_state` wrote it; what is in it is for the predictor to judge."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    steps = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_STEPS_PREFIX)}
    state: dict[str, Any] = {}
    if tensors or metadata:
        if set(metadata) - {_STILL} != _METADATA:
            raise ValueError(f"its metadata are {sorted(metadata)}, not {sorted({*_METADATA, _STILL})}")
        state |= {"holds": metadata["holds"], "lrs": json.loads(metadata["lrs"]), "weights": tensors}
        state[_STILL] = json.loads(metadata.get(_STILL, "[]"))
    if steps:
        state["steps"] = {name.removeprefix(_STEPS_PREFIX): tensor for name, tensor in steps.items()}
    return state
