"""Several processes: the contract of scale_out.py in every set-up, as `torchrun` and `accelerate launch` start it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType
from filelock import FileLock
from safetensors.torch import load_file

import scale_out
import tiny_models as tiny
from scale_out import CHECKPOINT, SETUPS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "accelerate_configs"
LIMIT = 300  # seconds that a launch may take on a slow machine


def marks(name: str) -> list[Any]:
    setup = SETUPS[name]
    missing = setup.engine == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None
    return [
        *([pytest.mark.slow] if setup.slow else []),
        *([pytest.mark.skip(reason="needs deepspeed")] if missing else []),
    ]


def every(*setups: str) -> list[Any]:
    return [pytest.param(name, marks=marks(name), id=name) for name in setups]


def launch(setup: str, folder: Path, *flags: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs scale_out.py in a set-up; at its end, and at the latest after `LIMIT`, no process of it is left."""
    launched = SETUPS[setup]
    count = str(processes or launched.processes)
    if launched.config is None:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", count]
    else:
        config = ("--config_file", str(CONFIGS / f"{launched.config}.yaml"))
        # On a port that is free: other launches run at the same time.
        launcher = ["accelerate.commands.launch", *config, "--num_processes", count, "--main_process_port", "0"]
        launcher += ["--mixed_precision", "bf16" if launched.bf16 else "no", *launched.flags]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    worker = [scale_out.__file__, "--setup", setup, "--out", str(folder), *flags]
    log = folder / "log.txt"
    with log.open("w") as output:
        process = psutil.Popen(
            [sys.executable, "-m", *launcher, *worker], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        workers: set[psutil.Process] = set()
        try:
            for _ in range(LIMIT):
                workers |= set(process.children(recursive=True))
                try:
                    process.wait(1)
                    break
                except psutil.TimeoutExpired:
                    pass
            else:
                output.write(f"\nstill running after {LIMIT} s\n")
        finally:
            for left in (process, *workers):  # each worker has a session of its own
                if left.is_running():
                    left.kill()
            psutil.wait_procs([process, *workers], timeout=10)
    return subprocess.CompletedProcess(process.args, process.returncode, log.read_text())


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def launched(shared: Path) -> Callable[[str], Path]:
    """Gives the folder that a set-up has left; the first who asks for it launches it."""

    def folder_of(setup: str) -> Path:
        folder = shared / f"scale-out-{setup}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                launch(setup, folder)
        return folder

    return folder_of


def tail(folder: Path) -> str:
    return "\n".join((folder / "log.txt").read_text().splitlines()[-60:])


@pytest.mark.parametrize(
    ("setup", "check"),
    [
        pytest.param(name, check, marks=marks(name), id=f"{name}-{check}")
        for name, setup in SETUPS.items()
        for check in setup.checks
    ],
)
def test_contract(launched: Callable[[str], Path], setup: str, check: str) -> None:
    folder = launched(setup)
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    assert check in results, f"the launch ended before this check:\n{tail(folder)}"
    assert not results[check]["problems"], "\n\n".join(results[check]["problems"].values())


@pytest.mark.parametrize("setup", every(*(name for name, setup in SETUPS.items() if "saved" in setup.checks)))
@pytest.mark.parametrize("model", ["end", f"checkpoint-{CHECKPOINT}"])
def test_saved_models_are_the_true_weights(launched: Callable[[str], Path], setup: str, model: str) -> None:
    folder = launched(setup) / "saved"
    true = load_file(folder / f"{model}.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder / model)
    [architecture] = config.architectures
    loaded = tiny.weights(getattr(transformers, architecture).from_pretrained(folder / model))
    assert loaded.keys() == true.keys()
    assert all(torch.equal(weight, true[name].to(weight.dtype)) for name, weight in loaded.items())


@pytest.mark.slow
@pytest.mark.parametrize("other", ["ddp2-accelerate"])
def test_launchers_give_the_same_weights(launched: Callable[[str], Path], other: str) -> None:
    name = "closed_form.safetensors"
    assert tiny.same(load_file(launched("ddp2") / name), load_file(launched(other) / name))


@pytest.mark.slow
@pytest.mark.parametrize("setup", every("ddp2"))
def test_one_process_that_fails_ends_all(tmp_path: Path, setup: str) -> None:
    """Each process that gets to know it holds its true weights again; none hangs."""
    done = launch(setup, tmp_path, "--fail")
    assert done.returncode not in (0, -9), done.stdout[-3000:]
    for rank in range(SETUPS[setup].processes):
        report = json.loads((tmp_path / f"fault-{rank}.json").read_text())
        assert report["predicted"], "the check shows nothing: the weights were not predicted"
        assert report["true"], report
        assert (report["error"] == "FaultError") == (rank == SETUPS[setup].processes - 1)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_those_of_accelerate(path: Path) -> None:
    config = load_config_from_file(str(path))
    kinds = {"single": "NO", "multi": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    assert config.distributed_type == DistributedType(kinds[path.stem.partition("_")[0]])
    raw = yaml.safe_load(path.read_text())
    assert raw["use_cpu"] is (path.stem == "multi_cpu")
    if path.stem.startswith("fsdp"):
        assert raw["fsdp_config"]["fsdp_version"] == int(path.stem[-1])
    if path.stem.startswith("deepspeed"):
        assert raw["deepspeed_config"]["zero_stage"] == int(path.stem[-1])
