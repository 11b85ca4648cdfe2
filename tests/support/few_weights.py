"""A few weights, steps of them on random gradients, and what is predicted then; for the tests of rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_xgrad import WeightPredictor, XGradConfig

SHAPES = ((5,), (3, 4), (), (2, 1, 3))


def take_steps(params: list[Tensor], optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def predict(optimizer: torch.optim.Optimizer, params: list[Tensor], **config: Any) -> list[Tensor]:
    with WeightPredictor(optimizer, XGradConfig(**{"steps": 1.0, **config})).predicted():
        return [p.detach().clone() for p in params]
