"""What a run of the training loop leaves: metrics, the model, its card, and a repository on the Hub."""

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCardData

from loop_arguments import LoopArguments
from run_results import format_table, read_json, steps_text, write_json
from script_arguments import as_input_error
from training_runs import HUB_ERRORS, pushing

logger = logging.getLogger(__name__)


def record(args: LoopArguments, kind: str, metrics: dict[str, float]) -> dict[str, float]:
    """Show metrics, write them to <kind>_results.json and all_results.json, and return them."""
    if args.process_index == 0 and metrics:
        folder = Path(args.output_dir)
        logger.info("%s metrics:\n%s", kind, format_table(("metric", "value"), sorted(metrics.items())))
        write_json(folder / f"{kind}_results.json", metrics)
        write_json(folder / "all_results.json", read_json(folder / "all_results.json") | metrics)
    return metrics


def save_model(accelerator: Accelerator, args: LoopArguments, model: Any, tokenizer: Any) -> None:
    """Save model, configuration and tokenizer as `from_pretrained` reads them."""
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)


def make_repository(args: LoopArguments) -> str | None:
    """Make the repository on the Hub, before any training time is spent, and return its id; nothing to push: None."""
    if not args.push_to_hub or args.process_index != 0:
        return None
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    with as_input_error(ValueError, *HUB_ERRORS, prefix=f"--push_to_hub: cannot make {name}: "):
        repository = HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True)
    return str(repository.repo_id)


def finish(args: LoopArguments, base_model: str | None, card: dict[str, Any], repository: str | None) -> None:
    """Write the card of a trained model and only then push; all results are in the folder by now."""
    if args.process_index != 0:
        return
    folder = Path(args.output_dir)
    if args.do_train:
        (folder / "README.md").write_text(_model_card(args, base_model, card), encoding="utf-8")
    if repository is not None:
        with pushing(folder, repository):
            HfApi(token=args.hub_token).upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                commit_message="End of training",
                ignore_patterns=["checkpoint-*", "runs/*", "_*"],
            )


def _model_card(args: LoopArguments, base_model: str | None, card: dict[str, Any]) -> str:
    """Return the card. A folder of this machine says nothing to others: `base_model` is named only from the Hub."""
    base = base_model if base_model is not None and not Path(base_model).exists() else None
    data = ModelCardData(
        base_model=base,
        datasets=card.get("dataset_tags"),
        language=card.get("language"),
        library_name=card.get("library_name", "transformers"),
        pipeline_tag=card["tasks"],
        tags=card["tags"] or None,
    )
    start = f"Fine-tuned from {base}" if base else "Trained"
    method = f"XGrad weight prediction (arXiv 2305.18240; s = {steps_text(args.xgrad_steps)}, rule {args.xgrad_rule})"
    names = ("seed", "optim", "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps",
             "per_device_train_batch_size", "gradient_accumulation_steps")  # fmt: skip
    results = read_json(Path(args.output_dir) / "all_results.json")
    scores = {name: value for name, value in sorted(results.items()) if not name.endswith(("_runtime", "_per_second"))}
    lines = [
        *("---", data.to_yaml(), "---", "", f"# {Path(args.output_dir).absolute().name}", ""),
        f"{start} on {card['dataset']} with {method if args.xgrad else 'the plain optimizer'}.",
        *("", "| metric | value |", "| --- | --- |"),
        *(f"| {name} | {value:.6g} |" for name, value in scores.items()),
        *("", "| setting | value |", "| --- | --- |"),
        *(f"| {name} | {getattr(args, name)} |" for name in names),
    ]
    return "\n".join(lines) + "\n"
