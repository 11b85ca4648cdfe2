"""Command lines of the recipes: dataclass flags, and a .json or .yaml file of them."""

import argparse
import copy
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from transformers import HfArgumentParser

from hf_xgrad.recipes.input_errors import InputError, describe_choices, one_line

CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
# Steps between two entries of the log, where Transformers has 500: a run of some hundred steps would have no curve.
LOGGING_STEPS = 10
# How --help groups the flags; a dataclass names its group.
GROUPS = ("XGrad", "data", "model", "run", "training")
# Flags of other scripts: the flag that means the same here, or else what does the same. From the Transformers examples
# run_classification and run_*_no_trainer, and from older releases.
HABITS = {
    "evaluation_strategy": "eval_strategy",
    "label_column_name": "label_column",
    "max_length": "max_seq_length",
    "max_train_steps": "max_steps",
    "metric_name": "metrics",
    "no_cuda": "use_cpu",
    "num_warmup_steps": "warmup_steps",
    "torch_dtype": "dtype",
    "use_auth_token": "token",
    "checkpointing_steps": "give --save_strategy steps and --save_steps N, or --save_strategy epoch",
    "do_regression": "give --problem_type regression",
    "group_by_length": "give --train_sampling_strategy group_by_length",
    "logging_dir": "set the variable TENSORBOARD_LOGGING_DIR",
    "remove_columns": "only the columns of texts and labels are read",
    "remove_splits": "only the splits that are trained on, evaluated or predicted are read",
    "save_safetensors": "weights are saved as safetensors, always",
    "shuffle_seed": "give --data_seed",
    "shuffle_train_dataset": "training data are shuffled in every epoch, by --seed or --data_seed",
    "test_split_name": "it is the split `test`, or --test_file",
    "text_column_delimiter": "texts are not joined; --text_column and --text_pair_column name the two of a pair",
    "text_column_names": "give --text_column, and --text_pair_column for a second one",
    "train_split_name": "it is the split `train`, or --train_file",
    "use_fast_tokenizer": "the tokenizer is the one that AutoTokenizer chooses",
    "use_slow_tokenizer": "the tokenizer is the one that AutoTokenizer chooses",
    "validation_split_name": "it is the split `validation`, or --validation_file",
    "warmup_ratio": "give --warmup_steps, which below 1 is a share of all steps",
    "with_tracking": "give --report_to and the names of trackers",
}


@dataclasses.dataclass
class ModelArguments:
    """Which model, configuration and tokenizer, and where they come from."""

    _argument_group_name = "model"

    model_name_or_path: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Folder or Hub name of the model to fine-tune. Left out: a new model from --config_name and "
            "--tokenizer_name."
        },
    )
    config_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder or Hub name of the configuration, where it is not the model's."}
    )
    tokenizer_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder or Hub name of the tokenizer, where it is not the model's."}
    )
    cache_dir: str | None = dataclasses.field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = dataclasses.field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."}
    )
    token: str | None = dataclasses.field(
        default=None, metadata={"help": "Token for the Hub; by default the one that `hf auth login` stored."}
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Run the code that comes with a model on the Hub."}
    )
    ignore_mismatched_sizes: bool = dataclasses.field(
        default=False, metadata={"help": "Replace a head made for another number of labels by a new one."}
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = dataclasses.field(
        default="float32",
        metadata={
            "help": "Type of the weights; 'auto' is the one they are stored in. In 16-bit weights most of a predicted "
            "move is rounded away: for mixed precision keep float32 and add --bf16 or --fp16."
        },
    )


@dataclasses.dataclass
class RunArguments:
    """How the runs of a script stand to their output folder and to each other."""

    _argument_group_name = "run"

    resume: bool = dataclasses.field(
        default=True,
        metadata={
            "help": "Resume from the last checkpoint in --output_dir. --no_resume starts over, in an empty folder."
        },
    )
    overwrite_output_dir: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Start over: what an earlier training left in --output_dir is removed (model, checkpoints, "
            "results, card, logs), and nothing else."
        },
    )
    baseline: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Run the same again with XGrad off, in <output_dir>-baseline, and print and write "
            "(comparison.json) both side by side."
        },
    )


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"


class _CoreSchemaLoader(yaml.SafeLoader):
    """YAML 1.2's core schema. PyYAML's own is YAML 1.1, where `1e-5` is text and the strategy `no` is a boolean."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's declaration)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    _CoreSchemaLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the settings that a .json or .yaml file holds, as name -> value."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {one_line(getattr(error, 'strerror', None) or error)}") from error
    try:
        settings = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_CoreSchemaLoader)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{path}{place}: {one_line(getattr(error, 'problem', None) or error)}") from error
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"{path} does not hold settings as `name: value`")
    return settings


def split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the config file, which comes first or after --config, and the other words of a command line."""
    words = list(arguments)
    if words and words[0].endswith(CONFIG_SUFFIXES) and not words[0].startswith("--"):
        return Path(words[0]), words[1:]
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config":
            rest = words[place + 1 :] if equals else words[place + 2 :]
            if not equals and place + 1 == len(words):
                raise InputError("--config needs the name of a file")
            return Path(value if equals else words[place + 1]), [*words[:place], *rest]
    return None, words


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == 0 and action.const is False:
            # HfArgumentParser makes a --no_a of an --a that is true, with the help of --a.
            return f"Not --{action.dest}."
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser makes --a-b of --a_b, too; one of them is enough to read.
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        return super()._format_action_invocation(shown)


class ScriptParser(HfArgumentParser):
    """Makes flags from dataclasses; whatever is wrong with them becomes an InputError."""

    def __init__(self, *dataclass_types: Any, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            usage="%(prog)s [settings.yaml] [--flag value]...",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--config",
            metavar="settings.yaml",
            default=argparse.SUPPRESS,
            help="File of flags, as `name: value` (.yaml) or {name: value} (.json); flags beside it override it. The "
            "first word of the command line may name it without --config.",
        )
        self._groups = {name: self.add_argument_group(name) for name in GROUPS}
        self.dataclass_types = list(dataclass_types)
        for kind in dataclass_types:
            self._add_dataclass_arguments(kind)
        self._log_small_runs()

    def add_argument_group(self, *args: Any, **kwargs: Any) -> Any:
        """Return the group of that name, a new one where there is none."""
        known: Any = getattr(self, "_groups", {}).get(args[0] if args else None)
        return known or super().add_argument_group(*args, **kwargs)

    def _parse_dataclass_field(self, parser: Any, field: Any) -> None:  # type: ignore[override]
        of_xgrad = field.name.startswith("xgrad")
        super()._parse_dataclass_field(self._groups["XGrad"] if of_xgrad else parser, field)

    def error(self, message: str) -> NoReturn:
        raise InputError(one_line(message))

    def _log_small_runs(self) -> None:
        """Log more often than Transformers does; what follows --logging_steps there stays where it was."""
        if logging := self._option_string_actions.get("--logging_steps"):
            logging.help = "Log every so many steps; below 1, a share of all steps. Transformers' own default is 500."
            evaluation = self._option_string_actions["--eval_steps"]
            evaluation.help = f"{evaluation.help} Where neither is given, every 500 steps."
            self.set_defaults(logging_steps=LOGGING_STEPS)

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Return one instance for each dataclass; a config file may come first, and flags override it."""
        if self.get_default("logging_steps") == LOGGING_STEPS:
            given = {name.replace("-", "_") for name in self.given(arguments)}
            self.set_defaults(eval_steps=None if "logging_steps" in given else 500)
        try:
            return self.parse_args_into_dataclasses(self._words(arguments), look_for_args_file=False)
        except (ValueError, ImportError) as error:
            raise InputError(one_line(error)) from error

    def given(self, arguments: Sequence[str]) -> set[str]:
        """Return the names of the flags that are there, on the command line or in the config file."""
        return {word.partition("=")[0][2:] for word in self._words(arguments) if word.startswith("--")}

    def _words(self, arguments: Sequence[str]) -> list[str]:
        path, flags = split_config(arguments)
        if path is not None:
            flags = [*self._flags_from(read_config_file(path), path), *flags]
        if split_config(flags)[0] is not None:
            raise InputError("one config file is enough, and there are two")
        flags = [self._as_here(word) if word.startswith("--") else word for word in flags]
        self._refuse_unknown(self.parse_known_args(flags)[1])
        return flags

    def _as_here(self, word: str) -> str:
        """Return a flag of another script as it is called here, any other word as it is."""
        flag, equals, value = word.partition("=")
        habit = HABITS.get(flag[2:].replace("-", "_"))
        if habit is None or flag in self._option_string_actions:
            return word
        if f"--{habit}" in self._option_string_actions:
            return f"--{habit}{equals}{value}"
        if " " in habit:
            raise InputError(f"there is no {flag} here: {habit}")
        return word

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        for word in words:
            if word.startswith("--"):
                name = word.split("=")[0]
                raise InputError(f"unknown argument {name}{describe_choices(name, list(self._option_string_actions))}")
        if words:
            raise InputError(f"unexpected argument {words[0]!r}")

    def _flags_from(self, settings: dict[str, Any], path: Path) -> list[str]:
        names = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        flags: list[str] = []
        for key, value in settings.items():
            flag = self._as_here(f"--{key}")
            if flag[2:] not in names or key == "config":
                raise InputError(f"{path}: unknown key {key!r}{describe_choices(key, names)}")
            # The values go through the flags' own parsers: one place knows what type each has.
            flags += _flag_words(flag, value, takes_value=self._option_string_actions[flag].nargs != 0)
        return flags


def _flag_words(flag: str, value: Any, takes_value: bool) -> list[str]:
    if not takes_value:
        return [flag] if value else []
    if value is None:
        return []
    if isinstance(value, list):
        return [flag, *(_text(item) for item in value)]
    return [f"{flag}={_text(value)}"]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)
