"""kill -9 and SIGTERM: the same command again, and the run ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import killed_runs
import run_files
from hf_xgrad.outputs.checkpoints import last_checkpoint
from killed_runs import OPTIMIZERS, PRECISIONS, STEPS, WITHOUT_FILE, WITNESS, SetUp, Signal

LIMIT = 120  # seconds that a run may take on a slow machine
KILLED = -signal.SIGKILL


# ---- runs ----


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """Makes processes that have imported what a run needs."""
    with pytest.MonkeyPatch.context() as patch:
        # The server of forks is not told sys.path by Python 3.11.
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([killed_runs.__name__])
        yield context


Start = Callable[..., int]


@pytest.fixture(scope="module")
def start(context: Any) -> Start:
    """Runs one of the functions of killed_runs in a process of its own, and gives the exit status."""

    def start(function: Callable[..., None], folder: Path, *args: Any) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=function, args=(str(folder), *args))
        process.start()
        return end(process)

    return start


def end(process: Any) -> int:
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"a run took more than {LIMIT} s")
    status: int = process.exitcode
    return status


@pytest.fixture(scope="module")
def uninterrupted(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run that nothing happened to, with a checkpoint at every step."""
    folders: dict[SetUp, Path] = {}

    def folder_of(setup: SetUp) -> Path:
        if setup not in folders:
            folders[setup] = tmp_path_factory.mktemp(str(setup))
            every_step = replace(setup, settings={"save_steps": 1})
            assert start(killed_runs.run, folders[setup], every_step) == 0, log(folders[setup])
        return folders[setup]

    return folder_of


def log(folder: Path, name: str = killed_runs.LOG) -> str:
    return "\n".join((folder / name).read_text().splitlines()[-40:])


# ---- what has to be equal ----


def plain(value: Any) -> Any:
    """Tensors as lists, so that == compares them bit for bit; NaN, which equals nothing, as a text."""
    if isinstance(value, torch.Tensor):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(value.element_size())
        return str(value.dtype), value.contiguous().view(bits).tolist() if bits else value.tolist()
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return repr(value)


def state_of(checkpoint: Path, *, without: Collection[str] = (), unlogged: int | None = None) -> dict[str, Any]:
    """All that a checkpoint says of a run: weights, optimizer, schedule, random numbers, XGrad's file, the log."""
    state = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    state |= {path.name: torch.load(path, weights_only=False) for path in checkpoint.glob("*.pt*")}
    state |= run_files.read(checkpoint / "trainer_state.json")
    state["log_history"] = [entry for entry in state["log_history"] if entry["step"] != unlogged]
    # The uninterrupted run saved more often.
    return {name: plain(each) for name, each in state.items() if name not in ("save_steps", *without)}


def differences(folder: Path, expected: Path, **options: Any) -> list[str]:
    """Names of what a run has not left as the uninterrupted one did."""
    last = f"checkpoint-{STEPS}"
    ours, theirs = (state_of(each / last, **options) for each in (folder, expected))
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return different + ([] if run_files.same_weights(folder, expected) else ["the end weights"])


# ---- kill -9 ----

FILES = (
    "config.json", "model.safetensors", "training_args.bin", "optimizer.pt", "scheduler.pt", "xgrad.*",
    "rng_state.pth", "trainer_state.json",
)  # fmt: skip


def writing(step: int, share: float) -> list[Signal]:
    """A kill at every stage of a checkpoint, one after the other."""
    return [Signal(name, step, share) for name in FILES]


def at(*moments: str) -> list[Signal]:
    return [Signal(moment, int(step)) for moment, _, step in (each.partition("@") for each in moments)]


# What happens to a run, again and again until it ends. "train_begin" is a kill while it is resumed.
LIVES = {
    "nothing-saved": [*at("train_begin@0", "forward@1"), *writing(2, 0.5), *at("save@2")],
    "in-windows": at(
        "forward@2", "train_begin@2", "backward@3", "pre_optimizer_step@3", "optimizer@3", "optimizer_step@3",
        "step_end@4", "forward@5", "train_begin@4", "backward@5", "step_end@6", "log@6",
    ),
    "between-epochs": at(
        "backward@5", "step_end@6", "log@6", "save@6", "train_begin@6", "step_begin@6", "optimizer@7", "train_end@9",
        "train_begin@9",
    ),
    "in-files": [*writing(4, 0), *writing(6, 1)],
    "rotated": [
        *at("forward@3"), Signal("rotation", 4, 0), *writing(6, 0.5), Signal("rotation", 6, 0.3),
        Signal("rotation", 8, 0.6), Signal("optimizer.pt", 9), Signal("rotation", 9, 1),
    ],
}  # fmt: skip
SETUPS = [
    SetUp(optimizer, precision, accumulation)
    for optimizer, precision, accumulation in product(OPTIMIZERS, PRECISIONS, (1, 4))
    # PyTorch rounds the state of an optimizer to the weights' type when it loads it, and Adafactor's is fp32.
    if precision != "bf16-weights" or "adafactor" not in optimizer
]
# Each life, precision and kind of rule; the slow tests are the product.
COVERING = {
    ("nothing-saved", SetUp("auto-adafactor", "bf16", 1)),
    ("in-windows", SetUp("adamw", "bf16-weights", 4)),
    ("between-epochs", SetUp("momentum", "bf16", 4)),
    ("in-files", SetUp("auto", "fp32", 4)),
    ("rotated", SetUp("rmsprop", "bf16-weights", 1)),
}


@pytest.mark.parametrize(
    ("life", "setup"),
    [
        pytest.param(life, setup, id=f"{life}-{setup}", marks=[] if (life, setup) in COVERING else [pytest.mark.slow])
        for life, setup in product(LIVES, SETUPS)
    ],
)
def test_killed_and_started_again(
    tmp_path: Path, start: Start, uninterrupted: Callable[..., Path], life: str, setup: SetUp
) -> None:
    expected = uninterrupted(setup)
    limited = replace(setup, settings={"save_total_limit": 1}) if life == "rotated" else setup
    for kill in LIVES[life]:
        if "xgrad" in kill.moment and setup.optimizer in WITHOUT_FILE:
            continue
        assert start(killed_runs.run, tmp_path, limited, kill) == KILLED, f"{kill}\n{log(tmp_path)}"
        if kill.step > 1:  # before, there may be nothing to predict from
            predicts = kill.moment in ("forward", "backward")
            assert (tmp_path / WITNESS).read_text() == ("predicted" if predicts else "true"), kill
    assert start(killed_runs.run, tmp_path, limited) == 0, log(tmp_path)
    assert differences(tmp_path, expected) == []


@pytest.mark.parametrize("moment", ["train_end", "save"])
def test_killed_when_nothing_is_left_to_train(tmp_path: Path, start: Start, moment: str) -> None:
    """The last checkpoint was written, the end weights were not; and the run ends within an epoch."""
    setup = SetUp("last_update", settings={"max_steps": STEPS - 1, "lr_scheduler_type": "constant_with_warmup"})
    assert start(killed_runs.run, tmp_path / "whole", setup) == 0, log(tmp_path / "whole")
    killed = tmp_path / "killed"
    assert start(killed_runs.run, killed, setup, Signal(moment, STEPS - 1)) == KILLED, log(killed)
    assert start(killed_runs.run, killed, setup) == 0, log(killed)
    assert run_files.same_weights(killed, tmp_path / "whole")


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json"])
def test_killed_while_a_whole_checkpoint_is_written_again(tmp_path: Path, start: Start, name: str) -> None:
    """Neither the old files nor the new ones are all there: none of them is gone on from."""
    old = SetUp("last_update", settings={"seed": 1})
    new = SetUp("last_update", settings={"seed": 2})
    for setup, folder in ((old, "mixed"), (new, "new")):
        assert start(killed_runs.run, tmp_path / folder, setup) == 0, log(tmp_path / folder)
    mixed = tmp_path / "mixed"
    shutil.rmtree(mixed / "checkpoint-2")
    shutil.copytree(tmp_path / "new" / "checkpoint-2", mixed / "checkpoint-2")
    for step in (6, 8, STEPS):
        shutil.rmtree(mixed / f"checkpoint-{step}")
    again = replace(new, settings={**new.settings, "resume_from_checkpoint": str(mixed / "checkpoint-2")})
    assert start(killed_runs.run, mixed, again, Signal(name, 4)) == KILLED, log(mixed)
    assert start(killed_runs.run, mixed, new) == 0, log(mixed)
    assert differences(mixed, tmp_path / "new") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_killed_by_the_parent(
    tmp_path: Path, context: Any, start: Start, uninterrupted: Callable[..., Path], seed: int
) -> None:
    """Wherever the run is when the signal comes: it does not wait for the parent, which counts what it does."""
    draw = random.Random(seed)
    setup = draw.choice(SETUPS)
    for _ in range(draw.randint(1, 6)):
        ours, its = context.Pipe(duplex=False)
        process = context.Process(target=killed_runs.run, args=(str(tmp_path), setup), kwargs={"pulse": its})
        process.start()
        its.close()
        try:
            for _ in range(draw.randint(1, 150)):
                ours.recv_bytes()
            process.kill()
        except EOFError:
            pass  # it had ended before
        assert end(process) in (KILLED, 0), log(tmp_path)
    assert start(killed_runs.run, tmp_path, setup) == 0, log(tmp_path)
    assert differences(tmp_path, uninterrupted(setup)) == []


# ---- two processes ----


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "last_update", "auto"])
def test_killed_between_the_files_of_two_processes(tmp_path: Path, context: Any, optimizer: str) -> None:
    setup = SetUp(optimizer, accumulation=4)
    numbers = count()

    def logs(folder: Path) -> str:
        return "\n".join(log(folder, f"log-{rank}.txt") for rank in range(2))

    def launch(folder: Path, kill: Signal | None = None) -> list[int]:
        folder.mkdir(exist_ok=True)
        store = str(tmp_path / f"store-{next(numbers)}")
        processes = [
            context.Process(target=killed_runs.run_process, args=(str(folder), setup, rank, store, kill))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        try:
            first = end(processes[0])
        finally:
            if kill is not None:
                processes[1].kill()
        return [first, end(processes[1])]

    assert launch(tmp_path / "whole") == [0, 0], logs(tmp_path / "whole")
    killed = tmp_path / "killed"
    assert launch(killed, Signal("between", 6)) == [KILLED, KILLED], logs(killed)
    names = {path.name for path in (killed / "checkpoint-6").iterdir()}
    assert "rng_state_0.pth" in names
    assert "rng_state_1.pth" not in names
    assert launch(killed) == [0, 0], logs(killed)
    assert differences(killed, tmp_path / "whole") == []


# ---- scripts ----

SCRIPTS = {
    "run_clm": ("optimizer.pt", "xgrad.*", "trainer_state.json"),
    "run_clm_no_trainer": ("optimizer.bin", "custom_checkpoint_1.pkl", "trainer_state.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_killed_and_started_again(tmp_path: Path, start: Start, script: str) -> None:
    model = "n_embd=16,n_layer=1,n_head=2,n_positions=16"
    flags = [
        *run_files.write_texts(tmp_path), "--model_type", "gpt2", "--new_tokenizer_size", "270", "--block_size", "13",
        "--config_overrides", model, "--do_train", "--do_eval", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2", "--warmup_steps", "2", "--logging_steps", "1",
        "--num_train_epochs", "4", "--save_strategy", "steps", "--save_steps", "3", "--xgrad_rule", "last_update",
        "--xgrad_steps", "auto", "--disable_tqdm", "true", "--use_cpu", "--dataloader_pin_memory", "false",
        "--report_to", "none",
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(killed_runs.run_script, whole, script, [*flags, "--output_dir", str(whole)], None) == 0, log(whole)
    steps = run_files.read(whole / "trainer_state.json")["global_step"]
    assert steps > 9
    optimizer, ours, state = SCRIPTS[script]
    kills = [
        *at("forward@1"), Signal(optimizer, 3), *at("pre_optimizer_step@2"), Signal(ours, 3), Signal(state, 3),
        *at("optimizer_step@4"), Signal("model.safetensors", 6), *at("forward@4"), Signal(ours, 9, 0),
        Signal(state, 9, 1),
    ]  # fmt: skip
    command = [*flags, "--output_dir", str(killed)]
    for kill in kills:
        (killed / WITNESS).unlink(missing_ok=True)
        assert start(killed_runs.run_script, killed, script, command, kill) == KILLED, f"{kill}\n{log(killed)}"
        assert (killed / WITNESS).read_text() == str(kill)
    assert start(killed_runs.run_script, killed, script, command, None) == 0, log(killed)
    assert run_files.same_weights(killed, whole)
    logs = [[e for e in run_files.history(folder) if "train_loss" not in e] for folder in (killed, whole)]
    assert json.dumps(logs[0]) == json.dumps(logs[1])


# ---- SIGTERM ----

TERMINATIONS = {
    # When the signal comes, and when its checkpoint is written.
    "pre_optimizer_step": (Signal("forward", 4, number=signal.SIGTERM), "on_pre_optimizer_step@4"),
    "step_end": (Signal("optimizer", 4, number=signal.SIGTERM), "on_step_end@5"),
    "step_begin": (Signal("log", 4, number=signal.SIGTERM), "on_step_begin@4"),
    "epoch_end": (Signal("log", 6, number=signal.SIGTERM), "on_epoch_end@6"),
}
# What the Trainer itself does not write into such a checkpoint as it does at the end of a step: what is logged of a
# step comes after its end; a window that is run again is counted twice, and has drawn other random numbers.
UNLIKE: dict[str, dict[str, Any]] = {
    "pre_optimizer_step": {"without": ("rng_state.pth", "total_flos")},
    "step_end": {"unlogged": 5},
    "step_begin": {},
    "epoch_end": {},
}


def terminated(optimizer: str, accumulation: int, dropout: float) -> SetUp:
    return SetUp(optimizer, "fp32", accumulation, dropout, {"enable_jit_checkpoint": True, "save_strategy": "no"})


@pytest.mark.parametrize("event", TERMINATIONS)
@pytest.mark.parametrize(("optimizer", "accumulation"), [("adamw", 1), ("last_update", 4), ("auto-adafactor", 4)])
def test_a_checkpoint_at_sigterm(
    tmp_path: Path,
    start: Start,
    uninterrupted: Callable[..., Path],
    event: str,
    optimizer: str,
    accumulation: int,
) -> None:
    """A window that is under way is run again: with dropout it would draw other random numbers."""
    setup = terminated(optimizer, accumulation, 0.0 if event == "pre_optimizer_step" else 0.1)
    expected = uninterrupted(setup)
    sent, written = TERMINATIONS[event]
    assert start(killed_runs.run, tmp_path, setup, sent) == 0, log(tmp_path)
    seen = "predicted" if event == "pre_optimizer_step" else "true"
    assert (tmp_path / WITNESS).read_text() == f"{seen} {written}"
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{written.partition('@')[2]}"
    for name in ("model.safetensors", "optimizer.pt"):
        load = load_file if name == "model.safetensors" else torch.load
        assert plain(load(checkpoint / name)) == plain(load(expected / checkpoint.name / name)), name
    finishing = replace(setup, settings={})
    assert start(killed_runs.run, tmp_path, finishing) == 0, log(tmp_path)
    assert differences(tmp_path, expected, **UNLIKE[event]) == []


@pytest.mark.parametrize(
    ("name", "share", "last"),
    [
        ("model.safetensors", 0.5, 4),
        ("optimizer.pt", 1, 4),
        ("trainer_state.json", 0.5, 4),
        ("trainer_state.json", 1, 5),
    ],
)
def test_a_checkpoint_at_sigterm_that_was_cut_short(
    tmp_path: Path, start: Start, uninterrupted: Callable[..., Path], name: str, share: float, last: int
) -> None:
    """Killed before its time was up, or just when all was written."""
    setup = replace(SetUp("last_update", accumulation=4), settings={"enable_jit_checkpoint": True})
    signals = Signal("optimizer", 4, number=signal.SIGTERM), Signal(name, 5, share)
    assert start(killed_runs.run, tmp_path, setup, *signals) == KILLED, log(tmp_path)
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{last}")
    assert start(killed_runs.run, tmp_path, setup) == 0, log(tmp_path)
    assert differences(tmp_path, uninterrupted(setup), unlogged=last if last == 5 else None) == []


def test_the_mark_of_an_unfinished_checkpoint_goes_when_it_is_written_again(
    tmp_path: Path, start: Start, uninterrupted: Callable[..., Path]
) -> None:
    """As the plain Trainer leaves it, when it is killed while it writes a checkpoint at SIGTERM."""
    setup = SetUp("last_update", accumulation=4)
    assert start(killed_runs.run, tmp_path, setup, Signal("forward", 5)) == KILLED, log(tmp_path)
    (tmp_path / "checkpoint-4" / "checkpoint-is-incomplete.txt").touch()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert start(killed_runs.run, tmp_path, setup, Signal("forward", 5)) == KILLED, log(tmp_path)
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert start(killed_runs.run, tmp_path, setup) == 0, log(tmp_path)
    assert differences(tmp_path, uninterrupted(setup)) == []


def test_a_checkpoint_at_sigterm_does_not_cost_the_one_that_is_there(tmp_path: Path, start: Start) -> None:
    """In the first window after a checkpoint, the only one that is kept."""
    setup = SetUp("last_update", settings={"enable_jit_checkpoint": True, "save_total_limit": 1})
    signals = Signal("forward", 4, number=signal.SIGTERM), Signal("optimizer.pt", 4)
    # The checkpoint that it has at this step is not the one to be cut.
    assert start(killed_runs.run, tmp_path, setup, Signal("forward", 4)) == KILLED, log(tmp_path)
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
    assert start(killed_runs.run, tmp_path, setup, *signals) in (KILLED, 0), log(tmp_path)
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")
