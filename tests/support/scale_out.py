r"""The worker of test_scale_out.py: runs the checks of one set-up in one group of processes, and writes what came out.

    accelerate launch --config_file scripts/accelerate_configs/fsdp2.yaml tests/support/scale_out.py \
        --setup fsdp2 --out DIR

A launch costs far more than the short runs that a check makes, so that all checks of a set-up share one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, training_args
from transformers.distributed import DistributedConfig

import tiny_models as tiny
from hf_xgrad import XGradTrainer, XGradTrainingArguments

STEPS = 8
BATCH = 4  # per process
ROWS = 16  # of training data per process: an epoch of four batches, none of them shorter
CHECKPOINT = 4

RULES: dict[str, dict[str, Any]] = {
    "plain": {"xgrad": False},
    "closed_form": {},
    "last_update": {"xgrad_rule": "last_update", "xgrad_steps": 1.0},
    "momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.2},
    # Without a closed form. A smaller eps would blow up the rounding of gradients that are 0 (of the keys' biases).
    "rmsprop": {"optim": "rmsprop", "optim_args": "eps=1e-3", "learning_rate": 5e-3, "xgrad_steps": 1.0},
    "auto": {"xgrad_steps": "auto"},
}
REMEMBERING = ("closed_form", "last_update", "auto")  # each remembers something else between steps


# ---- set-ups ----


@dataclass(frozen=True)
class SetUp:
    """How processes are launched, and what is trained in them."""

    engine: str  # the DistributedType that the Trainer has to find
    config: str | None = None  # of scripts/accelerate_configs; None is torchrun
    flags: tuple[str, ...] = ()  # of accelerate launch
    processes: int = 2
    model: str = "bert"
    settings: Mapping[str, Any] = field(default_factory=dict)  # TrainingArguments of all runs
    bf16: bool = False
    tolerance: float = 5e-5  # of weights and losses against one process
    without: tuple[str, ...] = ()  # checks that say nothing here
    mesh: Mapping[str, Any] | None = None  # by which Transformers shards the model when it loads it
    data_parallel: bool = True
    slow: bool = True

    @property
    def checks(self) -> list[str]:
        """Names of all that it has to pass."""
        return [
            name
            for name, check in CHECKS.items()
            if check.suits(self) and check.name not in self.without and name not in self.without
        ]

    @property
    def replicates(self) -> bool:
        """Whether it is DDP, which keeps all weights everywhere."""
        return self.engine == "MULTI_CPU" and self.mesh is None

    @property
    def shards_weights(self) -> bool:
        return self.engine == "FSDP" or self.mesh is not None or self.config == "deepspeed_zero3"


# Rounding to bf16 would decide the direction of steps where gradients are next to 0, but for the large eps.
COARSE = {"adam_epsilon": 1e-3}
# Accelerate broadcasts the weights of the first process only on accelerators; here all make the same ones.
FSDP = ("--fsdp_cpu_ram_efficient_loading", "false", "--fsdp_transformer_layer_cls_to_wrap", "BertLayer")
FSDP1 = (*FSDP, "--fsdp_sync_module_states", "false")

SETUPS: dict[str, SetUp] = {
    "ddp2": SetUp("MULTI_CPU", slow=False),
    "ddp3": SetUp("MULTI_CPU", processes=3),
    "ddp2-accelerate": SetUp("MULTI_CPU", "multi_cpu"),
    "ddp2-tied": SetUp("MULTI_CPU", "multi_cpu", model="gpt2"),
    "ddp2-bf16": SetUp("MULTI_CPU", settings=COARSE, bf16=True, tolerance=1e-2),
    "fsdp2": SetUp("FSDP", "fsdp2", FSDP, slow=False),
    "fsdp2-sharded": SetUp(
        "FSDP", "fsdp2", (*FSDP, "--fsdp_state_dict_type", "SHARDED_STATE_DICT"), without=("saved",)
    ),
    "fsdp2-no-reshard": SetUp("FSDP", "fsdp2", (*FSDP, "--fsdp_reshard_after_forward", "false")),
    "fsdp2-offload": SetUp("FSDP", "fsdp2", (*FSDP, "--fsdp_offload_params", "true")),
    "fsdp2-bf16": SetUp("FSDP", "fsdp2", FSDP, settings=COARSE, bf16=True, tolerance=1e-2),
    "fsdp2-odd": SetUp("FSDP", "fsdp2", FSDP, model="bert-odd"),
    "fsdp2-tied": SetUp("FSDP", "fsdp2", (*FSDP[:-1], "GPT2Block"), model="gpt2"),
    "fsdp2-3": SetUp("FSDP", "fsdp2", FSDP, processes=3),
    "fsdp2-native": SetUp(
        "MULTI_CPU",
        model="llama",
        mesh={"fsdp_size": 2},
        settings={"save_only_model": True},  # Transformers resumes no such training
        without=("resumed",),
    ),
    "tp": SetUp(
        "MULTI_GPU",
        model="llama",
        mesh={"tp_size": 2, "tp_plan": "auto"},
        settings={"save_only_model": True},
        without=("resumed",),
        data_parallel=False,
    ),
    "fsdp1": SetUp("FSDP", "fsdp1", FSDP1),
    "fsdp1-flat": SetUp("FSDP", "fsdp1", (*FSDP1, "--fsdp_use_orig_params", "false")),
    "fsdp1-grad-op": SetUp("FSDP", "fsdp1", (*FSDP1, "--fsdp_sharding_strategy", "SHARD_GRAD_OP")),
    "fsdp1-bf16": SetUp("FSDP", "fsdp1", FSDP1, settings=COARSE, bf16=True, tolerance=1e-2),
    "zero1": SetUp("DEEPSPEED", "deepspeed_zero1"),
    "zero2": SetUp("DEEPSPEED", "deepspeed_zero2"),
    "zero3": SetUp("DEEPSPEED", "deepspeed_zero3"),
    "zero1-bf16": SetUp("DEEPSPEED", "deepspeed_zero1", settings=COARSE, bf16=True, tolerance=1e-2),
    "zero2-bf16": SetUp("DEEPSPEED", "deepspeed_zero2", settings=COARSE, bf16=True, tolerance=1e-2),
    "zero3-bf16": SetUp("DEEPSPEED", "deepspeed_zero3", settings=COARSE, bf16=True, tolerance=1e-2),
    "zero2-offload": SetUp(
        "DEEPSPEED",
        "deepspeed_zero2",
        ("--offload_optimizer_device", "cpu"),
        without=("twin-momentum", "twin-rmsprop"),  # Accelerate puts DeepSpeed's Adam in the place of these
    ),
    "zero3-odd": SetUp("DEEPSPEED", "deepspeed_zero3", model="bert-odd"),
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": tiny.bert,
    # No dimension but that of the positions can be divided by 2; one weight has a single row.
    "bert-odd": lambda: tiny.bert(
        vocab_size=49, hidden_size=15, num_attention_heads=3, intermediate_size=33, num_labels=3, type_vocab_size=1
    ),
    "gpt2": tiny.gpt2,
    "llama": llama,
}
LANGUAGE_MODELS = ("gpt2", "llama")


# ---- the true weights, past what an engine shows of them ----


def local(p: Tensor) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


class Watch(TrainerCallback):
    """Looks at the true weights of a trainer, and at those that its forwards run on."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.parameters: dict[str, nn.Parameter] = {}
        self.tied: dict[str, str] = {}  # second names
        self.sees = False
        self.seen: list[dict[str, Tensor]] = []  # by the training forwards, by all names
        self.seen_in_evaluation: list[dict[str, Tensor]] = []
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # By name now: once FSDP has gathered its root for an evaluation, the model shows other tensors.
        model = self.trainer.model
        names: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            first = names.setdefault(id(p), _clean(name))
            if first == _clean(name):
                self.parameters[first] = p
            else:
                self.tied[_clean(name)] = first
        if self.sees:
            for name, module in model.named_modules():
                if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                    module.register_forward_pre_hook(self._see(_clean(f"{name}.weight")))

    def _see(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            seen = self.seen if module.training else self.seen_in_evaluation
            if not seen or name in seen[-1]:
                seen.append({})  # a weight that comes again begins another forward
            weight = module.weight.full_tensor() if isinstance(module.weight, DTensor) else module.weight
            seen[-1][name] = weight.detach().clone()

        return hook

    def shards(self) -> dict[str, Tensor]:
        """What this process holds of the true weights: the memory itself, not copies."""
        if self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return {name: _of_zero(p) for name, p in self.parameters.items()}
        handles = self._handles()
        if handles:
            return {prefix: _flat_shard(handle) for prefix, handle in handles.items()}
        return {name: local(p.detach()) for name, p in self.parameters.items()}

    def copies(self) -> dict[str, Tensor]:
        return {name: shard.clone() for name, shard in self.shards().items()}

    def whole(self) -> dict[str, Tensor]:
        """Copies of the true weights, gathered; to be called in all processes."""
        if self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            from deepspeed.utils import safe_get_full_fp32_param

            return {name: safe_get_full_fp32_param(p).clone() for name, p in self.parameters.items()}
        handles = self._handles()
        if handles:
            return dict(itertools.chain.from_iterable(_gather_flat(*item) for item in handles.items()))
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in self.parameters.items()
        }

    def _handles(self) -> dict[str, Any]:
        """Those of FSDP1's units, by the names of their modules."""
        return {
            _clean(f"{name}."): module._handle
            for name, module in self.trainer.model.named_modules()
            if isinstance(module, FullyShardedDataParallel) and module._handle is not None
        }


def _clean(name: str) -> str:
    """A name of the model as it is without wrappers."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix(".")


def _of_zero(p: Any) -> Tensor:
    """The partition of ZeRO 3, without what fills up the last one, where DeepSpeed leaves what was in the memory."""
    if not hasattr(p, "ds_tensor"):
        return p.data
    partition = p.ds_tensor.data
    return partition[: max(p.ds_numel - partition.numel() * dist.get_rank(p.ds_process_group), 0)]


def _flat_shard(handle: Any) -> Tensor:
    # Before its first forward FSDP has no second name for it yet.
    return getattr(handle.flat_param, "_local_shard", handle.flat_param.data)


def _gather_flat(prefix: str, handle: Any) -> Iterator[tuple[str, Tensor]]:
    flat, shard = handle.flat_param, _flat_shard(handle)
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    whole = torch.cat(parts)[: flat._unpadded_unsharded_size.numel()]
    for name, view in zip(flat._fqns, handle._get_unflat_views(whole), strict=True):
        yield prefix + _clean(name), view.detach().clone()


# ---- runs ----


@dataclass
class Outcome:
    weights: dict[str, Tensor]
    losses: list[float]
    eval_losses: list[float]
    watch: Watch

    @property
    def everything(self) -> tuple[Any, ...]:
        return [w.tolist() for w in self.weights.values()], self.losses, self.eval_losses


class Runs:
    """Makes trainers of one set-up, and their twins in one process; what was run once is not run again."""

    def __init__(self, setup: SetUp, out: Path) -> None:
        self.setup = setup
        self.out = out
        self._known: dict[Any, Outcome] = {}
        self._folders = itertools.count()

    @property
    def ways(self) -> int:
        """Over how many processes a batch is dealt out."""
        return self.setup.processes if self.setup.data_parallel else 1

    def folder(self) -> Path:
        return self.out / f"run-{next(self._folders)}"

    def trainer(self, cls: type = XGradTrainer, *, model: nn.Module | None = None, **settings: Any) -> Any:
        """A trainer; `alone` (of the twin) and `rows` (of its data) are no settings of the arguments."""
        alone, rows = settings.pop("alone", False), settings.pop("rows", ROWS * self.ways)
        defaults: dict[str, Any] = {
            "max_steps": STEPS,
            "warmup_steps": 2,
            "per_device_train_batch_size": BATCH * (self.ways if alone else 1),
            "per_device_eval_batch_size": BATCH * (self.ways if alone else 1),
            "output_dir": self.folder(),
            "bf16": self.setup.bf16,
            **self.setup.settings,
        }
        if self.setup.engine == "DEEPSPEED" and not alone:
            defaults |= {"use_cpu": False, "ddp_backend": "gloo"}
        args = tiny.arguments(cls=XGradTrainingArguments, **(defaults | settings))
        if self.setup.engine in ("FSDP", "MULTI_GPU") and not alone:
            # Accelerate has FSDP, and tensor parallelism, on accelerators only, and would train with DDP here.
            PartialState._shared_state |= {
                "distributed_type": DistributedType.MULTI_GPU,
                "device": torch.device("cpu"),
            }
        if model is None:
            model = MODELS[self.setup.model]() if alone or self.setup.mesh is None else self._load_sharded()
        language_model = self.setup.model in LANGUAGE_MODELS
        trainer = cls(
            model=model,
            args=args,
            train_dataset=tiny.Sentences(rows, language_model=language_model),
            eval_dataset=tiny.Sentences(24, seed=1, language_model=language_model),
        )
        plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
                plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # which needs an accelerator
            # FSDP1 takes what is on the CPU for copied there already, and writes over it.
            plugin.optim_state_dict_config.offload_to_cpu = False
        trainer.remove_callback(PrinterCallback)
        trainer.watch = Watch(trainer)
        return trainer

    def _load_sharded(self) -> nn.Module:
        folder = self.out / "model"
        model = MODELS[self.setup.model]()
        if int(os.environ["RANK"]) == 0 and not folder.exists():
            model.save_pretrained(folder)
        dist.barrier()
        return type(model).from_pretrained(folder, distributed_config=DistributedConfig(**self.setup.mesh))

    def run(self, cls: type = XGradTrainer, **settings: Any) -> Outcome:
        key = (cls, *sorted(settings.items()))
        if key not in self._known:
            with on_its_own() if settings.get("alone") else contextlib.nullcontext():
                self._known[key] = self.train(self.trainer(cls, **settings))
        return self._known[key]

    def train(self, trainer: Any, **kwargs: Any) -> Outcome:
        trainer.train(**kwargs)
        log = trainer.state.log_history
        return Outcome(
            trainer.watch.whole(),
            [entry["loss"] for entry in log if "loss" in entry],
            [entry["eval_loss"] for entry in log if "eval_loss" in entry],
            trainer.watch,
        )

    def close(self, ours: Outcome, theirs: Outcome, tolerance: float | None = None) -> None:
        """Both trained to the same weights and losses, to float tolerance."""
        tolerance = tolerance or self.setup.tolerance
        assert distance(ours.weights, theirs.weights) <= tolerance, distances(ours.weights, theirs.weights)
        for some, others in ((ours.losses, theirs.losses), (ours.eval_losses, theirs.eval_losses)):
            assert len(some) == len(others)
            assert all(abs(a - b) <= tolerance for a, b in zip(some, others, strict=True)), (some, others)


@contextlib.contextmanager
def on_its_own() -> Iterator[None]:
    """Hides the other processes, and the engine, from the trainers that are made inside."""
    kept = dict(os.environ)
    for name in kept:
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") or name.startswith(
            ("ACCELERATE_", "FSDP_")
        ):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def distances(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Largest differences, of the five weights where they are largest."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    each = {name: float((a[name].float() - b[name].float()).abs().max()) for name in a}
    return dict(sorted(each.items(), key=lambda item: -item[1])[:5])


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(distances(a, b).values())


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_first() -> bool:
    return dist.get_rank() == 0


# ---- checks ----


@dataclass(frozen=True)
class Check:
    name: str  # of all its variants
    run: Callable[[Runs], None]
    suits: Callable[[SetUp], bool] = lambda setup: True


CHECKS: dict[str, Check] = {}
_Function = Callable[..., None]


def check(suits: Callable[[SetUp], bool] = lambda setup: True, **variants: Any) -> Callable[[_Function], _Function]:
    """Registers a check, once for each variant: `rule=("a", "b")` calls it as `check(runs, rule="a")`..."""

    def register(function: _Function) -> _Function:
        if not variants:
            CHECKS[function.__name__] = Check(function.__name__, function, suits)
        for values in itertools.product(*variants.values()) if variants else ():
            settings = dict(zip(variants, values, strict=True))
            name = "-".join([function.__name__, *map(str, values)])
            CHECKS[name] = Check(function.__name__, partial(function, **settings), suits)
        return function

    return register


@check()
def engine(runs: Runs) -> None:
    """The set-up is what it says: not processes that each train alone, nor DDP where FSDP was asked for."""
    trainer = runs.trainer()
    runs.train(trainer)
    setup, watch = runs.setup, trainer.watch
    assert dist.get_world_size() == setup.processes == trainer.accelerator.num_processes
    assert trainer.accelerator.distributed_type == setup.engine, trainer.accelerator.distributed_type
    if setup.replicates:
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    if setup.engine == "DEEPSPEED":
        stage = trainer.model_wrapped.zero_optimization_stage()
        assert setup.config == f"deepspeed_zero{stage}"
    if setup.shards_weights:
        here = sum(shard.numel() for shard in watch.shards().values())
        whole = sum(p.numel() for p in MODELS[setup.model]().parameters())
        assert here < 0.7 * whole, (here, whole)


@check(rule=tuple(RULES)[1:])
def twin(runs: Runs, rule: str) -> None:
    """Trained to the weights of one process with the same batches, and not to those of the plain optimizer."""
    ours, theirs = runs.run(**RULES[rule]), runs.run(**RULES[rule], alone=True)
    steps = rule == "auto" and not runs.setup.replicates
    if steps:
        # What is looked at are other weights where they are in shards: s is close, not the same.
        assert distance(ours.weights, theirs.weights) <= 5e-3, distances(ours.weights, theirs.weights)
    else:
        runs.close(ours, theirs)
    plain = runs.run(Trainer, **RULES[rule], alone=True)
    enough = max(1e-3, 4 * distance(ours.weights, theirs.weights))
    assert distance(theirs.weights, plain.weights) > enough, distance(theirs.weights, plain.weights)
    if rule == "closed_form" and is_first():
        save_file(ours.weights, runs.out / "closed_form.safetensors")


@check()
def auto_steps(runs: Runs) -> None:
    """Every process chooses the same s."""
    trainer = runs.trainer(XGradTrainer, **RULES["auto"])
    runs.train(trainer)
    logs = [{key: value for key, value in entry.items() if key.startswith("xgrad/")}
            for entry in trainer.state.log_history if "loss" in entry]  # fmt: skip
    steps = [log["xgrad/steps"] for log in logs]
    assert all(0.0 <= s <= 2.0 for s in steps), steps
    assert len(set(steps)) > 2, steps
    everywhere = gathered(logs)
    assert all(others == everywhere[0] for others in everywhere), everywhere


@check(rule=("closed_form", "last_update"), accumulation=(1, 2))
def forwards_see(runs: Runs, rule: str, accumulation: int) -> None:
    """Training forwards see w_t + lr_t / lr_{t-1} * (w_t - w_{t-1}), evaluations w_t, to the last bit.

    Which, for AdamW without weight decay, the closed form gives too.
    """
    trainer = runs.trainer(
        **RULES[rule], warmup_steps=0, gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=2
    )
    watch = trainer.watch
    watch.sees = True
    true: list[dict[str, Tensor]] = []
    evaluated: list[dict[str, Tensor]] = []
    lrs: list[float] = []

    def observe(event: str, **kwargs: Any) -> None:
        if event == "step_begin":
            true.append(watch.whole())
            lrs.append(trainer.lr_scheduler.get_last_lr()[0])
        if event == "evaluate":
            evaluated.append(watch.whole())

    trainer.add_callback(tiny.EveryEvent(observe))
    trainer.train()
    assert len(watch.seen) == STEPS * accumulation
    assert len(true) == len(lrs) == STEPS
    for i, seen in enumerate(watch.seen):
        t = i // accumulation
        assert tiny.same(seen, watch.seen[t * accumulation]), "micro-batches of one window see the same weights"
        expected = true[t] if t == 0 else _extrapolated(true[t], true[t - 1], lrs[t] / lrs[t - 1])
        moved = 0
        for name, weight in seen.items():
            name = watch.tied.get(name, name)
            assert _near(weight, expected[name]), (t, name, float((weight - expected[name]).abs().max()))
            moved += not _near(weight, true[t][name])
        assert t == 0 or moved > 0, t
    forwards = len(watch.seen_in_evaluation) // (STEPS // 2)
    assert forwards > 0
    for i, seen in enumerate(watch.seen_in_evaluation):
        weights = evaluated[i // forwards]
        for name, weight in seen.items():
            assert torch.equal(weight, weights[watch.tied.get(name, name)].to(weight.dtype)), (i, name)


def _extrapolated(w: dict[str, Tensor], before: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    return {name: w[name] + ratio * (w[name] - before[name]) for name in w}


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal to the rounding of the coarser type."""
    resolution = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[a.dtype]
    return torch.allclose(a.float(), b.float(), rtol=resolution, atol=resolution * 1e-1)


@check()
def only_steps_change_weights(runs: Runs) -> None:
    """At every event the callbacks of this process find the weights as they were at the one before."""
    trainer = runs.trainer(
        **RULES["last_update"], gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    seen: list[tuple[str, dict[str, Tensor]]] = []

    def observe(event: str, **kwargs: Any) -> None:
        if trainer.watch.parameters:
            seen.append((event, trainer.watch.copies()))

    trainer.add_callback(tiny.EveryEvent(observe))
    trainer.train()
    events = {event for event, _ in seen}
    assert {"substep_end", "evaluate", "prediction_step", "save", "step_end", "log"} <= events
    # DeepSpeed's engine steps inside backward: the event before the Trainer's own step is the first after that.
    step = "pre_optimizer_step" if runs.setup.engine == "DEEPSPEED" else "optimizer_step"
    assert tiny.changes(seen) == {step}


@check(lambda setup: setup.replicates)
def replicas(runs: Runs) -> None:
    """All processes hold the same weights after every step, bit for bit."""
    for settings in ({}, {"gradient_accumulation_steps": 2}):
        trainer = runs.trainer(**RULES["last_update"], **settings)
        equal: list[bool] = []

        def observe(event: str, trainer: Any = trainer, equal: list[bool] = equal, **kwargs: Any) -> None:
            if event == "step_end":
                flat = torch.cat([w.flatten() for w in trainer.watch.shards().values()])
                parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, flat)
                equal.append(all(torch.equal(part, flat) for part in parts))

        trainer.add_callback(tiny.EveryEvent(observe))
        trainer.train()
        assert equal == [True] * STEPS


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


@check(off=("xgrad_steps", "xgrad"))
def switched_off(runs: Runs, off: str) -> None:
    """s = 0, or xgrad=False, is the plain Trainer, bit for bit."""
    plain = runs.run(Trainer, **EVALUATING)
    ours = runs.run(**EVALUATING, **{off: 0.0 if off == "xgrad_steps" else False})
    assert ours.everything == plain.everything
    assert distance(runs.run(**EVALUATING).weights, plain.weights) > 1e-3


@check(rule=("closed_form", "last_update"))
def accumulation(runs: Runs, rule: str) -> None:
    settings = {**RULES[rule], "gradient_accumulation_steps": 2}
    ours, theirs = runs.run(**settings), runs.run(**settings, alone=True)
    runs.close(ours, theirs)
    assert distance(theirs.weights, runs.run(Trainer, **settings, alone=True).weights) > 1e-3


@check(rule=REMEMBERING)
def evaluation(runs: Runs, rule: str) -> None:
    """Evaluating changes nothing, and is of the true weights."""
    without, ours = runs.run(**RULES[rule]), runs.run(**RULES[rule], **EVALUATING)
    assert tiny.same(ours.weights, without.weights), distances(ours.weights, without.weights)
    assert ours.losses == without.losses
    assert len(ours.eval_losses) == STEPS // 2
    if rule != "auto":
        runs.close(ours, runs.run(**RULES[rule], **EVALUATING, alone=True))


@check(rule=("plain", *REMEMBERING))
def resumed(runs: Runs, rule: str) -> None:
    """Stopped and resumed is the uninterrupted run, bit for bit; and so it is without XGrad, to begin with."""
    folder = runs.folder()
    settings = {**RULES[rule], **EVALUATING, "output_dir": folder}
    whole = runs.train(runs.trainer(**settings, save_strategy="steps", save_steps=CHECKPOINT, save_total_limit=None))
    again = runs.trainer(**settings)
    resumed = runs.train(again, resume_from_checkpoint=str(folder / f"checkpoint-{CHECKPOINT}"))
    assert resumed.everything == whole.everything, distances(resumed.weights, whole.weights)
    assert again.state.global_step == STEPS
    kept = runs.out / f"resumable-{rule}"
    if is_first():
        shutil.copytree(folder / f"checkpoint-{CHECKPOINT}", kept / f"checkpoint-{CHECKPOINT}")
        save_file(whole.weights, kept / "end.safetensors")
    dist.barrier()


@check()
def saved(runs: Runs) -> None:
    """Writes models, and the true weights beside them, for a plain process to compare."""
    folder = runs.out / "saved"
    trainer = runs.trainer(output_dir=folder, save_strategy="steps", save_steps=CHECKPOINT)

    def observe(event: str, state: Any, **kwargs: Any) -> None:
        if event == "step_end" and state.global_step == CHECKPOINT:
            weights = trainer.watch.whole()
            if is_first():
                folder.mkdir(exist_ok=True)
                save_file(weights, folder / f"checkpoint-{CHECKPOINT}.safetensors")

    trainer.add_callback(tiny.EveryEvent(observe))
    outcome = runs.train(trainer)
    trainer.save_model(str(folder / "end"))
    if is_first():
        save_file(outcome.weights, folder / "end.safetensors")
    dist.barrier()


class Recording(XGradTrainer):
    """Keeps the batches that it trained on, and takes its data in the order in which they are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Tensor]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.batches.append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


class InOrder(XGradTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@check(lambda setup: setup.data_parallel, rule=("closed_form", "last_update"))
def uneven(runs: Runs, rule: str) -> None:
    """With a last batch that the samples of an epoch do not fill: the same as one process with what each got."""
    trainer = runs.trainer(Recording, **RULES[rule], rows=27 + runs.ways)
    ours = runs.train(trainer)
    batches = [list(parts) for parts in zip(*gathered(trainer.batches), strict=True)]
    samples = [
        {name: torch.cat([part[name] for part in parts])[i] for name in parts[0]}
        for parts in batches
        for i in range(BATCH * runs.ways)
    ]
    with on_its_own():
        alone = runs.trainer(InOrder, **RULES[rule], alone=True)
        alone.train_dataset = samples
        runs.close(ours, runs.train(alone))


@check(lambda setup: setup.replicates and setup.model == "bert", rule=("closed_form", "last_update"))
def unused_parameters(runs: Runs, rule: str) -> None:
    outcomes = []
    for alone in (False, True):
        with on_its_own() if alone else contextlib.nullcontext():
            model = tiny.bert()
            model.unused = nn.Linear(3, 3)
            before = model.unused.weight.detach().clone()
            trainer = runs.trainer(
                model=model, alone=alone, ddp_find_unused_parameters=True, gradient_accumulation_steps=2, **RULES[rule]
            )
            outcomes.append(runs.train(trainer))
        assert torch.equal(outcomes[-1].weights["unused.weight"], before)
    runs.close(*outcomes)


# ---- one process fails ----


class FaultError(Exception):
    pass


def fail(runs: Runs, step: int = 3) -> None:
    """The last process raises in a forward of `step`; each writes whether it holds its true weights afterwards."""
    trainer = runs.trainer(**RULES["last_update"])
    watch = trainer.watch
    before: dict[str, Tensor] = {}
    report = {"predicted": False, "true": False, "error": ""}
    rank, last = dist.get_rank(), dist.get_world_size() - 1

    def observe(event: str, state: Any, **kwargs: Any) -> None:
        if event == "step_begin" and state.global_step == step:
            before.update(watch.copies())

    def hook(*args: Any) -> None:
        if before:
            report["predicted"] = not tiny.same(watch.shards(), before)
            if rank == last:
                raise FaultError("this process fails")

    trainer.add_callback(tiny.EveryEvent(observe))
    trainer.model.register_forward_pre_hook(hook)
    try:
        trainer.train()
    except Exception as error:
        report["true"] = tiny.same(watch.shards(), before)
        report["error"] = type(error).__name__
        (runs.out / f"fault-{rank}.json").write_text(json.dumps(report))
        if rank == last:
            # The launcher ends the others as soon as this one has ended: they get the time to notice by themselves.
            dist.destroy_process_group()
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not (runs.out / "fault-0.json").exists():
                time.sleep(0.05)
        raise


def elsewhere(runs: Runs, checkpoint: Path) -> None:
    """Resumes from a checkpoint of another number of processes."""
    trainer = runs.trainer(
        **RULES["last_update"], **EVALUATING, per_device_train_batch_size=BATCH * 2 // runs.ways,
    )  # fmt: skip
    outcome = runs.train(trainer, resume_from_checkpoint=str(checkpoint))
    if is_first():
        save_file(outcome.weights, runs.out / "elsewhere.safetensors")


# DeepSpeed computes in bf16 on the CPU too, but Transformers asks what GPUs can do.
training_args.is_torch_bf16_gpu_available = lambda: True

# Of FSDP1, which offloads whole state dicts to the CPU: where they are there already, it would go on to free memory
# that is in use, and crash, under the plain Trainer too.
FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", required=True, choices=SETUPS)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--checks", nargs="*")
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args()
    runs = Runs(SETUPS[options.setup], options.out)
    runs.trainer()  # joins the processes
    if options.fail:
        fail(runs)
    elif options.resume:
        elsewhere(runs, options.resume)
    else:
        results = {}
        for name in options.checks or runs.setup.checks:
            start = time.monotonic()
            try:
                CHECKS[name].run(runs)
                problem = ""
            except Exception:
                problem = traceback.format_exc()
                print(f"{name}: {problem}", flush=True)
            problems = {f"process {i}": text for i, text in enumerate(gathered(problem)) if text}
            results[name] = {"problems": problems, "seconds": time.monotonic() - start}
            if is_first():
                (options.out / "results.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
