"""Whether Accelerate gives what was asked for. Where it cannot it trains in another way, and does not say so."""

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from hf_xgrad.recipes.input_errors import InputError

# What asks for an engine: a variable that `accelerate launch` sets, or a flag of the Trainer.
_FSDP = ("FSDP", "ACCELERATE_USE_FSDP", "fsdp")
_DEEPSPEED = ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", "deepspeed")
_PARALLELISM = ("a parallelism config", "ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config")


def check_engine(args: Any) -> None:
    """Refuse a run that would not be the one asked for. `args` are TrainingArguments, or LoopArguments."""
    device = args.device  # joins the processes
    state = PartialState()
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if state.num_processes < started:
        raise InputError(
            f"WORLD_SIZE is {started}, but Accelerate finds no accelerators for so many processes, and each would "
            "train alone: give --use_cpu, which joins them on CPUs"
        )
    # These are for accelerators only, one for each process.
    if state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        _refuse(args, *_FSDP, f"here ({state.num_processes} on {device.type})")
        _refuse(args, *_PARALLELISM, f"here ({state.num_processes} on {device.type})")
    if args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
        _refuse(args, *_DEEPSPEED, "with --use_cpu")


def _refuse(args: Any, engine: str, variable: str, flag: str, where: str) -> None:
    given = f"--{flag}" if getattr(args, flag, None) else variable if parse_flag_from_env(variable) else None
    if given is not None:
        raise InputError(
            f"{given} asks for {engine}, and Accelerate has none {where}: start several processes with an accelerator "
            "each, or leave it out"
        )
