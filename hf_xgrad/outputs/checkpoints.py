"""Checkpoints on the disk: which of them are whole, and errors of writing them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_xgrad.outputs.files import INCOMPLETE_FILE, STATE_FILE, CheckpointError
from hf_xgrad.outputs.predictor_state import STATE_NAMES

logger = logging.get_logger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# What the Trainer, Accelerate and DeepSpeed write and read again; whatever else lies there is not ours to judge.
_READ_AGAIN = re.compile(
    r"trainer_state\.json|(adapter_)?config\.json"
    r"|(model|pytorch_model|adapter_model)[^/]*\.(safetensors|bin|json)"
    r"|(optimizer|scheduler|scaler|rng_state|random_states|sampler|custom_checkpoint|training_args)[^/]*\.(pt|pth|bin|pkl)"
    r"|(pytorch_model_fsdp|optimizer)_\d+/.*\.distcp|global_step\d+/.*\.pt"
)
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
# What there is beside weights, whatever form those have.
_NO_WEIGHTS = re.compile(
    r"\.|xgrad|optimizer|scheduler|scaler|rng_state|training_args|random_states|sampler|dl_state_dict|custom_checkpoint"
    r"|.*\.(json|jsonl|txt|md|jinja|model|log)$|latest$|zero_to_fp32\.py$"
)
_ZIP = b"PK\x03\x04"

# What a disk answers without naming a file.
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
_OF_SAFETENSORS = re.compile(r"(?:\(os error |Os \{ code: )(\d+)")
_OF_TORCH = re.compile(r"inline_container|PytorchStreamWriter|iostream error|Parent directory .* does not exist")
# Less than this is free where torch, which does not tell the cause, has filled a disk.
_FULL = 2**20


# ---- whole checkpoints ----


def checkpoint_to_resume(given: str | os.PathLike[str] | bool, output_dir: str) -> str | os.PathLike[str] | bool:
    """What `train(resume_from_checkpoint=given)` goes on from; to be called on every process.

    Args:
        given: a checkpoint, or True for the last whole one in `output_dir`.

    Returns:
        the checkpoint; True where there is none at all, for the Trainer to say so.

    Raises:
        ValueError: `given` is not whole, or none is.
    """
    if given is not True:
        # XGrad's own file is judged as it is read, if it is.
        reason = _of_any(fault(str(given), own=False))
        if reason is None:
            return given
        last, _ = _search(os.path.dirname(os.path.abspath(str(given))))
        way_out = f"The last whole one beside it is {last}." if last else "There is no whole one beside it."
        # The first words are those of the Trainer.
        raise ValueError(
            f"Can't find a valid checkpoint at {given}. XGrad: resume_from_checkpoint={str(given)!r} is not a whole "
            f"checkpoint: {reason}. {way_out}"
        )
    last, skipped = _search(output_dir)
    if last is None and skipped:
        raise _none_whole(output_dir, skipped)
    _warn_of(skipped)
    return True if last is None else last


def last_checkpoint(output_dir: str) -> str | None:
    """The last whole checkpoint of a run, with a warning for each later one; to be called on every process.

    None where nothing was ever saved to its end: a run may start from the beginning.

    Raises:
        ValueError: none is whole, though some were written to their end.
    """
    last, skipped = _search(output_dir)
    if last is None and any(_of_all(any(_was_finished(Path(path)) for path in skipped))):
        raise _none_whole(output_dir, skipped)
    _warn_of(skipped)
    return last


def _was_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, whatever has become of it."""
    return (checkpoint / STATE_FILE).is_file() and _fault_of_json(checkpoint / STATE_FILE) is None


def _none_whole(output_dir: str, skipped: Mapping[str, str]) -> ValueError:
    reasons = "; ".join(f"{os.path.basename(path)}: {reason}" for path, reason in skipped.items())
    return ValueError(
        f"XGrad: no checkpoint in {output_dir} is whole ({reasons}). Train from the start, in another folder or with "
        "these removed (resume_from_checkpoint=None), or name another checkpoint."
    )


def _warn_of(skipped: Mapping[str, str]) -> None:
    if not _is_distributed() or dist.get_rank() == 0:
        for path, reason in skipped.items():
            logger.warning(f"XGrad: {path} is skipped, as it is not a whole checkpoint: {reason}.")


def _search(output_dir: str) -> tuple[str | None, dict[str, str]]:
    """The last checkpoint that is whole, and why each later one is not.

    Every process looks for itself, as each may have a disk of its own, and what one finds counts for all: they have
    to go on from the same step. The names are those that the first process sees, for the others to keep in step.
    """
    skipped: dict[str, str] = {}
    for path in _of_all(_checkpoints(output_dir))[0]:
        reason = _of_any(fault(path))
        if reason is None:
            return path, skipped
        skipped[path] = reason
    return None, skipped


def _checkpoints(output_dir: str) -> list[str]:
    """Folders of checkpoints, the last one first."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = {name: int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))}
    paths = [os.path.join(output_dir, name) for name in sorted(steps, key=steps.__getitem__, reverse=True)]
    return [path for path in paths if os.path.isdir(path)]


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _of_all(value: Any) -> list[Any]:
    """`value` of every process."""
    if not _is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _of_any(reason: str | None) -> str | None:
    """The first process's reason that has one."""
    return next(filter(None, _of_all(reason)), None)


def fault(checkpoint: str, *, own: bool = True) -> str | None:
    """Why a checkpoint of the Trainer or of a loop is not whole; None where it is.

    A whole one was written to its end, and is all there: its state, weights, and the other parts that its files say
    it has. Looked at are names, headers and ends of files, never tensors, so that it is quick.

    Args:
        checkpoint: the folder.
        own: whether to look at XGrad's own files in it.
    """
    if not os.path.isdir(checkpoint):
        return "there is no such folder"
    return next(_faults(Path(checkpoint), own), None)


def missing_optimizer(checkpoint: str) -> str | None:
    """What somebody took out of a whole checkpoint, so that the optimizer starts anew; None where it goes on.

    The Trainer takes up neither the optimizer's state nor the schedule's without the other, and says nothing.
    """
    names = os.listdir(checkpoint)
    if not any(name.startswith(("optimizer", "global_step")) for name in names):
        return "optimizer.pt"
    return "scheduler.pt" if "optimizer.pt" in names and "scheduler.pt" not in names else None


def holds_mark_only(checkpoint: str) -> bool:
    """Whether a just-in-time checkpoint has been begun, on every process, in one that was whole before.

    To be called on every process.
    """
    marked = Path(checkpoint, INCOMPLETE_FILE).exists()
    return all(_of_all(marked and next(_faults(Path(checkpoint), own=True, marked=True), None) is None))


def _faults(checkpoint: Path, own: bool, marked: bool = False) -> Iterator[str]:
    if not marked and (checkpoint / INCOMPLETE_FILE).exists():
        yield f"it was being written when its run ended, as {INCOMPLETE_FILE} says"
    if not (checkpoint / STATE_FILE).exists():
        yield f"it has no {STATE_FILE}, which is written last"
    entries = sorted(checkpoint.iterdir())
    folders = [
        path for path in entries if re.fullmatch(r"(pytorch_model_fsdp|optimizer)_\d+|global_step\d+", path.name)
    ]
    for path in [*entries, *(inner for folder in folders for inner in sorted(folder.rglob("*")))]:
        name = path.relative_to(checkpoint).as_posix()
        is_own = STATE_NAMES.fullmatch(name) is not None
        if _READ_AGAIN.fullmatch(name) or (own and is_own):
            try:
                reason = _fault_of_file(path)
            except OSError as error:
                reason = f"cannot be read ({error.strerror or error})"
            if reason is not None:
                yield f"{name} {reason}"
    for single in _SINGLE_FILES:
        index = checkpoint / f"{single}.index.json"
        # As the Trainer reads them: the index only where there is no single file.
        if index.exists() and not (checkpoint / single).exists():
            reason = _fault_of_index(index)
            if reason is not None:
                yield f"{index.name} {reason}"
    if all(_NO_WEIGHTS.match(path.name) for path in entries):
        yield "it has no weights"
    for folder in folders:
        if any(folder.glob("*.distcp")) and not (folder / ".metadata").is_file():
            yield f"{folder.name} has no .metadata, which is written last"
    latest = checkpoint / "latest"  # DeepSpeed's
    tag = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    if tag.startswith("global_step") and not (checkpoint / tag).is_dir():
        yield f"it has no folder {tag!r}, which `latest` names"


def _fault_of_file(path: Path) -> str | None:
    """What is wrong with a file that is read again."""
    if not path.is_file():
        return "is not a file, or a link to none"
    if path.suffix == ".json":
        return _fault_of_json(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                return None
        except SafetensorError as error:
            return f"is cut off or damaged ({error})"
    with path.open("rb") as file:
        start = file.read(len(_ZIP))
    if not start.strip(b"\0"):
        return "is empty"
    # Only what begins as torch's zip files do: there are older kinds.
    return "is cut off" if _ZIP.startswith(start) and not zipfile.is_zipfile(path) else None


def _fault_of_index(path: Path) -> str | None:
    content = json.loads(path.read_bytes())
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        return "has no weight_map"
    missing = sorted({str(name) for name in weights.values() if not (path.parent / str(name)).is_file()})
    return f"names files that are not there: {', '.join(missing[:3])}" if missing else None


def _fault_of_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    if path.name == STATE_FILE and not (isinstance(content, dict) and isinstance(content.get("global_step"), int)):
        return "has no global_step"
    return None


# ---- writing ----


@contextmanager
def writing(folder: str, output_dir: str) -> Iterator[None]:
    """`with` this: what a disk refuses becomes a `CheckpointError` of one line; other errors pass.

    Args:
        folder: what is written.
        output_dir: where the run's checkpoints are, if `folder` is not among them itself.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = _free_bytes(folder)
        reason = _reason(error, folder, free)
        if reason is None:
            raise
        if _CHECKPOINT.fullmatch(os.path.basename(folder)):
            output_dir = os.path.dirname(folder)
        # Not _search: the other processes are elsewhere.
        last = next((path for path in _checkpoints(output_dir) if fault(path) is None), None)
        way_out = (
            f"Earlier checkpoints are untouched: with that mended, resuming goes on from {last}."
            if last is not None
            else f"There is no whole checkpoint in {output_dir} to resume from."
        )
        raise CheckpointError(
            f"XGrad: {folder} could not be written: {reason} ({free:,} bytes free). {way_out}"
        ) from error


def _reason(error: Exception, folder: str, free: int) -> str | None:
    """Why a write to disk failed, or None for errors of other kinds."""
    if isinstance(error, OSError):
        # What the network raises names no file, and nor does a CheckpointError from within.
        if error.filename is None:
            return error.strerror if error.errno in _OF_DISKS else None
        # What could not be read elsewhere is another matter.
        is_here = Path(os.fsdecode(error.filename)).absolute().is_relative_to(Path(folder).absolute())
        return f"{error.strerror}: {error.filename}" if is_here or error.errno in _OF_DISKS else None
    if isinstance(error, SafetensorError):
        code = _OF_SAFETENSORS.search(str(error))
        return os.strerror(int(code[1])) if code else None
    if not _OF_TORCH.search(str(error)):
        return None
    cause = os.strerror(errno.ENOSPC) if free < _FULL else "a file could not be written to its end"
    return f"{cause} ({' '.join(str(error).split())})"


def _free_bytes(folder: str) -> int:
    path = Path(folder).absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free


def begin_writing(checkpoint: str) -> None:
    """Marks what may be there already as not whole, until its state is written anew, which comes last."""
    for name in (STATE_FILE, INCOMPLETE_FILE):
        Path(checkpoint, name).unlink(missing_ok=True)
