"""Pushing the folder of a run to the Hub: at its end, and again after a push that failed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

# What the Hub, or the way to it, may raise; HTTPError is that of the client which huggingface_hub has, ValueError is
# how it says that a card was rejected.
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, HTTPError, ValueError)
# As RuntimeError it wraps whatever came of the upload of a large file.
PUSH_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, RuntimeError)

# Checkpoints, event files and what is only of use to go on with the run where it was.
_NOT_PUSHED = ("checkpoint-*", "runs/*", "_*", "xgrad_settings.json")
_CONFIGURATIONS = ("config.json", "adapter_config.json")


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
    """Whether a model, or an adapter, was saved into a folder."""
    return any((Path(folder) / name).is_file() for name in _CONFIGURATIONS)


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
    if not has_model(folder):
        raise ValueError(f"{folder} holds no model to push: it has neither {' nor '.join(_CONFIGURATIONS)}")
    api = HfApi(token=token)
    repository = api.create_repo(hub_model_id or folder.absolute().name, private=private, exist_ok=True)
    return api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=folder,
        commit_message="End of training",
        ignore_patterns=list(_NOT_PUSHED),
        revision=revision,
    )


def push_command(
    folder: str | os.PathLike[str],
    hub_model_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
) -> str:
    """The command line that does as `push` does; the token is left out."""
    words = ["python", "-m", "hf_xgrad", "push", os.fspath(folder)]
    if hub_model_id is not None:
        words += ["--hub_model_id", hub_model_id]
    if private:
        words.append("--private")
    if revision is not None:
        words += ["--revision", revision]
    return shlex.join(words)
