"""What TensorBoard, Trackio and Weights & Biases get of a run, read back from the files that they write."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import hf_xgrad

ROOT = Path(hf_xgrad.__file__).resolve().parent.parent
INSTALLED = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]
XGRAD = ("active", "cosine", "relative_norm", "steps", "steps_0", "steps_1")
SETTINGS = {"xgrad": True, "xgrad_steps": "auto", "xgrad_rule": "last_update", "xgrad_weight_decay": True}

# In a process of its own: trackers read the environment when they are imported, and leave threads behind.
RUN = """
import json, os, sys

def watch(event, arguments):
    host = None
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        print("asked for", host, file=sys.stderr, flush=True)
        os._exit(3)  # whatever thread this is

sys.addaudithook(watch)
from hf_xgrad import XGradTrainer, XGradTrainingArguments
from tiny_models import Sentences, arguments, bert

folder, settings, *trackers = sys.argv[1:]
args = arguments(
    folder, XGradTrainingArguments, **json.loads(settings), report_to=trackers, project="project", run_name="run",
)
trainer = XGradTrainer(bert(), args, train_dataset=Sentences(16))
trainer.train()
trainer.save_state()
if "wandb" in trackers:
    import wandb

    wandb.finish()
"""


class Tracked(NamedTuple):
    """A run of 6 steps: its folder, and its log without the last entry, which is of the whole run."""

    folder: Path
    log: list[dict[str, Any]]

    def expected(self, name: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[name]) for entry in self.log if name in entry]


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    folder = tmp_path_factory.mktemp("tracked")
    folders = {"TRACKIO_DIR": "trackio", "WANDB_DIR": "wandb", "WANDB_CACHE_DIR": "cache", "HOME": "home"}
    for name in ("WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        folders[name] = "wandb"
    for name in set(folders.values()):
        (folder / name).mkdir()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))},
        **{name: str(folder / value) for name, value in folders.items()},
        "WANDB_MODE": "offline",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support"))),
    }
    command = [sys.executable, "-c", RUN, str(folder / "run"), json.dumps(SETTINGS), *INSTALLED]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6, 6]
    return Tracked(folder, log[:-1])


def needs(tracker: str) -> None:
    if tracker not in INSTALLED:
        pytest.skip(f"{tracker} is not installed: pip install '.[trackers]'")


def check_config(config: dict[str, Any]) -> None:
    assert {name: config[name] for name in SETTINGS} == SETTINGS


def test_the_run_logs_what_the_trackers_are_to_get(tracked: Tracked) -> None:
    assert {name.removeprefix("xgrad/") for entry in tracked.log for name in entry if "xgrad" in name} == set(XGRAD)
    assert [step for step, _ in tracked.expected("xgrad/active")] == [1, 2, 3, 4, 5, 6]
    # Nothing is predicted before two updates are known.
    assert [step for step, _ in tracked.expected("xgrad/cosine")] == [3, 4, 5, 6]


# ---- TensorBoard ----


def test_tensorboard(tracked: Tracked) -> None:
    """As numbers of 32 bits; and the arguments, as a text."""
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tracked.folder.glob("run/runs/*/events.*")
    events = EventAccumulator(str(file)).Reload()
    tags = events.Tags()
    assert {tag for tag in tags["scalars"] if "xgrad" in tag} == {f"train/xgrad/{name}" for name in XGRAD}
    for name in ("loss", *(f"xgrad/{name}" for name in XGRAD)):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(step, float(np.float32(value))) for step, value in tracked.expected(name)]
    (text,) = events.Tensors("args/text_summary")
    check_config(json.loads(text.tensor_proto.string_val[0]))


# ---- Trackio ----


def test_trackio(tracked: Tracked) -> None:
    needs("trackio")
    with sqlite3.connect(tracked.folder / "trackio" / "project.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics ORDER BY step")]
        ((config,),) = database.execute("SELECT config FROM configs").fetchall()
    for name in ("loss", *(f"xgrad/{name}" for name in XGRAD)):
        found = [(row["train/global_step"], row[f"train/{name}"]) for row in rows if f"train/{name}" in row]
        assert found == tracked.expected(name)
    check_config(json.loads(config))


# ---- Weights & Biases ----


def records(file: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log format in blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, start, record = file.read_bytes(), 7, b""
    whole, last = 1, 4
    while start + 7 <= len(content):
        room = 32768 - start % 32768
        if room < 7:
            start += room
            continue
        size, kind = struct.unpack_from("<HB", content, start + 4)
        record += content[start + 7 : start + 7 + size]
        start += 7 + size
        if kind in (whole, last):
            yield Record.FromString(record)
            record = b""


def test_wandb(tracked: Tracked) -> None:
    needs("wandb")
    (file,) = tracked.folder.glob("wandb/**/*.wandb")
    rows, config = [], {}
    for record in records(file):
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        updates = [*record.config.update, *record.run.config.update]
        config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
    for name in ("loss", *(f"xgrad/{name}" for name in XGRAD)):
        found = [(row["train/global_step"], row[f"train/{name}"]) for row in rows if f"train/{name}" in row]
        assert found == tracked.expected(name)
    check_config(config)
