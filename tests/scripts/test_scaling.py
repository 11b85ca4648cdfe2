"""docs/scaling.md: its tables are what the script prints, and the bytes that they rest on are what kernels move."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import scaling
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.core import diagnostics
from inside import kept_weights

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
WEIGHTS = 4096


def test_the_page_has_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([]) == 0
    assert f"```\n{capsys.readouterr().out}```\n" in PAGE


def test_a_model_and_gpus_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    """3 billion weights on 4 GPUs: FSDP holds 16 x 3 / 4 GB, and XGrad adds a quarter of that."""
    assert scaling.main(["--billions", "3", "--gpus", "4"]) == 0
    (memory, time) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("3B on 4 ")]
    assert " ".join(memory[3:9]) == "48 + 12 12 + 3"
    # 56 bytes for each weight at 3.35 TB/s; 6 x 8192 operations at 0.4 x 989 TFLOP/s.
    assert time[3:5] == ["50.1,", "13%"]


def test_an_all_gather_goes_over_nvlink_within_a_node_and_over_the_network_beyond() -> None:
    (engine,) = [engine for engine in scaling.ENGINES if engine.name == "ZeRO-1"]
    assert scaling.gather_seconds(engine, 1e9, 1) == 0
    assert scaling.gather_seconds(engine, 1e9, 8) == pytest.approx(2e9 * 7 / 8 / 450e9)
    assert scaling.gather_seconds(engine, 1e9, 16) == pytest.approx(2e9 * 15 / 16 / 400e9)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--billions", "0"), "--billions must be above 0 and finite, not 0.0"),
        (("--billions", "nan"), "--billions must be above 0 and finite, not nan"),
        (("--gpus", "8", "-1"), "--gpus must be above 0 and finite, not -1"),
        (("--tokens", "0"), "--tokens must be above 0 and finite, not 0"),
        (("--utilisation", "1.1"), "--utilisation must be above 0 and at most 1, not 1.1"),
        (("--gpu", "8"), "unknown argument --gpu; did you mean --gpus?"),
    ],
)
def test_wrong_input_is_one_line(flags: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(flags) == 2
    assert capsys.readouterr().err == f"scaling.py: error: {named}\n"


# ---- the bytes behind it ----


class Traffic(TorchDispatchMode):
    """Bytes that kernels read and write, and how many of the tensors that they made there were at most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.most = 0
        self._living = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        written = [arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments]
        for i, arg in enumerate(args):
            # A copy does not read what it overwrites; all other kernels in place do.
            reads = not (written[i] and "copy_" in func._schema.name)
            self.bytes += (reads + written[i]) * _bytes(arg)
        if not any(written) and not any(value.alias_info for value in func._schema.returns):  # else: no new tensors
            self.bytes += _bytes(result)
            for tensor in _weights(result):
                self._count(_bytes(tensor))
                weakref.finalize(tensor, self._count, -_bytes(tensor))
        return result

    def _count(self, number: int) -> None:
        self._living += number
        self.most = max(self.most, self._living)


def _weights(values: Any) -> list[Tensor]:
    """The tensors among `values` that hold a number for each weight, not step counts and the like."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.numel() >= WEIGHTS]


def _bytes(values: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _weights(values))


class Still(torch.optim.Optimizer):
    """Moves nothing, so that all bytes are XGrad's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    def step(self, closure: None = None) -> None:
        pass


def adamw(weight: nn.Parameter) -> torch.optim.Optimizer:
    """As after a step of the fused AdamW, which counts its steps on the device."""
    optimizer = torch.optim.AdamW([weight], fused=weight.device.type == "cpu")
    moments = {name: torch.ones_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[weight] = {"step": torch.ones((), device=weight.device), **moments}
    return optimizer


def window(
    optimizer: torch.optim.Optimizer, micro_batches: int = 1, *, logged: bool = False, **settings: Any
) -> Traffic:
    """What a predictor does in one window, when it has been at work for a while."""
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, **settings))
    # The last one holds no prediction at which values are compared: that is done at the 1st, 2nd, 4th, 8th...
    for _ in range(6):
        predictor.measure(logged)
        with Traffic() as traffic:
            for _ in range(micro_batches):
                with predictor.predicted():
                    pass
            if isinstance(optimizer, Still) or logged:
                optimizer.step()
    (kept,) = kept_weights(predictor).values()
    assert kept.numel() == WEIGHTS
    return traffic


def weight_on(device: str) -> nn.Parameter:
    return nn.Parameter(torch.ones(WEIGHTS, device=device))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bytes_of_the_closed_form(micro_batches: int) -> None:
    """On the meta device steps are counted where the weights are, as on a GPU; nothing is worked out there."""
    on_host, on_device = (window(adamw(weight_on(device)), micro_batches) for device in ("cpu", "meta"))
    assert on_host.bytes == 48 * micro_batches * WEIGHTS
    assert on_device.bytes == scaling.CLOSED_FORM_BYTES * micro_batches * WEIGHTS


@pytest.mark.parametrize(("micro_batches", "expected"), [(1, 80), (2, 80 + 56), (4, 80 + 3 * 56)])
def test_bytes_of_the_last_update_rule(micro_batches: int, expected: int) -> None:
    assert window(Still([weight_on("meta")]), micro_batches).bytes == expected * WEIGHTS


def test_the_page_has_these_bytes() -> None:
    for count in (48, 56, 80, scaling.CLOSED_FORM_BYTES, scaling.MASTERS_BYTES):
        assert f"{count} bytes" in PAGE


def test_temporaries() -> None:
    """One of the size of the weights; with decay two."""
    one = 4 * WEIGHTS
    assert window(adamw(weight_on("meta"))).most == one
    assert window(adamw(weight_on("meta")), weight_decay=True).most == 2 * one
    assert window(Still([weight_on("meta")]), 2).most == one


def test_a_logged_step_holds_no_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """But a sample of them, of which there is more here than may be looked at; beside it the usual temporaries."""
    monkeypatch.setattr(diagnostics, "SAMPLE", WEIGHTS // 64)
    one = 4 * WEIGHTS
    assert window(Still([weight_on("cpu")]), 2, logged=True).most == one
    optimizer = adamw(weight_on("cpu"))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(WEIGHTS)
    assert window(optimizer, 2, logged=True).most == 2 * one
