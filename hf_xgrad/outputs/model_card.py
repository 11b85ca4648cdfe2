"""What XGrad adds to the card of a trained model: how it was trained, a picture, and metadata that the Hub accepts."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_xgrad import __version__
from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.refusals import unwrap_optimizer
from hf_xgrad.core.rules import form_of_group
from hf_xgrad.outputs.files import CARD_FILE, PICTURE_FILE
from hf_xgrad.outputs.plots import PlotError, plot_runs

logger = logging.get_logger(__name__)

PAPER = "https://arxiv.org/abs/2305.18240"
TAGS = ("xgrad", "generated_from_trainer", "arxiv:2305.18240")

_CURVES = "Training curves"
_COMPARISON = "XGrad beside the plain optimizer"
_NOT_ON_HUB = "a model that is not on the Hub"
_PLACEHOLDER = "More information needed"
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_CITATION = """```bibtex
@article{guan2024xgrad,
  title   = {{XGrad}: Boosting Gradient-Based Optimizers With Weight Prediction},
  author  = {Guan, Lei and Li, Dongsheng and Shi, Yanqi and Meng, Jian},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume  = {46},
  number  = {10},
  year    = {2024},
  doi     = {10.1109/TPAMI.2024.3387399}
}
```
"""


@dataclass(frozen=True)
class TrainedModel:
    """What a card says of a model beside what its Trainer has written.

    Args:
        config: settings of XGrad.
        model: the trained model.
        name: its id on the Hub, or its folder.
        optimizer: the one that it was trained by, if it is known.
        processing_class: tokenizer or processor, if there is one.
        history: the log of the run.
        task: its task, as the Hub names it.
        split: the split of the data set that it was evaluated on.
        builder: what built that data set (its `builder_name`: "generator", say), which Transformers takes for an id.
        own_optimizer: whether `optimizer` was given to the Trainer, which describes that of its arguments even so.
        unpredicted: steps that were taken without a prediction, as where training_step is another.
    """

    config: XGradConfig
    model: nn.Module
    name: str
    optimizer: Optimizer | None = None
    processing_class: Any = None
    history: Sequence[Mapping[str, Any]] = ()
    task: str | None = None
    split: str | None = None
    builder: str | None = None
    own_optimizer: bool = False
    unpredicted: int = 0

    @classmethod
    def of(cls, trainer: Any, config: XGradConfig, tasks: Any, own_optimizer: bool, unpredicted: int) -> TrainedModel:
        """What a Trainer's card says of its model."""
        tasks = [tasks] if isinstance(tasks, str) else tasks or []
        folder = os.path.abspath(trainer.args.output_dir)
        data = trainer.train_dataset if trainer.eval_dataset is None else trainer.eval_dataset
        split = data.split if hasattr(data, "builder_name") else None
        return cls(
            config=config,
            model=trainer.model,
            name=trainer.hub_model_id or trainer.args.hub_model_id or os.path.basename(folder),
            optimizer=trainer.optimizer,
            processing_class=trainer.processing_class,
            history=trainer.state.log_history,
            task=tasks[0] if len(tasks) == 1 else None,
            split=None if split is None else str(split),
            builder=getattr(data, "builder_name", None),
            own_optimizer=own_optimizer,
            unpredicted=unpredicted,
        )


# ---- ids of the Hub ----


def is_hub_id(name: object) -> bool:
    """Whether `name` can be an id on the Hub, and is no file or folder here."""
    if not isinstance(name, str) or not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


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


# ---- cards ----


def complete_card(folder: str | Path, trained: TrainedModel) -> None:
    """Completes the card that a Trainer has written into `folder`, and draws the picture that it shows."""
    path = Path(folder) / CARD_FILE
    card, text = _read(path)
    card = _valid(card, trained)
    text = _corrected(text, trained)
    for theirs, ours in _mended(trained):
        text = text.replace(theirs, ours)
    sections = {
        title: section
        for title, section in _sections(text).items()
        if section.strip() != f"## {title}\n\n{_PLACEHOLDER}"
    }
    added = {}
    if "Quick start" not in sections:
        added["How to use"] = _how_to_use(trained, card.get("base_model"))
    if trained.config.active:
        added["XGrad"] = _method(trained)
    added[_CURVES] = _picture(Path(folder), {_run_name(trained.config): trained.history})
    # After what the model is and how well it does, before how it was trained.
    start, *others = sections
    order = {start: sections[start]} | {title: f"## {title}\n\n{body}\n" for title, body in added.items() if body}
    order |= {title: _with_versions(sections[title]) for title in others}
    if trained.config.active:
        heading = "" if any(title.startswith("Citation") for title in others) else "## Citation\n\n"
        order["XGrad's citation"] = heading + _CITATION
    _write(path, card, order.values())


def add_comparison(
    folder: str | Path,
    metrics: Mapping[str, Mapping[str, float]],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Puts a run with XGrad and the same run without it side by side, in the card of the former.

    Args:
        folder: the folder of the run with XGrad, with its card.
        metrics: of each metric the values "xgrad", "baseline" and their "difference".
        histories: the log of each run, under the name that the picture gives it.
    """
    path = Path(folder) / CARD_FILE
    card, text = _read(path)
    rows = []
    for name, row in metrics.items():
        cells = (_number(row["xgrad"]), _number(row["baseline"]), _number(row["difference"], "+"))
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    body = "\n".join(
        [
            "The same run once more with XGrad off: same seed, initial weights and batches. It is one pair of runs; "
            "with another seed the differences may be others.",
            *("", "| metric | XGrad | plain | difference |", "| --- | ---: | ---: | ---: |", *rows),
            *("", _picture(Path(folder), histories)),
        ]
    )
    section = f"## {_COMPARISON}\n\n{body.rstrip()}\n"
    sections = _sections(text)
    titles = list(sections)
    taken = next((title for title in (_COMPARISON, _CURVES) if title in sections), None)
    before = titles.index(taken) if taken is not None else titles.index("XGrad") + 1 if "XGrad" in titles else 1
    others = [text for title, text in sections.items() if title != taken]
    _write(path, card, [*others[:before], section, *others[before:]])


def _corrected(text: str, trained: TrainedModel) -> str:
    """A Trainer's text, where it is not what a reader wants or not true."""
    text = re.sub(r"\bOptimizerNames\.(\w+)", lambda match: match[1].lower(), text)
    # A heading without its table.
    text = re.sub(r"### Training results\n\s*(?=#)", "", text)
    optimizer = _named(trained.optimizer)
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


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The metadata of a card, and its text."""
    content = path.read_text(encoding="utf-8")
    found = _FRONT_MATTER.match(content)
    if found is None:
        return {}, content
    return yaml.safe_load(found[1]) or {}, content[found.end() :]


def _write(path: Path, card: dict[str, Any], sections: Iterable[str]) -> None:
    head = yaml.safe_dump(card, sort_keys=False, allow_unicode=True)
    body = "\n".join(f"{section.strip()}\n" for section in sections)
    path.write_text(f"---\n{head}---\n\n{body}", encoding="utf-8")


def _sections(text: str) -> dict[str, str]:
    """The text in parts, each from its heading of the second level on; what stands before the first is ""."""
    parts: dict[str, list[str]] = {"": []}
    title, in_code = "", False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("## ") and not in_code:
            title = line.removeprefix("## ").strip()
        parts.setdefault(title, []).append(line)
    return {title: "\n".join(lines) for title, lines in parts.items()}


def _valid(card: dict[str, Any], trained: TrainedModel) -> dict[str, Any]:
    """The metadata without what the Hub would reject the whole card for, and with our tags."""
    card = dict(card)
    for key in ("base_model", "datasets"):
        given = card.get(key)
        kept = [given] if isinstance(given, str) else given or []
        kept = [name for name in kept if is_hub_id(name) and (key != "datasets" or name != trained.builder)]
        if kept:
            card[key] = kept[0] if isinstance(given, str) else kept
        else:
            card.pop(key, None)
    tags = [card["tags"]] if isinstance(card.get("tags"), str) else card.get("tags") or []
    # peft makes a tag of the base model, whatever its name.
    tags = [tag for tag in tags if not tag.startswith("base_model:") or is_hub_id(tag.rpartition(":")[2])]
    if trained.config.active:
        tags = [*tags, *TAGS]
    if tags:
        card["tags"] = list(dict.fromkeys(tags))
    if trained.task is not None and "pipeline_tag" not in card:
        # Beside the library, at the top.
        library = {key: card.pop(key) for key in ("library_name",) if key in card}
        card = {**library, "pipeline_tag": trained.task, **card}
    for model in card.get("model-index") or []:
        results = [_valid_result(result, trained) for result in model.get("results") or []]
        model["results"] = [result for result in results if result is not None]
    return card


def _valid_result(result: dict[str, Any], trained: TrainedModel) -> dict[str, Any] | None:
    # What Transformers does not know of a data set it writes as null, or as "None".
    dataset = {key: value for key, value in (result.get("dataset") or {}).items() if value not in (None, "None")}
    metrics = [metric for metric in result.get("metrics") or [] if _is_finite(metric.get("value"))]
    if not metrics or not is_hub_id(dataset.get("type")) or dataset["type"] == trained.builder:
        return None
    if isinstance(dataset.get("args"), str):
        dataset.setdefault("config", dataset["args"])
    if trained.split is not None:
        dataset.setdefault("split", trained.split)
    return {**result, "dataset": dataset, "metrics": metrics}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- sections ----


def _how_to_use(trained: TrainedModel, base_model: Any) -> str | None:
    """Code that loads the model; None for one of a class that others do not have."""
    kind, name = type(trained.model), json.dumps(trained.name, ensure_ascii=False)
    package = kind.__module__.split(".")[0]
    lines = []
    if package == "transformers":
        lines += [
            f"from transformers import {kind.__name__}",
            "",
            f"model = {kind.__name__}.from_pretrained({name})",
        ]
    elif package == "peft":
        auto = f"Auto{kind.__name__}"
        lines += [f"from peft import {auto}", "", f"model = {auto}.from_pretrained({name})"]
    else:
        return None
    if trained.processing_class is not None:
        is_tokenizer = isinstance(trained.processing_class, PreTrainedTokenizerBase)
        loader, what = ("AutoTokenizer", "tokenizer") if is_tokenizer else ("AutoProcessor", "processor")
        if package == "transformers":
            lines[0] = f"from transformers import {', '.join(sorted((loader, kind.__name__)))}"
        else:
            lines.insert(1, f"from transformers import {loader}")
        lines.append(f"{what} = {loader}.from_pretrained({name})")
    text = "\n".join(["```python", *lines, "```"])
    if package == "peft" and base_model is None:
        text += "\n\nThese are adapters; the model that they belong to is not on the Hub."
    return text


def _method(trained: TrainedModel) -> str:
    config = trained.config
    if trained.unpredicted:
        return (
            f"[XGrad]({PAPER}) was set up for this run, but {trained.unpredicted} of its steps were taken without a "
            "prediction, as with the plain optimizer: the trainer has a training_step of its own that does not call "
            "XGrad's."
        )
    rows = [("steps predicted ahead, s", _steps(trained)), ("rule", _rule(trained))]
    optimizer = _named(trained.optimizer)
    if optimizer is not None:
        rows.insert(0, ("optimizer", type(optimizer).__name__))
    if config.weight_decay:
        rows.append(("decoupled weight decay", "predicted too"))
    cosines = [entry["xgrad/cosine"] for entry in trained.history if _is_finite(entry.get("xgrad/cosine"))]
    if cosines:
        mean = sum(cosines) / len(cosines)
        rows.append(("cosine of predicted and made step", f"{mean:.2f} (mean of {len(cosines)} logged steps)"))
    return "\n".join(
        [
            f"Trained with [XGrad]({PAPER}): each gradient was taken at the weights that the optimizer was heading "
            "for, as predicted from its own update rule, and then applied to the true ones.",
            "The weights here are the true ones; nothing special is needed to use them.",
            *("", "| setting | value |", "| --- | --- |"),
            *(f"| {name} | {value} |" for name, value in rows),
        ]
    )


def _named(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer that a reader knows: that within the wrappers of Accelerate and DeepSpeed."""
    if optimizer is None:
        return None
    found: Any = unwrap_optimizer(optimizer)
    while type(found).__module__.startswith("deepspeed.") and isinstance(getattr(found, "optimizer", None), Optimizer):
        found = found.optimizer
    return found


def _steps(trained: TrainedModel) -> str:
    """`s` as it was set, and what it was at last where it was chosen in training."""
    config, optimizer = trained.config, _named(trained.optimizer)
    if not isinstance(config.steps, str):
        return f"{config.steps:g}"
    fixed: set[float | None] = set()
    if optimizer is not None:
        forms = [form_of_group(optimizer, group, config.rule) for group in optimizer.param_groups]
        fixed = set(map(config.steps_under, forms))
    if fixed and None not in fixed:
        return f"1 ({config.steps})"
    logged = [entry["xgrad/steps"] for entry in trained.history if _is_finite(entry.get("xgrad/steps"))]
    kind = "auto" if fixed == {None} else config.steps
    return f"{kind} (last: {logged[-1]:.2f})" if logged else kind


def _rule(trained: TrainedModel) -> str:
    rule = trained.config.rule
    optimizer = _named(trained.optimizer)
    if rule != "auto" or optimizer is None:
        return {"closed_form": "closed form", "last_update": "last update"}.get(rule, rule)
    forms = Counter(form_of_group(optimizer, group, rule) is not None for group in optimizer.param_groups)
    if not forms[False]:
        return f"closed form of {type(optimizer).__name__}"
    if not forms[True]:
        return "last update"
    return f"closed form for {forms[True]} of {forms.total()} parameter groups, last update for the others"


def _picture(folder: Path, histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draws the losses into `folder` and returns the line that shows them; "" where there is nothing to draw."""
    # Whoever writes into a log of their own may leave out the step.
    groups = {
        name: [[entry for entry in history if isinstance(entry.get("step"), int)]]
        for name, history in histories.items()
    }
    if not any("loss" in entry or "eval_loss" in entry for runs in groups.values() for run in runs for entry in run):
        return ""
    try:
        plot_runs(groups, folder / PICTURE_FILE)
    except (ImportError, OSError, PlotError) as error:
        logger.warning(f"XGrad: the model card goes without a picture: {error}")
        return ""
    return f"![Losses, and agreement of predicted and made steps, over the optimizer's steps]({PICTURE_FILE})"


def _run_name(config: XGradConfig) -> str:
    return "XGrad" if config.active else "plain optimizer"


def _with_versions(section: str) -> str:
    """The versions that a Trainer lists, with those of this library and of Accelerate."""
    ours = f"- hf_xgrad {__version__}\n- Accelerate {accelerate.__version__}"
    return re.sub(r"(### Framework versions\n\n)", rf"\g<1>{ours}\n", section)


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if _is_finite(value) else "-"
