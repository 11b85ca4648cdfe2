"""Clients of the Hub of these tests: each is a process of its own, which can reach nothing but this machine.

huggingface_hub reads its environment when it is imported, so that clients cannot run in the process of the tests. One
process imports everything once, and forks for each call of a `Clients`; what is called are the functions below.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

SUPPORT = Path(__file__).parent


# ---- in the process of the tests ----


@dataclass
class Outcome:
    """What a client returned, or the error that ended it: its class, its text and its notes."""

    value: Any
    error: str | None
    text: str
    notes: list[str]
    log: str
    """What it wrote to stdout and stderr."""

    def unwrap(self) -> Any:
        assert self.error is None, f"{self.error}: {self.text}\n{self.log}"
        return self.value


class Clients:
    """Calls functions of this module in forks of one process.

    No client may have tried to reach another machine, or have shown the token: both fail the test.
    """

    def __init__(self, folder: Path, endpoint: str, token: str) -> None:
        self.folder = folder
        self.token = token
        self.calls = 0
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")
        }
        places = {"HOME": "home", "HF_HOME": "huggingface", "TMPDIR": "tmp", "XDG_CACHE_HOME": "cache"}
        for place in places.values():
            (folder / place).mkdir()
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=kept
            | {name: str(folder / place) for name, place in places.items()}
            | {"HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1"}
            | {"PYTHONPATH": os.pathsep.join(map(str, (SUPPORT.parents[1], SUPPORT)))},
        )
        # What is imported may have something to say before that, as DeepSpeed has.
        assert "ready\n" in self.process.stdout

    def __call__(
        self, function: Callable[..., Any], *, token: str | None = None, xet: bool = False, **arguments: Any
    ) -> Outcome:
        """Call a function of this module by its keywords.

        Args:
            token: that of whoever is logged in.
            xet: whether hf_xet may be used, as it is in any installation.
        """
        self.calls += 1
        result = self.folder / f"call-{self.calls}"
        wanted = {
            "function": function.__name__,
            "arguments": arguments,
            "token": token,
            "xet": xet,
            "result": str(result),
        }
        print(json.dumps(wanted), file=self.process.stdin, flush=True)
        status = self.process.stdout.readline()
        written = result.with_suffix(".log")
        log = written.read_text() if written.is_file() else ""
        assert status == "0\n", f"the client died ({status!r}):\n{log}"
        kept = torch.load(result, weights_only=True)
        assert kept.pop("refused") == [], log
        outcome = Outcome(**kept, log=log)
        assert self.token not in "\n".join((outcome.text, *outcome.notes, log))
        return outcome

    def close(self) -> None:
        with self.process:
            self.process.stdin.close()


# ---- in a client ----

_refused: list[str] = []


def _refuse_other_machines(event: str, args: tuple[Any, ...]) -> None:
    host = None
    if event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        _refused.append(f"{event} {host}")
        raise PermissionError(f"{host} is not this machine")


def _serve() -> None:
    """Fork for each line of the input."""
    sys.addaudithook(_refuse_other_machines)
    # Once for all clients: what they import, and what the first model that is saved sets up.
    for module in ("hf_xgrad.__main__", "hf_xgrad.trainer", "matplotlib.figure", "peft"):
        importlib.import_module(module)
    with TemporaryDirectory() as folder:
        importlib.import_module("tiny_models").bert().save_pretrained(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        call = json.loads(line)
        process = os.fork()
        if process == 0:
            _client(**call)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _client(function: str, arguments: dict[str, Any], token: str | None, xet: bool, result: str) -> None:
    import huggingface_hub.utils._http
    from huggingface_hub import constants

    log = os.open(f"{result}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    constants.HF_HUB_DISABLE_XET = not xet
    # No waits between the tries of a call.
    huggingface_hub.utils._http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    kept: dict[str, Any] = {"value": None, "error": None, "text": "", "notes": []}
    try:
        kept["value"] = globals()[function](**arguments)
    except Exception as error:
        traceback.print_exc()
        kept |= {"error": type(error).__name__, "text": str(error), "notes": list(getattr(error, "__notes__", []))}
    torch.save(kept | {"refused": _refused}, result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _trainer(output_dir: str, *, base: str | None = None, lora: bool = False, **settings: Any) -> Any:
    import tiny_models as tiny
    from hf_xgrad import XGradTrainer, XGradTrainingArguments

    model: Any = tiny.bert() if base is None else type(tiny.bert()).from_pretrained(base)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    args = tiny.arguments(output_dir, XGradTrainingArguments, optim="adamw_torch", **settings)
    return XGradTrainer(model=model, args=args, train_dataset=tiny.Sentences())


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(
    output_dir: str,
    *,
    resume_from: str | None = None,
    waits: bool = True,
    lookup: int | None = None,
    push: bool = True,
    card: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train, and push at the end.

    Args:
        output_dir: where to.
        resume_from: a repository whose last-checkpoint to go on from.
        waits: whether training goes on only when what was pushed at a checkpoint is there.
        lookup: the step after which to ask the Hub who one is.
        push: whether to push at the end, too.
        card: what the card is told.
        settings: arguments of the run; `base` is the model to start from, `lora` trains an adapter.

    Returns:
        The weights at the end, `steps` with those after each step, `moved` with the steps after which a forward ran on
        others while a push was under way, `links` if the checkpoint came as links.
    """
    from huggingface_hub import snapshot_download, whoami
    from transformers import TrainerCallback

    trainer = _trainer(output_dir, **settings)
    steps: dict[int, dict[str, torch.Tensor]] = {}
    moved: list[int] = []

    def is_pushing() -> bool:
        in_progress = getattr(trainer, "push_in_progress", None)
        return in_progress is not None and not in_progress.is_done()

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps[state.global_step] = _weights(trainer.model)
            if state.global_step == lookup:
                whoami(token=args.hub_token)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if waits and is_pushing():
                trainer.push_in_progress.wait_until_done()

    def look(model: Any, _: Any) -> None:
        step = trainer.state.global_step
        if model.training and step in steps and is_pushing():
            before = steps[step]
            if not all(torch.equal(value, before[name]) for name, value in model.state_dict().items()):
                moved.append(step)

    trainer.add_callback(Watch())
    trainer.model.register_forward_pre_hook(look)
    checkpoint, links = None, False
    if resume_from is not None:
        local = snapshot_download(resume_from, token=settings["hub_token"], allow_patterns="last-checkpoint/*")
        checkpoint = os.path.join(local, "last-checkpoint")
        links = os.path.islink(os.path.join(checkpoint, "model.safetensors"))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    if push:
        trainer.push_to_hub(**(card or {}))
    return {"weights": _weights(trainer.model), "steps": steps, "moved": moved, "links": links}


def load(name: str, *, lora: bool = False) -> dict[str, torch.Tensor]:
    """The weights of a model, from a repository or a folder."""
    from transformers import BertForSequenceClassification

    if not lora:
        return _weights(BertForSequenceClassification.from_pretrained(name))
    from peft import PeftModel

    import tiny_models as tiny

    return _weights(PeftModel.from_pretrained(tiny.bert(), name))


def command(words: list[str]) -> dict[str, Any]:
    """`hf-xgrad`: what it prints, and its exit status."""
    import hf_xgrad.cli

    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        status = hf_xgrad.cli.main(words)
    print(output.getvalue(), errors.getvalue())
    return {"status": status, "output": output.getvalue(), "errors": errors.getvalue()}


def reach_out(host: str) -> None:
    """Try to reach another machine."""
    import socket

    socket.create_connection((host, 80), timeout=1)


if __name__ == "__main__":
    # The names of this module are those that a client calls.
    _serve()
