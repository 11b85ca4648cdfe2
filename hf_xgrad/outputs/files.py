"""The names of the files that runs leave behind, and the error where one cannot be written."""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "xgrad_settings.json"
CARD_FILE = "README.md"
PICTURE_FILE = "training_curves.png"
# A checkpoint that has it was not finished.
INCOMPLETE_FILE = "checkpoint-is-incomplete.txt"

# All of them, in an output folder: those above, weights, configuration, tokenizer, results and logs.
_LEFT_BY_RUNS = re.compile(
    "|".join(map(re.escape, (STATE_FILE, SETTINGS_FILE, CARD_FILE, PICTURE_FILE)))
    + r"|checkpoint-\d+|training_args\.bin|"
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|"
    r"(adapter_|generation_|tokenizer_)?config\.json|tokenizer\.json|special_tokens_map\.json|added_tokens\.json|"
    r"chat_template\.jinja|(train|eval|predict|all)_results\.json|predict_results[^/]*\.tsv|comparison\.json|"
    r"sample\.txt|runs/(.*/)?(events\.out\.tfevents\..*|hparams\.yml)"
)


class CheckpointError(OSError):
    """A checkpoint or a model could not be written; the message says why, and what there is to go on from."""


def left_by_runs(folder: Path) -> list[Path]:
    """Return what a run leaves in its output folder; nothing of what others may have put there."""
    inside = [*folder.glob("*"), *folder.glob("runs/**/*")]
    return sorted(path for path in inside if _LEFT_BY_RUNS.fullmatch(path.relative_to(folder).as_posix()))


def remove(paths: Iterable[Path]) -> list[str]:
    """Remove files and folders, and return their names."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in paths]
