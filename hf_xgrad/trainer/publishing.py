"""Model cards and pushes of a trainer."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.utils import logging

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.outputs.files import CheckpointError
from hf_xgrad.outputs.hub import PUSH_ERRORS, UnsavedToken, has_model, push_again, push_command
from hf_xgrad.outputs.model_card import TrainedModel, complete_card
from hf_xgrad.outputs.stock_card import (
    base_model_of,
    correct_saved_card,
    is_hub_id,
    naming_hub_models_only,
    with_readable_log,
)

# To a type checker the mixin is a Trainer; at run time it is mixed into one.
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)


class PublishingMixin(_Trainer):
    """Completes the model card, and says how to push again what could not be pushed."""

    _has_own_optimizer = False  # whether the trainer was given one, or how to make it
    _steps_unpredicted = 0  # steps of this run that came without a prediction

    @property
    def xgrad_config(self) -> XGradConfig:
        """The settings in force."""
        raise NotImplementedError

    def prepare_publishing(self) -> None:
        """To be called when the trainer has been made."""
        self._has_own_optimizer = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if self.args.hub_token is not None:
            # The Trainer pickles its arguments, token and all, into a file that it pushes.
            self.args.hub_token = UnsavedToken(self.args.hub_token)
        self._warn_of_local_names()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir or str(self.args.output_dir)
        try:
            correct_saved_card(folder)
        except OSError:
            raise
        except Exception:
            # Whoever wrote it: it must not end a run.
            logger.warning(f"XGrad: the model card in {folder} is left as it is.", exc_info=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's own card, completed: method and settings, loss curves, how to load the model, citation.

        Names that the Hub would reject the card for (a base model or a data set in a local folder) are left out.
        """
        if not self.is_world_process_zero():
            return
        create = super().create_model_card
        given = inspect.signature(create).bind(*args, **kwargs).arguments
        if given.get("model_name") == "":
            # Of output_dir ".", say.
            kwargs["model_name"] = os.path.basename(os.path.abspath(str(self.args.output_dir)))
        with naming_hub_models_only(self.model), with_readable_log(self.state):
            create(*args, **kwargs)
        trained = TrainedModel.of(
            self, self.xgrad_config, given.get("tasks"), self._has_own_optimizer, self._steps_unpredicted
        )
        try:
            complete_card(str(self.args.output_dir), trained)
        except Exception:
            # Some trainers write the card with every checkpoint: it must not end a run.
            logger.warning("XGrad: the model card is left as the Trainer wrote it.", exc_info=True)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own `push_to_hub`; an error has a note that says how to push again what was trained."""
        try:
            return super().push_to_hub(*args, **kwargs)
        except CheckpointError:
            raise
        except PUSH_ERRORS as error:
            if has_model(str(self.args.output_dir)):
                way_out = push_again(error, self._push_command(kwargs))
                error.add_note(f"XGrad: the model is in {self.args.output_dir}; {way_out}")
            raise

    def _push_command(self, given: dict[str, Any]) -> str:
        args = self.args
        private, revision = (given.get(name) for name in ("private", "revision"))
        return push_command(
            str(args.output_dir),
            self.hub_model_id or args.hub_model_id,
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision if revision is None else revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._warn_of_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Tells of pushes in the background that failed, which the Trainer never asks for."""
        in_progress = getattr(self, "push_in_progress", None)
        if in_progress is None:
            return
        done = [job for job in in_progress.jobs if job.done()]
        in_progress.jobs = [job for job in in_progress.jobs if job not in done]
        errors = [error for error in (job.exception() for job in done if not job.cancelled()) if error is not None]
        if errors:
            logger.warning(
                f"XGrad: a push of a checkpoint failed ({errors[-1]}); training goes on, and everything is in "
                f"{self.args.output_dir}. To push it by hand: {self._push_command({})}"
            )

    def _warn_of_local_names(self) -> None:
        if not self.args.push_to_hub or not self.is_world_process_zero():
            return
        name = base_model_of(self.model)
        if name is not None and not is_hub_id(name):
            logger.warning(
                f"XGrad: the model was loaded from {name}, which is no id of the Hub: the model card will not name it "
                "as base_model, as the Hub would reject the card for it."
            )
