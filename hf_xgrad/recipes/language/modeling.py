"""A run of a language modelling script, causal or masked: from its flags to the files that it leaves.

The evaluation loss is that of scores.py: every predicted token counts the same, over all rows, batches and
processes. So does the training loss within an accumulation window.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from hf_xgrad import XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs.hub import HUB_ERRORS
from hf_xgrad.recipes.arguments import RunArguments, ScriptParser
from hf_xgrad.recipes.corpora.python_documentation import load_texts
from hf_xgrad.recipes.input_errors import InputError, as_input_error
from hf_xgrad.recipes.language.data import (
    DATA_SOURCES,
    BlockCutter,
    LanguageDataArguments,
    TextData,
    Texts,
    make_blocks,
    read_texts,
    texts_from,
)
from hf_xgrad.recipes.language.models import (
    MODEL_SOURCES,
    LanguageModelArguments,
    block_size,
    check_kind,
    check_looks_back,
    make_config,
    make_model,
    make_tokenizer,
)
from hf_xgrad.recipes.language.scores import TokenScores, mean_loss, score_rows
from hf_xgrad.recipes.results import first_logged
from hf_xgrad.recipes.runs import check_run, do_runs, make_parser, plan_runs, set_up_logging
from hf_xgrad.recipes.training import record, train, write_card

METRICS = ("loss", "perplexity", "accuracy")
# Where nothing is named, a small model is trained on load_texts(): what the scripts have in common then. One
# processor core takes about two minutes.
EMBEDDED_TRAINING = {
    "new_tokenizer_size": 2048,
    "do_train": True,
    "do_eval": True,
    "eval_on_start": True,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "max_steps": 1000,
    "logging_steps": 50,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 1,
    "dataloader_pin_memory": False,
}

logger = logging.getLogger(__name__)

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What tells the causal script from the masked one.

    Attributes:
        description: one line for --help.
        task: what the Hub calls it.
        auto_class: class that loads the models.
        masked: whether a token's logits are for the token itself, instead of for the one after it.
        data_arguments: dataclass of the flags on data.
        embedded: values of flags where neither data nor model is named.
        wanted_size: `data_args -> ` length of a block, or None for the longest that the model takes.
        make_cutter: `(data_args, tokenizer, column, size) -> ` how texts become rows.
        make_collator: `(data_args, tokenizer, size, args) -> ` how rows become batches.
        finish_validation: `(collator, rows) -> ` rows to evaluate on.
    """

    description: str
    task: str
    auto_class: Any
    masked: bool
    data_arguments: type[LanguageDataArguments]
    embedded: Mapping[str, Any]
    wanted_size: Callable[[Any], int | None]
    make_cutter: Callable[[Any, PreTrainedTokenizerBase, str, int], BlockCutter]
    make_collator: Callable[[Any, PreTrainedTokenizerBase, int, XGradTrainingArguments], Any]
    finish_validation: Callable[[Any, TextData], TextData] = lambda _, rows: rows


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What both runs of a --baseline share."""

    objective: Objective
    model_args: LanguageModelArguments
    data_args: LanguageDataArguments
    config: Any
    tokenizer: PreTrainedTokenizerBase
    blocks: dict[str, TextData]
    collator: Collator


class LanguageModelTrainer(XGradTrainer):
    """XGradTrainer with the scores of scores.py.

    Args:
        shifted: whether a token's logits are for the token after it, as in causal models.

    Attributes:
        tokens_read: tokens of the last evaluation, padding aside.
    """

    def __init__(self, *, shifted: bool, **kwargs: Any) -> None:
        self._scores = TokenScores()
        super().__init__(
            compute_metrics=self._add_scores,
            preprocess_logits_for_metrics=partial(_score, shifted=shifted),
            compute_loss_func=None if shifted and _has_own_loss(kwargs) else partial(_loss, shifted=shifted),
            **kwargs,
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's own, but for the loss: that one averages over batches."""
        self._scores = TokenScores()
        self._tokens_read = torch.zeros((), dtype=torch.long, device=self.args.device)
        output = super().evaluation_loop(*args, **kwargs)
        self.tokens_read = int(self.accelerator.reduce(self._tokens_read))
        metrics: Any = output.metrics
        for name in [name for name in metrics if name.endswith("_token_loss")]:
            metrics[name.replace("_token_loss", "_loss")] = metrics.pop(name)
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own; it also counts tokens, which a stream cannot tell."""
        self._tokens_read += inputs["attention_mask"].sum()
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _add_scores(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        rows: Any = prediction.predictions
        self._scores.add(rows)
        if not compute_result:
            return {}
        scores = self._scores.result()
        return {"token_loss": scores.pop("loss"), **scores}


def _score(logits: Any, labels: Tensor, *, shifted: bool) -> Tensor:
    return score_rows(logits[0] if isinstance(logits, tuple) else logits, labels, shifted=shifted)


def _has_own_loss(trainer_settings: dict[str, Any]) -> bool:
    """Tell a model whose loss is more than that of its tokens (routing), or comes without logits (Liger's kernels)."""
    config = trainer_settings["model"].config
    return bool(trainer_settings["args"].use_liger_kernel or getattr(config, "output_router_logits", False))


def _loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, shifted: bool) -> Tensor:
    return mean_loss(outputs.logits, labels, num_items_in_batch, shifted=shifted)


def run_language_model(
    prog: str,
    objective: Objective,
    arguments: list[str],
    run: Callable[..., dict[str, float]],
    kind_of_arguments: type = XGradTrainingArguments,
    further: Sequence[Any] = (),
) -> None:
    """Do what a command line asks for.

    `kind_of_arguments` are those of the Trainer or of the loop, `further` dataclasses of flags that the script has for
    itself. `run(prepared, args, checkpoint, *further)` does one run, from the initial weights, or a checkpoint, to the
    files that it leaves, and returns its metrics.
    """
    kinds = (LanguageModelArguments, objective.data_arguments, RunArguments, *further, kind_of_arguments)
    parser = make_parser(prog, objective.description, *kinds)
    model_args, data_args, run_args, *extra, args = parse_flags(parser, arguments, objective.embedded)
    set_up_logging(args)
    _check(model_args, data_args, args)
    check_run(run_args, args)
    runs = plan_runs(parser, arguments, run_args, args, model_args, data_args)
    prepared = prepare(objective, model_args, data_args, args)
    do_runs(runs, lambda each, checkpoint: run(prepared, each, checkpoint, *extra))


def parse_flags(parser: ScriptParser, arguments: list[str], embedded: Mapping[str, Any]) -> tuple[Any, ...]:
    """Parse flags; where neither data nor a model is named, `embedded` are the defaults."""
    given = parser.given(arguments)
    if given.isdisjoint(DATA_SOURCES):
        if not given.isdisjoint(MODEL_SOURCES):
            raise InputError("no data: give --dataset_name or --train_file")
        # Of two flags that say the same in different ways, the given one counts.
        rivals = {"max_steps": "num_train_epochs", "new_tokenizer_size": "tokenizer_name"}
        parser.set_defaults(**{name: value for name, value in embedded.items() if rivals.get(name) not in given})
    return parser.parse(arguments)


def _check(model_args: LanguageModelArguments, data_args: LanguageDataArguments, args: Any) -> None:
    if not (args.do_train or args.do_eval):
        raise InputError("nothing to do: give --do_train or --do_eval")
    model_args.check()
    if data_args.streaming and not isinstance(args, TrainingArguments):
        raise InputError("--streaming is not for this loop, which counts the steps of an epoch; `hf-xgrad clm` has it")
    if data_args.streaming and not data_args.named:
        raise InputError("--streaming needs data to stream: give --dataset_name or --train_file")
    if data_args.streaming and args.do_train and args.max_steps <= 0:
        raise InputError("--streaming has no end that could be known: it needs --max_steps")
    if not isinstance(args, TrainingArguments):
        return
    if args.label_smoothing_factor:
        raise InputError("--label_smoothing_factor is not supported: perplexity is that of the data as they are")
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in METRICS:
        raise InputError(f"--metric_for_best_model {wanted} is not one of {', '.join(METRICS)}")


def prepare(
    objective: Objective,
    model_args: LanguageModelArguments,
    data_args: LanguageDataArguments,
    args: Any,
) -> Prepared:
    """Read the texts, load or make tokenizer and configuration, and cut the texts into rows.

    Of `args`, seed, do_train, do_eval and main_process_first are read.
    """
    with args.main_process_first(desc="reading and tokenizing"):
        texts = _read(data_args, model_args, args)
        tokenizer = make_tokenizer(model_args, texts, masked=objective.masked)
        if objective.masked and tokenizer.mask_token is None:
            raise InputError(f"the tokenizer {tokenizer.name_or_path} has no mask token: it is not for masked models")
        config = make_config(model_args, tokenizer)
        check_kind(objective.auto_class, config)
        wanted = objective.wanted_size(data_args)
        size, too_many = block_size(wanted, config, tokenizer)
        if too_many:
            logger.warning("blocks of %d tokens are more than the model takes; using %d", wanted, size)
        collator = objective.make_collator(data_args, tokenizer, size, args)
        blocks = make_blocks(
            *(texts, objective.make_cutter(data_args, tokenizer, texts.column, size), data_args, args.seed),
            partial(objective.finish_validation, collator),
        )
    return Prepared(objective, model_args, data_args, config, tokenizer, blocks, collator)


def _read(data_args: LanguageDataArguments, model_args: LanguageModelArguments, args: Any) -> Texts:
    if data_args.named:
        hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        return read_texts(data_args, do_train=args.do_train, do_eval=args.do_eval, hub=hub)
    # For so small a model a second thread brings little, and where other processes want the core it costs a lot.
    torch.set_num_threads(1)
    train_texts, validation_texts = load_texts()
    splits = {"train": train_texts} if args.do_train else {}
    return texts_from(splits | ({"validation": validation_texts} if args.do_eval else {}))


def make_language_model(prepared: Prepared) -> Any:
    """Load the model of a run, or make a new one."""
    objective = prepared.objective
    model = make_model(objective.auto_class, prepared.model_args, prepared.config, prepared.tokenizer)
    if not objective.masked:
        check_looks_back(model)
    return model


def _make_trainer(prepared: Prepared, args: XGradTrainingArguments) -> LanguageModelTrainer:
    # The collator needs columns that the model does not take; the scores are added up batch by batch.
    args.remove_unused_columns = False
    args.batch_eval_metrics = True
    args.prediction_loss_only = False
    # The Trainer's own guess: whatever is no loss should be great.
    args.greater_is_better = (args.metric_for_best_model or "").removeprefix("eval_") == "accuracy"
    if args.include_num_input_tokens_seen == "no":
        args.include_num_input_tokens_seen = "non_padding"
    # New weights are drawn from this: two runs with the same seed start from the same ones.
    set_seed(args.seed)
    model = make_language_model(prepared)
    with as_input_error(ImportError, *HUB_ERRORS):
        return LanguageModelTrainer(
            shifted=not prepared.objective.masked,
            model=model,
            args=args,
            train_dataset=prepared.blocks.get("train"),
            eval_dataset=prepared.blocks.get("validation"),
            processing_class=prepared.tokenizer,
            data_collator=prepared.collator,
        )


def train_and_evaluate(
    prepared: Prepared,
    args: XGradTrainingArguments,
    checkpoint: str | None,
    before_card: Callable[[LanguageModelTrainer], None] = lambda trainer: None,
) -> dict[str, float]:
    """Do one run under the Trainer."""
    trainer = _make_trainer(prepared, args)
    metrics: dict[str, float] = {}
    if args.do_train:
        metrics |= record(trainer, "train", train(trainer, checkpoint))
    if args.do_eval:
        found = trainer.evaluate()
        found["eval_tokens_per_second"] = round(trainer.tokens_read / found["eval_runtime"], 1)
        if args.do_train and args.eval_on_start:
            found["eval_perplexity_at_start"] = first_logged(trainer.state.log_history, "eval_perplexity")
        metrics |= record(trainer, "eval", found)
        if trainer.is_world_process_zero():
            tell_both_ends(found)
    before_card(trainer)
    write_card(trainer, describe_for_card(prepared, args))
    return metrics


def tell_both_ends(found: dict[str, float]) -> None:
    """Print the perplexity before training, if it is known, and after it."""
    before = found.get("eval_perplexity_at_start")
    if before is not None:
        print(f"Perplexity: {before:.1f} before training, {found['eval_perplexity']:.2f} after")


def describe_for_card(prepared: Prepared, args: Any) -> dict[str, Any]:
    """Return what the model card says of task and data. Of `args`, xgrad is read."""
    task = prepared.objective.task
    # Where the data are not the Hub's, the Trainer leaves the task out; as a tag it stays.
    card: dict[str, Any] = {"tasks": task, "tags": [task, *(["xgrad"] if args.xgrad else [])]}
    data_args = prepared.data_args
    if data_args.dataset_name is not None:
        on_hub = {} if Path(data_args.dataset_name).exists() else {"dataset_tags": data_args.dataset_name}
        return card | on_hub | {"dataset": data_args.dataset_name, "dataset_args": data_args.dataset_config_name}
    return card | {"dataset": Path(data_args.train_file).name if data_args.train_file else "Python documentation"}
