"""The command `hf-xgrad`, which `python -m hf_xgrad` is, too: training, pictures of runs, pushing them, and facts.

Nothing heavy is imported before a command needs it, so that `hf-xgrad --help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module, metadata, resources
from pathlib import Path
from typing import Any

from hf_xgrad import __version__
from hf_xgrad.recipes import RECIPES
from hf_xgrad.recipes.input_errors import InputError, describe_choices, run_script
from hf_xgrad.recipes.results import text_table

Row = dict[str, str]

OPTIM = "--optim"  # the rows of names that --optim takes
# The columns, and what of them may be broken over lines.
COLUMNS: dict[str, dict[str, Any]] = {
    "optimizer": {"min_width": 8},
    "rule": {"no_wrap": True},
    "class": {"min_width": 8},
    "remark": {},
}

# Libraries that a bug may come from, as pip names them.
_REQUIRED = ("torch", "transformers", "accelerate", "safetensors")
_OPTIONAL = (
    *("apollo-torch", "bitsandbytes", "galore-torch", "grokadamw", "lomo-optim", "pytorch-optimizer", "schedulefree"),
    *("torch-optimi", "torchao", "datasets", "deepspeed", "liger-kernel", "numpy", "peft", "trl"),
)
# Settings from outside that change how a run goes. None of them holds a secret or a path.
_VARIABLES = (
    *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "CUBLAS_WORKSPACE_CONFIG"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "LOCAL_RANK", "MKL_NUM_THREADS"),
    *("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK", "RANK"),
    *("TOKENIZERS_PARALLELISM", "TORCH_COMPILE_DISABLE", "TRANSFORMERS_OFFLINE", "WORLD_SIZE"),
)


# ---- optimizers ----


def read_table() -> dict[str, Any]:
    """The table as it was made: `versions` by package, and `optimizers`, a row for each setting that was tried."""
    return json.loads(resources.files("hf_xgrad").joinpath("optimizers.json").read_text(encoding="utf-8"))


def grouped(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows that differ in their options only as one, with the list of these as `settings`."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        shared = {key: value for key, value in row.items() if key != "options"}
        groups.setdefault(tuple(shared.values()), {**shared, "settings": []})["settings"].append(row["options"])
    return list(groups.values())


def chosen(rows: list[Row], names: list[str] | None, text: str | None) -> list[Row]:
    """The rows of these names of --optim, or with this text in a column.

    Raises:
        InputError: there are none.
    """
    if names is not None:
        known = {row["name"] for row in rows if row["source"] == OPTIM}
        for name in names:
            if name not in known:
                close = describe_choices(name, sorted(known))
                raise InputError(f"--optim {name}: no such name{close}; `optimizers` without --optim lists all")
        rows = [row for row in rows if row["source"] == OPTIM and row["name"] in names]
    if text is not None:
        rows = [row for row in rows if text.lower() in " ".join(row.values()).lower()]
        if not rows:
            raise InputError(f"{text}: in no row of the table; `optimizers` without it lists all.")
    return rows


def is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def missing_packages(row: Mapping[str, str]) -> list[str]:
    return [package for package in row["install"].split() if not is_installed(package)]


def optimizers(arguments: argparse.Namespace) -> None:
    table = read_table()
    rows = chosen(table["optimizers"], arguments.optim, arguments.text)
    if arguments.json:
        listed = [{**row, "missing": missing_packages(row)} for row in rows]
        print(json.dumps({"versions": table["versions"], "optimizers": listed}, indent=2))
        return
    for source in dict.fromkeys(row["source"] for row in rows):
        print(f"\n{source}")
        lines = []
        for group in grouped(row for row in rows if row["source"] == source):
            settings = "; ".join(setting or "plain" for setting in group["settings"])
            name = group["name"] if settings == "plain" else f"{group['name']} ({settings})"
            missing = missing_packages(group)
            install = f"not installed here: pip install {' '.join(missing)}" if missing else ""
            note = "; ".join(filter(None, (group["note"], install)))
            lines.append((name, group["rule"], group["class"], note))
        print(text_table(COLUMNS, lines, max(60, shutil.get_terminal_size().columns)))
    counts = Counter(row["rule"] for row in rows)
    print("\n" + ", ".join(f"{number} {rule}" for rule, number in counts.most_common()) + " (each setting counted)")


# ---- env ----


def environment() -> dict[str, Any]:
    """What a bug report needs; nothing that names the user, a folder or a secret."""
    import torch

    from hf_xgrad import XGradConfig

    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "hf_xgrad": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: metadata.version(package) for package in _REQUIRED},
        "optional": {package: metadata.version(package) for package in _OPTIONAL if is_installed(package)},
        "cuda of torch": torch.version.cuda,
        "devices": devices or ["cpu"],
        "threads": torch.get_num_threads(),
        "XGradConfig": dataclasses.asdict(XGradConfig()),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def env(arguments: argparse.Namespace) -> None:
    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        if name in ("versions", "optional"):
            flat.update(value)
        elif isinstance(value, dict):
            flat[name] = ", ".join(f"{key}={entry}" for key, entry in value.items()) or "none"
        else:
            flat[name] = ", ".join(value) if isinstance(value, list) else value
    for name, value in flat.items():
        print(f"{name + ':':20} {value}")


# ---- plot ----


def plot(arguments: argparse.Namespace) -> None:
    from hf_xgrad.outputs.plots import plot_folders
    from hf_xgrad.outputs.run_logs import PlotError

    try:
        plot_folders(arguments.runs, arguments.output, arguments.metric)
    except (ImportError, PlotError) as error:
        raise InputError(str(error)) from error
    print(arguments.output)


# ---- push ----


def push(arguments: argparse.Namespace) -> None:
    from hf_xgrad.outputs.hub import PUSH_ERRORS, push, push_again, push_command

    target = {name: getattr(arguments, name) for name in ("hub_model_id", "private", "revision")}
    try:
        commit = push(arguments.folder, **target)
    except PUSH_ERRORS as error:
        reason = " ".join(str(error).split())
        again = push_again(error, push_command(arguments.folder, **target))
        raise InputError(f"{arguments.folder} was not pushed: {reason}; {again}") from error
    print(commit.repo_url)


# ---- the command line ----


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="hf-xgrad", description="XGrad weight prediction. `hf-xgrad COMMAND --help` lists the flags of a command."
    )
    top.add_argument("--version", action="version", version=f"hf_xgrad {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (_, text) in RECIPES.items():
        commands.add_parser(name, help=text, add_help=False)

    def command(run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=text, description=text)
        added.set_defaults(run=run)
        return added

    picture = command(plot, "Draw runs over their steps: losses or another metric, and what XGrad measured.")
    picture.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="output folder, checkpoint or trainer_state.json; NAME=RUN names it, and runs of one name are one line",
    )
    picture.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("xgrad_runs.png"),
        metavar="FILE",
        help="a name in .png or .svg (default: %(default)s)",
    )
    picture.add_argument(
        "--metric",
        metavar="NAME",
        help="what to draw beside the training loss (default: what chose the best checkpoints, else eval_loss)",
    )
    pushed = command(push, "Push the folder of a run to the Hub: model, card and results, without its checkpoints.")
    pushed.add_argument("folder", type=Path, help="output folder of the run")
    pushed.add_argument("--hub_model_id", metavar="ID", help="repository (default: yours, of the folder's name)")
    pushed.add_argument("--private", action="store_true", default=None, help="if it has to be made, make it private")
    pushed.add_argument("--revision", metavar="BRANCH", help="(default: the main branch)")
    table = command(optimizers, "Print which optimizers work, by which rule, and which are refused and why.")
    which = table.add_mutually_exclusive_group()
    which.add_argument("text", nargs="?", help="only the rows with this text in them")
    which.add_argument("--optim", nargs="+", metavar="NAME", help="only these names of --optim")
    facts = command(env, "Print what a bug report needs: versions, devices, settings.")
    for printed in (table, facts):
        printed.add_argument("--json", action="store_true", help="print JSON")
    return top


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] not in RECIPES:
        return run_script("hf-xgrad", _run, words, again="")
    module = {}

    def load(words: list[str]) -> None:
        module["main"] = import_module(f"hf_xgrad.recipes.{RECIPES[words[0]][0]}").main

    # This takes seconds, in which a Ctrl-C may come, too.
    status: int = run_script(f"hf-xgrad {words[0]}", load, words) or module["main"](words[1:])
    return status


def _run(words: list[str]) -> None:
    top = parser()
    if not words:
        top.print_help()
        return
    try:
        parsed = top.parse_args(words)
        parsed.run(parsed)
    except BrokenPipeError:
        # Whoever read the output has seen enough; closing it at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
