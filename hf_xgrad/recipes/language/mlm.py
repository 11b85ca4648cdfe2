"""Trains a masked language model with XGrad: goes on with one, or pretrains a new one.

    hf-xgrad mlm --model_name_or_path FacebookAI/roberta-base --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval --output_dir outputs/wikitext --baseline
    hf-xgrad mlm          (a small ModernBERT on the documentation that comes with Python, no network)

`hf-xgrad mlm settings.yaml --seed 3` takes its flags from a file first. See --help for all of them.
"""

import dataclasses
import sys
from collections.abc import Sequence

from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from hf_xgrad import XGradTrainingArguments
from hf_xgrad.recipes.input_errors import run_script
from hf_xgrad.recipes.language.batches import MaskingCollator
from hf_xgrad.recipes.language.data import BlockCutter, LanguageDataArguments
from hf_xgrad.recipes.language.modeling import EMBEDDED_TRAINING, Objective, run_language_model, train_and_evaluate

PROG = "hf-xgrad mlm"


@dataclasses.dataclass
class MaskedDataArguments(LanguageDataArguments):
    """Which texts, how long the rows are, and what is masked."""

    max_seq_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Tokens of a row. Left out: as many as the model takes, 1024 at most."}
    )
    mlm_probability: float = dataclasses.field(
        default=0.15, metadata={"help": "How likely a token (or word) is masked."}
    )
    whole_word_masking: bool = dataclasses.field(
        default=False, metadata={"help": "Mask all tokens of a word together."}
    )
    line_by_line: bool = dataclasses.field(
        default=False, metadata={"help": "Each line is a row of its own. Left out: lines are joined and cut."}
    )
    pad_to_max_length: bool = dataclasses.field(
        default=False, metadata={"help": "Pad to --max_seq_length instead of to the longest row of each batch."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_seq_length is not None and self.max_seq_length < 4:
            raise ValueError(f"--max_seq_length must be 4 or more, not {self.max_seq_length}")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must be above 0 and below 1, not {self.mlm_probability}")


EMBEDDED = {
    "output_dir": "outputs/mlm",
    "model_type": "modernbert",
    "config_overrides": "hidden_size=128,num_hidden_layers=2,num_attention_heads=4,intermediate_size=336,"
    "max_position_embeddings=128",
    "max_seq_length": 128,
    **EMBEDDED_TRAINING,
}


def _make_cutter(
    data_args: MaskedDataArguments, tokenizer: PreTrainedTokenizerBase, column: str, size: int
) -> BlockCutter:
    return BlockCutter(
        tokenizer,
        column,
        size,
        masked=True,
        whole_words=data_args.whole_word_masking,
        by_line=data_args.line_by_line,
    )


def _make_collator(
    data_args: MaskedDataArguments, tokenizer: PreTrainedTokenizerBase, size: int, args: XGradTrainingArguments
) -> MaskingCollator:
    return MaskingCollator(
        tokenizer,
        data_args.mlm_probability,
        args.seed,
        # Tensor cores want lengths that are multiples of eight.
        pad_to_multiple_of=8 if size % 8 == 0 else None,
        pad_to_length=size if data_args.pad_to_max_length else None,
    )


MASKED = Objective(
    description=(__doc__ or "").splitlines()[0],
    task="fill-mask",
    auto_class=AutoModelForMaskedLM,
    masked=True,
    data_arguments=MaskedDataArguments,
    embedded=EMBEDDED,
    wanted_size=lambda data_args: data_args.max_seq_length,
    make_cutter=_make_cutter,
    make_collator=_make_collator,
    finish_validation=lambda collator, rows: collator.mask_once(rows),
)


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad mlm` and return its exit status. `prog` is what the user called."""
    return run_script(prog, lambda words: run_language_model(prog, MASKED, words, train_and_evaluate), arguments)


if __name__ == "__main__":
    sys.exit(main())
