"""Which optimizers the Trainer makes, with which settings, and which it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import Trainer

import tiny_models as tiny
from hf_xgrad import XGradConfig, XGradTrainer, XGradTrainingArguments
from hf_xgrad.optim import AdaM3

EXTRA = ["adam", "adabelief", "adam3", "nadam", "radam"]
SMALL_EPSILON = ["adabelief", "adam3"]


def optimizer_class(name: str) -> Any:
    if name == "adabelief":
        return pytest.importorskip("pytorch_optimizer").AdaBelief
    return {"adam": torch.optim.Adam, "adam3": AdaM3, "nadam": torch.optim.NAdam, "radam": torch.optim.RAdam}[name]


def make(folder: Path, *, optimizers: Any = (None, None), given: Any = None, **settings: Any) -> XGradTrainer:
    return XGradTrainer(
        model=tiny.bert(),
        args=tiny.arguments(folder, XGradTrainingArguments, **settings),
        train_dataset=tiny.Sentences(),
        optimizers=optimizers,
        optimizer_cls_and_kwargs=given,
    )


def made(folder: Path, **settings: Any) -> Any:
    """The optimizer that a trainer with these settings makes."""
    return make(folder, **settings).create_optimizer()


# ---- optimizers beside those of Transformers ----


@pytest.mark.parametrize("name", EXTRA)
def test_class_and_settings(tmp_path: Path, name: str) -> None:
    cls = optimizer_class(name)
    optimizer = made(
        tmp_path, optim=name, learning_rate=3e-3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5, weight_decay=0.1
    )
    assert type(optimizer) is cls
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim < 2 for p in vectors["params"])
    for group in optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (3e-3, (0.8, 0.95), 1e-5)


@pytest.mark.parametrize("name", EXTRA)
def test_epsilon(tmp_path: Path, name: str) -> None:
    """By default that of the optimizer's authors; `adam_epsilon` where changed; `optim_args` over both."""
    optimizer_class(name)
    default = 1e-16 if name in SMALL_EPSILON else 1e-8
    for settings, eps in (
        ({}, default),
        ({"adam_epsilon": 1e-6}, 1e-6),
        ({"optim_args": "eps=1e-4"}, 1e-4),
        ({"optim_args": "eps=1e-4", "adam_epsilon": 1e-6}, 1e-4),
        ({"optim_args": "eps=1e-8"}, 1e-8),
    ):
        assert made(tmp_path, optim=name, **settings).defaults["eps"] == eps, settings


@pytest.mark.parametrize(
    ("name", "optim_args", "expected"),
    [
        ("adam", "amsgrad=true", {"amsgrad": True}),
        ("adam", "amsgrad=True, foreach=false", {"amsgrad": True, "foreach": False}),
        ("adam", "amsgrad=1,maximize=0,foreach=None", {"amsgrad": True, "maximize": False, "foreach": None}),
        ("adam", "decoupled_weight_decay=true", {"decoupled_weight_decay": True}),
        ("adam3", "eps=1e-10,maximize=true", {"eps": 1e-10, "maximize": True}),
        ("adabelief", "weight_decouple=false,n_sma_threshold=4", {"weight_decouple": False}),
        ("adabelief", "ams_bound=true", {"ams_bound": True}),
        ("nadam", "momentum_decay=0.01,decoupled_weight_decay=true", {"momentum_decay": 0.01}),
        ("radam", "decoupled_weight_decay=true", {"decoupled_weight_decay": True}),
        ("adam", "", {}),
        ("adam", "amsgrad=true,", {"amsgrad": True}),
    ],
)
def test_optim_args(tmp_path: Path, name: str, optim_args: str, expected: dict[str, Any]) -> None:
    optimizer_class(name)
    defaults = made(tmp_path, optim=name, optim_args=optim_args).defaults
    for key, value in expected.items():
        assert (defaults[key], type(defaults[key])) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "optim_args", "culprit"),
    [
        ("adam", "amsgard=true", "amsgard"),
        ("adam", "amsgrad=maybe", "maybe"),
        ("adam", "eps=small", "small"),
        ("adam", "eps=", "eps"),
        ("adam", "eps", "eps"),
        ("adam", "=1", "''"),
        ("adam3", "momentum_decay=0.1", "momentum_decay"),
        ("nadam", "momentum_decay=x", "momentum_decay"),
        ("adam", "params=3", "params"),
        # The Trainer sets it for each group of parameters: here it would change nothing.
        ("adam", "weight_decay=0.25", "weight_decay"),
    ],
)
def test_bad_optim_args_are_named_at_construction(tmp_path: Path, name: str, optim_args: str, culprit: str) -> None:
    with pytest.raises(ValueError) as error:
        make(tmp_path, optim=name, optim_args=optim_args)
    message = str(error.value)
    assert "optim_args" in message
    assert culprit in message
    assert "\n" not in message


def test_adabelief_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match="pip install pytorch-optimizer"):
        make(tmp_path, optim="adabelief")


@pytest.mark.parametrize("rule", ["auto", "last_update"])
@pytest.mark.parametrize("name", EXTRA)
def test_trains_on_predicted_weights(tmp_path: Path, name: str, rule: str) -> None:
    optimizer_class(name)
    trainer = make(tmp_path, optim=name, xgrad_rule=rule, xgrad_steps=1.0, max_steps=4, lr_scheduler_type="constant")
    forwards = tiny.Forwards(trainer.model)
    callback, seen = tiny.recorder(trainer.model)
    trainer.add_callback(callback)
    trainer.train()
    true = [w for event, w in seen if event == "step_begin"]
    moved = [not tiny.same(a, b) for a, b in zip(forwards.weights, true, strict=True)]
    assert moved == [False, True, True, True]
    assert tiny.changes(seen) == {"optimizer_step"}
    # Ahead, not back: the move and the update that was then made point the same way.
    assert trainer.state.log_history[2]["xgrad/cosine"] > 0
    assert all(torch.isfinite(w).all() for w in true[-1].values())


@pytest.mark.parametrize("name", EXTRA)
def test_switched_off_equals_the_plain_trainer_with_that_optimizer(tmp_path: Path, name: str) -> None:
    """`--optim` alone changes nothing: the plain Trainer, given the class, comes to the same weights."""
    cls = optimizer_class(name)
    eps = 1e-16 if name in SMALL_EPSILON else 1e-8
    finals = []
    for settings in ({"xgrad_steps": 0}, {"xgrad": False}):
        trainer = make(tmp_path, optim=name, weight_decay=0.1, **settings)
        trainer.train()
        finals.append(tiny.weights(trainer.model))
    plain = Trainer(
        model=tiny.bert(),
        args=tiny.arguments(tmp_path, weight_decay=0.1),
        train_dataset=tiny.Sentences(),
        optimizer_cls_and_kwargs=(cls, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": eps}),
    )
    plain.train()
    finals.append(tiny.weights(plain.model))
    assert tiny.same(finals[0], finals[2])
    assert tiny.same(finals[1], finals[2])


# ---- refusals ----

# How the text says what to do about it.
WAY_OUT = "xgrad=False"


class FusedBackward(torch.optim.SGD):
    """Looks like LOMO: updates inside backward."""

    def fused_backward(self, loss: Any, lr: float) -> None:
        raise NotImplementedError


class Switching(torch.optim.SGD):
    """Looks like Schedule-Free: weights differ between training and evaluation."""

    def train(self) -> None:
        pass

    def eval(self) -> None:
        pass


class LayerWise(torch.optim.SGD):
    """Looks like what Transformers makes for layer-wise GaLore and APOLLO."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.optimizer_dict: dict[Any, Any] = {}


REFUSED_NAMES = [
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
]


@pytest.mark.parametrize("rule", ["auto", "last_update", "closed_form"])
@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_refused_by_name_without_the_package(tmp_path: Path, name: str, rule: str) -> None:
    with pytest.raises(ValueError) as error:
        make(tmp_path, optim=name, xgrad_rule=rule)
    message = str(error.value)
    assert name in message
    assert WAY_OUT in message
    assert ("inside backward" in message) != ("extrapolated" in message)
    assert "\n" not in message


@pytest.mark.parametrize("off", [{"xgrad": False}, {"xgrad_steps": 0}], ids=str)
@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_no_name_is_refused_when_switched_off(tmp_path: Path, name: str, off: dict[str, Any]) -> None:
    make(tmp_path, optim=name, **off)


@pytest.mark.parametrize("off", [{"xgrad": False}, {"xgrad_steps": 0}, None], ids=str)
@pytest.mark.parametrize("how", ["instance", "class"])
@pytest.mark.parametrize("cls", [FusedBackward, Switching, LayerWise])
def test_refused_by_what_the_optimizer_offers(tmp_path: Path, cls: Any, how: str, off: dict[str, Any] | None) -> None:
    def build(**settings: Any) -> XGradTrainer:
        if how == "class":
            return make(tmp_path, given=(cls, {"lr": 0.1}), **settings)
        model = tiny.bert()
        args = tiny.arguments(tmp_path, XGradTrainingArguments, **settings)
        optimizer = cls(model.parameters(), lr=0.1)
        return XGradTrainer(model=model, args=args, train_dataset=tiny.Sentences(), optimizers=(optimizer, None))

    if off is not None:
        build(**off)
        return
    # A class shows what its instances offer only where that is a method.
    if how == "class" and cls is LayerWise:
        trainer = build()
        with pytest.raises(ValueError, match=cls.__name__):
            trainer.train()
        return
    with pytest.raises(ValueError) as error:
        build()
    assert cls.__name__ in str(error.value)
    assert WAY_OUT in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{"given": (torch.optim.AdamW, {"differentiable": True})}, {"optim": "adam", "optim_args": "differentiable=true"}],
    ids=str,
)
def test_settings_are_refused_before_the_optimizer_is_made(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"differentiable.*{WAY_OUT}"):
        make(tmp_path, **settings)
    make(tmp_path, xgrad=False, **settings)


NO_CLOSED_FORM = [
    pytest.param({"optim": "adafactor"}, "Adafactor", id="adafactor"),
    pytest.param({"optim": "sgd"}, "momentum", id="sgd"),
    pytest.param({"optim": "sgd", "optim_args": "momentum=0.9,nesterov=True"}, "Nesterov", id="nesterov"),
    pytest.param({"optim": "adagrad"}, "Adagrad", id="adagrad"),
    pytest.param({"optim": "rmsprop"}, "RMSprop", id="rmsprop"),
    pytest.param({"given": (torch.optim.Adadelta, {"lr": 1e-2})}, "Adadelta", id="given-class"),
    pytest.param({"given": (torch.optim.SGD, {"lr": 1e-2})}, "momentum", id="given-sgd"),
]


@pytest.mark.parametrize(("settings", "culprit"), NO_CLOSED_FORM)
def test_a_closed_form_that_there_is_not(tmp_path: Path, settings: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValueError) as error:
        make(tmp_path, xgrad_rule="closed_form", **settings)
    message = str(error.value)
    assert culprit in message
    assert "closed_form" in message
    assert "auto" in message
    assert "\n" not in message
    make(tmp_path, xgrad_rule="closed_form", xgrad=False, **settings)
    make(tmp_path, xgrad_rule="closed_form", xgrad_steps=0, **settings)
    make(tmp_path, xgrad_rule="auto", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adam"},
        {"optim": "adam3"},
        {"optim": "nadam"},
        {"optim": "radam"},
        {"optim": "rmsprop", "optim_args": "momentum=0.9"},
        {"optim": "stable_adamw"},
        {"optim": "paged_adamw_32bit"},
        {"optim": "galore_adamw", "optim_target_modules": ["query"]},
        {"given": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5})},
    ],
    ids=str,
)
def test_a_closed_form_that_there_is(tmp_path: Path, settings: dict[str, Any]) -> None:
    library = {"stable_adamw": "optimi", "paged_adamw_32bit": "bitsandbytes", "galore_adamw": "galore_torch"}
    if settings.get("optim") in library:
        pytest.importorskip(library[settings["optim"]], reason="of an optional library")
    trainer = make(tmp_path, xgrad_rule="closed_form", max_steps=3, **settings)
    forwards = tiny.Forwards(trainer.model)
    callback, true = tiny.recorder(trainer.model, "step_begin")
    trainer.add_callback(callback)
    trainer.train()
    moved = [not tiny.same(seen, w) for seen, (_, w) in zip(forwards.weights, true, strict=True)]
    assert moved == [False, True, True]


def test_a_closed_form_is_asked_of_the_given_optimizer(tmp_path: Path) -> None:
    model = tiny.bert()
    args = tiny.arguments(tmp_path)
    config = XGradConfig(rule="closed_form")
    with pytest.raises(ValueError, match="closed_form"):
        XGradTrainer(
            model=model, args=args, optimizers=(torch.optim.Adadelta(model.parameters()), None), xgrad_config=config
        )
    XGradTrainer(model=model, args=args, optimizers=(torch.optim.AdamW(model.parameters()), None), xgrad_config=config)


@pytest.mark.parametrize("kind", [DistributedType.MEGATRON_LM, DistributedType.XLA])
def test_engines_with_loops_of_their_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError) as error:
        make(tmp_path)
    assert kind.value in str(error.value)
    assert WAY_OUT in str(error.value)
    make(tmp_path, xgrad=False)
    make(tmp_path, xgrad_steps=0)


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP])
def test_other_engines_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    make(tmp_path)


def test_deepspeed_does_not_search_for_a_batch_size(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.is_deepspeed_enabled = trainer.args.auto_find_batch_size = True
    with pytest.raises(ValueError, match="auto_find_batch_size") as error:
        trainer.set_up_xgrad(None)
    assert WAY_OUT in str(error.value)


def test_a_users_own_optimizer_class_follows_its_last_update(tmp_path: Path) -> None:
    """`optimizer_cls_and_kwargs` with a class that has no closed form: the last-update rule, exactly."""
    trainer = make(tmp_path, given=(torch.optim.Adadelta, {"lr": 1e-2}), lr_scheduler_type="constant", xgrad_steps=2.0)
    forwards = tiny.Forwards(trainer.model)
    callback, true = tiny.recorder(trainer.model, "step_begin")
    trainer.add_callback(callback)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.Adadelta
    for t in range(1, 6):
        now, before = true[t][1], true[t - 1][1]
        expected = {name: now[name] + 2.0 * (now[name] - before[name]) for name in now}
        assert tiny.same(forwards.weights[t], expected)


def test_an_optimizer_instance_is_used_as_it_is(tmp_path: Path) -> None:
    """With groups of its own, one of them with another learning rate: each is predicted at its own."""
    model = tiny.bert().double()
    head = list(model.classifier.parameters())
    body = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
    optimizer = torch.optim.SGD([{"params": head, "lr": 0.1}, {"params": body}], lr=0.01, momentum=0.9)
    trainer = XGradTrainer(
        model=model,
        args=tiny.arguments(tmp_path, lr_scheduler_type="constant"),
        train_dataset=tiny.Sentences(),
        optimizers=(optimizer, None),
    )
    forwards = tiny.Forwards(model)
    expected: list[dict[str, torch.Tensor]] = []

    def observe(event: str, **_: Any) -> None:
        if event == "step_begin":
            w = tiny.weights(model)
            for p, lr in [(p, 0.1) for p in head] + [(p, 0.01) for p in body]:
                if p in optimizer.state:
                    name = next(name for name, q in model.named_parameters() if q is p)
                    w[name] -= lr * optimizer.state[p]["momentum_buffer"]
            expected.append(w)

    trainer.add_callback(tiny.EveryEvent(observe))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer
    assert len(expected) == 6
    for seen, want in zip(forwards.weights, expected, strict=True):
        assert all(torch.allclose(seen[name], want[name], rtol=1e-12, atol=1e-14) for name in want)


def test_weights_that_the_optimizer_does_not_own_are_not_touched(tmp_path: Path) -> None:
    model = tiny.bert()
    owned = list(model.classifier.parameters())
    others = [p for p in model.parameters() if not any(p is q for q in owned)]
    versions = [p._version for p in others]
    trainer = XGradTrainer(
        model=model,
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.Sentences(),
        optimizers=(torch.optim.AdamW(owned, lr=1e-2), None),
    )
    trainer.train()
    assert [p._version for p in others] == versions
