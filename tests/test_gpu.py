"""What only a GPU can show: step counts that live on the device, and that nothing waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.optim import AdaM3
from reference import predicted_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "adamw-capturable": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01).cuda(), capturable=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam3": lambda params: AdaM3(params, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prediction_on_the_device(name: str) -> None:
    """The slow twin's weights, restored bit for bit, without a single wait for the device."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).cuda()
    optimizer = OPTIMIZERS[name](model.parameters())
    predictor = WeightPredictor(optimizer, XGradConfig(steps=2.0))
    for x in torch.randn(4, 16, 6).cuda():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # The first prediction allocates.
    with predictor.predicted():
        pass
    before = [p.detach().clone() for p in model.parameters()]
    expected = predicted_weights(optimizer, 2.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        predictor.predict()
        moved = [p.detach().clone() for p in model.parameters()]
        predictor.restore()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(moved, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not any(torch.equal(m, w) for m, w in zip(moved, before, strict=True))
