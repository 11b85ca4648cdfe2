"""XGrad weight prediction for Hugging Face Transformers, Accelerate and plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_xgrad import closed_forms as closed_forms
from hf_xgrad import optim as optim
from hf_xgrad.prediction import WeightPredictor
from hf_xgrad.rules import register_rule

if TYPE_CHECKING:
    from hf_xgrad.arguments import XGradConfig, XGradSeq2SeqTrainingArguments, XGradTrainingArguments
    from hf_xgrad.trainer import XGradMixin, XGradSeq2SeqTrainer, XGradTrainer

__version__ = "0.1.0"

__all__ = [
    "WeightPredictor",
    "XGradConfig",
    "XGradMixin",
    "XGradSeq2SeqTrainer",
    "XGradSeq2SeqTrainingArguments",
    "XGradTrainer",
    "XGradTrainingArguments",
    "register_rule",
]

# What needs Transformers comes when it is asked for: `python -m hf_xgrad` need not wait for that.
_ON_DEMAND = {
    "XGradConfig": "arguments",
    "XGradMixin": "trainer",
    "XGradSeq2SeqTrainer": "trainer",
    "XGradSeq2SeqTrainingArguments": "arguments",
    "XGradTrainer": "trainer",
    "XGradTrainingArguments": "arguments",
}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_ON_DEMAND[name]}"), name)
        return value
    if name in _ON_DEMAND.values():
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
