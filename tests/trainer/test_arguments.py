"""XGradConfig and the classes of training arguments: parsing, copying, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments
from transformers.training_args import OptimizerNames

import tiny_models as tiny
from hf_xgrad import XGradConfig, XGradSeq2SeqTrainingArguments, XGradTrainer, XGradTrainingArguments
from hf_xgrad.trainer.arguments import EXTRA_OPTIMIZERS

CLASSES = [XGradTrainingArguments, XGradSeq2SeqTrainingArguments]
classes = pytest.mark.parametrize("cls", CLASSES)
OPTIMIZERS = ["adamw_torch_fused", "adafactor", *EXTRA_OPTIMIZERS]


def parse(cls: Any, folder: Path, *flags: str) -> Any:
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", str(folder), "--use_cpu", *flags])
    return args


# ---- defaults and parsing ----


@classes
def test_defaults(tmp_path: Path, cls: Any) -> None:
    args = cls(output_dir=str(tmp_path), use_cpu=True)
    assert XGradConfig.from_args(args) == XGradConfig() == XGradConfig(True, "default", "auto", False)
    assert parse(cls, tmp_path).to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(XGradTrainingArguments, TrainingArguments), (XGradSeq2SeqTrainingArguments, Seq2SeqTrainingArguments)],
)
def test_everything_else_is_as_in_transformers(tmp_path: Path, ours: Any, theirs: Any) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "learning_rate": 3e-4, "warmup_steps": 7}
    mine, plain = ours(**settings).to_dict(), theirs(**settings).to_dict()
    extra = {"xgrad": True, "xgrad_steps": "default", "xgrad_rule": "auto", "xgrad_weight_decay": False}
    assert issubclass(ours, theirs)
    # The folder of logs has the time in its name.
    assert {**mine, "logging_dir": None} == {**plain, **extra, "logging_dir": None}


@classes
def test_flags(tmp_path: Path, cls: Any) -> None:
    flags = "--xgrad_steps 2 --no_xgrad --xgrad_rule last_update --xgrad_weight_decay --optim adam3"
    args = parse(cls, tmp_path, *flags.split())
    assert XGradConfig.from_args(args) == XGradConfig(False, 2.0, "last_update", True)
    assert isinstance(args.xgrad_steps, float)
    assert args.optim == "adam3"


@pytest.mark.parametrize(
    ("flags", "enabled"),
    [("", True), ("--xgrad", True), ("--xgrad true", True), ("--xgrad false", False), ("--no_xgrad", False)],
)
def test_the_switch(tmp_path: Path, flags: str, enabled: bool) -> None:
    assert parse(XGradTrainingArguments, tmp_path, *flags.split()).xgrad is enabled


@classes
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_is_a_flag(tmp_path: Path, cls: Any, optim: str) -> None:
    assert parse(cls, tmp_path, "--optim", optim).optim == optim


@classes
def test_config_files(tmp_path: Path, cls: Any) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "xgrad_steps": 3, "optim": "nadam", "xgrad": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (args,) = HfArgumentParser(cls).parse_json_file(str(tmp_path / "config.json"))
    assert (args.xgrad_steps, args.optim, args.xgrad) == (3, "nadam", False)


def test_optim_keeps_the_type_that_transformers_gives_it(tmp_path: Path) -> None:
    """An enum member for names of Transformers (code compares with those), a string for ours."""
    for given in ("adafactor", OptimizerNames.ADAFACTOR):
        args = XGradTrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=given)
        assert args.optim is OptimizerNames.ADAFACTOR
    assert type(XGradTrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="adam").optim) is str


def test_plain_arguments_give_the_default_config(tmp_path: Path) -> None:
    assert XGradConfig.from_args(TrainingArguments(output_dir=str(tmp_path), use_cpu=True)) == XGradConfig()


# ---- copies ----


def through_json(args: Any) -> Any:
    """What a config file made from `to_json_string` gives: only the settings that a user may set."""
    stored = json.loads(args.to_json_string())
    return type(args)(**{name: stored[name] for name in ("output_dir", "use_cpu", *CHANGED, "optim")})


CHANGED = {"xgrad": False, "xgrad_steps": 2.5, "xgrad_rule": "last_update", "xgrad_weight_decay": True}
COPIES = {
    "replace": lambda args: dataclasses.replace(args),
    "pickle": lambda args: pickle.loads(pickle.dumps(args)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "json": through_json,
}


@classes
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_copies_keep_every_setting(tmp_path: Path, cls: Any, how: str, optim: str) -> None:
    args = cls(output_dir=str(tmp_path), use_cpu=True, optim=optim, **CHANGED)
    twin = COPIES[how](args)
    assert type(twin) is cls
    assert twin.optim == optim
    assert type(twin.optim) is type(args.optim)
    assert twin.adam_epsilon == args.adam_epsilon
    assert {name: getattr(twin, name) for name in CHANGED} == CHANGED
    assert twin.to_dict()["optim"] == optim
    assert json.loads(twin.to_json_string())["optim"] == optim
    assert XGradConfig.from_args(twin) == XGradConfig.from_args(args)


@classes
@pytest.mark.parametrize("optim", ["adam3", "adabelief"])
def test_replacing_the_optimizer_forgets_the_epsilon_of_the_old(tmp_path: Path, cls: Any, optim: str) -> None:
    args = cls(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    assert dataclasses.replace(args, optim="adamw_torch").adam_epsilon == 1e-8


def test_replace_checks_again(tmp_path: Path) -> None:
    args = XGradTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="xgrad_steps"):
        dataclasses.replace(args, xgrad_steps=-1.0)


def test_saved_arguments_load(tmp_path: Path) -> None:
    """`training_args.bin`, which every checkpoint has."""
    args = tiny.arguments(tmp_path, XGradTrainingArguments, optim="adam3", xgrad_steps=2.0)
    trainer = XGradTrainer(model=tiny.bert(), args=args)
    trainer.save_model()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (type(loaded), loaded.optim, loaded.xgrad_steps) == (XGradTrainingArguments, "adam3", 2.0)


# ---- what is refused ----

BAD_STEPS = [(-1.0, ValueError), (-1e-9, ValueError), (math.nan, ValueError), (math.inf, ValueError)]
BAD_STEPS += [(-math.inf, ValueError), (None, TypeError), (True, TypeError), ([1.0], TypeError)]
BAD_STEPS += [("Auto", ValueError), ("", ValueError), ("two", ValueError)]


@pytest.mark.parametrize(("steps", "kind"), BAD_STEPS, ids=str)
def test_bad_steps(tmp_path: Path, steps: Any, kind: type[Exception]) -> None:
    for make in (
        lambda: XGradConfig(steps=steps),
        lambda: XGradTrainingArguments(output_dir=str(tmp_path), use_cpu=True, xgrad_steps=steps),
        lambda: XGradSeq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, xgrad_steps=steps),
        # Not even where it would not be used.
        lambda: XGradConfig(enabled=False, steps=steps),
    ):
        with pytest.raises(kind, match="xgrad_steps") as error:
            make()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["-1", "nan", "inf", "many", "AUTO"])
def test_bad_steps_as_flags(tmp_path: Path, flag: str) -> None:
    with pytest.raises(ValueError, match="xgrad_steps"):
        parse(XGradTrainingArguments, tmp_path, f"--xgrad_steps={flag}")


@pytest.mark.parametrize("steps", [0, 0.0, 1, 0.5, 1e6, "auto"])
def test_good_steps(steps: float | str) -> None:
    assert XGradConfig(steps=steps).steps == steps


@classes
@pytest.mark.parametrize(("flag", "steps"), [("auto", "auto"), ("2", 2.0), ("1e-1", 0.1), ("0", 0.0)])
def test_steps_as_flags(tmp_path: Path, cls: Any, flag: str, steps: float | str) -> None:
    args = parse(cls, tmp_path, "--xgrad_steps", flag)
    assert (args.xgrad_steps, type(args.xgrad_steps)) == (steps, type(steps))
    assert XGradConfig.from_args(args).active == (steps != 0)


def test_a_search_may_set_a_number_where_auto_was(tmp_path: Path) -> None:
    """It converts the value to the type that the field has at the time."""
    args = XGradTrainingArguments(output_dir=str(tmp_path), use_cpu=True, xgrad_steps="auto")
    args.xgrad_steps = type(args.xgrad_steps)(2.0)
    assert XGradConfig.from_args(args).steps == 2.0


@pytest.mark.parametrize("rule", ["closed-form", "AUTO", "", None])
def test_unknown_rule(tmp_path: Path, rule: Any) -> None:
    for make in (
        lambda: XGradConfig(rule=rule),
        lambda: XGradTrainingArguments(output_dir=str(tmp_path), use_cpu=True, xgrad_rule=rule),
    ):
        with pytest.raises(ValueError, match="xgrad_rule") as error:
            make()
        for known in ("auto", "closed_form", "last_update"):
            assert known in str(error.value)


@classes
@pytest.mark.parametrize(
    ("optim", "close"), [("adamw_torh", "adamw_torch"), ("adabelif", "adabelief"), ("adamm3", "adam3"), ("zzz", None)]
)
def test_unknown_optimizer(tmp_path: Path, cls: Any, optim: str, close: str | None) -> None:
    with pytest.raises(ValueError) as error:
        cls(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    message = str(error.value)
    assert repr(optim) in message
    assert "\n" not in message
    if close is None:
        assert "Did you mean" not in message
    else:
        assert close in message.split("Did you mean")[1].split("?")[0]
    for known in ("adamw_torch", "adafactor", *EXTRA_OPTIMIZERS):
        assert known in message


def test_config_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        XGradConfig().steps = 2.0  # type: ignore[misc]
