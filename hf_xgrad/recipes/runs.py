"""Runs within their output folders: what is checked, started or resumed, compared and pushed.

With --baseline there are two, side by side.
"""

import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
import transformers
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments
from transformers.utils.import_utils import is_liger_kernel_available

from hf_xgrad import WeightPredictor, XGradConfig, XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs.checkpoints import fault, last_checkpoint
from hf_xgrad.outputs.files import SETTINGS_FILE, left_by_runs, remove
from hf_xgrad.outputs.hub import PUSH_ERRORS, push, push_again, push_command
from hf_xgrad.outputs.model_card import add_comparison
from hf_xgrad.recipes.arguments import RunArguments, ScriptParser
from hf_xgrad.recipes.engines import check_engine
from hf_xgrad.recipes.input_errors import InputError, as_input_error, check_positive, one_line
from hf_xgrad.recipes.loop.arguments import Optim, make_optimizer, make_schedule
from hf_xgrad.recipes.results import (
    compare,
    format_comparison,
    read_json,
    read_log,
    write_comparison,
    write_json,
)

# Accelerate writes it into its checkpoints, the Trainer does not.
LOOP_FILE = "random_states_0.pkl"
# What makes a training another one, of the flags of the Trainer or of the loop; others have fewer of them.
_TRAINING = (
    *("xgrad", "xgrad_steps", "xgrad_rule", "xgrad_weight_decay"),
    *("seed", "data_seed", "full_determinism", "train_sampling_strategy", "dataloader_drop_last"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16"),
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
)
# What does not, of all flags on model and data.
_NOT_TRAINING = (
    *("cache_dir", "token", "overwrite_cache", "preprocessing_num_workers", "low_cpu_mem_usage"),
    *("attn_implementation", "trust_remote_code", "metrics", "max_eval_samples"),
    *("test_file", "test_mismatched_file", "validation_mismatched_file", "max_predict_samples"),
)
# What a comparison says of the two runs beside their metrics.
SHARED_SETTINGS = ("seed", "optim", "learning_rate", "xgrad_steps", "xgrad_rule", "xgrad_weight_decay")
# A run that ended leaves these; to train into their folder again would overwrite them.
_FINISHED = ("*.safetensors", "*.bin", "*_results.json", "README.md", "predict_results*.tsv")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is to be done in one output folder.

    Attributes:
        args: TrainingArguments, or LoopArguments.
        checkpoint: what is gone on with, if there is anything.
        settings: what makes it this run and not another, as plain values.
        starts_over: whether what an earlier run left there goes first.
    """

    args: Any
    checkpoint: str | None
    settings: dict[str, Any]
    starts_over: bool

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))


def make_parser(prog: str, description: str, *kinds: Any) -> ScriptParser:
    """Make the parser of a recipe's command line; the arguments of the Trainer, or of the loop, come last."""
    parser = ScriptParser(*kinds, prog=prog, description=description)
    if kinds[-1] is XGradTrainingArguments:
        # The Trainer's own default pushes every checkpoint, before there are any results to push with it.
        parser.set_defaults(hub_strategy="end")
    return parser


def set_up_logging(args: Any) -> None:
    """Show what the package says on the main process, and what the libraries say at --log_level."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("hf_xgrad").setLevel(logging.INFO if args.should_log else logging.WARNING)
    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(level)
    datasets.utils.logging.set_verbosity(level)


def check_run(run_args: RunArguments, args: Any) -> None:
    """Refuse flags that no run can have. `args` are TrainingArguments, or LoopArguments."""
    check_engine(args)
    _check_numbers(args)
    _try_optimizer(args)
    if isinstance(args, XGradTrainingArguments):
        with as_input_error(ValueError, ImportError):
            XGradTrainer.check_arguments(args)
    if args.fp16 and args.device.type == "cpu":
        raise InputError("--fp16 does nothing on a CPU: give --bf16")
    if args.eval_on_start and not args.do_eval:
        raise InputError("--eval_on_start needs data to evaluate on: give --do_eval")
    if getattr(args, "use_liger_kernel", False) and not is_liger_kernel_available():
        raise InputError("--use_liger_kernel needs the package liger-kernel, which is not installed")
    if args.resume_from_checkpoint and not run_args.resume:
        raise InputError("--resume_from_checkpoint and --no_resume exclude each other")
    if args.resume_from_checkpoint and run_args.overwrite_output_dir:
        raise InputError("--resume_from_checkpoint and --overwrite_output_dir exclude each other")
    if args.push_to_hub and not args.do_train:
        # What --output_dir may hold need not be what is evaluated.
        raise InputError("--push_to_hub pushes what is trained: give --do_train (`hf-xgrad push` pushes a folder)")
    if not run_args.baseline:
        return
    if not args.do_train:
        raise InputError("--baseline compares two trainings: it needs --do_train")
    if not args.xgrad:
        raise InputError("--baseline runs with XGrad on and off: it excludes --no_xgrad")
    if args.xgrad_steps == 0:
        raise InputError("--baseline runs with XGrad on and off: it excludes --xgrad_steps 0, which is off")
    if args.resume_from_checkpoint:
        raise InputError("--baseline resumes each run from its own folder: it excludes --resume_from_checkpoint")


def _check_numbers(args: Any) -> None:
    with as_input_error(ValueError):
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_positive(name, getattr(args, name))
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} must be a number from 0, not {getattr(args, name)}")
    for name in ("seed", "data_seed"):
        # NumPy takes no others.
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 2**32:
            raise InputError(f"--{name} must be a number from 0 to {2**32 - 1}, not {getattr(args, name)}")
    if not 0 < args.num_train_epochs < math.inf and args.max_steps <= 0:
        raise InputError(f"--num_train_epochs must be more than 0, not {args.num_train_epochs}")


def _try_optimizer(args: Any) -> None:
    """Make all that steps, for one weight: what is wrong with it shows before a model is loaded."""
    if args.optim not in get_args(Optim):
        # Others want a model, another library or a GPU.
        return
    named = f"--optim {getattr(args.optim, 'value', args.optim)}"
    try:
        optimizer = make_optimizer(nn.Linear(1, 1), args)
        WeightPredictor(optimizer, XGradConfig.from_args(args))
        named = f"--lr_scheduler_type {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}"
        make_schedule(optimizer, args, 1)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{named}: {one_line(error)}") from error


def plan_runs(
    parser: ScriptParser, arguments: Sequence[str], run_args: RunArguments, args: Any, *flags: Any
) -> list[Run]:
    """Return the run that the command line `arguments` asks for, and with --baseline the one without XGrad too.

    Their folders are made, and refused where they hold what would be overwritten or taken for these runs' own.

    Args:
        args: what `parser` makes of `arguments` last.
        flags: the dataclasses of flags on model and data.
    """
    of_runs = [args]
    if run_args.baseline:
        changed = ["--no_xgrad", f"--output_dir={baseline_folder(str(args.output_dir))}", "--push_to_hub=false"]
        of_runs.append(parser.parse([*arguments, *changed])[-1])
    runs = []
    for each in of_runs:
        if each.device.type == "cpu":
            # There is nothing to copy to: torch would say so of each loader.
            each.dataloader_pin_memory = False
        settings = _settings(each, flags)
        starts_over = run_args.overwrite_output_dir and each.do_train
        if starts_over:
            _check_read(Path(str(each.output_dir)), flags)
        runs.append(Run(each, _checkpoint(each, run_args, settings), settings, starts_over))
    # No process writes before the others have looked.
    PartialState().wait_for_everyone()
    for run in runs:
        try:
            with tempfile.TemporaryFile(dir=run.folder):
                pass
        except OSError as error:
            raise _unwritable(run.folder, error) from error
    return runs


def do_runs(runs: Sequence[Run], run: Callable[[Any, str | None], dict[str, float]]) -> None:
    """Do what is planned, show two runs side by side, and then push, if asked to.

    `run` gets the arguments of one run and the checkpoint to go on with, leaves model, card and results in its folder,
    and returns its metrics.
    """
    results = []
    main = runs[0]
    for each in runs:
        if len(runs) > 1:
            logger.info("The run with XGrad %s, in %s", "on" if each.args.xgrad else "off", each.folder)
        if each.args.do_train and each.args.process_index == 0:
            if each.starts_over:
                removed = remove(left_by_runs(each.folder))
                logger.info("Starting over in %s: removed %s", each.folder, ", ".join(removed) or "nothing")
            write_json(each.folder / SETTINGS_FILE, each.settings)
        results.append(run(each.args, each.checkpoint))
    if main.args.process_index != 0:
        return
    if len(runs) > 1:
        rows = compare(*results)
        comparison = main.folder / "comparison.json"
        write_comparison(comparison, rows, {name: getattr(main.args, name) for name in SHARED_SETTINGS})
        names = ("XGrad", "plain optimizer")
        histories = {name: read_log(each.folder) for name, each in zip(names, runs, strict=True)}
        add_comparison(main.folder, read_json(comparison)["metrics"], histories)
        print(format_comparison(rows))
    if main.args.push_to_hub:
        push_run(main.args)


def push_run(args: Any) -> None:
    """Push what a run has left in its folder; where the Hub cannot be reached or refuses, say how to push it later."""
    target = {"private": args.hub_private_repo, "revision": getattr(args, "hub_revision", None)}
    try:
        commit = push(args.output_dir, args.hub_model_id, token=args.hub_token, **target)
    except PUSH_ERRORS as error:
        again = push_again(error, push_command(args.output_dir, args.hub_model_id, **target))
        raise InputError(
            f"--push_to_hub: {args.output_dir} is complete but not pushed ({one_line(error)}); {again}"
        ) from error
    logger.info("Pushed to %s", commit.repo_url)


def baseline_folder(output_dir: str) -> str:
    """Return where the run without XGrad goes: beside the other's folder, not into it, which may be pushed."""
    return f"{output_dir.rstrip('/')}-baseline"


def _settings(args: Any, flags: Sequence[Any]) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in _TRAINING if hasattr(args, name)}
    for each in flags:
        settings |= {name: value for name, value in vars(each).items() if name not in _NOT_TRAINING}
    # As they are read again from their file.
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _checkpoint(args: Any, run_args: RunArguments, settings: dict[str, Any]) -> str | None:
    """Make the output folder, refuse to overwrite another run's results, and return the checkpoint to resume from."""
    folder = Path(str(args.output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not args.do_train or run_args.overwrite_output_dir:
        return None
    if not run_args.resume:
        # A run that came to nothing before its training leaves its settings alone.
        if any(path.name != SETTINGS_FILE for path in folder.iterdir()):
            raise InputError(f"--no_resume starts over in an empty folder only, but --output_dir {folder} has files")
        return None
    if args.resume_from_checkpoint:
        reason = fault(args.resume_from_checkpoint)
        if reason is not None:
            raise InputError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint} is not a checkpoint that is whole: {reason}"
            )
        return _checked(args.resume_from_checkpoint, args)
    with as_input_error(ValueError):
        checkpoint = last_checkpoint(str(folder))
    if checkpoint is not None:
        _checked(checkpoint, args)
        _check_settings(settings, folder)
        return checkpoint
    if any(path for pattern in _FINISHED for path in folder.glob(pattern)):
        raise InputError(
            f"--output_dir {folder} holds another run's results and no checkpoint to resume from; name a new folder "
            "(or start over in this one, by --overwrite_output_dir)"
        )
    return None


def _check_read(folder: Path, flags: Sequence[Any]) -> None:
    """Refuse to start over where the run reads what would be removed."""
    removed = {path.resolve() for path in left_by_runs(folder)}
    for name, value in (item for each in flags for item in vars(each).items()):
        if isinstance(value, str) and Path(value).exists():
            path = Path(value).resolve()
            if path == folder.resolve() or not removed.isdisjoint([path, *path.parents]):
                raise InputError(f"--overwrite_output_dir would remove what --{name} {value} is: name a new folder")


def _unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(f"--output_dir {folder} cannot be written: {error.strerror}")


def _check_settings(settings: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with a run under settings that make another one: its results would be taken for theirs."""
    stored = read_json(folder / SETTINGS_FILE)
    for name, value in settings.items():
        if name in stored and stored[name] != value:
            raise InputError(
                f"--output_dir {folder} holds a run with {name}={stored[name]}, not {value}; name a new folder "
                "(and --resume_from_checkpoint, to go on with that run all the same)"
            )


def _checked(checkpoint: str, args: Any) -> str:
    """Refuse the Trainer a checkpoint of a loop under Accelerate, of which it would read a part, and the reverse."""
    of_loop = (Path(checkpoint) / LOOP_FILE).is_file()
    if of_loop == isinstance(args, TrainingArguments):
        other = "a script without the Trainer" if of_loop else "a script with the Trainer"
        raise InputError(f"{checkpoint} was written by {other}: go on with that one, or name a new --output_dir")
    return checkpoint
