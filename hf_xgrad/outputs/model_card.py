"""What XGrad adds to the card of a trained model: how it was trained, a picture, and metadata that the Hub accepts."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
from huggingface_hub import ModelCard
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from hf_xgrad import __version__
from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.rules import form_of_group
from hf_xgrad.outputs.files import CARD_FILE, PICTURE_FILE
from hf_xgrad.outputs.plots import plot_runs
from hf_xgrad.outputs.run_logs import PlotError
from hf_xgrad.outputs.stock_card import PAPER, correct_metadata, correct_text, is_finite, known_optimizer

logger = logging.get_logger(__name__)

_CURVES = "Training curves"
_COMPARISON = "XGrad beside the plain optimizer"
_PLACEHOLDER = "More information needed"
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


# ---- cards ----


def complete_card(folder: str | Path, trained: TrainedModel) -> None:
    """Completes the card that a Trainer has written into `folder`, and draws the picture that it shows."""
    path = Path(folder) / CARD_FILE
    card = ModelCard.load(path)
    correct_metadata(card.data, trained)
    sections = {
        title: section
        for title, section in _sections(correct_text(card.text, trained)).items()
        if section.strip() != f"## {title}\n\n{_PLACEHOLDER}"
    }
    added = {}
    if "Quick start" not in sections:
        added["How to use"] = _how_to_use(trained, card.data.get("base_model"))
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
    _save(card, path, order.values())


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
    card = ModelCard.load(path)
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
    sections = _sections(card.text)
    titles = list(sections)
    taken = next((title for title in (_COMPARISON, _CURVES) if title in sections), None)
    before = titles.index(taken) if taken is not None else titles.index("XGrad") + 1 if "XGrad" in titles else 1
    others = [text for title, text in sections.items() if title != taken]
    _save(card, path, [*others[:before], section, *others[before:]])


def _save(card: ModelCard, path: Path, sections: Iterable[str]) -> None:
    card.text = "\n" + "\n".join(f"{section.strip()}\n" for section in sections)
    card.save(path)


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
    optimizer = known_optimizer(trained.optimizer)
    if optimizer is not None:
        rows.insert(0, ("optimizer", type(optimizer).__name__))
    if config.weight_decay:
        rows.append(("decoupled weight decay", "predicted too"))
    cosines = [entry["xgrad/cosine"] for entry in trained.history if is_finite(entry.get("xgrad/cosine"))]
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


def _steps(trained: TrainedModel) -> str:
    """`s` as it was set, and what it was at last where it was chosen in training."""
    config, optimizer = trained.config, known_optimizer(trained.optimizer)
    if not isinstance(config.steps, str):
        return f"{config.steps:g}"
    fixed: set[float | None] = set()
    if optimizer is not None:
        forms = [form_of_group(optimizer, group, config.rule) for group in optimizer.param_groups]
        fixed = set(map(config.steps_under, forms))
    if fixed and None not in fixed:
        return f"1 ({config.steps})"
    logged = [entry["xgrad/steps"] for entry in trained.history if is_finite(entry.get("xgrad/steps"))]
    kind = "auto" if fixed == {None} else config.steps
    return f"{kind} (last: {logged[-1]:.2f})" if logged else kind


def _rule(trained: TrainedModel) -> str:
    rule = trained.config.rule
    optimizer = known_optimizer(trained.optimizer)
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
    return f"{value:{sign}.4f}" if is_finite(value) else "-"
