"""Training with Transformers: arguments, optimizers, prediction, resuming, publishing."""

from hf_xgrad.trainer.arguments import XGradSeq2SeqTrainingArguments, XGradTrainingArguments
from hf_xgrad.trainer.mixin import XGradMixin
from hf_xgrad.trainer.trainers import XGradSeq2SeqTrainer, XGradTrainer, enable_xgrad

__all__ = [
    "XGradMixin",
    "XGradSeq2SeqTrainer",
    "XGradSeq2SeqTrainingArguments",
    "XGradTrainer",
    "XGradTrainingArguments",
    "enable_xgrad",
]
