"""`ZeroPredictor`, the predictor of a DeepSpeed engine; needs DeepSpeed."""

from __future__ import annotations

from typing import Any

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.refusals import check_optimizer
from hf_xgrad.core.weights import Weights
from hf_xgrad.engines.deepspeed import ZeroWeights
from hf_xgrad.predictor import WeightPredictor


class ZeroPredictor(WeightPredictor):
    """`WeightPredictor` of a DeepSpeed engine; within `predicted()` there may be engine.step() too.

    Every process has to enter and to leave it: entering takes the communication that DeepSpeed does at the end of a
    step, and so does leaving where no step was taken in it. Leaving with an error takes none, as others may not
    follow; where that leaves something wrong, the error has a note that says what to do.

    Args:
        engine: what deepspeed.initialize gave, with an optimizer.
        config: as of `WeightPredictor`.

    Raises:
        ValueError: what `WeightPredictor` refuses, and what cannot be right with DeepSpeed.
    """

    def __init__(self, engine: Any, config: XGradConfig) -> None:
        self._engine = engine
        super().__init__(engine.basic_optimizer, config)

    def _make_weights(self, config: XGradConfig) -> Weights:
        weights = ZeroWeights(self._engine, config.rule)
        self.optimizer = weights.optimizer
        check_optimizer(weights.optimizer, config)
        for group in weights.groups():
            weights.form(group)  # raises where there should be a closed form
        return weights

    def refresh(self) -> None:
        """Brings true weights to every process, also after an error; every process has to call it."""
        if self.prediction is not None and isinstance(self.prediction.weights, ZeroWeights):
            self.prediction.weights.refresh()
