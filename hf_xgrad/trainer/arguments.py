"""TrainingArguments of Transformers with the settings of XGrad beside theirs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_xgrad.core.config import DEFAULT_STEPS, XGradConfig

# To a type checker the fields below belong to TrainingArguments; at run time they are mixed into them. And at run time
# HfArgumentParser takes the type of a field for what parses its flag: of a union that would be float alone.
if TYPE_CHECKING:
    _Arguments = TrainingArguments
    Steps = float | str
else:
    _Arguments = object
    Steps = str

# Values of `optim` beside those of Transformers.
EXTRA_OPTIMIZERS = ("adabelief", "adam", "adam3", "nadam", "radam")


def check_optimizer_name(name: str) -> None:
    """Raises ValueError, with the names there are, where `optim` is none of them."""
    known = sorted({*EXTRA_OPTIMIZERS, *(member.value for member in OptimizerNames)})
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"optim={name!r}: no such optimizer.{hint} There are: {', '.join(known)}")


@dataclass(repr=False)
class _XGradFields(_Arguments):
    """The fields that XGrad adds to a class of TrainingArguments; see `XGradConfig` for what they mean."""

    # The heading of these flags, and of those of Transformers, in the --help of HfArgumentParser.
    _argument_group_name = "training"

    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={
            "help": "The optimizer: a name of Transformers' OptimizerNames, or one of "
            f"{', '.join(EXTRA_OPTIMIZERS)}. adabelief and adam3 use an epsilon of 1e-16 unless --adam_epsilon "
            "differs from its default or --optim_args gives eps."
        },
    )
    xgrad: bool = field(default=True, metadata={"help": "Train on predicted weights (XGrad)."})
    xgrad_steps: Steps = field(
        default=DEFAULT_STEPS,
        metadata={
            "help": "Number of steps predicted ahead (s); 0 is the plain optimizer. auto: chosen while training. "
            "default: 1 where the optimizer has a closed form, auto under the last-update rule."
        },
    )
    xgrad_rule: str = field(
        default="auto",
        metadata={
            "help": "Prediction rule: closed_form (from the optimizer's state), last_update (works with any "
            "optimizer), or auto (closed form where there is one)."
        },
    )
    xgrad_weight_decay: bool = field(
        default=False, metadata={"help": "Add decoupled weight decay to the predicted move of closed forms."}
    )

    def __repr__(self) -> str:
        return str(self)  # hides tokens, which a dataclass would show

    def __post_init__(self) -> None:
        self.xgrad_steps = XGradConfig.from_args(self).steps
        name = getattr(self.optim, "value", self.optim)
        check_optimizer_name(name)
        if name not in EXTRA_OPTIMIZERS:
            super().__post_init__()
            return
        # Transformers checks `optim` against its own names; a stand-in passes, and the trainer reads the real one.
        self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()
        self.optim = name


@dataclass(repr=False)
class XGradTrainingArguments(_XGradFields, TrainingArguments):
    """`transformers.TrainingArguments` with the settings of XGrad.

    Args:
        xgrad: whether weights are predicted. Default True.
        xgrad_steps: `s`, steps predicted ahead; `"auto"`: chosen while training; `"default"`: 1 where there is a
            closed form, `"auto"` under the last-update rule.
        xgrad_rule: `"auto"` (default), `"closed_form"` or `"last_update"`.
        xgrad_weight_decay: adds decoupled weight decay to the predicted move of closed forms. Default False.
        optim: beside Transformers' names also `adam`, `adabelief`, `adam3`, `nadam` and `radam`; `optim_args` takes
            their further settings as `"name=value,name=value"`.

    Everything else is as in `transformers.TrainingArguments`.

    Raises:
        ValueError: a setting that cannot be right, with its name and what it may be.
    """


@dataclass(repr=False)
class XGradSeq2SeqTrainingArguments(_XGradFields, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the settings of XGrad; see `XGradTrainingArguments`."""
