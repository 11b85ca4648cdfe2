"""What a run of the training loop leaves: metrics, the model, its card, and a repository on the Hub."""

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard
from torch import nn
from transformers import TrainerState
from transformers.modelcard import TrainingSummary

from hf_xgrad import XGradConfig
from hf_xgrad.outputs.files import CARD_FILE, STATE_FILE
from hf_xgrad.outputs.hub import HUB_ERRORS
from hf_xgrad.outputs.model_card import TrainedModel, complete_card
from hf_xgrad.outputs.stock_card import is_hub_id
from hf_xgrad.recipes.input_errors import as_input_error
from hf_xgrad.recipes.loop.arguments import LoopArguments, make_optimizer
from hf_xgrad.recipes.results import format_table, read_json, read_log, until_trained, write_json

logger = logging.getLogger(__name__)

# The Trainer does not log the former; the others are another time of the clock whenever a run is finished again.
_NOT_LOGGED = ("_samples", "_samples_mm", "_at_start", "_runtime", "_per_second")


def record(args: LoopArguments, kind: str, metrics: dict[str, float]) -> dict[str, float]:
    """Show metrics, write them to <kind>_results.json and all_results.json, and return them."""
    if args.process_index == 0 and metrics:
        folder = Path(args.output_dir)
        logger.info("%s metrics:\n%s", kind, format_table(("metric", "value"), sorted(metrics.items())))
        write_json(folder / f"{kind}_results.json", metrics)
        write_json(folder / "all_results.json", read_json(folder / "all_results.json") | metrics)
        if kind == "eval" and args.do_train:
            _log_last_evaluation(folder / STATE_FILE, metrics)
    return metrics


def _log_last_evaluation(path: Path, metrics: dict[str, float]) -> None:
    """Add it to the log of the run, as the Trainer does."""
    state = TrainerState.load_from_json(str(path))
    logged = {name: value for name, value in metrics.items() if not name.endswith(_NOT_LOGGED)}
    entry = {**logged, "epoch": state.epoch, "step": state.global_step}
    state.log_history = [*until_trained(state.log_history), entry]
    state.save_to_json(str(path))


def save_model(accelerator: Accelerator, args: LoopArguments, model: Any, tokenizer: Any) -> None:
    """Save model, configuration and tokenizer as `from_pretrained` reads them."""
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


def make_repository(args: LoopArguments, base_model: str | None) -> None:
    """Make the repository on the Hub, if there is something to be pushed, before any training time is spent."""
    if not args.push_to_hub or args.process_index != 0:
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with as_input_error(*HUB_ERRORS, prefix=f"--push_to_hub: cannot make {name}: "):
        repository = HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True)
    # With the name of its owner, for the card.
    args.hub_model_id = repository.repo_id
    if base_model is not None and not is_hub_id(base_model):
        logger.warning("%s is no id of the Hub: the model card will not name it as base_model", base_model)


def write_card(args: LoopArguments, model: Any, tokenizer: Any, base_model: str | None, card: dict[str, Any]) -> None:
    """Write the card of a trained model: that of Transformers, completed as a Trainer's."""
    if args.process_index != 0 or not args.do_train:
        return
    folder = Path(args.output_dir)
    name = folder.absolute().name
    results = read_json(folder / "eval_results.json")
    scores = {metric: value for metric, value in results.items() if not metric.endswith(("epoch", *_NOT_LOGGED))}
    settings = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "optim",
                "lr_scheduler_type", "num_train_epochs", "max_steps")  # fmt: skip
    summary = TrainingSummary(
        model_name=name,
        tags=card["tags"],
        finetuned_from=base_model if is_hub_id(base_model) else None,
        eval_results={_title(metric): value for metric, value in scores.items()} or None,
        hyperparameters={setting: getattr(args, setting) for setting in settings},
        source="a loop under Accelerate",
        **{key: card.get(key) for key in ("language", "tasks", "dataset", "dataset_tags", "dataset_args")},
    )
    written = ModelCard(summary.to_model_card())
    written.data["library_name"] = card.get("library_name", "transformers")
    written.save(folder / CARD_FILE)
    trained = TrainedModel(
        config=XGradConfig.from_args(args),
        model=model,
        name=args.hub_model_id or name,
        # Which one it is shows on any weight.
        optimizer=make_optimizer(nn.Linear(1, 1), args),
        processing_class=tokenizer,
        history=read_log(folder),
        task=card["tasks"],
    )
    complete_card(folder, trained)


def _title(metric: str) -> str:
    """Return a metric's name as Transformers has it in cards: Matthews Correlation."""
    return metric.removeprefix("eval_").replace("_", " ").title()
