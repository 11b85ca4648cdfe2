"""Checkpoints that are whole, or refused: half-written ones, full disks, and links that lead astray."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from torch import distributed as dist
from transformers import Trainer, TrainerCallback

import hf_xgrad.outputs.checkpoints as checkpoints
import tiny_models as tiny
from hf_xgrad import XGradMixin, XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs import predictor_state
from hf_xgrad.outputs.checkpoints import CheckpointError, fault, last_checkpoint
from hf_xgrad.outputs.predictor_state import write_state
from hf_xgrad.recipes.language import clm as run_clm
from hf_xgrad.recipes.loop import clm as run_clm_no_trainer
from hf_xgrad.recipes.results import RESUMED
from run_files import write_texts

RULE = {"optim": "adamw_torch", "xgrad_rule": "last_update", "xgrad_steps": "auto"}
STEPS = 6
FILE = "xgrad.safetensors"
LAST = f"checkpoint-{STEPS}"


def make(folder: Path, cls: type = XGradTrainer, *, model: Any = None, **settings: Any) -> Any:
    """A trainer of 6 steps with dropout, which saves every second one."""
    saving = {"save_strategy": "steps", "save_steps": 2, "warmup_steps": 1}
    args = tiny.arguments(folder, XGradTrainingArguments, **{**saving, "max_steps": STEPS, **RULE, **settings})
    model = model or tiny.bert(hidden_dropout_prob=0.1)
    return cls(model=model, args=args, train_dataset=tiny.Sentences(28))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run leaves; `end` has its weights."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make(folder)
    trainer.train()
    trainer.save_model(str(folder / "end"))
    return folder


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


def ends_as(run: Path, trainer: Any) -> bool:
    """Whether a trainer's weights are those of the undisturbed run's end, bit for bit."""
    return tiny.same(dict(trainer.model.state_dict()), load_file(run / "end" / "model.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ours(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    records = [record for record in caplog.records if record.levelno >= level]
    return [record.getMessage() for record in records if record.name.startswith("hf_xgrad")]


# ---- what is whole ----


def sharded(folder: Path) -> None:
    tiny.bert().save_pretrained(folder, max_shard_size="8KB")
    assert (folder / "model.safetensors.index.json").is_file()
    assert not (folder / "model.safetensors").exists()


def with_folders(weights: str, optimizer: str) -> Callable[[Path], None]:
    """As FSDP saves sharded states."""

    def change(folder: Path) -> None:
        for name in ("model.safetensors", "optimizer.pt"):
            (folder / name).unlink()
        for name in (weights, optimizer):
            (folder / name).mkdir()
            for file in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
                (folder / name / file).write_bytes(b"\x80\x04tensors")

    return change


def fsdp_full(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model_fsdp.bin")


def deepspeed(folder: Path) -> None:
    """Stage 3, without a gathered model; DeepSpeed keeps the schedule, too."""
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()
    (folder / "global_step6").mkdir()
    torch.save({}, folder / "global_step6" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step6")
    (folder / "zero_to_fp32.py").write_text("")


def of_the_first_kind(folder: Path) -> None:
    """Files from before torch wrote zip files."""
    for name in ("optimizer.pt", "scheduler.pt"):
        state = torch.load(folder / name)
        torch.save(state, folder / name, _use_new_zipfile_serialization=False)


def with_files_of_others(folder: Path) -> None:
    (folder / "vectors.bin").write_bytes(b"\x1f\x8bnot of torch")
    (folder / "predictions.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "notes").mkdir()
    (folder / "notes" / "log.txt").write_text("")


def of_several_processes(folder: Path) -> None:
    for rank in range(2):
        shutil.copy(folder / "rng_state.pth", folder / f"rng_state_{rank}.pth")
        shutil.copy(folder / FILE, folder / f"xgrad-{rank + 1:05d}-of-00002.safetensors")
    (folder / "rng_state.pth").unlink()
    (folder / FILE).unlink()


def in_a_folder_of_its_own(folder: Path) -> None:
    """As sentence-transformers saves a model, and PEFT every adapter but the first."""
    (folder / "0_Transformer").mkdir()
    (folder / "model.safetensors").rename(folder / "0_Transformer" / "model.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        sharded,
        with_folders("pytorch_model_fsdp_0", "optimizer_0"),
        fsdp_full,
        deepspeed,
        of_the_first_kind,
        with_files_of_others,
        of_several_processes,
        in_a_folder_of_its_own,
    ],
    ids=["single", "sharded", "fsdp-sharded", "fsdp-full", "deepspeed", "old", "others", "processes", "folder"],
)
def test_what_is_whole(run: Path, change: Callable[[Path], None]) -> None:
    if change is sharded:
        (run / LAST / "model.safetensors").unlink()
    change(run / LAST)
    assert fault(str(run / LAST)) is None
    assert last_checkpoint(str(run)) == str(run / LAST)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
@pytest.mark.parametrize("cls", [Trainer, XGradTrainer])
@pytest.mark.parametrize("only_model", [False, True])
def test_what_a_trainer_writes_is_whole(tmp_path: Path, cls: type, only_model: bool, optim: str) -> None:
    make(tmp_path, cls, save_only_model=only_model, max_steps=2, optim=optim).train()
    assert fault(str(tmp_path / "checkpoint-2")) is None


def test_an_adapter_is_whole_and_resumed(tmp_path: Path) -> None:
    def adapted() -> Any:
        return get_peft_model(tiny.bert(hidden_dropout_prob=0.1), LoraConfig(r=2, target_modules=["query", "value"]))

    uninterrupted = make(tmp_path, model=adapted())
    uninterrupted.train()
    shutil.rmtree(tmp_path / LAST)
    resumed = make(tmp_path, model=adapted())
    resumed.train(resume_from_checkpoint=True)
    assert tiny.same(tiny.weights(resumed.model), tiny.weights(uninterrupted.model))


# ---- what is not ----


def cut(name: str, left: int = -1) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:left])

    return damage


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sharded(folder)
    next(folder.glob("model-00002-of-*")).unlink()


def fsdp_without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with_folders("pytorch_model_fsdp_0", "optimizer_0")(folder)
        (folder / name / ".metadata").unlink()

    return damage


def deepspeed_without_its_folder(folder: Path) -> None:
    deepspeed(folder)
    torch.save({}, folder / "pytorch_model.bin")
    shutil.rmtree(folder / "global_step6")


def dangling(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "nowhere")

    return damage


def a_folder_in_place_of(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def index_only(content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(content)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "just-in-time": (write("checkpoint-is-incomplete.txt", b"Checkpoint started"), "checkpoint-is-incomplete.txt"),
    "no-state": (remove("trainer_state.json"), "no trainer_state.json"),
    "empty-state": (write("trainer_state.json", b""), "trainer_state.json is not JSON"),
    "cut-state": (cut("trainer_state.json", 200), "trainer_state.json is not JSON"),
    "state-of-zeros": (write("trainer_state.json", b"\0" * 300), "trainer_state.json is not JSON"),
    "two-states": (write("trainer_state.json", b'{"global_step": 6}{}'), "trainer_state.json is not JSON"),
    "state-list": (write("trainer_state.json", b"[]"), "trainer_state.json has no global_step"),
    "other-state": (write("trainer_state.json", b'{"global_step": "6"}'), "trainer_state.json has no global_step"),
    "deep-state": (write("trainer_state.json", b"[" * 100_000), "trainer_state.json is not JSON"),
    "cut-config": (cut("config.json", 50), "config.json is not JSON"),
    "config-of-bytes": (write("config.json", b"\xff\xfe\xff"), "config.json is not JSON"),
    "cut-weights": (cut("model.safetensors"), "model.safetensors is cut off or damaged"),
    "empty-weights": (cut("model.safetensors", 0), "model.safetensors is cut off or damaged"),
    "weights-of-zeros": (write("model.safetensors", b"\0" * 3000), "model.safetensors is cut off or damaged"),
    "no-weights": (remove("model.safetensors"), "it has no weights"),
    "dangling-weights": (dangling("model.safetensors"), "model.safetensors is not a file"),
    "pipe": (a_folder_in_place_of("model.safetensors"), "model.safetensors is not a file"),
    "shard": (without_a_shard, "model.safetensors.index.json names files that are not there: model-00002-of-"),
    "index": (index_only(b"{}"), "model.safetensors.index.json has no weight_map"),
    "index-list": (index_only(b"[1]"), "model.safetensors.index.json has no weight_map"),
    "cut-optimizer": (cut("optimizer.pt"), "optimizer.pt is cut off"),
    "empty-optimizer": (cut("optimizer.pt", 0), "optimizer.pt is empty"),
    "optimizer-of-zeros": (write("optimizer.pt", b"\0" * 300), "optimizer.pt is empty"),
    "cut-scheduler": (cut("scheduler.pt", 100), "scheduler.pt is cut off"),
    "cut-random-state": (cut("rng_state.pth"), "rng_state.pth is cut off"),
    "cut-arguments": (cut("training_args.bin"), "training_args.bin is cut off"),
    "cut-own": (cut(FILE), f"{FILE} is cut off or damaged"),
    "fsdp-weights": (fsdp_without("pytorch_model_fsdp_0"), "pytorch_model_fsdp_0 has no .metadata"),
    "fsdp-optimizer": (fsdp_without("optimizer_0"), "optimizer_0 has no .metadata"),
    "deepspeed": (deepspeed_without_its_folder, "'global_step6', which `latest` names"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole(run: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    change, reason = DAMAGES[damage]
    change(run / LAST)
    told = fault(str(run / LAST))
    assert told is not None
    assert reason in told
    assert last_checkpoint(str(run)) == str(run / "checkpoint-4")
    [warning] = ours(caplog)
    assert str(run / LAST) in warning
    assert reason in warning
    assert "\n" not in warning


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_whole_without_the_optimizers_state(run: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """Somebody has taken it out: the Trainer starts the optimizer anew, which is told where weights are predicted."""
    (run / LAST / name).unlink()
    assert fault(str(run / LAST)) is None
    assert last_checkpoint(str(run)) == str(run / LAST)
    for settings in ({"xgrad": False}, {"xgrad_steps": 0}):
        make(run, max_steps=STEPS + 1, save_strategy="no", **settings).train(resume_from_checkpoint=True)
    assert ours(caplog) == []
    resumed = make(run, max_steps=STEPS + 1, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS + 1
    [warning] = ours(caplog)
    assert str(run / LAST) in warning
    assert f"has no {name}" in warning
    assert "\n" not in warning


FOREIGN: dict[str, bytes] = {
    "mistakes.json": b"",
    "tokens.bin": b"\0\0\0\0\1",
    "._config.json": b"\0\5\26\7",
    "._model.safetensors": b"\0\5\26\7",
    "docs.index.json": b"{}",
    "notes.json": b"{} // a comment",
    "done.pt": b"",
    "tmpabc.safetensors": b"x",
    "latest": b"of something else",
    "model.safetensors.index.json": b'{"weight_map": {"w": "model-00001-of-00002.safetensors"}}',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_not_judged(run: Path, name: str) -> None:
    (run / LAST / name).write_bytes(FOREIGN[name])
    assert fault(str(run / LAST)) is None


@pytest.mark.parametrize("name", ["weights.npz", "model.ckpt", "flax_model.msgpack"])
def test_weights_may_have_a_form_of_their_own(run: Path, name: str) -> None:
    (run / LAST / "model.safetensors").rename(run / LAST / name)
    assert fault(str(run / LAST)) is None


def test_weights_may_lie_behind_a_link(run: Path) -> None:
    (run / "elsewhere").mkdir()
    (run / LAST / "model.safetensors").rename(run / "elsewhere" / "model.safetensors")
    (run / LAST / "weights").symlink_to(run / "elsewhere")
    assert fault(str(run / LAST)) is None


def test_scripts_do_not_start_anew_over_checkpoints_that_were_whole(run: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole .*config\.json is not JSON"):
        last_checkpoint(str(run))
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    assert last_checkpoint(str(run)) is None


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        assert fault(str(tmp_path / name)) == "there is no such folder"
        assert last_checkpoint(str(tmp_path / name)) is None


def test_a_file_that_may_not_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "optimizer.pt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert fault(str(run / LAST)) == "optimizer.pt cannot be read (Permission denied)"


@pytest.mark.parametrize("name", ["model.safetensors", FILE, "optimizer.pt", "scheduler.pt", "rng_state.pth",
                                  "training_args.bin", "trainer_state.json", "config.json"])  # fmt: skip
def test_every_beginning_of_a_file_is_seen_as_one(run: Path, name: str) -> None:
    """Killed at whatever byte."""
    path = run / LAST / name
    data = path.read_bytes().rstrip() if path.suffix == ".json" else path.read_bytes()
    for left in [*range(len(data) - 1, 8, -max(1, len(data) // 200)), *range(9)]:
        path.write_bytes(data[:left])
        assert name in (fault(str(run / LAST)) or ""), left


def test_the_last_is_the_one_of_the_highest_number(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-", "checkpoint-11-old", "my-checkpoint-12"):
        shutil.copytree(run / LAST, run / name)
    (run / "checkpoint-13").write_text("no folder")
    assert last_checkpoint(str(run)) == str(run / "checkpoint-10")
    assert ours(caplog) == []


# ---- going on from the last whole one ----


def beginnings(trainer: Any) -> list[int]:
    """A list that gets the step at which each training begins."""
    steps: list[int] = []

    def observe(event: str, state: Any, **_: Any) -> None:
        if event == "train_begin":
            steps.append(state.global_step)

    trainer.add_callback(tiny.EveryEvent(observe))
    return steps


@pytest.mark.parametrize("settings", [{}, {"xgrad": False}], ids=["on", "off"])
def test_half_written_ones_are_skipped(run: Path, caplog: pytest.LogCaptureFixture, settings: Any) -> None:
    if settings:
        shutil.rmtree(run)
        undisturbed = make(run, **settings)
        undisturbed.train()
        undisturbed.save_model(str(run / "end"))
    (run / LAST / "trainer_state.json").unlink()
    cut("optimizer.pt")(run / "checkpoint-4")
    trainer = make(run, **settings)
    starts = beginnings(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert ends_as(run, trainer)
    assert starts == [2]
    warnings = ours(caplog)
    assert [name in warning for name, warning in zip((LAST, "checkpoint-4"), warnings, strict=True)] == [True, True]
    # They have been written anew.
    assert last_checkpoint(str(run)) == str(run / LAST)
    assert fault(str(run / "checkpoint-4")) is None


def state_of(trainer: Any) -> tuple[Any, ...]:
    return tiny.weights(trainer.model), trainer.optimizer, trainer.state, trainer.is_in_train


def test_none_is_whole(run: Path) -> None:
    for path in run.glob("checkpoint-*"):
        cut("model.safetensors")(path)
    trainer = make(run)
    before = state_of(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=True)
    message = str(error.value)
    assert str(run) in message
    assert message.count("model.safetensors is cut off") == 3
    assert all(f"checkpoint-{step}" in message for step in (2, 4, 6))
    assert "\n" not in message
    assert tiny.same(before[0], state_of(trainer)[0])
    assert before[1:] == state_of(trainer)[1:]


@pytest.mark.parametrize("settings", [{}, {"xgrad": False}], ids=["on", "off"])
def test_a_given_one_that_is_not_whole(run: Path, settings: Any) -> None:
    (run / LAST / "trainer_state.json").unlink()
    trainer = make(run, **settings)
    before = state_of(trainer)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(run / LAST))
    message = str(error.value)
    assert str(run / LAST) in message
    assert "trainer_state.json" in message
    assert str(run / "checkpoint-4") in message
    assert "\n" not in message
    assert tiny.same(before[0], state_of(trainer)[0])
    assert before[1:] == state_of(trainer)[1:]
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="There is no whole one beside it"):
        trainer.train(resume_from_checkpoint=str(run / LAST))


def test_a_given_one_that_is_whole(run: Path) -> None:
    """Also as a Path, and also where later ones are whole or not."""
    cut("optimizer.pt")(run / LAST)
    for given in (run / "checkpoint-2", str(run / "checkpoint-4")):
        trainer = make(run, save_strategy="no")
        trainer.train(resume_from_checkpoint=given)
        assert ends_as(run, trainer)


@pytest.mark.parametrize("given", [None, False])
def test_what_asks_for_none_starts_anew(run: Path, caplog: pytest.LogCaptureFixture, given: Any) -> None:
    cut("optimizer.pt")(run / LAST)
    trainer = make(run, save_strategy="no")
    starts = beginnings(trainer)
    trainer.train(given)
    assert starts == [0]
    assert ends_as(run, trainer)
    assert ours(caplog) == []


def test_no_checkpoint_at_all_is_the_trainers_own_error(tmp_path: Path) -> None:
    messages = []
    for cls in (Trainer, XGradTrainer):
        with pytest.raises(ValueError) as error:
            make(tmp_path, cls).train(resume_from_checkpoint=True)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def _on_a_node(rank: int, folder: Path, results: Any) -> None:
    """One of two processes, each with a disk of its own."""
    os.chdir(folder / f"node-{rank}")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    given: list[Any] = [last_checkpoint("run")]
    for asked in (True, "run/checkpoint-2", "run/checkpoint-4", "run/checkpoint-6"):
        try:
            given.append(checkpoints.checkpoint_to_resume(asked, "run"))
        except ValueError as error:
            given.append(str(error))
    results.put((rank, given))
    dist.destroy_process_group()


def test_processes_go_on_from_the_same_one(run_folder: Path, tmp_path: Path) -> None:
    """Of the last whole ones on either disk, one that is whole on both."""
    for rank in range(2):
        shutil.copytree(run_folder, tmp_path / f"node-{rank}" / "run")
    cut("optimizer.pt")(tmp_path / "node-1" / "run" / LAST)
    cut("model.safetensors")(tmp_path / "node-0" / "run" / "checkpoint-4")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_on_a_node, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in processes:
        process.start()
    given = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert given[0] == given[1]
    last, automatic, second, fourth, sixth = given[0]
    assert last == automatic == second == "run/checkpoint-2"
    assert "model.safetensors is cut off" in fourth
    assert "optimizer.pt is cut off" in sixth


# ---- writing: what dies half way never looks whole ----


class KilledError(Exception):
    pass


@contextmanager
def dying_at(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The file of this name is not written any more, nor what comes after it."""
    with monkeypatch.context() as patch:

        def save(original: Callable[..., Any]) -> Callable[..., Any]:
            def stop(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
                if Path(path).name == name:
                    raise KilledError
                return original(what, path, *args, **kwargs)

            return stop

        patch.setattr(torch, "save", save(torch.save))
        patch.setattr(predictor_state, "save_file", save(predictor_state.save_file))
        yield


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                                  "xgrad.unfinished"])  # fmt: skip
def test_overwriting_one_makes_no_mixture(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Another run into the same folder ends in the middle of a checkpoint that was whole."""
    trainer = make(run, learning_rate=3e-2)
    for step in (2, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / LAST).rename(run / "checkpoint-2")
    with dying_at(name, monkeypatch), pytest.raises(KilledError):
        trainer.train()
    assert fault(str(run / "checkpoint-2")) is not None
    assert last_checkpoint(str(run)) is None


def test_what_a_just_in_time_checkpoint_left_does_not_outlive_a_whole_one(run: Path) -> None:
    (run / "checkpoint-4" / "checkpoint-is-incomplete.txt").write_text("Checkpoint started")
    trainer = make(run)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert fault(str(run / "checkpoint-4")) is None


def test_the_state_waits_for_the_files_of_all_processes(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    seen: list[set[str]] = []
    wait = trainer.accelerator.wait_for_everyone

    def waiting() -> None:
        folder = tmp_path / "checkpoint-2"
        seen.append({path.name for path in folder.iterdir()} if folder.is_dir() else set())
        wait()

    trainer.accelerator.wait_for_everyone = waiting
    trainer.train()
    before, after = (names for names in seen if not names or FILE in names)
    assert before == set()
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", FILE} <= after
    assert "trainer_state.json" not in after
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_our_file_is_replaced_and_no_link_is_followed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Older safetensors write into what is there.
    monkeypatch.setattr(predictor_state, "save_file", lambda tensors, path, metadata: path.write_bytes(save(tensors)))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    for name in (FILE, "xgrad.unfinished"):
        path = run / LAST / name
        path.unlink(missing_ok=True)
        path.symlink_to(elsewhere)
    make(run).train()
    assert elsewhere.read_text() == "mine"
    assert stat.S_ISREG((run / LAST / FILE).lstat().st_mode)
    assert not (run / LAST / "xgrad.unfinished").exists()


def test_our_file_is_written_as_a_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (run / LAST / FILE).read_bytes()

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(before[:100])
        raise KilledError

    monkeypatch.setattr(predictor_state, "save_file", half)
    with pytest.raises(KilledError):
        write_state({"steps": {"0.sums": torch.ones(3)}}, str(run / LAST))
    assert (run / LAST / FILE).read_bytes() == before


# ---- full disks ----


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def check_message(message: str, folder: Path, reason: str, last: Path | None) -> None:
    assert "\n" not in message
    assert f"{folder} could not be written" in message
    assert reason in message
    assert re.search(r"\([\d,]+ bytes free\)", message)
    assert (f"resuming goes on from {last}" if last else "no whole checkpoint") in message


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_files_that_are_too_large(run: Path, name: str) -> None:
    """EFBIG of safetensors, and what torch makes of it."""
    shutil.rmtree(run / LAST)
    shutil.rmtree(run / "checkpoint-4")
    kept = contents(run / "checkpoint-2")
    size = (run / "checkpoint-2" / name).stat().st_size
    trainer = make(run)
    with files_of_at_most(size - 1), pytest.raises(CheckpointError) as error:
        trainer.train(resume_from_checkpoint=True)
    reason = "File too large" if name == "model.safetensors" else "a file could not be written to its end"
    check_message(str(error.value), run / "checkpoint-4", reason, run / "checkpoint-2")
    assert contents(run / "checkpoint-2") == kept
    assert fault(str(run / "checkpoint-4")) is not None
    resumed = make(run)
    resumed.train(resume_from_checkpoint=True)
    assert ends_as(run, resumed)


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_no_space_is_left(run: Path, name: str, first: bool) -> None:
    """ENOSPC for one file, by the device that is always full."""
    shutil.rmtree(run / LAST)
    shutil.rmtree(run / "checkpoint-4")
    if first:
        shutil.rmtree(run / "checkpoint-2")
    kept = contents(run)
    failing = run / ("checkpoint-2" if first else "checkpoint-4")
    failing.mkdir()
    (failing / name).symlink_to("/dev/full")
    trainer = make(run)
    with pytest.raises(CheckpointError) as error:
        trainer.train(resume_from_checkpoint=not first)
    # Torch does not tell the cause, and the disk itself has room.
    reason = "No space left on device" if name.endswith(".json") else "could not be written to its end"
    check_message(str(error.value), failing, reason, None if first else run / "checkpoint-2")
    assert contents(run) | kept == contents(run)
    shutil.rmtree(failing)
    resumed = make(run)
    resumed.train(resume_from_checkpoint=not first)
    assert ends_as(run, resumed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of a size that can be changed; for root only, who may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(size: int) -> Path:
        options = f"size={size}" + (",remount" if disk.is_mount() else "")
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode != 0:
            pytest.skip("no disk can be mounted here")
        return disk

    yield sized
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def pages(folder: Path) -> int:
    """What the files of a folder take on a disk."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="mounts a disk")
@pytest.mark.parametrize("room", [0.02, 0.1, 0.35, 0.6, 0.8, 0.9])
def test_a_disk_becomes_full(run_folder: Path, small_disk: Callable[[int], Path], room: float) -> None:
    """While checkpoint-4 is written, at various of its files; with more room the same run goes on."""
    size = pages(run_folder / "checkpoint-4")
    disk = small_disk(int(size * (1 + room)) + 4096)
    trainer = make(disk)
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    check_message(str(error.value), disk / "checkpoint-4", "No space left on device", disk / "checkpoint-2")
    assert contents(disk / "checkpoint-2").keys() == contents(run_folder / "checkpoint-2").keys()
    small_disk(4 * size)
    resumed = make(disk)
    resumed.train(resume_from_checkpoint=True)
    assert ends_as(run_folder, resumed)


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="mounts a disk")
def test_a_disk_is_full_at_the_end(run_folder: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(pages(run_folder / LAST) + 4096)
    shutil.copytree(run_folder / LAST, disk / LAST)
    trainer = make(disk, save_strategy="no")
    trainer.train()
    with pytest.raises(CheckpointError) as error:
        trainer.save_model()
    check_message(str(error.value), disk, "No space left on device", disk / LAST)


def test_a_model_that_cannot_be_written(run: Path) -> None:
    trainer = make(run)
    for folder in (run, run / "model"):
        with files_of_at_most(1000), pytest.raises(CheckpointError) as error:
            trainer.save_model(None if folder == run else str(folder))
        check_message(str(error.value), folder, "File too large", run / LAST)


def test_a_state_that_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last file of all."""
    trainer = make(run)
    trainer.state.global_step = 8
    trainer.create_optimizer_and_scheduler(8)

    def full(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.state, "save_to_json", full)
    with pytest.raises(CheckpointError) as error:
        trainer._save_checkpoint(trainer.model, trial=None)
    check_message(str(error.value), run / "checkpoint-8", "No space left on device", run / LAST)
    assert error.value.__cause__ is not None


def test_the_last_whole_one_is_sought_beside_the_one_that_was_written(run: Path, tmp_path: Path) -> None:
    """The runs of a search have folders of their own."""
    with pytest.raises(CheckpointError) as error, checkpoints.writing(str(run / "checkpoint-8"), str(tmp_path)):
        raise OSError(122, "Disk quota exceeded")
    check_message(str(error.value), run / "checkpoint-8", "Disk quota exceeded", run / LAST)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Some tensors share memory"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(110, "Connection timed out"),
        OSError("Consistency check failed"),
        ValueError("not of the disk"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_errors_of_other_kinds_pass(run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    trainer = make(run, max_steps=2)

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(trainer, "_save_scaler", fail)
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error


# ---- our file, and where it leads ----


def test_a_link_out_of_the_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / LAST / FILE
    path.rename(tmp_path / FILE)
    for target in (tmp_path / FILE, Path("../../") / FILE, run / "checkpoint-4" / FILE):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        assert path.exists()
        check_refused(run, "it is a link out of the checkpoint")


def check_refused(run: Path, reason: str) -> None:
    trainer = make(run, save_strategy="no")
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(run / LAST))
    message = str(error.value)
    assert str(run / LAST / FILE) in message
    assert reason in message
    assert "remove the file" in message
    assert "\n" not in message


def test_what_is_no_file_is_refused(run: Path) -> None:
    path = run / LAST / FILE
    kinds: list[Callable[[], Any]] = [path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("nothing")]
    for place in kinds:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
        place()
        check_refused(run, "it is not a file")


def test_links_within_the_checkpoint_and_to_it_are_fine(run: Path, tmp_path: Path) -> None:
    (run / "checkpoint-4" / FILE).rename(run / "checkpoint-4" / "kept")
    (run / "checkpoint-4" / FILE).symlink_to("kept")
    (tmp_path / "link").symlink_to(run / "checkpoint-4")
    trainer = make(run, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(tmp_path / "link"))
    assert ends_as(run, trainer)


def in_the_cache(checkpoint: Path, repository: Path) -> Path:
    """A checkpoint as snapshot_download leaves it: links to blobs, in the folder of a revision."""
    folder = repository / "snapshots" / "0123abc" / "last-checkpoint"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(checkpoint.iterdir()):
        shutil.copy(path, repository / "blobs" / f"{number:040x}")
        (folder / path.name).symlink_to(f"../../../blobs/{number:040x}")
    return folder


def test_a_checkpoint_in_the_hubs_cache_is_resumed(run: Path, tmp_path: Path) -> None:
    folder = in_the_cache(run / "checkpoint-4", tmp_path / "models--me--mine")
    trainer = make(tmp_path / "out", save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder))
    assert ends_as(run, trainer)
    # But not with what belongs to another repository there.
    other = in_the_cache(run / "checkpoint-4", tmp_path / "models--not--mine")
    (folder / FILE).unlink()
    (folder / FILE).symlink_to((other / FILE).resolve())
    with pytest.raises(ValueError, match="link out of the checkpoint"):
        make(tmp_path / "out").train(resume_from_checkpoint=str(folder))


# ---- scripts ----

SCRIPTS = {"trainer": run_clm, "loop": run_clm_no_trainer}
MODEL = ("--model_type", "gpt2", "--new_tokenizer_size", "270", "--block_size", "13", "--config_overrides",
         "n_embd=16,n_layer=1,n_head=2,n_positions=16")  # fmt: skip


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    training = ("--do_train", "--per_device_train_batch_size", "4", "--max_steps", "4", "--save_strategy", "steps",
                "--save_steps", "2", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu",
                "--dataloader_pin_memory", "false", "--output_dir", str(tmp_path / "out"))  # fmt: skip
    return (*MODEL, *write_texts(tmp_path), *training)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_scripts_go_on_from_the_last_whole_one(
    tmp_path: Path, flags: tuple[str, ...], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    assert SCRIPTS[kind].main([*flags]) == 0
    out = tmp_path / "out"
    end = contents(out / "checkpoint-4")["model.safetensors"]
    assert fault(str(out / "checkpoint-4")) is None
    cut("model.safetensors")(out / "checkpoint-4")
    assert SCRIPTS[kind].main([*flags]) == 0
    [warning] = ours(caplog, logging.WARNING)
    assert "checkpoint-4 is skipped" in warning
    assert contents(out / "checkpoint-4")["model.safetensors"] == end
    assert json.loads((out / "train_results.json").read_text())[RESUMED] == 2


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_scripts_refuse_a_given_one_that_is_not_whole(
    tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str], run: Path, kind: str
) -> None:
    cut("optimizer.pt")(run / LAST)
    assert SCRIPTS[kind].main([*flags, "--resume_from_checkpoint", str(run / LAST)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"--resume_from_checkpoint {run / LAST}" in line
    assert "optimizer.pt is cut off" in line


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(("kind", "name"), [("trainer", "scheduler.pt"), ("loop", "optimizer.bin")])
def test_scripts_end_with_one_line_where_the_disk_is_full(
    tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    failing = tmp_path / "out" / "checkpoint-4"
    failing.mkdir(parents=True)
    (failing / name).symlink_to("/dev/full")
    assert SCRIPTS[kind].main([*flags]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    check_message(line, failing, "could not be written", tmp_path / "out" / "checkpoint-2")


# ---- the Trainer's own ways ----


@pytest.mark.parametrize("keyword_only", [True, False])
def test_trainers_between_may_take_fewer_arguments(tmp_path: Path, keyword_only: bool) -> None:
    class Plain(Trainer):
        def train(self) -> Any:  # type: ignore[override]
            return super().train()

    class KeywordOnly(Trainer):
        def train(self, *, resume_from_checkpoint: Any = None) -> Any:  # type: ignore[override]
            return super().train(resume_from_checkpoint=resume_from_checkpoint)

    base: type = KeywordOnly if keyword_only else Plain
    trainer = make(tmp_path, type("Mixed", (XGradMixin, base), {}))
    trainer.train(**({"resume_from_checkpoint": None} if keyword_only else {}))
    assert trainer.state.global_step == trainer.state.max_steps


class ChangesWeights(TrainerCallback):
    """At the end of an epoch, where the step has been saved already."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        control.should_save = True


def test_a_second_checkpoint_of_a_step_is_written(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=7, save_strategy="steps", save_steps=7, logging_steps=5)
    trainer.add_callback(ChangesWeights())
    trainer.train()
    stored = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    assert all(not weight.any() for weight in stored.values())
