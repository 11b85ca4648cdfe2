"""Settings of XGrad, alone and beside those of Transformers."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_xgrad.rules import RULES

# To a type checker the fields below belong to TrainingArguments; at run time they are mixed into them. And at run time
# HfArgumentParser takes the type of a field for what parses its flag: of a union that would be float alone.
if TYPE_CHECKING:
    _Arguments = TrainingArguments
    Steps = float | str
else:
    _Arguments = object
    Steps = str

AUTO_STEPS = "auto"

# Values of `optim` beside those of Transformers.
EXTRA_OPTIMIZERS = ("adabelief", "adam", "adam3", "nadam", "radam")


@dataclass(frozen=True)
class XGradConfig:
    """Settings of the prediction `w_hat_t = w_t - s * lr_t * delta_t`.

    Args:
        enabled: False trains as if XGrad were not there.
        steps: `s`, the number of steps predicted ahead; any finite number >= 0, or `"auto"`: chosen while training
            (see `hf_xgrad.auto_steps`). 0 is the plain optimizer.
        rule: `"closed_form"` reads `delta_t` from the optimizer's state, `"last_update"` repeats the last realised
            update, `"auto"` takes the closed form where the optimizer's class has one, else the last update.
        weight_decay: adds decoupled weight decay to the predicted move of a closed form. The paper's code leaves it
            out; the last update always holds it.

    Raises:
        ValueError: `steps` or `rule` outside these.
        TypeError: `steps` is neither a number nor a text.
    """

    enabled: bool = True
    steps: float | str = 1.0
    rule: str = "auto"
    weight_decay: bool = False

    def __post_init__(self) -> None:
        steps = self.steps
        wanted = f"a number of steps to predict ahead, finite and >= 0 (0 is the plain optimizer), or '{AUTO_STEPS}'"
        if isinstance(steps, bool) or not isinstance(steps, (int, float, str)):
            raise TypeError(f"xgrad_steps={steps!r}: must be {wanted}")
        if steps != AUTO_STEPS and (isinstance(steps, str) or not math.isfinite(steps) or steps < 0):
            raise ValueError(f"xgrad_steps={steps!r}: must be {wanted}")
        if self.rule not in RULES:
            raise ValueError(f"xgrad_rule={self.rule!r}: must be one of {', '.join(RULES)}")

    @property
    def active(self) -> bool:
        """Whether anything is predicted at all."""
        return self.enabled and self.steps != 0

    @classmethod
    def from_args(cls, args: Any) -> XGradConfig:
        """The settings in the `xgrad*` fields of `args`, and the defaults where it has none."""
        default = cls()
        return cls(
            enabled=getattr(args, "xgrad", default.enabled),
            steps=_parse_steps(getattr(args, "xgrad_steps", default.steps)),
            rule=getattr(args, "xgrad_rule", default.rule),
            weight_decay=getattr(args, "xgrad_weight_decay", default.weight_decay),
        )


def _parse_steps(steps: float | str) -> float | str:
    """The number that a text says or a whole number is, as a float; anything else as it is."""
    try:
        return float(steps) if isinstance(steps, (str, int)) and not isinstance(steps, bool) else steps
    except ValueError:
        return steps


def check_optimizer_name(name: str) -> None:
    """Raises ValueError, with the names there are, where `optim` is none of them."""
    known = sorted({*EXTRA_OPTIMIZERS, *(member.value for member in OptimizerNames)})
    if name in known:
        return
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"optim={name!r}: no such optimizer.{hint} There are: {', '.join(known)}")


@dataclass
class _XGradFields(_Arguments):
    """The fields that XGrad adds to a class of TrainingArguments; see `XGradConfig` for what they mean."""

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
        default=1.0,
        metadata={
            "help": "Number of steps predicted ahead (s), or auto: chosen while training; 0 is the plain optimizer."
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


@dataclass
class XGradTrainingArguments(_XGradFields, TrainingArguments):
    """`transformers.TrainingArguments` with the settings of XGrad.

    Args:
        xgrad: whether weights are predicted. Default True.
        xgrad_steps: `s`, steps predicted ahead, or `"auto"`: chosen while training. Default 1.0.
        xgrad_rule: `"auto"` (default), `"closed_form"` or `"last_update"`.
        xgrad_weight_decay: adds decoupled weight decay to the predicted move of closed forms. Default False.
        optim: beside Transformers' names also `adam`, `adabelief`, `adam3`, `nadam` and `radam`; `optim_args` takes
            their further settings as `"name=value,name=value"`.

    Everything else is as in `transformers.TrainingArguments`.

    Raises:
        ValueError: a setting that cannot be right, with its name and what it may be.
    """


@dataclass
class XGradSeq2SeqTrainingArguments(_XGradFields, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the settings of XGrad; see `XGradTrainingArguments`."""
