"""Pushing the folder of a run to the Hub: at its end, and again after a push that failed."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from hf_xgrad.outputs.files import CARD_FILE, SETTINGS_FILE

# What the Hub, or the way to it, may raise; HTTPError is that of the client which huggingface_hub has, ValueError is
# how it says that a card was rejected.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HTTPError, ValueError)
# As RuntimeError it wraps whatever came of the upload of a large file.
PUSH_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, RuntimeError)

# Checkpoints, event files and what is only of use to go on with the run where it was.
_NOT_PUSHED = ("checkpoint-*", "*/checkpoint-*", "runs/*", "wandb/*", "_*", ".env*", SETTINGS_FILE)
_WEIGHTS = ("model", "pytorch_model", "adapter_model")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


class UnsavedToken(str):
    """A token that stays out of what is saved: pickled with the arguments of a run (training_args.bin), it is None."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def __copy__(self) -> UnsavedToken:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> UnsavedToken:
        return self


def has_model(folder: str | os.PathLike[str]) -> bool:
    """Whether the weights of a model, or of an adapter, were saved into a folder."""
    endings = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    return any((Path(folder) / f"{name}{ending}").is_file() for name in _WEIGHTS for ending in endings)


def push(
    folder: str | os.PathLike[str],
    hub_model_id: str | None = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Pushes the model, its card and the results in the folder of a run.

    Files that are on the Hub already are not sent again.

    Args:
        folder: output folder of the run.
        hub_model_id: repository, made if it is not there; by default of the folder's name, under the token's user.
        token: by default that of `hf auth login`, or of the variable HF_TOKEN.
        private: whether a repository that is made is private; by default as the user's organisation has it.
        revision: the branch; by default the main one.

    Returns:
        The commit; its `repo_url` is where the model can be seen.

    Raises:
        ValueError: `folder` holds no model, or the Hub rejects the metadata of its card.
        OSError: the Hub cannot be reached, or refuses.
        RuntimeError: the upload of a large file broke off.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if _CHECKPOINT.fullmatch(folder.absolute().name):
        raise ValueError(f"{folder} is a checkpoint; the folder of the run is {folder.absolute().parent}")
    if not has_model(folder):
        raise ValueError(f"{folder} holds no model to push: neither weights nor an adapter")
    api = HfApi(token=token)
    repository = api.create_repo(hub_model_id or folder.absolute().name, private=private, exist_ok=True)
    _name_in_card(folder, repository.repo_id)
    return api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=folder,
        commit_message="End of training",
        ignore_patterns=list(_NOT_PUSHED),
        revision=revision,
    )


def _name_in_card(folder: Path, repository: str) -> None:
    """Lets the code in the card load the model from where it is pushed to."""
    card = folder / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        named = text.replace(f'.from_pretrained("{folder.absolute().name}")', f'.from_pretrained("{repository}")')
        if named != text:
            card.write_text(named, encoding="utf-8")


def push_again(error: Exception, command: str) -> str:
    """What to do after a push that failed."""
    if "Invalid metadata" in str(error):
        return f"correct the metadata in its {CARD_FILE} (between the first two ---), then: {command}"
    if getattr(getattr(error, "response", None), "status_code", None) == 401:
        return f"log in (`hf auth login`, or HF_TOKEN), then: {command}"
    return f"to push it: {command}"


def push_command(
    folder: str | os.PathLike[str],
    hub_model_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """The command line that does as `push` does; the token is left out."""
    words = ["hf-xgrad", "push", os.fspath(folder)]
    if hub_model_id is not None:
        words += ["--hub_model_id", hub_model_id]
    if private:
        words.append("--private")
    if revision is not None:
        words += ["--revision", revision]
    return shlex.join(words)
