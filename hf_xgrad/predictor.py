"""WeightPredictor: predicts the weights of an optimizer, and brings the true ones back."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

import hf_xgrad.closed_forms  # noqa: F401, registers them
from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.prediction import Prediction
from hf_xgrad.core.refusals import check_model, check_optimizer, unwrap_optimizer
from hf_xgrad.core.saved_state import load_state, needed_parts, state_of
from hf_xgrad.core.weights import Weights
from hf_xgrad.core.written import write_is_lost
from hf_xgrad.engines.sharded import ShardedWeights, is_sharded


class WeightPredictor:
    r"""Runs forward and backward on the weights that an optimizer is heading for.

        w_hat_t = w_t - s * lr_t * delta_t                              (closed form)
        w_hat_t = w_t + s * (lr_t / lr_{t-1}) * (w_t - w_{t-1})         (last update)

    `predict` writes `w_hat_t` into the parameters, `restore` brings `w_t` back bit for bit, by copying. Between two
    realised steps every `predict` makes the same move, so that all micro-batches of one accumulation window see the
    same weights. Parameters keep their storage; the optimizer's state and groups are only read. Beside the temporaries
    of one chunk, the predictor holds one copy of the weights that it moves, allocated once.

    What others write to predicted weights (a forward that clamps them, a second optimizer) would be lost, and is an
    error as soon as the true ones are back. Between two predictions everything may change.

    Args:
        optimizer: the optimizer `w` is stepped by: any `torch.optim.Optimizer`, bare or prepared by Accelerate.
        config: `s` is `config.steps`, the rule `config.rule`; may be set anew between two predictions.
        model: the model as prepared; needed where its parameters are sharded (FSDP, tensor parallelism), of which each
            process predicts the part that it holds. Elsewhere it gives the weights their names in messages.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: an optimizer or a model for which no prediction can be right, `rule="closed_form"` where there is
            none, or sharded parameters without `model`.

    Example:
        >>> import torch
        >>> from hf_xgrad import WeightPredictor, XGradConfig
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0))
        >>> for batch in torch.ones(3, 4, 2):
        ...     with predictor.predicted():
        ...         loss = model(batch).square().mean()
        ...         loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Source: Guan et al., "XGrad: Boosting Gradient-Based Optimizers With Weight Prediction", arXiv 2305.18240.
    """

    def __init__(self, optimizer: Optimizer, config: XGradConfig, model: nn.Module | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"WeightPredictor: `optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self.optimizer = unwrap_optimizer(optimizer)
        self._model = model
        self._inside = False  # between predict and restore, also where nothing is moved
        self._config = XGradConfig(enabled=False)
        self.prediction: Prediction | None = None  # the parts at work, from the first settings on that predict
        self.config = config

    @property
    def config(self) -> XGradConfig:
        """The settings; new ones hold from the next window on."""
        return self._config

    @config.setter
    def config(self, config: XGradConfig) -> None:
        if self._inside:
            raise RuntimeError("WeightPredictor: config is set inside a prediction; leave predicted() first")
        if self.prediction is not None and (config.rule == self.prediction.weights.rule or not config.active):
            self.prediction.config = config
        elif config.active:
            observers = self.prediction.more_observers if self.prediction is not None else []
            self.prediction = Prediction(self._make_weights(config), config, observers)
        self._config = config

    def _make_weights(self, config: XGradConfig) -> Weights:
        return _weights_of(self.optimizer, config, self._model)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "WeightPredictor: it listens to the steps of its optimizer, and cannot be copied or pickled with it. Make "
            "a new one for the copy, and give it what state_dict() of this one returns."
        )

    # ---- predict and restore ----

    @property
    def is_predicted(self) -> bool:
        """True between `predict` and `restore`."""
        return self._inside

    def predicted(self) -> _Predicted:
        """Context manager: predicted weights inside, the true ones again on every way out.

        A signal may come between the body and the way out, in CPython itself: a `finally` of your own with `restore()`
        is safe from that, too.

        Raises:
            RuntimeError: on entering it twice (predicting from predicted weights), and on leaving it where predicted
                weights were written by others.
        """
        return _Predicted(self)

    def predict(self) -> None:
        """Writes the predicted weights into the parameters.

        Does nothing to a parameter for which the optimizer has no state yet, nor with `steps=0` or `enabled=False`.

        Raises:
            RuntimeError: the weights are predicted already.
        """
        if self._inside:
            raise RuntimeError(
                "WeightPredictor: the weights are predicted already; call restore() (or leave predicted()) first"
            )
        try:
            self._inside = True
            if self.prediction is not None:
                self.prediction.predict()
        except BaseException:
            self._restore(failed=True)
            raise

    def restore(self) -> None:
        """Brings the true weights back, bit for bit; does nothing where they are already there.

        Raises:
            RuntimeError: predicted weights were written by others; the true ones are back.
        """
        self._restore(failed=False)

    def _restore(self, *, failed: bool) -> None:
        """`restore`, told whether forward or backward `failed`; without communication, as others may not follow."""
        if not self._inside:
            return
        written = self.prediction.restore(failed=failed) if self.prediction is not None else []
        self._inside = False
        if written and not failed:
            raise write_is_lost(written[0])

    # ---- diagnostics ----

    def measure(self, enabled: bool = True) -> None:
        """Whether to compare the prediction of the coming step with the step; `diagnostics` then has the result."""
        if self.prediction is not None:
            self.prediction.weights.settle()
            self.prediction.comparison.measure(enabled)

    def diagnostics(self) -> dict[str, float]:
        """Result of the last measured step, once; empty where none was measured since.

        `relative_norm` is `|w_hat_t - w_t| / |w_t|` over all predicted weights, `cosine` that of the angle between
        `w_hat_t - w_t` and `w_{t+1} - w_t` (missing where either is zero; of an even sample where there are more than
        2^20 weights), `active` 1.0 where weights were moved, `steps` the mean of `s` over the parameter groups, and
        `steps_<i>` that of group i where groups choose theirs.
        """
        if self.prediction is None:
            return {}
        self.prediction.weights.settle()
        return self.prediction.comparison.result()

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the optimizer's state; empty where that is all (closed forms, a fixed s).

        Returns:
            of the last-update rule `{"holds": "previous" | "move", "lrs": [lr_{t-1} per group], "weights":
            {"<group>.<index>": w_{t-1}, or the move of the open window}, "still": [names of those that do not move]}`,
            and where s is chosen also `{"steps": {name: tensor}}`. Of sharded weights the local parts, and
            `{"process": [rank, number of processes]}`: each process saves and loads its own.

        Raises:
            RuntimeError: inside a prediction.
        """
        if self._inside:
            raise RuntimeError("WeightPredictor: state_dict() inside a prediction; leave predicted() first")
        return state_of(self.prediction) if self.prediction is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; what is not in it starts anew.

        To be called after the weights and the optimizer's state have been loaded.

        Raises:
            ValueError: the state belongs to other parameters or to another process, is incomplete, or holds what it
                cannot have been; nothing is changed then.
            RuntimeError: inside a prediction.
        """
        if self._inside:
            raise RuntimeError("WeightPredictor: load_state_dict() inside a prediction; leave predicted() first")
        if self.prediction is not None:
            load_state(self.prediction, state_dict)

    @property
    def process(self) -> list[int] | None:
        """`[rank, number of processes]` that `state_dict` belongs to; None where it is the same on all."""
        return self.prediction.weights.process if self.prediction is not None else None

    @property
    def remembers(self) -> set[str]:
        """What of `state_dict` a prediction needs beside the optimizer's state: `"weights"`, `"steps"`, or neither."""
        return needed_parts(self.prediction) if self.prediction is not None else set()


class _Predicted:
    """`with predictor.predicted()`.

    A class, not a generator: where a Ctrl-C comes between `__enter__` and the body, a suspended generator would keep
    the predicted weights until it is collected.
    """

    def __init__(self, predictor: WeightPredictor) -> None:
        self._predictor = predictor

    def __enter__(self) -> WeightPredictor:
        nested = self._predictor.is_predicted
        try:
            self._predictor.predict()
        except BaseException as error:
            if not nested:
                self._predictor._restore(failed=True)
                self._explain(error)
            raise
        return self._predictor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = error is not None
        try:
            try:
                self._predictor._restore(failed=failed)
            finally:
                self._predictor._restore(failed=failed)  # only has work to do where an interrupt ended the first
        except BaseException as interrupt:
            self._explain(interrupt)
            raise
        if error is not None:
            self._explain(error)

    def _explain(self, error: BaseException) -> None:
        """Adds a note to an error that has ended a prediction, if that has left something wrong (under ZeRO)."""
        if self._predictor.prediction is not None:
            self._predictor.prediction.weights.explain(error)


def _weights_of(optimizer: Optimizer, config: XGradConfig, model: nn.Module | None) -> Weights:
    """The weights, whole or sharded; refuses what cannot be right."""
    check_optimizer(optimizer, config)
    check_model(model)
    if not any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
        return Weights(optimizer, config.rule, model)
    if model is None:
        raise ValueError(
            "WeightPredictor: the parameters are sharded; give it the prepared model too: "
            "WeightPredictor(optimizer, config, model)"
        )
    return ShardedWeights(optimizer, config.rule, model)
