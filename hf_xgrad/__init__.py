"""XGrad weight prediction for Hugging Face Transformers, Accelerate and plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_xgrad import optim as optim
    from hf_xgrad.closed_forms import register_rule
    from hf_xgrad.core.config import XGradConfig
    from hf_xgrad.predictor import WeightPredictor
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

_MODULES = {"WeightPredictor": "predictor", "XGradConfig": "core.config", "register_rule": "closed_forms"}


def __getattr__(name: str) -> Any:
    # torch and Transformers come when they are asked for: the command line need not wait for them to print its help.
    if name in __all__:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'trainer')}"), name)
        return value
    if name == "optim":
        return import_module(f"{__name__}.optim")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
