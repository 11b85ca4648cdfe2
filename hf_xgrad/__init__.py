"""XGrad weight prediction for Hugging Face Transformers, Accelerate and plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_xgrad import closed_forms as closed_forms
from hf_xgrad import optim as optim
from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.rules import register_rule
from hf_xgrad.predictor import WeightPredictor

if TYPE_CHECKING:
    from hf_xgrad.trainer import (
        XGradMixin,
        XGradSeq2SeqTrainer,
        XGradSeq2SeqTrainingArguments,
        XGradTrainer,
        XGradTrainingArguments,
        enable_xgrad,
    )

__version__ = "0.1.0"

__all__ = [
    "WeightPredictor",
    "XGradConfig",
    "XGradMixin",
    "XGradSeq2SeqTrainer",
    "XGradSeq2SeqTrainingArguments",
    "XGradTrainer",
    "XGradTrainingArguments",
    "enable_xgrad",
    "register_rule",
]


def __getattr__(name: str) -> Any:
    # What needs Transformers comes when it is asked for: `python -m hf_xgrad` need not wait for that.
    if name in __all__:
        value = globals()[name] = getattr(import_module(f"{__name__}.trainer"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
