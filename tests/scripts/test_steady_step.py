"""The benchmark of a step's Python: its table, its JSON, and kernels that do what the predictor does."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_xgrad import WeightPredictor, XGradConfig

# Loaded from its file: scripts/tools is on no path, and other projects have modules named tools.
SCRIPT = Path(__file__).parents[2] / "scripts" / "tools" / "steady_step.py"
_spec = importlib.util.spec_from_file_location("steady_step", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
steady_step = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = steady_step
_spec.loader.exec_module(steady_step)

WITH_KERNELS = [name for name, setting in steady_step.SETTINGS.items() if setting.kernels is not None]


def test_the_table_has_a_row_for_each_setting_and_number_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    steady_step.main(["--parameters", "2", "3", "--repeats", "2"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["parameters", "setting", "plain", "step", "kernels", "added", "added/kernels"]
    assert [row.split()[:2] for row in rows] == [[n, name] for n in "23" for name in steady_step.SETTINGS]
    # Only where steps="auto" is measured against steps=1.0 there are no kernels to compare with.
    assert [row.endswith("-") for row in rows] == 2 * [name not in WITH_KERNELS for name in steady_step.SETTINGS]
    assert len({len(line) for line in (header, *rows)}) == 1


def test_the_json_has_the_numbers_and_the_machine(tmp_path: Path) -> None:
    file = tmp_path / "steady_step.json"
    flags = ["--parameters", "2", "--settings", "sgd", "adamw_auto", "--micro_batches", "2", "--clock", "cpu"]
    steady_step.main([*flags, "--repeats", "2", "--json", str(file)])
    content = json.loads(file.read_text(encoding="utf-8"))
    assert set(content) == {"machine", "settings", "unit", "results"}
    assert content["settings"]["micro_batches"] == 2
    described = {"processor", "device", "cpus", "threads", "python", "torch", "hf_xgrad", "date"}
    assert set(content["machine"]) == described
    assert all(content["machine"].values())
    sgd, auto = content["results"]
    row = {"parameters", "setting", "added_to", "plain", "fixed", "added"}
    assert set(sgd) == row | {"with_kernels", "kernels", "added/kernels"}
    assert set(auto) == row | {"auto"}
    assert (sgd["added_to"], auto["added_to"]) == ("plain", "fixed")
    for result, variants in ((sgd, ("plain", "fixed", "with_kernels")), (auto, ("plain", "fixed", "auto"))):
        for variant in variants:
            spread = result[variant]
            assert 0 < spread["first_quartile"] <= spread["median"] <= spread["third_quartile"]


@pytest.mark.parametrize("flag", ["--repeats 1", "--parameters 0", "--micro_batches 0", "--settings lion"])
def test_wrong_input_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        steady_step.main(flag.split())
    assert flag.split()[0] in capsys.readouterr().err.partition("error: ")[2]


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_kernels_alone_give_the_predicted_weights(name: str) -> None:
    """In both micro-batches of a window, bit for bit; then the true weights come back, and the next step goes on."""
    setting = steady_step.SETTINGS[name]
    optimizer, twin = (steady_step.make_optimizer(setting, 5, "cpu", seed=1) for _ in range(2))
    predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, rule=setting.rule))
    kept = weights(twin)
    for _ in range(3):
        optimizer.step()
        twin.step()
        true = weights(twin)
        kernels = setting.kernels(twin, kept)
        for predict in (kernels.predict, kernels.predict_again):
            predict()
            with predictor.predicted():
                assert equal(weights(optimizer), weights(twin))
                assert not equal(weights(optimizer), true)
            kernels.restore()
            assert equal(weights(optimizer), true)
            assert equal(weights(twin), true)
        kernels.before_step()


def test_one_seed_gives_twins() -> None:
    setting = steady_step.SETTINGS["sgd"]
    first, second, other = (weights(steady_step.make_optimizer(setting, 5, "cpu", seed)) for seed in (1, 1, 2))
    assert equal(first, second)
    assert not equal(first, other)


def weights(optimizer: Optimizer) -> list[Tensor]:
    """Return copies of the weights."""
    return [p.detach().clone() for p in optimizer.param_groups[0]["params"]]


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    """Return whether all tensors are the same, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))
