"""Settings of XGrad."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_xgrad.core.rules import ClosedForm

RULES = ("auto", "closed_form", "last_update")
AUTO_STEPS = "auto"
DEFAULT_STEPS = "default"


@dataclass(frozen=True)
class XGradConfig:
    """Settings of the prediction `w_hat_t = w_t - s * lr_t * delta_t`.

    Args:
        enabled: False trains as if XGrad were not there.
        steps: `s`, the number of steps predicted ahead: a finite number >= 0 (0 is the plain optimizer), `"auto"`
            (chosen while training, see `hf_xgrad.core.auto_steps`), or `"default"`: 1 where there is a closed form,
            `"auto"` under the last-update rule.
        rule: `"closed_form"` reads `delta_t` from the optimizer's state, `"last_update"` repeats the last realised
            update, `"auto"` takes the closed form where the optimizer's class has one, else the last update.
        weight_decay: adds decoupled weight decay to the predicted move of a closed form. The paper's code leaves it
            out; the last update always holds it.

    Raises:
        ValueError: `steps` or `rule` outside these.
        TypeError: `steps` is neither a number nor a text, or `enabled` or `weight_decay` is not a bool.
    """

    enabled: bool = True
    steps: float | str = DEFAULT_STEPS
    rule: str = "auto"
    weight_decay: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _checked_steps(self.steps))
        if self.rule not in RULES:
            raise ValueError(f"xgrad_rule={self.rule!r}: must be one of {', '.join(RULES)}")
        for name, value in (("xgrad", self.enabled), ("xgrad_weight_decay", self.weight_decay)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: must be True or False")

    @property
    def active(self) -> bool:
        """Whether anything is predicted at all."""
        return self.enabled and self.steps != 0

    def steps_under(self, form: ClosedForm | None) -> float | None:
        """`s` for a group with this closed form (None: the last-update rule); None where it is chosen in training."""
        if not self.enabled:
            return 0.0
        if self.steps == AUTO_STEPS or (self.steps == DEFAULT_STEPS and form is None):
            return None
        return 1.0 if self.steps == DEFAULT_STEPS else float(self.steps)

    @classmethod
    def from_args(cls, args: Any) -> XGradConfig:
        """The settings in the `xgrad*` fields of `args`, and the defaults where it has none."""
        return cls(**{field: getattr(args, name) for field, name in ARGUMENTS.items() if hasattr(args, name)})


# Each setting, and the field of the training arguments that has it.
ARGUMENTS = {
    "enabled": "xgrad",
    "steps": "xgrad_steps",
    "rule": "xgrad_rule",
    "weight_decay": "xgrad_weight_decay",
}


def _checked_steps(steps: Any) -> float | str:
    """A number as a float, also one that is written as a text; `auto` and `default` as they are."""
    if isinstance(steps, bool) or not isinstance(steps, (Real, str)):
        raise TypeError(_wrong_steps(steps))
    if steps in (AUTO_STEPS, DEFAULT_STEPS):
        return str(steps)
    try:
        number = float(steps)
    except ValueError:
        raise ValueError(_wrong_steps(steps)) from None
    if not math.isfinite(number) or number < 0:
        raise ValueError(_wrong_steps(steps))
    return number


def _wrong_steps(steps: Any) -> str:
    return (
        f"xgrad_steps={steps!r}: must be a number of steps to predict ahead, finite and >= 0 (0 is the plain "
        f"optimizer), '{AUTO_STEPS}' or '{DEFAULT_STEPS}'"
    )
