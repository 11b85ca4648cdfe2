"""XGrad's file in a checkpoint, damaged in every way that can be thought of, and in many that cannot.

Whatever is in it: either it is refused by one clear error, and nothing has changed, or what was loaded is a state that
a run could have been in.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.outputs.predictor_state import load_state, write_state
from inside import kept_weights, remembered

FILE = "xgrad.safetensors"
LRS = (1e-2, 3e-3)

pytestmark = pytest.mark.filterwarnings("ignore:XGrad. the last update of weights kept in torch.bfloat16")


class Run:
    """Two groups of weights, one of them in bf16, and what predicts them; some steps have been taken."""

    def __init__(self, config: XGradConfig, steps: int = 3, *, open_window: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        self.model.register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.bfloat16)))
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.model[0].parameters()), "lr": LRS[0]},
                {"params": [self.model[1].weight, self.model.scale], "lr": LRS[1]},
            ]
        )
        self.predictor = WeightPredictor(self.optimizer, config)
        for _ in range(steps):
            self.forward_and_backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if open_window:
            self.forward_and_backward()

    def forward_and_backward(self) -> None:
        with self.predictor.predicted():
            (self.model(torch.ones(2, 3)).sum() * self.model.scale).square().backward()

    def everything(self) -> dict[str, Any]:
        """All that a load might change, as plain values; NaN is equal to itself here."""
        state = self.predictor.state_dict()
        tensors = {**state.pop("weights", {}), **state.pop("steps", {}), **self.model.state_dict()}
        tensors |= {f"{i}": p for i, p in enumerate(kept_weights(self.predictor).values())}
        tensors |= {
            f"{i}.{name}": value
            for i, entries in enumerate(self.optimizer.state.values())
            for name, value in entries.items()
        }
        held = (remembered(self.predictor), self.predictor.is_predicted)
        return {"tensors": {name: save({"": t.contiguous()}) for name, t in tensors.items()}, "state": state, "": held}


CONFIGS = {
    "last_update": XGradConfig(steps=1.0, rule="last_update"),
    "auto": XGradConfig(steps="auto"),
    "auto-last_update": XGradConfig(steps="auto", rule="last_update"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> XGradConfig:
    return CONFIGS[request.param]


def written(folder: Path, config: XGradConfig, **of_run: Any) -> bytes:
    write_state(Run(config, **of_run).predictor.state_dict(), str(folder))
    return (folder / FILE).read_bytes()


# ---- the property ----


def check(folder: Path, config: XGradConfig, data: bytes) -> bool:
    """Whether a predictor takes up a file of these bytes; it must be for good reasons, or leave everything alone."""
    (folder / FILE).write_bytes(data)
    run = Run(config, steps=2)
    before = run.everything()
    try:
        taken = load_state(run.predictor, str(folder))
    except ValueError as error:
        message = str(error)
        assert str(folder / FILE) in message
        assert "remove the file" in message
        assert "\n" not in message
        assert len(message) < 2000
        assert run.everything() == before, "refused, but not untouched"
        return False
    check_state(run, taken)
    return True


def check_state(run: Run, taken: set[str]) -> None:
    """That a predictor's state is one it can have come to by itself, and a prediction from it can be taken back."""
    state = run.predictor.state_dict()
    params = {
        f"{g}.{i}": p for g, group in enumerate(run.optimizer.param_groups) for i, p in enumerate(group["params"])
    }
    assert ("holds" in state) == ("weights" in state) == ("weights" in taken and "weights" in run.predictor.remembers)
    if "holds" in state:
        assert state["holds"] in ("previous", "move")
        assert len(state["lrs"]) == len(LRS)
        assert all(type(lr) in (int, float) and abs(lr) < float("inf") for lr in state["lrs"])
        assert sorted([*state["weights"], *state["still"]]) == sorted(params)
        for name, tensor in state["weights"].items():
            assert tensor.shape == params[name].shape
            assert tensor.dtype == params[name].dtype
            assert tensor.isfinite().all()
    for tensor in state.get("steps", {}).values():
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
    fresh = Run(run.predictor.config, steps=1).predictor.state_dict().get("steps", {})
    if "steps" in state:
        assert {k: t.shape for k, t in state["steps"].items()} == {k: t.shape for k, t in fresh.items()}
    true = {name: p.clone() for name, p in run.model.state_dict().items()}
    run.predictor.predict()
    run.predictor.restore()
    assert all(torch.equal(p, true[name]) for name, p in run.model.state_dict().items())


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)


# ---- damages by name ----


@pytest.mark.parametrize("open_window", [False, True])
def test_what_was_written_is_taken_up(tmp_path: Path, config: XGradConfig, open_window: bool) -> None:
    source = Run(config, open_window=open_window)
    write_state(source.predictor.state_dict(), str(tmp_path))
    run = Run(config, steps=2)
    assert load_state(run.predictor, str(tmp_path)) >= run.predictor.remembers
    ours, theirs = source.predictor.state_dict(), run.predictor.state_dict()
    for part in ("weights", "steps"):
        pairs = ours.pop(part, {}), theirs.pop(part, {})
        assert pairs[0].keys() == pairs[1].keys()
        assert all(torch.equal(tensor, pairs[1][name]) for name, tensor in pairs[0].items())
    assert ours == theirs


@pytest.mark.parametrize("name", ["last_update", "auto-last_update"])
def test_what_has_no_list_of_weights_that_stand_still_is_taken_up(tmp_path: Path, name: str) -> None:
    """As older versions wrote it, which knew only of weights that move."""
    data = written(tmp_path, CONFIGS[name])
    assert header_of(data)["__metadata__"]["still"] == "[]"
    (tmp_path / FILE).write_bytes(rewritten(data, lambda t, m: m.pop("still")))
    old, new = Run(CONFIGS[name], steps=2), Run(CONFIGS[name], steps=2)
    load_state(old.predictor, str(tmp_path))
    (tmp_path / FILE).write_bytes(data)
    load_state(new.predictor, str(tmp_path))
    assert old.everything() == new.everything()


def test_weights_that_stand_still_are_named_not_written(tmp_path: Path) -> None:
    """Those of a group whose learning rate is 0, in an open window, and a weight that was frozen."""
    source = Run(CONFIGS["last_update"])
    source.optimizer.param_groups[0]["lr"] = 0.0
    source.model[1].weight.requires_grad_(False)
    source.forward_and_backward()
    write_state(source.predictor.state_dict(), str(tmp_path))
    data = (tmp_path / FILE).read_bytes()
    assert json.loads(header_of(data)["__metadata__"]["still"]) == ["0.0", "0.1", "1.0"]
    assert set(load(data)) == {"1.1"}
    run = Run(CONFIGS["last_update"], steps=2)
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.model.load_state_dict(source.model.state_dict())
    run.model[1].weight.requires_grad_(False)
    load_state(run.predictor, str(tmp_path))
    seen = []
    for predictor, model in ((source.predictor, source.model), (run.predictor, run.model)):
        with predictor.predicted():
            seen.append([p.detach().clone() for p in model.parameters()])
    true = list(source.model.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*seen, strict=True))
    moved = [not torch.equal(ours, w) for ours, w in zip(seen[0], true, strict=True)]
    assert moved == [p is source.model.scale for p in true]


def rewritten(data: bytes, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> bytes:
    tensors, metadata = dict(load(data)), dict(header_of(data).get("__metadata__", {}))
    change(tensors, metadata)
    return save(tensors, metadata or None)


def header_of(data: bytes) -> dict[str, Any]:
    return dict(json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]))


def with_header(data: bytes, header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data[8 + struct.unpack("<Q", data[:8])[0] :]


def to(value: float, name: str = "0.0") -> Callable[[dict[str, Tensor], Any], None]:
    def change(tensors: dict[str, Tensor], metadata: Any) -> None:
        tensors[name].view(-1)[-1] = value

    return change


def put(**metadata: str) -> Callable[[Any, dict[str, str]], None]:
    return lambda tensors, own: own.update(metadata)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "shape": (lambda t, m: t.update({"0.0": torch.zeros(3, 5)}), "shape"),
    "transposed": (lambda t, m: t.update({"0.0": t["0.0"].t().contiguous()}), "shape"),
    "scalar": (lambda t, m: t.update({"0.1": torch.zeros(())}), "shape"),
    "empty": (lambda t, m: t.update({"0.1": torch.zeros(0)}), "shape"),
    "half": (lambda t, m: t.update({"0.0": t["0.0"].half()}), "type"),
    "double": (lambda t, m: t.update({"0.0": t["0.0"].double()}), "type"),
    "whole-numbers": (lambda t, m: t.update({"0.0": t["0.0"].long()}), "type"),
    "full-precision": (lambda t, m: t.update({"1.1": t["1.1"].float()}), "type"),
    "float8": (lambda t, m: t.update({"0.0": t["0.0"].to(torch.float8_e4m3fn)}), "type"),
    "nan": (to(float("nan")), "NaN or infinity"),
    "inf": (to(float("-inf"), "0.1"), "NaN or infinity"),
    "nan-in-bf16": (to(float("nan"), "1.1"), "NaN or infinity"),
    "missing": (lambda t, m: t.pop("1.0"), "lacks the weights"),
    "unknown": (lambda t, m: t.update({"0.7": torch.zeros(1)}), "does not have"),
    "unnamed": (lambda t, m: t.update({"": torch.zeros(1)}), "does not have"),
    "no-metadata": (lambda t, m: m.clear(), "metadata"),
    "no-holds": (lambda t, m: m.pop("holds"), "metadata"),
    "no-lrs": (lambda t, m: m.pop("lrs"), "metadata"),
    "more-metadata": (put(format="pt"), "metadata"),
    "holds": (put(holds="future"), "holds"),
    "holds-nothing": (put(holds="nothing"), "holds"),
    "holds-true": (put(holds="true"), "holds"),
    "holds-predicted": (put(holds="predicted"), "holds"),
    "still-not-json": (put(still='["0.0",'), "cannot be used"),
    "still-empty": (put(still=""), "cannot be used"),
    "still-deep": (put(still="[" * 100_000), "cannot be used"),
    "still-object": (put(still='{"0.0": "0.1"}'), "names of weights"),
    "still-text": (put(still='"0.0"'), "names of weights"),
    "still-numbers": (put(still="[0.0, 0.1]"), "names of weights"),
    "still-null": (put(still="null"), "names of weights"),
    "still-unknown": (put(still='["0.0", "0.7"]'), "does not have"),
    "lrs-not-json": (put(lrs="[0.1,"), "cannot be used"),
    "lrs-empty": (put(lrs=""), "cannot be used"),
    "lrs-deep": (put(lrs="[" * 100_000), "cannot be used"),
    "lrs-object": (put(lrs='{"0": 0.1, "1": 0.1}'), "learning rates"),
    "lrs-number": (put(lrs="0.1"), "learning rates"),
    "lrs-texts": (put(lrs='["0.1", "0.1"]'), "learning rates"),
    "lrs-truths": (put(lrs="[true, false]"), "learning rates"),
    "lrs-lists": (put(lrs="[[0.1], [0.1]]"), "learning rates"),
    "lrs-nan": (put(lrs="[NaN, 0.1]"), "learning rates"),
    "lrs-inf": (put(lrs="[0.1, -Infinity]"), "learning rates"),
    "lrs-too-large": (put(lrs=f"[0.1, 1{'0' * 400}]"), "learning rates"),
    "lrs-null": (put(lrs="[0.1, null]"), "learning rates"),
    "lrs-fewer": (put(lrs="[0.1]"), "1 parameter groups"),
    "lrs-more": (put(lrs="[0.1, 0.1, 0.1]"), "3 parameter groups"),
}
DAMAGES_OF_STEPS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "shape": (lambda t, m: t.update({"steps.0.trace": torch.zeros(5)}), "shape"),
    "sums": (lambda t, m: t.update({"steps.1.sums": torch.zeros(2)}), "shape"),
    "type": (lambda t, m: t.update({"steps.0.sums": t["steps.0.sums"].double()}), "type"),
    "nan": (to(float("nan"), "steps.0.sums"), "NaN or infinity"),
    "inf": (to(float("inf"), "steps.1.trace"), "NaN or infinity"),
    "missing": (lambda t, m: t.pop("steps.0.trace"), "lacks"),
    "missing-group": (lambda t, m: (t.pop("steps.1.trace"), t.pop("steps.1.sums")), "lacks"),
    "unknown": (lambda t, m: t.update({"steps.2.sums": torch.zeros(3)}), "no group"),
    "unnamed": (lambda t, m: t.update({"steps.": torch.zeros(3)}), "no group"),
}


def check_damage(folder: Path, config: XGradConfig, change: Callable[..., Any], reason: str) -> None:
    data = written(folder, config)
    assert check(folder, config, data)
    data = rewritten(data, change)
    assert not check(folder, config, data)
    (folder / FILE).write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        load_state(Run(config).predictor, str(folder))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["last_update", "auto-last_update"])
def test_a_malformed_last_update_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    """Under "auto", too, whose own part is whole: it must not be taken up alone."""
    check_damage(tmp_path, CONFIGS[name], *DAMAGES[damage])


@pytest.mark.parametrize("damage", DAMAGES_OF_STEPS)
@pytest.mark.parametrize("name", ["auto", "auto-last_update"])
def test_a_malformed_automatic_s_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    check_damage(tmp_path, CONFIGS[name], *DAMAGES_OF_STEPS[damage])


@pytest.mark.parametrize("holds_both", [True, False])
def test_a_diverged_run_goes_on_as_it_was(tmp_path: Path, holds_both: bool) -> None:
    """NaN and infinity are remembered where the weight itself is such; only then is a memory of them no damage."""
    config = CONFIGS["last_update"]
    source, target = Run(config), Run(config)
    for run in (source, target):
        with torch.no_grad():
            run.model[0].weight[0] = float("inf")
            run.model[0].bias[1] = float("nan")
    weights = kept_weights(source.predictor)
    weights[source.model[0].weight][0] = float("nan")
    weights[source.model[0].bias][1 if holds_both else 0] = float("-inf")
    write_state(source.predictor.state_dict(), str(tmp_path))
    if not holds_both:
        with pytest.raises(ValueError, match=r"0\.1 of state_dict holds NaN or infinity"):
            load_state(target.predictor, str(tmp_path))
        return
    load_state(target.predictor, str(tmp_path))
    for p, q in zip(source.model.parameters(), target.model.parameters(), strict=True):
        assert torch.equal(weights[p].nan_to_num(7.0), kept_weights(target.predictor)[q].nan_to_num(7.0))


# ---- fuzzing ----

FAST = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
SLOW = settings(FAST, max_examples=4000)

TENSOR_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
NAMES = st.one_of(
    st.sampled_from(["0.0", "0.1", "1.0", "1.1", "steps.0.trace", "steps.0.sums", "steps.1.trace", "steps.1.sums"]),
    st.text(max_size=8),
    st.builds("{}.{}".format, st.integers(-1, 3), st.integers(-1, 3)),
)
SHAPES = st.one_of(
    st.sampled_from([(4, 3), (4,), (2, 4), (), (3,), (16,), (9,)]), st.lists(st.integers(0, 5), max_size=3).map(tuple)
)
NUMBERS = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0, 3e38, 1e-45]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
LEARNING_RATES = st.one_of(
    st.lists(st.floats() | st.integers() | st.none(), max_size=3).map(json.dumps), JSON.map(json.dumps), st.text()
)
STILL = st.one_of(st.lists(NAMES, max_size=5).map(json.dumps), JSON.map(json.dumps), st.text())
METADATA = st.one_of(
    st.fixed_dictionaries(
        {"holds": st.sampled_from(["previous", "move", "predicted", "nothing", ""]), "lrs": LEARNING_RATES},
        optional={"still": STILL},
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    tensor = torch.full(draw(SHAPES), draw(NUMBERS), dtype=torch.float64)
    kind = draw(st.sampled_from(TENSOR_TYPES))
    return tensor.to(kind) if kind.is_floating_point else tensor.nan_to_num().clamp(0, 9).to(kind)


@st.composite
def flipped(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes changed, anywhere, but more often in the header than its size alone would have it."""
    changed = bytearray(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, header - 1) | st.integers(0, len(data) - 1))
        changed[at] = draw(st.integers(0, 255) | st.sampled_from(list(b'"[]{},:0123456789F')))
    return bytes(changed)


@st.composite
def resized(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut off, something cut out, or something put in."""
    start, end = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    return data[:start] + draw(st.binary(max_size=16)) + data[end:]


@st.composite
def of_another_header(draw: st.DrawFn, data: bytes) -> bytes:
    """Entries of the header changed, dropped, copied, exchanged, or added."""
    header = header_of(data)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*header, "__metadata__", "new"]))
        match draw(st.sampled_from(["value", "field", "drop", "copy", "exchange", "metadata"])):
            case "value":
                header[name] = draw(JSON)
            case "field" if isinstance(header.get(name), dict):
                field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "holds", "lrs", "still", "more"]))
                kinds = st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "F4", "?"])
                header[name][field] = draw(
                    JSON | kinds | st.lists(st.integers(0, len(data)), max_size=3) | LEARNING_RATES | STILL
                )
            case "drop":
                header.pop(name, None)
            case "copy":
                header[draw(NAMES)] = header.get(name)
            case "exchange":
                other = draw(st.sampled_from([*header, "new"]))
                header[name], header[other] = header.get(other), header.get(name)
            case "metadata":
                header["__metadata__"] = draw(METADATA)
            case _:
                pass
    return with_header(data, json.dumps(header).encode())


@st.composite
def rebuilt(draw: st.DrawFn, data: bytes) -> bytes:
    """A good safetensors file, of tensors and metadata that are another's."""

    def change(own: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if draw(st.booleans()):
            own.clear()
        own.update(draw(st.dictionaries(NAMES, tensors(), max_size=4)))
        if own and draw(st.booleans()):
            own[draw(st.sampled_from(sorted(own)))].view(-1)[:1] = draw(st.sampled_from([0.0, 1.0]))
        if draw(st.booleans()):
            metadata.clear()
            metadata.update(draw(METADATA))

    return rewritten(data, change)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(flipped(data), resized(data), of_another_header(data), rebuilt(data), st.binary(max_size=200))


def fuzz(folder: Path, config: XGradConfig, profile: settings) -> tuple[int, int]:
    """Numbers of files that were taken up and refused."""
    counts = {True: 0, False: 0}
    data = written(folder, config, open_window=True)

    @profile
    @given(damaged(data))
    def one(file: bytes) -> None:
        counts[check(folder, config, file)] += 1

    one()
    return counts[True], counts[False]


def test_fuzzed_files_are_refused_or_right(tmp_path: Path, config: XGradConfig) -> None:
    taken, refused = fuzz(tmp_path, config, FAST)
    assert taken + refused >= FAST.max_examples
    assert refused > 10
    assert taken > 0, "damage to the numbers alone cannot be told"


@pytest.mark.slow
def test_thousands_of_fuzzed_files_are_refused_or_right(tmp_path: Path, config: XGradConfig) -> None:
    taken, refused = fuzz(tmp_path, config, SLOW)
    print(f"\n{taken + refused} files: {taken} taken up, {refused} refused")
    assert taken + refused >= SLOW.max_examples
