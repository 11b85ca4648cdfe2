"""What is asked for is what trains: FSDP, DeepSpeed and several processes, where Accelerate cannot give them."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import hf_xgrad
from hf_xgrad.recipes.engines import check_engine
from hf_xgrad.recipes.input_errors import InputError

ROOT = Path(hf_xgrad.__file__).resolve().parent.parent
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0")  # fmt: skip


def launched(*words: str, folder: Path) -> list[str]:
    """Launch a recipe that would train on Python's documentation, and return the lines of its errors."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*LAUNCH, *words, "--output_dir", str(folder)],
        env=environment,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert not folder.exists()
    return [line for line in run.stderr.splitlines() if ": error: " in line]


@pytest.mark.parametrize("recipe", ["language.clm", "loop.clm"])
def test_fsdp_on_cpus_is_refused(tmp_path: Path, recipe: str) -> None:
    """Accelerate has it on accelerators only, and would train with DDP."""
    launch = ("--use_fsdp", "--num_processes", "2", "-m", f"hf_xgrad.recipes.{recipe}", "--use_cpu")
    lines = launched(*launch, folder=tmp_path / "out")
    assert len(lines) == 2  # one of each process
    assert all("ACCELERATE_USE_FSDP asks for FSDP, and Accelerate has none here (2 on cpu)" in line for line in lines)


def test_processes_that_would_train_alone_are_refused(tmp_path: Path) -> None:
    launch = ("--use_fsdp", "--num_processes", "2", "-m", "hf_xgrad.recipes.language.clm")
    lines = launched(*launch, folder=tmp_path / "out")
    assert len(lines) == 2
    assert all("WORLD_SIZE is 2" in line and "--use_cpu" in line for line in lines)


# ---- without processes ----


@pytest.fixture
def accelerate_gives(monkeypatch: pytest.MonkeyPatch) -> object:
    """Set what Accelerate gives: the type, and the number of processes."""

    def give(kind: DistributedType, processes: int) -> None:
        monkeypatch.setattr(
            PartialState,
            "_shared_state",
            {
                "distributed_type": kind,
                "num_processes": processes,
                "backend": None,
                "debug": False,
                "device": torch.device("cpu"),
                "_cpu": True,
                "fork_launched": False,
                "process_index": 0,
                "local_process_index": 0,
            },
        )

    return give


def args(**settings: object) -> SimpleNamespace:
    return SimpleNamespace(**{"device": torch.device("cpu"), "use_cpu": False, **settings})


@pytest.mark.parametrize(
    ("settings", "variables", "said"),
    [
        ({"fsdp": True}, {}, "--fsdp asks for FSDP"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP asks for FSDP"),
        ({"deepspeed": "ds.json", "use_cpu": True}, {}, "--deepspeed asks for DeepSpeed"),
        ({"use_cpu": True}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED asks for DeepSpeed"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_USE_CPU": "1"}, "asks for DeepSpeed"),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism config"),
        ({}, {"WORLD_SIZE": "3"}, "WORLD_SIZE is 3"),
    ],
)
@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_CPU])
def test_what_is_not_obtained_is_refused(
    accelerate_gives: object,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    variables: dict[str, str],
    said: str,
    kind: DistributedType,
) -> None:
    accelerate_gives(kind, 1 if kind == DistributedType.NO else 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        check_engine(args(**settings))


@pytest.mark.parametrize(
    ("kind", "processes", "settings", "variables"),
    [
        (DistributedType.NO, 1, {}, {}),
        (DistributedType.MULTI_CPU, 2, {"use_cpu": True}, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "false"}),
        (DistributedType.MULTI_GPU, 2, {"fsdp": True}, {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}),
        (DistributedType.DEEPSPEED, 2, {"deepspeed": "ds.json"}, {"ACCELERATE_USE_DEEPSPEED": "true"}),
        # Accelerate takes up DeepSpeed in one process when the trainer is made.
        (DistributedType.NO, 1, {"deepspeed": "ds.json"}, {}),
    ],
)
def test_what_is_obtained_is_not(
    accelerate_gives: object,
    monkeypatch: pytest.MonkeyPatch,
    kind: DistributedType,
    processes: int,
    settings: dict[str, object],
    variables: dict[str, str],
) -> None:
    accelerate_gives(kind, processes)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_engine(args(**settings))
