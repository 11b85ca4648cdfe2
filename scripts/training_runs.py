"""A Trainer run within its output folder: start or resume, train, save, leave results and model card, push.

With --baseline there are two, side by side.
"""

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_xgrad import XGradTrainer, XGradTrainingArguments
from run_results import RESUMED, compare, format_comparison, read_json, write_comparison, write_json
from script_arguments import InputError, RunArguments, ScriptParser, as_input_error

STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "xgrad_settings.json"
# Accelerate writes it into its checkpoints, the Trainer does not.
LOOP_FILE = "random_states_0.pkl"
XGRAD_SETTINGS = ("xgrad", "xgrad_steps", "xgrad_rule", "xgrad_weight_decay")
# What a comparison says of the two runs beside their metrics.
SHARED_SETTINGS = ("seed", "optim", "learning_rate", "xgrad_steps", "xgrad_rule", "xgrad_weight_decay")
# A run that ended leaves these; to train into their folder again would overwrite them.
_FINISHED = ("*.safetensors", "*.bin", "*_results.json", "README.md", "predict_results*.tsv")

logger = logging.getLogger(__name__)


def set_up_logging(args: Any, *modules: str) -> None:
    """Show what these modules and this one say on the main process, and what the libraries say at --log_level."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for name in (*modules, __name__):
        logging.getLogger(name).setLevel(logging.INFO if args.should_log else logging.WARNING)
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)


def check_run(run_args: RunArguments, args: Any) -> None:
    """Refuse flags that exclude each other. `args` are TrainingArguments, or have those of their fields read here."""
    if args.resume_from_checkpoint and not run_args.resume:
        raise InputError("--resume_from_checkpoint and --no_resume exclude each other")
    if not run_args.baseline:
        return
    if not args.do_train:
        raise InputError("--baseline compares two trainings: it needs --do_train")
    if not args.xgrad:
        raise InputError("--baseline runs with XGrad on and off: it excludes --no_xgrad")
    if args.resume_from_checkpoint:
        raise InputError("--baseline resumes each run from its own folder: it excludes --resume_from_checkpoint")


def check_optimizer_flags(args: XGradTrainingArguments) -> None:
    """Refuse, before a model is loaded, an optimizer that the trainer would refuse."""
    with as_input_error(ValueError, ImportError):
        XGradTrainer.check_arguments(args)


def run_with_baseline(
    parser: ScriptParser,
    arguments: Sequence[str],
    run_args: RunArguments,
    args: Any,
    run: Callable[[Any, str | None], dict[str, float]],
) -> None:
    """Do the run that the command line `arguments` asks for; with --baseline, the one without XGrad too.

    `run` gets the arguments of one run and the checkpoint to resume from, and returns its metrics. `args`, what
    `parser` makes of `arguments` last, are TrainingArguments, or have those of their fields that are read here.
    """
    runs = [args]
    if run_args.baseline:
        changed = ["--no_xgrad", f"--output_dir={baseline_folder(str(args.output_dir))}", "--push_to_hub=false"]
        runs.append(parser.parse([*arguments, *changed])[-1])
    checkpoints = [prepare_folder(each, run_args) for each in runs]
    results = []
    for each, checkpoint in zip(runs, checkpoints, strict=True):
        if run_args.baseline:
            logger.info("The run with XGrad %s, in %s", "on" if each.xgrad else "off", each.output_dir)
        results.append(run(each, checkpoint))
    if run_args.baseline and args.process_index == 0:
        rows = compare(*results)
        settings = {name: getattr(args, name) for name in SHARED_SETTINGS}
        write_comparison(Path(str(args.output_dir)) / "comparison.json", rows, settings)
        print(format_comparison(rows))


def baseline_folder(output_dir: str) -> str:
    """Return where the run without XGrad goes: beside the other's folder, not into it, which may be pushed."""
    return f"{output_dir.rstrip('/')}-baseline"


def prepare_folder(args: Any, run: RunArguments) -> str | None:
    """Make the output folder, refuse to overwrite another run's results, and return the checkpoint to resume from."""
    folder = Path(str(args.output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
    if not args.do_train:
        return None
    if not run.resume:
        if any(folder.iterdir()):
            raise InputError(f"--no_resume starts over in an empty folder only, but --output_dir {folder} has files")
        return None
    if args.resume_from_checkpoint:
        return _checked(_given_checkpoint(Path(args.resume_from_checkpoint)), args)
    checkpoint = _last_checkpoint(folder)
    if checkpoint is not None:
        _check_settings(args, folder)
        return _checked(checkpoint, args)
    if any(path for pattern in _FINISHED for path in folder.glob(pattern)):
        raise InputError(
            f"--output_dir {folder} holds another run's results and no checkpoint to resume from; name a new folder"
        )
    return None


def write_settings(args: Any) -> None:
    """Leave XGrad's settings in the output folder, so that no run with others goes on with this one."""
    settings = {name: getattr(args, name) for name in XGRAD_SETTINGS}
    write_json(Path(str(args.output_dir)) / SETTINGS_FILE, settings)


def _check_settings(args: Any, folder: Path) -> None:
    """Refuse to go on with a run under other settings of XGrad: its results would be taken for theirs."""
    for name, value in read_json(folder / SETTINGS_FILE).items():
        if value != getattr(args, name):
            raise InputError(
                f"--output_dir {folder} holds a run with {name}={value}, not {getattr(args, name)}; name a new folder "
                "(and --resume_from_checkpoint, to go on with that run all the same)"
            )


def _given_checkpoint(checkpoint: Path) -> str:
    if not (checkpoint / STATE_FILE).is_file():
        raise InputError(f"--resume_from_checkpoint {checkpoint} is not a checkpoint: it has no {STATE_FILE}")
    return str(checkpoint)


def _checked(checkpoint: str, args: Any) -> str:
    """Refuse the Trainer a checkpoint of a loop under Accelerate, of which it would read a part, and the reverse."""
    of_loop = (Path(checkpoint) / LOOP_FILE).is_file()
    if of_loop == isinstance(args, TrainingArguments):
        other = "a script without the Trainer" if of_loop else "a script with the Trainer"
        raise InputError(f"{checkpoint} was written by {other}: go on with that one, or name a new --output_dir")
    return checkpoint


def _last_checkpoint(folder: Path) -> str | None:
    # The state is what the Trainer writes last: a checkpoint without it was cut off.
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    whole = [path for path in whole if path.name.removeprefix("checkpoint-").isdecimal()]
    return str(max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")))) if whole else None


def train(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Train, from `checkpoint` if there is one, save the model and return the training metrics.

    Where the checkpoint is already the last one of the run, its model is loaded and nothing is trained: the Trainer's
    own resuming would go one step too far if the run ends within an epoch.
    """
    if checkpoint is None:
        return _trained(trainer, None, {})
    step = TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE)).global_step
    if step >= _total_steps(trainer):
        return _load_finished(trainer, Path(checkpoint))
    logger.info("Resuming from %s (step %d of %d)", checkpoint, step, _total_steps(trainer))
    return _trained(trainer, checkpoint, {RESUMED: step})


def _trained(trainer: Trainer, checkpoint: str | None, extra: dict[str, float]) -> dict[str, float]:
    if trainer.is_world_process_zero():
        write_settings(trainer.args)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics | extra
    tokens = trainer.state.num_input_tokens_seen - _tokens_seen(checkpoint)
    if tokens > 0:
        metrics["train_tokens_per_second"] = round(tokens / metrics["train_runtime"], 1)
    # An "internal" call is one that does not push: results and card are still to be written.
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if has_length(trainer.train_dataset):
        metrics["train_samples"] = trainer.num_examples(trainer.get_train_dataloader())
    return metrics


def _tokens_seen(checkpoint: str | None) -> int:
    if checkpoint is None:
        return 0
    return TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE)).num_input_tokens_seen


def _total_steps(trainer: Trainer) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def _load_finished(trainer: Trainer, checkpoint: Path) -> dict[str, float]:
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    best = state.best_model_checkpoint
    if trainer.args.load_best_model_at_end and best is not None and Path(best).is_dir():
        checkpoint = Path(best)
    logger.info("Training is complete in %s (step %d): nothing left to train", checkpoint, state.global_step)
    _load_weights(trainer.model, checkpoint)
    trainer.state = state
    results = Path(str(trainer.args.output_dir))
    trainer.save_model(_internal_call=True)
    if not (results / STATE_FILE).is_file():
        trainer.save_state()
    return read_json(results / "train_results.json")


def _load_weights(model: Any, folder: Path) -> None:
    if hasattr(model, "peft_config"):
        import peft

        peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
        return
    stored = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
    model.load_state_dict(stored.state_dict())


def record(trainer: Trainer, kind: str, metrics: dict[str, float]) -> dict[str, float]:
    """Show metrics, write them to <kind>_results.json and all_results.json, and return them."""
    if metrics:
        trainer.log_metrics(kind, metrics)
        trainer.save_metrics(kind, metrics)
    return metrics


def finish(trainer: Trainer, card: dict[str, Any]) -> None:
    """Write the card of a trained model and only then push, if asked to; all results are in the folder by now."""
    if trainer.args.do_train:
        # A new model has no name, which the card would make a link of; one with the name of a folder gets none.
        model: Any = trainer.model
        model.config._name_or_path = model.config._name_or_path or str(trainer.args.output_dir)
        if hasattr(model, "peft_config"):
            # peft rewrites the tags of the card, from those of the model.
            model.get_base_model().add_model_tags(card["tags"])
        trainer.create_model_card(**card)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
