"""ZeroPredictor on engines without a Trainer: what forward reads, bit for bit. With one: test_scale_out.py.

As a script it is the worker: it trains in every case, in one group of processes, and writes what it found.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.closed_forms.torch_optim import adam_direction
from hf_xgrad.core.refusals import check_deepspeed
from hf_xgrad.core.rules import Direction, closed_form_of
from inside import compute_weights, in_chunks, is_in_place, kept_weights

ROOT = Path(__file__).parents[2]
STEPS = 6
MICRO_BATCHES = 2
BATCH = 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RULES = ("closed_form", "last_update")
PARTITIONED = (1, 2, 3)

CASES: dict[str, dict[str, Any]] = {
    **{
        f"stage{stage}-{dtype}-{rule}": {"stage": stage, "dtype": dtype, "rule": rule}
        for stage in (0, *PARTITIONED)
        for dtype in DTYPES
        for rule in RULES
    },
    **{f"{rule}-in-place": {"stage": 3, "dtype": "fp32", "rule": rule, "in_place": True} for rule in RULES},
    **{f"{rule}-offload": {"stage": 3, "dtype": "bf16", "rule": rule, "offload": True} for rule in RULES},
    **{f"{rule}-fp32-sums": {"stage": 1, "dtype": "bf16", "rule": rule, "sums": "fp32"} for rule in RULES},
}
SETTINGS = {
    # The smallest weights are never partitioned, the others are stepped in several groups.
    "stage3_param_persistence_threshold": 10,
    "sub_group_size": 40,
}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))


def batches(process: int, processes: int) -> list[list[Tensor]]:
    """The micro-batches of each step."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(STEPS, MICRO_BATCHES, BATCH, 5, generator=generator)
    return [list(step[:, process::processes]) for step in data]


# ---- worker ----


class Case:
    """One engine, and what its forwards read."""

    def __init__(
        self,
        stage: int,
        dtype: str,
        rule: str,
        offload: bool = False,
        sums: str | None = None,
        in_place: bool = False,
    ) -> None:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        self.dtype = DTYPES[dtype]
        self.model = model()
        zero: dict[str, Any] = {"stage": stage}
        if stage == 3:
            zero |= SETTINGS
        if offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
            "gradient_accumulation_steps": MICRO_BATCHES,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == "bf16"},
            "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 4},
            **({"data_types": {"grad_accum_dtype": sums}} if sums else {}),
        }
        # Not AdamW: some of DeepSpeed's optimizers step once when they are made, which is to move nothing.
        groups = [{"params": [p for p in self.model.parameters() if (p.dim() > 1) is wide]} for wide in (True, False)]
        optimizer = torch.optim.Adam(groups, lr=0.05)
        with pytest.MonkeyPatch.context() as patch:
            if in_place:
                # A single copy is what DeepSpeed means to have here, but it compares devices with their names.
                patch.setattr(type(get_accelerator()), "current_device_name", lambda self: torch.device("cpu"))
            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        if stage == 3 and dist.get_rank() == 1:
            self.spoil_padding()
        self.base = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        self.predictor = _predictor(self.engine, XGradConfig(steps=1.0, rule=rule))
        self.rule = rule
        self.seen: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(lambda module, args, name=name: self.see(name, module))

    def see(self, name: str, module: nn.Module) -> None:
        if module.training:
            for own, p in module.named_parameters(recurse=False):
                self.seen[f"{name}.{own}"] = p.detach().clone()

    def spoil_padding(self) -> None:
        """DeepSpeed leaves there what was in the memory."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        odd = self.model[3].bias
        master = safe_get_local_fp32_param(odd).clone()
        master[-1] = odd.ds_tensor[-1] = torch.nan
        safe_set_local_fp32_param(odd, master)

    def masters(self) -> dict[str, Tensor]:
        """What the optimizer steps, whole; to be called in all processes."""
        from deepspeed.utils import safe_get_full_fp32_param

        zero, own = self.engine.optimizer, {}
        if hasattr(zero, "fp32_groups"):  # stage 0 in half precision
            pairs = zip(chain(*zero.fp16_groups), chain(*zero.fp32_groups), strict=True)
            own = {id(p): master for p, master in pairs}
        result = {}
        for name, p in self.model.named_parameters():
            whole = own.get(id(p), p) if self.engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(p)
            result[name] = whole.detach().clone().view(getattr(p, "ds_shape", p.shape))
        return result

    def state(self, key: str) -> dict[str, Tensor]:
        """The optimizer's state, whole: put where the masters are for the moment, as these can be gathered."""
        kept = {p: p.detach().clone() for p in self.base.state}
        with torch.no_grad():
            for p in kept:
                p.copy_(self.base.state[p][key])
            result = self.masters()
            for p, value in kept.items():
                p.copy_(value)
        return result

    def expected(self) -> dict[str, Tensor]:
        """The prediction of the coming step, from whole weights."""
        now = self.masters()
        if self.rule == "last_update":
            return {name: w + (w - self.before[name]) if self.before else w for name, w in now.items()}
        if self.base.state:
            moments, squares, step = self.state("exp_avg"), self.state("exp_avg_sq"), _step(self.base)
            group = self.base.param_groups[0]
            for name, w in now.items():
                state = {"exp_avg": moments[name], "exp_avg_sq": squares[name], "step": step}
                adam_direction([w], [state], group).add_to_([w], -group["lr"])
        return now

    def is_true(self) -> bool:
        """Whether compute weights are the masters: whole ones, and partitions."""
        from deepspeed.utils import safe_get_local_fp32_param

        masters = self.masters()
        for name, p in self.model.named_parameters():
            if hasattr(p, "ds_tensor") and not torch.equal(safe_get_local_fp32_param(p).to(p.dtype), p.ds_tensor):
                return False
            whole = not hasattr(p, "ds_status") or p.ds_status.name == "AVAILABLE"
            if whole and not torch.equal(p, masters[name].to(p.dtype)):
                return False
        return True

    def train(self, *, step_inside: bool = True, skipped: int | None = None, checks: bool = False) -> Iterator[str]:
        """Yields what is wrong."""
        moved = 0.0
        for t, micro_batches in enumerate(batches(dist.get_rank(), dist.get_world_size())):
            self.predictor.measure(t == STEPS - 1)
            expected, masters = (self.expected(), self.masters()) if checks else ({}, {})
            moved = max(moved, *((expected[name] - w).abs().max().item() for name, w in masters.items()), 0.0)
            for i, batch in enumerate(micro_batches):
                with self.predictor.predicted():
                    loss = self.engine(batch.to(self.dtype)).float().square().mean()
                    if t == skipped and i == 1 and dist.get_rank() == 1:
                        loss = loss * float("inf")
                    self.engine.backward(loss)
                    if step_inside:
                        self.engine.step()
                if checks and not all(torch.equal(w, expected[n].to(w.dtype)) for n, w in self.seen.items()):
                    yield f"step {t}, micro-batch {i}: forward did not read the predicted weights"
                if not step_inside:
                    if checks and not self.is_true():
                        yield f"step {t}, micro-batch {i}: not the true weights before the step"
                    self.engine.step()
                if checks and not self.is_true():
                    yield f"step {t}, micro-batch {i}: not the true weights afterwards"
            if checks and t != skipped:
                self.before = masters
            self.engine.eval()
            with torch.no_grad():
                self.engine(micro_batches[0].to(self.dtype))  # stage 3 leaves weights gathered
            self.engine.train()
        if checks and not moved > 1e-2:
            yield "nothing was predicted"


def _predictor(engine: Any, config: XGradConfig) -> Any:
    from hf_xgrad.deepspeed import ZeroPredictor

    return ZeroPredictor(engine, config)


def _step(optimizer: Any) -> Any:
    return next(iter(optimizer.state.values()))["step"]


def _reads(case: dict[str, Any]) -> Iterator[str]:
    inside, outside = Case(**case), Case(**case)
    yield from inside.train(checks=True, skipped=3 if case["stage"] > 0 else None)
    yield from (f"step outside: {problem}" for problem in outside.train(checks=True, step_inside=False))
    if case["stage"] > 0 and inside.engine.skipped_steps != 1:
        yield f"{inside.engine.skipped_steps} steps were skipped"
    own = any(kept.data_ptr() != p.data_ptr() for p, kept in kept_weights(inside.predictor).items())
    if own is not (case["rule"] == "last_update" or is_in_place(inside.predictor)):
        yield f"masters were {'' if own else 'not '}copied"
    if is_in_place(inside.predictor) != case.get("in_place", case["dtype"] == "fp32" and case["stage"] == 0):
        yield "masters and compute weights are not where they were thought to be"


def _twin(case: dict[str, Any]) -> Iterator[str]:
    zero = Case(**case)
    yield from zero.train()
    diagnostics = zero.predictor.diagnostics()
    alone = model()
    optimizer = torch.optim.Adam(alone.parameters(), lr=0.05)
    for predicts in (True, False):
        predictor = WeightPredictor(optimizer, XGradConfig(steps=1.0, rule=case["rule"], enabled=predicts))
        for t, micro_batches in enumerate(batches(0, 1)):
            predictor.measure(t == STEPS - 1)
            for batch in micro_batches:
                with predictor.predicted():
                    (alone(batch).square().mean() / MICRO_BATCHES).backward()
            optimizer.step()
            optimizer.zero_grad()
        far = max((w - zero.masters()[name]).abs().max().item() for name, w in alone.named_parameters())
        if predicts is not (far < 1e-5):
            yield f"{far} from one process that {'predicts' if predicts else 'does not predict'}"
        if predicts and diagnostics != pytest.approx(predictor.diagnostics(), abs=1e-4):
            yield f"diagnostics: {diagnostics}"
        alone = model()
        optimizer = torch.optim.Adam(alone.parameters(), lr=0.05)


def _pieces(case: dict[str, Any]) -> Iterator[str]:
    whole, cut = Case(**case), Case(**case)
    yield from whole.train()
    with pytest.MonkeyPatch.context() as patch:
        in_chunks(patch, 7)
        yield from cut.train()
    a, b = whole.masters(), cut.masters()
    if not all(torch.equal(a[name], b[name]) for name in a):
        yield "cutting partitions has changed the weights"


def _fails(case: dict[str, Any], error_class: type[BaseException]) -> Iterator[str]:
    trained = Case(**case)
    yield from trained.train()
    raised: BaseException | None = None
    try:
        with trained.predictor.predicted():
            trained.engine(batches(0, 1)[0][0].to(trained.dtype))
            raise error_class
    except error_class as error:
        raised = error
    own = all(
        torch.equal(compute, master.to(compute.dtype))
        for master, compute in compute_weights(trained.predictor).items()
    )
    if not own:
        yield "this process's own weights are not the true ones"
    note = " ".join(getattr(raised, "__notes__", []))
    if ("update_lp_params" in note) is not (case["stage"] in (1, 2)):
        yield f"notes: {note!r}"
    if case["stage"] in (1, 2) and trained.is_true():
        yield "communicated, though others might not have followed"
    trained.predictor.refresh()
    if not trained.is_true():
        yield "refresh() has not brought the true weights back"


CHECKS: dict[str, Any] = {
    **{f"reads-{name}": lambda case=case: _reads(case) for name, case in CASES.items()},
    **{
        f"{name}-stage{stage}-{rule}": lambda check=check, stage=stage, rule=rule: check(
            {"stage": stage, "dtype": "fp32", "rule": rule}
        )
        for name, check in {"twin": _twin, "pieces": _pieces}.items()
        for stage in PARTITIONED
        for rule in RULES
    },
    **{
        f"fails-stage{stage}-{dtype}-{error.__name__}": lambda stage=stage, dtype=dtype, error=error: _fails(
            {"stage": stage, "dtype": dtype, "rule": "closed_form"}, error
        )
        for stage in PARTITIONED
        for dtype in ("fp32", "bf16")
        for error in (ValueError, KeyboardInterrupt)
    },
}


def _problems(found: Iterator[str]) -> list[str]:
    """What a check finds; an error, which comes to all processes alike, ends only this check."""
    problems = []
    try:
        for problem in found:
            problems.append(problem)
    except Exception:
        problems.append(traceback.format_exc())
    return problems


def work(out: Path) -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Compiling it would take minutes; the usual communication does as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on CPUs, but right
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    results = {}
    for name, check in CHECKS.items():
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, _problems(check()))
        results[name] = [f"process {i}: {problem}" for i, problems in enumerate(everywhere) for problem in problems]
        if dist.get_rank() == 0:
            out.write_text(json.dumps(results))
    dist.destroy_process_group()


# ---- tests ----

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[str]], str]:
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["timeout", "--kill-after=10", "280", sys.executable, "-m", *launcher, __file__, str(folder / "found")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    results = json.loads((folder / "found").read_text()) if (folder / "found").exists() else {}
    return results, done.stdout[-2000:] + done.stderr[-6000:]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.xdist_group("deepspeed")
@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(found: tuple[dict[str, list[str]], str], check: str) -> None:
    results, log = found
    assert check in results, f"the worker ended before this check:\n{log}"
    assert not results[check], "\n".join(results[check])


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device='nvme'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device='nvme'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio=0.5"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "super_offload=True"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow="),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size=8"),
        ({"zero_optimization": {"mics_shard_size": 4}}, "mics_shard_size=4"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights=True"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size=2"),
        ({"compile": {"deepcompile": True}}, "deepcompile=True"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled=True"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast="),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type='OneBitAdam'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_by_name(config: dict[str, Any], setting: str) -> None:
    with pytest.raises(ValueError, match=r"is refused: .*switch XGrad off") as caught:
        check_deepspeed(config)
    assert setting in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "cpu"},
            }
        },
        {"zero_optimization": {"offload_param": None, "offload_optimizer": {"device": "none", "ratio": 1.0}}},
        {"zero_optimization": {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "mics_shard_size": -1}},
        {"tensor_parallel": {"autotp_size": 1}, "compile": {"deepcompile": False}, "hybrid_engine": None},
        {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "optimizer": {"type": "AdamW"}},
        {"torch_autocast": {"enabled": False, "dtype": "float16"}, "optimizer": {"type": "auto"}},
    ],
)
def test_what_is_not_refused(config: dict[str, Any]) -> None:
    check_deepspeed(config)


def named(name: str) -> type:
    """A class with the name of one of DeepSpeed's; its own need extensions that take minutes to compile."""
    module, _, own = f"deepspeed.ops.{name}".rpartition(".")
    return type(own, (), {"__module__": module})


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["adam.fused_adam.FusedAdam", "adam.cpu_adam.DeepSpeedCPUAdam"])
def test_closed_form_of_deepspeeds_adam(name: str, corrected: bool) -> None:
    form = closed_form_of(named(name))
    assert form is not None
    m, v, w = torch.tensor([0.3, -0.2, 0.0]), torch.tensor([0.04, 0.09, 0.0]), torch.zeros(3)
    group = {"betas": (0.9, 0.99), "eps": 1e-3, "lr": 0.1, "weight_decay": 0.5, "bias_correction": corrected}
    delta = form.direction([w], [{"exp_avg": m, "exp_avg_sq": v, "step": 3}], group)
    assert isinstance(delta, Direction)
    if corrected:
        m, v = m / (1 - 0.9**3), v / (1 - 0.99**3)
    torch.testing.assert_close(delta.moves(-0.1), [-0.1 * m / (v.sqrt() + 1e-3)])
    assert form.decay is not None
    assert form.decay(group) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["lion.fused_lion.FusedLion", "lion.cpu_lion.DeepSpeedCPULion"])
def test_closed_form_of_deepspeeds_lion(name: str) -> None:
    form = closed_form_of(named(name))
    assert form is not None
    delta = form.direction([torch.zeros(3)], [{"exp_avg": torch.tensor([0.3, -0.2, 0.0])}], {})
    assert torch.equal(delta.moves(1.0)[0], torch.tensor([1.0, -1.0, 0.0]))


def test_fused_adam_counts_the_steps_of_one_weight_of_each_group() -> None:
    form = closed_form_of(named("adam.fused_adam.FusedAdam"))
    assert form is not None
    one, two = (torch.optim.SGD([torch.zeros(1, requires_grad=True) for _ in range(count)]) for count in (1, 2))
    assert form.obstacle(one, one.param_groups[0]) is None
    assert "counts the steps of only one weight" in str(form.obstacle(two, two.param_groups[0]))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
