"""What Transformers, TRL and peft write into the card of a model, set right: metadata, names, optimizer, table."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load, metadata_save
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch.optim import Optimizer

from hf_xgrad.core.refusals import unwrap_optimizer
from hf_xgrad.outputs.files import CARD_FILE

if TYPE_CHECKING:
    from hf_xgrad.outputs.model_card import TrainedModel

PAPER = "https://arxiv.org/abs/2305.18240"
TAGS = ("xgrad", "generated_from_trainer", "arxiv:2305.18240")


_NOT_ON_HUB = "a model that is not on the Hub"


def is_hub_id(name: object) -> bool:
    """Whether `name` can be an id on the Hub, and is no file or folder here."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def base_model_of(model: Any) -> str | None:
    """What the model was loaded from, whatever it is; None of a new one."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


@contextmanager
def naming_hub_models_only(model: Any) -> Iterator[None]:
    """`with` this: a card that is written does not name, nor link to, a base model that is not on the Hub."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "_name_or_path") or is_hub_id(base_model_of(model)):
        yield
        return
    name = config._name_or_path
    # A folder is what both Transformers and TRL leave out; of no name at all the former makes an empty link.
    config._name_or_path = os.curdir
    try:
        yield
    finally:
        config._name_or_path = name


@contextmanager
def with_readable_log(state: Any) -> Iterator[None]:
    """`with` this: Transformers finds all evaluations in the log of a Trainer's state.

    It takes those before the first entry with "train_runtime" for the training's. Where tokens are counted every
    entry has one, and none has where a run was stopped after its last checkpoint.
    """
    log = state.log_history
    entries = [{name: entry[name] for name in sorted(entry, key=_in_a_table)} for entry in log]
    for entry in entries:
        # Measured where a model is evaluated that was not trained before.
        entry.pop("eval_model_preparation_time", None)
        if "loss" in entry:
            entry.pop("train_runtime", None)
    if any("loss" in entry for entry in entries) and not any("train_runtime" in entry for entry in entries):
        # The last evaluation came after the training if there is one of the same step before it.
        evaluated = [entry["step"] for entry in entries if "eval_loss" in entry and "step" in entry]
        again = "eval_loss" in entries[-1] and len(evaluated) > 1 and evaluated[-1] == evaluated[-2]
        entries.insert(len(entries) - again, {"train_runtime": None})
    state.log_history = entries
    try:
        yield
    finally:
        state.log_history = log


def _in_a_table(name: str) -> tuple[bool, str]:
    """The order of columns, whether a log was read from a file, which sorts it, or not."""
    return name != "eval_loss", name


# ---- metadata ----


def correct_metadata(data: ModelCardData, trained: TrainedModel) -> None:
    """Takes out what the Hub would reject the whole card for, and adds our tags."""
    _leave_out_local_names(data, trained.builder)
    if trained.config.active:
        data.tags = list(dict.fromkeys([*data.get("tags", []), *TAGS]))
    data.pipeline_tag = data.pipeline_tag or trained.task
    if data.eval_results is not None:
        data.eval_results = [
            result
            for result in data.eval_results
            if is_finite(result.metric_value)
            and is_hub_id(result.dataset_type)
            and result.dataset_type != trained.builder
        ]
        for result in data.eval_results:
            _correct_result(result, trained.split)


def correct_saved_card(folder: str | os.PathLike[str]) -> None:
    """Takes local names out of the card in a folder, if there is one.

    Beside adapters peft writes a card that names their base model, whatever it is. The Hub then rejects the folder.
    """
    path = Path(folder, CARD_FILE)
    data = metadata_load(path) if path.is_file() else None
    if data:
        before = copy.deepcopy(data)
        _leave_out_local_names(data)
        if data != before:
            metadata_save(path, data)


def _leave_out_local_names(data: dict[str, Any] | ModelCardData, builder: str | None = None) -> None:
    """Takes out what the Hub rejects a card for: base models and data sets that are no ids.

    Args:
        data: the metadata, which are changed.
        builder: what built the data set, which Transformers takes for an id.
    """

    def keep(key: str, valid: Callable[[Any], bool]) -> None:
        given = data.get(key)
        kept = [name for name in ([given] if isinstance(given, str) else given or []) if valid(name)]
        data.pop(key, None)
        if kept:
            data[key] = kept[0] if isinstance(given, str) else kept

    keep("base_model", is_hub_id)
    keep("datasets", lambda name: is_hub_id(name) and name != builder)
    # peft makes a tag of the base model, whatever its name.
    keep("tags", lambda tag: not str(tag).startswith("base_model:") or is_hub_id(tag.rpartition(":")[2]))


def _correct_result(result: EvalResult, split: str | None) -> None:
    """Completes a result by its configuration and split. What Transformers does not know of these it writes "None"."""
    for name in ("dataset_config", "dataset_split", "dataset_args"):
        if getattr(result, name) == "None":
            setattr(result, name, None)
    if isinstance(result.dataset_args, str):
        result.dataset_config = result.dataset_config or result.dataset_args
    result.dataset_split = result.dataset_split or split


# ---- text ----


def correct_text(text: str, trained: TrainedModel) -> str:
    """A Trainer's text, where it is not what a reader wants or not true."""
    for theirs, ours in _mended(trained):
        text = text.replace(theirs, ours)
    text = re.sub(r"\bOptimizerNames\.(\w+)", lambda match: match[1].lower(), text)
    # A heading without its table.
    text = re.sub(r"### Training results\n\s*(?=#)", "", text)
    optimizer = known_optimizer(trained.optimizer)
    if optimizer is None:
        return text
    group = optimizer.param_groups[0]
    if trained.own_optimizer:
        settings = (
            f"{name}={value}" for name, value in group.items() if isinstance(value, int | float | tuple) and value
        )
        described = f"\n- optimizer: {type(optimizer).__name__} with {', '.join(settings)}"
        return re.sub(r"\n- optimizer: Use .*( are:\n.*)?", lambda _: described, text)
    if isinstance(group.get("eps"), float):
        # Printed is `adam_epsilon`, which is not what every optimizer takes.
        text = re.sub(r"(\n- optimizer: Use \S+ with betas=\(.*?\) and epsilon=)\S+", rf"\g<1>{group['eps']}", text)
    return text


def _mended(trained: TrainedModel) -> Iterator[tuple[str, str]]:
    """What Transformers and TRL write of a base model or a data set that is not on the Hub, and what it is instead."""
    base = base_model_of(trained.model)
    if base is not None and not is_hub_id(base):
        yield "This model was trained from scratch on ", f"This model was fine-tuned from {_NOT_ON_HUB}, on "
    origin = "trained from scratch" if base is None else f"fine-tuned from {_NOT_ON_HUB}"
    yield "This model is a fine-tuned version of [None](https://huggingface.co/None)", f"This model was {origin}"
    yield 'model="None"', f'model="{trained.name}"'
    if trained.builder is not None:
        yield f" on the {trained.builder} dataset.", " on an unknown dataset."


def known_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that a reader knows: that within the wrappers of Accelerate and DeepSpeed."""
    if optimizer is None:
        return None
    found: Any = unwrap_optimizer(optimizer)
    while type(found).__module__.startswith("deepspeed.") and isinstance(getattr(found, "optimizer", None), Optimizer):
        found = found.optimizer
    return found
