"""The names of the files that runs leave behind, and the error where one cannot be written."""

STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "xgrad_settings.json"
CARD_FILE = "README.md"
PICTURE_FILE = "training_curves.png"
# A checkpoint that has it was not finished.
INCOMPLETE_FILE = "checkpoint-is-incomplete.txt"


class CheckpointError(OSError):
    """A checkpoint or a model could not be written; the message says why, and what there is to go on from."""
