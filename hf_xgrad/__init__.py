"""XGrad weight prediction for Hugging Face Transformers, Accelerate and plain PyTorch."""

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
