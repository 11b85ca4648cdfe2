"""The table of optimizers is what its cases come to, and misses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import every_optimizer as sweep
import tiny_models as tiny
from hf_xgrad import WeightPredictor, XGradConfig

TABLE = json.loads(sweep.TABLE.read_text())
ROWS = TABLE["optimizers"]
AGAIN = "run `python tests/support/every_optimizer.py --write`"

# Their cases are made without importing what they need, so that these can be told apart while tests are collected.
SLOW = {"adamw_torch_4bit", "adamw_torch_8bit", "SpectralSphere"}


def name_of(row: dict[str, str]) -> str:
    return f"{row['source']} {row['name']}{' ' if row['options'] else ''}{row['options']}"


def parameters() -> list[Any]:
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(row, id=name_of(row), marks=marks[row["name"] in SLOW]) for row in ROWS]


@pytest.mark.parametrize("row", parameters())
def test_row(row: dict[str, str], fresh_accelerator: None) -> None:
    """Prediction, restoring, accumulation and resuming are as `every_optimizer` checks them, and come to this row."""
    differing = sweep.differing(TABLE, row)
    if differing:
        pytest.skip(differing)
    case = sweep.cases()[row["source"], row["name"], row["options"]]
    assert sweep.run_case(case) == row, AGAIN


def test_every_optimizer_has_a_row() -> None:
    """A class or a name that a new version adds is missing until there is a case for it."""
    found = {(row["source"], row["name"]) for row in ROWS}
    assert {(sweep.TORCH, name) for name in sweep.torch_classes()} <= found
    assert {(sweep.OPTIM, name) for name in sweep.optim_names()} <= found
    assert {(source, name) for source, name, _ in sweep.cases()} <= found, AGAIN


def test_every_option_of_torch_has_a_row() -> None:
    """Those that are switched on or off; a version that has fewer is fine."""
    found = {(row["name"], row["options"]) for row in ROWS if row["source"] == sweep.TORCH}
    assert {(case.name, case.options) for case in sweep.torch_cases()} <= found, AGAIN


def test_every_class_of_the_library_has_a_row() -> None:
    pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    found = {row["name"] for row in ROWS if row["source"] == sweep.LIBRARY}
    assert {cls.__name__ for cls in sweep.library_classes().values()} <= found, AGAIN


def test_every_row_is_one_of_four() -> None:
    """And says why, where it does not work."""
    for row in ROWS:
        assert row["rule"] in sweep.RULES, row
        assert (row["rule"] in (sweep.REFUSED, sweep.NOT_RUN)) <= bool(row["note"]), row
        assert (row["rule"] in (sweep.CLOSED, sweep.LAST_UPDATE)) <= bool(row["class"]), row
        assert "\n" not in "".join(row.values()), row
    assert len({name_of(row) for row in ROWS}) == len(ROWS)


def test_slow_cases_are_the_ones_marked() -> None:
    assert {case.name for case in sweep.cases().values() if case.slow} <= SLOW


def test_page_is_made_of_the_table() -> None:
    assert sweep.PAGE.read_text() == sweep.page(TABLE), "run `python tests/support/every_optimizer.py --write_page`"


@pytest.mark.parametrize(
    "key",
    [
        (sweep.TORCH, "LBFGS", ""),
        (sweep.OPTIM, "lomo", ""),
        (sweep.LIBRARY, "AliG", ""),
        (sweep.WRAPPERS, "SAM", "SGD"),
    ],
    ids=str,
)
def test_a_refusal_is_one_line_with_the_way_out(key: tuple[str, str, str]) -> None:
    case = sweep.cases().get(key)
    if case is None:
        pytest.skip("pytorch-optimizer is not installed")
    with sweep.quiet(), pytest.raises(ValueError) as error:
        case.train(XGradConfig())
    message = str(error.value)
    assert "\n" not in message
    assert key[1] in message
    assert "xgrad=False" in message


def test_averages_are_of_true_weights() -> None:
    """torch.optim.swa_utils sees no predicted weights, and SWALR sets the rate that the prediction goes by."""
    model = sweep.small_bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    average = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=5e-2, anneal_epochs=3)
    predictor = WeightPredictor(optimizer, XGradConfig(steps=2.0))
    true = []
    for t in range(5):
        rate = optimizer.param_groups[0]["lr"]
        before = tiny.weights(model)
        with predictor.predicted():
            inside = tiny.weights(model)
            model(**sweep.batch_of(t, 0)).loss.backward()
        for name, p in model.named_parameters() if t else ():
            expected = before[name] - 2.0 * rate * optimizer.state[p]["momentum_buffer"]
            assert torch.allclose(inside[name], expected, rtol=1e-6, atol=1e-8)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
        true.append(tiny.weights(model))
    assert len({float(rate) for rate in (1e-2, optimizer.param_groups[0]["lr"])}) == 2
    for name, p in average.module.named_parameters():
        assert torch.allclose(p, torch.stack([w[name] for w in true]).mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "ademamix_8bit", "lion_8bit", "rmsprop_bnb_8bit"])
def test_low_bit_names_are_tried_in_low_bits(name: str, tmp_path: Path, fresh_accelerator: None) -> None:
    """Small tensors keep a full state; the model of these cases is wide enough."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    case = sweep.cases()[sweep.OPTIM, name, ""]
    assert isinstance(case, sweep.TrainerCase)
    with sweep.quiet():
        trainer = case.trainer(str(tmp_path), XGradConfig(), decay=True)
        trainer.train()
    dtypes = {state["state1"].dtype for state in trainer.optimizer.optimizer.state.values()}
    assert torch.uint8 in dtypes


# ---- the checks themselves ----


def a_case(key: tuple[str, str, str] = (sweep.TORCH, "AdamW", "")) -> sweep.Trace:
    with sweep.quiet():
        return sweep.cases()[key].train(XGradConfig(steps=sweep.STEPS_AHEAD), decay=False)


def test_checks_see_what_is_wrong() -> None:
    """Each, on a trace that is right but for one thing."""
    closed, repeating = a_case(), a_case((sweep.TORCH, "Adagrad", ""))
    sweep.check_windows(closed)
    sweep.check_closed_form(closed, None)
    sweep.check_windows(repeating)
    sweep.check_last_update(repeating)

    name = next(iter(closed.groups))
    for trace, check in (
        (closed, lambda trace: sweep.check_closed_form(trace, None)),
        (repeating, sweep.check_last_update),
    ):
        seen = trace.windows[3].seen[0][name]
        kept = seen.clone()
        seen += 1e-2 * (seen - trace.windows[3].true[name])
        with pytest.raises(sweep.CaseError, match="window 3"):
            check(trace)
        seen.copy_(kept)
        check(trace)

    second = closed.windows[4].seen[1][name]
    second.view(-1)[0] += 1e-3
    with pytest.raises(sweep.CaseError, match="micro-batches"):
        sweep.check_windows(closed)
    second.copy_(closed.windows[4].seen[0][name])
    closed.windows[2].restored = False
    with pytest.raises(sweep.CaseError, match="come back"):
        sweep.check_windows(closed)
    closed.windows[2].restored = True
    closed.final[name].view(-1)[0] = torch.nan
    with pytest.raises(sweep.CaseError, match="NaN"):
        sweep.check_windows(closed)


def test_resuming_that_is_not_exact_is_seen() -> None:
    case = sweep.cases()[sweep.TORCH, "Adagrad", ""]
    config = XGradConfig(steps=sweep.STEPS_AHEAD)
    trace = case.train(config)
    sweep.check_resumed(case, trace, config)
    with pytest.raises(sweep.CaseError, match="after resuming"):
        sweep.check_resumed(case, trace, XGradConfig(steps=1.0))


def test_what_only_xgrad_breaks_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error counts as the optimizer's own only where the plain optimizer ends in it too."""
    case = sweep.cases()[sweep.TORCH, "Adagrad", ""]

    def fails(self: WeightPredictor) -> None:
        if self.config.active:
            raise RuntimeError("at fault")

    monkeypatch.setattr(WeightPredictor, "predict", fails)
    with pytest.raises(sweep.CaseError, match="at fault"):
        sweep.run_case(case)
