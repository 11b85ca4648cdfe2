"""What cannot be right, with the cause and the way out: one table each of optimizers, weights, engines and settings.

A refusal comes when a trainer or a predictor is made, before any training time is spent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_xgrad.core.config import XGradConfig
from hf_xgrad.core.rules import form_of_group

_REQUIRES_GRAD = attrgetter("requires_grad")


def refused(what: str, reason: str, way_out: str = "Choose another optimizer") -> ValueError:
    """The error for what cannot be right."""
    return ValueError(f"XGrad: {what} is refused: {reason}. {way_out}, or switch XGrad off (xgrad=False).")


# ---- optimizers ----

IN_BACKWARD = (
    "it updates the weights inside backward, so that the predicted weights would be updated instead of the true ones"
)
_CLOSURE = "its step needs a closure, which would run forward and backward on the true weights"
_HESSIAN = (
    "its step differentiates once more through backward's graph, which belongs to the predicted weights that are gone "
    "by then"
)
_EXTRAPOLATED = "it already trains at an extrapolated point"

# Told by what an optimizer (or its class) offers, not by its name.
_BY_ATTRIBUTES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fused_backward",), IN_BACKWARD),
    (("optimizer_dict",), f"it is layer-wise: {IN_BACKWARD}"),
    (
        ("train", "eval"),
        "it switches its weights between training and evaluation, as Schedule-Free does, which already trains at an "
        "extrapolated point",
    ),
    (
        ("first_step", "second_step"),
        "it moves the weights to a point of its own between two backward passes, as SAM does, and takes the gradient "
        "there",
    ),
    (("perturb_weights",), _CLOSURE),
)
# By a setting of its groups, where that is on.
_BY_SETTING = {
    "differentiable": "differentiable=True has autograd follow the steps, which cannot follow the prediction",
    "gradient_release": IN_BACKWARD,  # of the optimi library
}
# And what shows nothing of it from outside, by "module.qualname".
_BY_CLASS = {
    "pytorch_optimizer.optimizer.adahessian.AdaHessian": _HESSIAN,
    "pytorch_optimizer.optimizer.alig.AliG": _CLOSURE,
    "pytorch_optimizer.optimizer.sophia.SophiaH": _HESSIAN,
}
# Values of `optim`.
_BY_NAME = {
    "lomo": IN_BACKWARD,
    "adalomo": IN_BACKWARD,
    "galore_adamw_layerwise": IN_BACKWARD,
    "galore_adamw_8bit_layerwise": IN_BACKWARD,
    "galore_adafactor_layerwise": IN_BACKWARD,
    "apollo_adamw_layerwise": IN_BACKWARD,
    "schedule_free_radam": _EXTRAPOLATED,
    "schedule_free_adamw": _EXTRAPOLATED,
    "schedule_free_sgd": _EXTRAPOLATED,
}


def refusal(optimizer: Optimizer | Callable[..., Any]) -> str | None:
    """Why weights cannot be predicted for `optimizer` (an instance, a class or a factory); None where they can."""
    for attributes, reason in _BY_ATTRIBUTES:
        if all(hasattr(optimizer, attribute) for attribute in attributes):
            return reason
    optimizer_class = optimizer if isinstance(optimizer, type) else type(optimizer)
    if _needs_closure(optimizer_class):
        return _CLOSURE
    reasons = [_BY_CLASS.get(f"{base.__module__}.{base.__qualname__}") for base in optimizer_class.__mro__]
    if isinstance(optimizer, Optimizer):
        reasons += [refused_setting(group) for group in getattr(optimizer, "param_groups", ())]
        # What is wrong with the optimizer inside is not mended by one around it.
        reasons += [refusal(inner) for inner in _inner_optimizers(optimizer)]
    return next(filter(None, reasons), None)


def refused_setting(settings: Mapping[str, Any]) -> str | None:
    """Why weights cannot be predicted under these settings of an optimizer; None where they can."""
    return next((reason for name, reason in _BY_SETTING.items() if settings.get(name)), None)


def check_name(name: str) -> None:
    """Raises ValueError where no prediction can be right with this value of `optim`."""
    if name in _BY_NAME:
        raise refused(f"optim={name!r}", _BY_NAME[name])


def check_optimizer(optimizer: Optimizer, config: XGradConfig) -> None:
    """Raises ValueError, with the cause and the way out, where `optimizer` cannot be predicted under `config`."""
    optimizer = unwrap_optimizer(optimizer)
    reason = refusal(optimizer) or _unreachable(optimizer)
    if reason is not None:
        raise refused(type(optimizer).__name__, reason)
    for group in optimizer.param_groups:
        for p in filter(_REQUIRES_GRAD, group["params"]):
            check_weight(p)
        form_of_group(optimizer, group, config.rule)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer behind wrappers that only pass through, such as Accelerate's.

    A wrapper passes through if its state and its groups *are* those of the optimizer inside, and its steps run no
    hooks of their own; any other steps by a rule of its own.
    """
    inner = getattr(optimizer, "optimizer", None)
    if (
        isinstance(inner, Optimizer)
        and not hasattr(optimizer, "_optimizer_step_pre_hooks")
        and inner.state is getattr(optimizer, "state", None)
        and inner.param_groups is getattr(optimizer, "param_groups", None)
    ):
        return unwrap_optimizer(inner)
    return optimizer


def _needs_closure(optimizer_class: type) -> bool:
    """Whether `step` asks for a closure, as that of LBFGS does."""
    step = getattr(optimizer_class, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step is not None else None
    return closure is not None and closure.default is inspect.Parameter.empty


def _unreachable(optimizer: Optimizer) -> str | None:
    """Why the weights that `optimizer` steps, or its steps, cannot be seen from outside; None where they can.

    Optimizers around others are the ones to look at: nothing makes them show the groups of those inside, nor their
    steps.
    """
    if not hasattr(optimizer, "param_groups"):
        return "it has no param_groups, where the weights that it steps could be found"
    shown = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for inner in _inner_optimizers(optimizer):
        if any(id(p) not in shown for group in inner.param_groups for p in group["params"]):
            return f"it steps weights of a {type(inner).__name__} inside that its own param_groups do not have"
    if not hasattr(optimizer, "_optimizer_step_pre_hooks") or not getattr(type(optimizer).step, "hooked", False):
        return (
            "its step runs no step hooks, as it never called torch.optim.Optimizer.__init__, so that no step would be "
            "noticed"
        )
    return None


def _inner_optimizers(optimizer: Optimizer) -> Iterator[Optimizer]:
    for value in vars(optimizer).values():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        yield from (item for item in inner if isinstance(item, Optimizer))


# ---- weights and models ----


def check_weight(p: Tensor) -> None:
    """Raises ValueError for weights of which no exact copy can be written back."""
    local = getattr(p, "_local_tensor", p)
    if any(base.__module__.partition(".")[0] == "torchao" for base in type(local).__mro__):
        raise refused(
            f"training of torchao's {type(local).__name__}",
            "its weights are quantised: moves are lost in them, and nothing is written back exactly",
            "Train in high precision",
        )


def check_model(model: nn.Module | None) -> None:
    """Raises ValueError for trainable weights that no prediction fits, or that their own module writes in forward."""
    if model is None:
        return
    for p in filter(_REQUIRES_GRAD, model.parameters()):
        check_weight(p)
    for name, module in model.named_modules():
        is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if is_embedding and module.max_norm is not None and module.weight.requires_grad:
            raise refused(
                f"max_norm={module.max_norm:g} of {type(module).__name__} {name!r}",
                "it rescales rows of its weight in forward, where that is predicted, and those of the true one stay",
                "Leave max_norm out (and rescale the rows after each step, in a callback)",
            )


# ---- engines and arguments of a trainer ----

_ENGINES = {
    "MEGATRON_LM": "it has a training loop of its own, which runs the optimizer's step together with forward and "
    "backward",
    "XLA": "it was never tried there",
}


def check_engine(name: str) -> None:
    """Raises ValueError for a `DistributedType` of Accelerate, by its value."""
    if name in _ENGINES:
        raise refused(name, _ENGINES[name], "Train with DDP, FSDP or DeepSpeed")


def check_fp8(backend: str | None, *, gathers_in_fp8: bool) -> None:
    """Raises ValueError for Accelerate's fp8 as it is set up.

    torchao and Transformer Engine keep the weights in high precision and cast them at each forward, predicted or not.

    Args:
        backend: "AO", "TE" or "MSAMP"; None without fp8.
        gathers_in_fp8: whether torchao's all-gather is in fp8.
    """
    if backend == "MSAMP":
        raise refused(
            "fp8 by MS-AMP",
            "it keeps the weights in 8 and 16 bits with scales of their own, which a prediction cannot write",
            "Choose torchao (ACCELERATE_FP8_BACKEND=AO)",
        )
    if backend == "AO" and gathers_in_fp8:
        raise refused(
            "fp8 by torchao with its all-gather in fp8",
            "it scales the weights by what they were after the optimizer's step, not as they are predicted",
            "Switch that off (ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER=false)",
        )


def check_generation(args: Any) -> None:
    """Raises ValueError for a generation engine that is given weights inside a training step."""
    if getattr(args, "use_vllm", False):
        raise refused(
            "use_vllm=True",
            "the vLLM engine is given the weights inside a training step, where they are predicted, and keeps serving "
            "them outside it",
            "Generate with the model itself (use_vllm=False)",
        )


# ---- DeepSpeed ----


class _Setting(NamedTuple):
    name: str  # in DeepSpeed's config, with its sections
    is_wrong: Callable[[Any], bool]
    reason: str


def _is_on(value: Any) -> bool:
    return value not in (None, False, "none", 0)


_FLOAT16 = ("fp16", "float16", "half", "torch.float16")
UNTRIED = "a prediction was never tried with it"
_SECOND_COPY = "forward reads copies of the partitions that a prediction does not reach"
_OF_DEEPSPEED = (
    _Setting(
        "zero_optimization.offload_param.device",
        lambda device: device == "nvme",
        "the weights are in files between their uses, and each prediction would have to rewrite them all",
    ),
    _Setting(
        "zero_optimization.offload_optimizer.device",
        lambda device: device == "nvme",
        "the weights that the optimizer steps and its state are in files, which each prediction would have to read",
    ),
    _Setting(
        "zero_optimization.offload_optimizer.ratio",
        lambda ratio: ratio is not None and ratio < 1,
        "a second optimizer, with settings of its own, steps some of the weights",
    ),
    _Setting(
        "zero_optimization.offload_optimizer.super_offload", _is_on, "its optimizer runs ahead, and rolls steps back"
    ),
    _Setting("zero_optimization.zenflow", _is_on, "it steps some of the weights at other times than the others"),
    _Setting("zero_optimization.zero_hpz_partition_size", lambda size: (size or 1) > 1, _SECOND_COPY),
    _Setting("zero_optimization.mics_shard_size", lambda size: (size or -1) > 0, _SECOND_COPY),
    _Setting("zero_optimization.zero_quantized_weights", _is_on, UNTRIED),
    _Setting("tensor_parallel.autotp_size", lambda size: (size or 1) > 1, UNTRIED),
    _Setting("compile.deepcompile", _is_on, "the gathering of weights is compiled into the model"),
    _Setting("hybrid_engine.enabled", _is_on, "it generates from copies of the weights"),
    _Setting(
        "torch_autocast",
        lambda autocast: _is_on(autocast) and _is_on(autocast.get("enabled")) and autocast.get("dtype") in _FLOAT16,
        "each process may skip a step on its own, so that nobody knows which steps were taken",
    ),
    _Setting(
        "optimizer.type",
        lambda name: str(name).lower() in ("onebitadam", "zerooneadam", "onebitlamb"),
        "it communicates what it steps by in a compressed form, so that the weights alone do not tell its steps",
    ),
)


def check_deepspeed(config: Mapping[str, Any]) -> None:
    """Raises ValueError where a DeepSpeed config asks for what cannot be right."""
    for setting in _OF_DEEPSPEED:
        *sections, name = setting.name.split(".")
        node: Any = config
        for section in sections:
            node = node.get(section) or {}
        value = node.get(name)
        if value != "auto" and setting.is_wrong(value):
            raise refused_by_deepspeed(f"{setting.name}={value!r}", setting.reason)


def refused_by_deepspeed(what: str, reason: str) -> ValueError:
    """The error for what cannot be right with DeepSpeed."""
    return refused(f"DeepSpeed with {what}", reason, "Train without it")
