"""XGrad weight prediction for Hugging Face Transformers, Accelerate and plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_xgrad.arguments import XGradConfig, XGradSeq2SeqTrainingArguments, XGradTrainingArguments
    from hf_xgrad.prediction import WeightPredictor
    from hf_xgrad.rules import register_rule
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

_MODULES = {
    "WeightPredictor": "prediction",
    "XGradConfig": "arguments",
    "XGradMixin": "trainer",
    "XGradSeq2SeqTrainer": "trainer",
    "XGradSeq2SeqTrainingArguments": "arguments",
    "XGradTrainer": "trainer",
    "XGradTrainingArguments": "arguments",
    "register_rule": "rules",
}


def __getattr__(name: str) -> Any:
    # On demand: `python -m hf_xgrad optimizers` need not wait for Transformers.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
