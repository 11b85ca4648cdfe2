"""Trains a causal language model with XGrad: fine-tunes one, or pretrains a new one.

    hf-xgrad clm --model_name_or_path openai-community/gpt2 --dataset_name Salesforce/wikitext \\
        --dataset_config_name wikitext-2-raw-v1 --do_train --do_eval --output_dir outputs/wikitext --baseline
    hf-xgrad clm          (a small Llama on the documentation that comes with Python, no network)

`hf-xgrad clm settings.yaml --seed 3` takes its flags from a file first. See --help for all of them.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from hf_xgrad import XGradTrainingArguments
from hf_xgrad.recipes.input_errors import check_positive, run_script
from hf_xgrad.recipes.language.batches import CausalCollator
from hf_xgrad.recipes.language.data import BlockCutter, LanguageDataArguments, special_tokens
from hf_xgrad.recipes.language.modeling import (
    EMBEDDED_TRAINING,
    Objective,
    Prepared,
    run_language_model,
    train_and_evaluate,
)
from hf_xgrad.recipes.pretrained import positions

PROG = "hf-xgrad clm"


@dataclasses.dataclass
class CausalDataArguments(LanguageDataArguments):
    """Which texts, and how long the blocks are."""

    block_size: int | None = dataclasses.field(
        default=None, metadata={"help": "Tokens of a block. Left out: as many as the model takes, 1024 at most."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(
                f"--block_size must be 2 or more, not {self.block_size}: a token to predict from, and one"
            )


@dataclasses.dataclass
class SampleArguments:
    """A sample of what the trained model writes."""

    _argument_group_name = "run"

    sample_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Let the trained model write so many tokens: printed, and in sample.txt."}
    )
    sample_prompt: str = dataclasses.field(default="", metadata={"help": "What the sample begins with."})

    def __post_init__(self) -> None:
        check_positive("sample_length", self.sample_length)


EMBEDDED = {
    "output_dir": "outputs/clm",
    "model_type": "llama",
    "config_overrides": "hidden_size=128,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=4,"
    "intermediate_size=336,max_position_embeddings=128,tie_word_embeddings=true",
    "block_size": 128,
    # The texts have no token that starts them: the model has to be given a start that it knows.
    "sample_prompt": "Return the",
    "sample_length": 120,
    **EMBEDDED_TRAINING,
}

CAUSAL = Objective(
    description=(__doc__ or "").splitlines()[0],
    task="text-generation",
    auto_class=AutoModelForCausalLM,
    masked=False,
    data_arguments=CausalDataArguments,
    embedded=EMBEDDED,
    wanted_size=lambda data_args: data_args.block_size,
    make_cutter=lambda data_args, tokenizer, column, size: BlockCutter(tokenizer, column, size),
    # Tensor cores want lengths that are multiples of eight.
    make_collator=lambda data_args, tokenizer, size, args: CausalCollator(tokenizer, 8 if size % 8 == 0 else None),
)


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run `hf-xgrad clm` and return its exit status. `prog` is what the user called."""
    return run_script(
        prog, lambda words: run_language_model(prog, CAUSAL, words, _run, further=[SampleArguments]), arguments
    )


def _run(
    prepared: Prepared, args: XGradTrainingArguments, checkpoint: str | None, sample_args: SampleArguments
) -> dict[str, float]:
    def sample(trainer: Trainer) -> None:
        write_sample(trainer.accelerator, trainer.model, prepared.tokenizer, sample_args, args)

    return train_and_evaluate(prepared, args, checkpoint, sample)


def write_sample(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sample_args: SampleArguments,
    args: Any,
) -> None:
    """Print what the model writes, if asked to, and leave it in sample.txt. `args` has output_dir and seed."""
    if sample_args.sample_length is None:
        return
    # On every process: each may hold a part of the model only.
    model = accelerator.unwrap_model(model)
    text = sample_text(model, tokenizer, sample_args.sample_prompt, sample_args.sample_length, args.seed)
    if not accelerator.is_main_process:
        return
    (Path(args.output_dir) / "sample.txt").write_text(text + "\n", encoding="utf-8")
    print(f"A sample of what the model writes:\n{text}")


def sample_text(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, length: int, seed: int, top_k: int = 40
) -> str:
    """Return the prompt and `length` tokens that a causal model writes after it, fewer where its positions end."""
    # Without the tokens that the tokenizer puts after a text: the model is to go on.
    before, _ = special_tokens(tokenizer)
    ids = [*before, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not ids:
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        ids = [next((start for start in starts if start is not None), 0)]
    most = positions(model.config, model)
    if most is not None and most > 1:
        ids = ids[1 - most :]
        length = min(length, most - len(ids))
    inputs = torch.tensor([ids], device=model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        was_training = model.training
        model.eval()
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=True,
            top_k=top_k,
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.train(was_training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    sys.exit(main())
