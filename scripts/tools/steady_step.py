"""Measures what `predicted()` adds to a step on tiny tensors, where Python and not arithmetic takes the time.

    python scripts/tools/steady_step.py --parameters 10 100 500 --json outputs/steady_step.json

The variants of a row alternate in random order in one process: the plain step of a twin optimizer, the step with a
predictor, and the step with the multi-tensor kernels alone that a prediction cannot do without. `added` and `kernels`
are differences to the plain step of the same round, so that whatever else the machine does meets all alike. In the
rows named auto `added` is what steps="auto" adds to steps=1.0. Times are microseconds: the median over all rounds, and
the quartiles in brackets.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import hf_xgrad
from hf_xgrad import WeightPredictor, XGradConfig

ELEMENTS, LR = 4, 1e-5
SHORTEST_NS = 5_000_000  # One measurement lasts at least this long: the clock itself then costs nothing.
CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.process_time_ns}
Call = Callable[[], Any]


class Kernels(NamedTuple):
    """The kernels of one rule, as calls without arguments."""

    predict: Call
    predict_again: Call  # For the later micro-batches of a window.
    restore: Call
    before_step: Call = lambda: None


def adam_kernels(optimizer: Optimizer, kept: list[Tensor]) -> Kernels:
    """Return the kernels of the closed form of Adam for the state that `optimizer` has now."""
    params, states, group = _lists(optimizer)
    m, v = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
    (beta1, beta2), k = group["betas"], float(states[0]["step"])
    root = (1 - beta2**k) ** 0.5
    eps, scalars = root * group["eps"], [-group["lr"] * (root / (1 - beta1**k))] * len(params)

    def predict() -> None:
        torch._foreach_copy_(kept, params)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, eps)
        torch._foreach_addcdiv_(params, m, denominators, scalars)

    return Kernels(predict, predict, lambda: torch._foreach_copy_(params, kept))


def sgd_kernels(optimizer: Optimizer, kept: list[Tensor]) -> Kernels:
    """Return the kernels of the closed form of SGD with momentum."""
    params, states, group = _lists(optimizer)
    buffers, alpha = [state["momentum_buffer"] for state in states], -group["lr"]

    def predict() -> None:
        torch._foreach_copy_(kept, params)
        torch._foreach_add_(params, buffers, alpha=alpha)

    return Kernels(predict, predict, lambda: torch._foreach_copy_(params, kept))


def last_update_kernels(optimizer: Optimizer, kept: list[Tensor]) -> Kernels:
    """Return the kernels of the last-update rule; `kept` holds the weights before the last step."""
    params, _, _ = _lists(optimizer)

    def predict() -> None:
        # Neither s nor the learning rate changes here: the scale is 1. Rounded to a difference, the move gives the
        # same weights to every micro-batch of the window.
        move = list(torch._foreach_lerp(kept, params, 2.0))
        torch._foreach_sub_(move, params)
        torch._foreach_copy_(kept, params)
        torch._foreach_add_(params, move)

    def predict_again() -> None:
        predicted = torch._foreach_add(params, kept)
        torch._foreach_copy_(kept, params)
        torch._foreach_copy_(params, predicted)

    def restore() -> None:
        # The move is kept, because the later micro-batches of the window need it.
        move = torch._foreach_sub(params, kept)
        torch._foreach_copy_(params, kept)
        torch._foreach_copy_(kept, move)

    return Kernels(predict, predict_again, restore, lambda: torch._foreach_copy_(kept, params))


def _lists(optimizer: Optimizer) -> tuple[list[Tensor], list[dict[str, Any]], dict[str, Any]]:
    (group,) = optimizer.param_groups
    return [p.detach() for p in group["params"]], [optimizer.state[p] for p in group["params"]], group


class Setting(NamedTuple):
    """An optimizer and how its weights are predicted."""

    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    rule: str
    kernels: Callable[[Optimizer, list[Tensor]], Kernels] | None  # None: steps="auto" is measured against steps=1.0.


_adamw = partial(torch.optim.AdamW, lr=LR, fused=True)
SETTINGS = {
    "adamw": Setting(_adamw, "closed_form", adam_kernels),
    "adamw_auto": Setting(_adamw, "closed_form", None),
    "sgd": Setting(partial(torch.optim.SGD, lr=LR, momentum=0.9), "closed_form", sgd_kernels),
    "last_update": Setting(_adamw, "last_update", last_update_kernels),
    "last_update_auto": Setting(_adamw, "last_update", None),
}


def make_optimizer(setting: Setting, parameters: int, device: str, seed: int) -> Optimizer:
    """Return an optimizer with gradients and a state; two calls with the same arguments give twins."""
    torch.manual_seed(seed)
    params = [nn.Parameter(1 + torch.rand(ELEMENTS).to(device)) for _ in range(parameters)]
    for p in params:
        p.grad = torch.randn(ELEMENTS).to(device)
    optimizer = setting.optimizer(params)
    optimizer.step()
    return optimizer


def make_variants(setting: Setting, parameters: int, args: argparse.Namespace) -> dict[str, Call]:
    """Return what alternates in a row, as calls: one call is one step, or the kernels of one step."""

    def twin() -> Optimizer:
        return make_optimizer(setting, parameters, args.device, args.seed)

    def with_predictor(config: XGradConfig) -> Call:
        optimizer = twin()
        predictor = WeightPredictor(optimizer, config)

        def step() -> None:
            for _ in range(args.micro_batches):
                with predictor.predicted():
                    pass
            optimizer.step()

        return step

    variants: dict[str, Call] = {"plain": twin().step}
    variants["fixed"] = with_predictor(XGradConfig(steps=1.0, rule=setting.rule))
    if setting.kernels is None:
        return {**variants, "auto": with_predictor(XGradConfig(steps="auto", rule=setting.rule))}
    optimizer = twin()
    predict, again, restore, before_step = setting.kernels(optimizer, [p.clone() for p in _lists(optimizer)[0]])
    calls = [predict, restore, *[again, restore] * (args.micro_batches - 1), before_step]
    # Within a step, as those of a prediction are: alone in a loop they would find all in the nearest cache.
    within: list[Call] = [*calls, optimizer.step]
    return {**variants, "with_kernels": lambda: [call() for call in within]}


def nanoseconds(call: Call, times: int, args: argparse.Namespace) -> int:
    """Return how long `times` calls take, the work that they leave to a GPU included."""
    wait: Call = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    clock = CLOCKS[args.clock]
    wait()
    start = clock()
    for _ in range(times):
        call()
    wait()
    return clock() - start


def measure(name: str, parameters: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: medians and quartiles of its variants, in microseconds."""
    variants = make_variants(SETTINGS[name], parameters, args)
    times = dict.fromkeys(variants, 1)
    for variant, call in variants.items():
        # This finds how many calls a measurement needs, and warms the variant up.
        while nanoseconds(call, times[variant], args) < SHORTEST_NS:
            times[variant] *= 2
    rounds: dict[str, list[float]] = {variant: [] for variant in variants}
    order, shuffle = list(variants), random.Random(args.seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(args.repeats):
            shuffle(order)  # Each variant finds the caches as the one before it has left them.
            for variant in order:
                spent = nanoseconds(variants[variant], times[variant], args)
                rounds[variant].append(spent / times[variant] / 1000)
    finally:
        gc.enable()
    more, less = ("auto", "fixed") if "auto" in variants else ("fixed", "plain")
    rounds["added"] = [a - b for a, b in zip(rounds[more], rounds[less], strict=True)]
    if "with_kernels" in variants:
        rounds["kernels"] = [a - b for a, b in zip(rounds["with_kernels"], rounds["plain"], strict=True)]
        # Ratios within a round: a slow phase of the machine lengthens both times alike.
        rounds["added/kernels"] = [a / b for a, b in zip(rounds["added"], rounds["kernels"], strict=True)]
    row: dict[str, Any] = {"parameters": parameters, "setting": name, "added_to": less}
    for variant, values in rounds.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        row[variant] = {"median": median, "first_quartile": low, "third_quartile": high}
    return row


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as aligned text, with "-" where a row has no such number."""
    lines = [["parameters", "setting", "plain step", "kernels", "added", "added/kernels"]]
    for row in rows:
        spreads = [row.get(variant) for variant in ("plain", "kernels", "added", "added/kernels")]
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*spread.values()) if spread else "-" for spread in spreads]
        lines.append([str(row["parameters"]), row["setting"], *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def machine(device: str) -> dict[str, Any]:
    """Return what the numbers depend on, beside the settings."""
    return {
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hf_xgrad": hf_xgrad.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every setting with every number of parameters, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, nargs="+", default=[10, 100, 500], help="numbers of parameters")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="rows to measure")
    parser.add_argument("--micro_batches", type=int, default=1, help="predictions per step")
    parser.add_argument("--repeats", type=int, default=50, help="rounds, each with all variants of a row")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu leaves out what other processes take")
    parser.add_argument("--device", default="cpu", help="where the parameters are: cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights, gradients and the order of the variants")
    parser.add_argument("--json", type=Path, help="file for all numbers and the machine")
    args = parser.parse_args(arguments)
    if min(*args.parameters, args.micro_batches, args.repeats - 1) < 1:
        parser.error("--parameters and --micro_batches must be 1 or more, and --repeats 2 or more")
    rows = [measure(name, parameters, args) for parameters in args.parameters for name in args.settings]
    print(format_table(rows))
    if args.json:
        settings = {**vars(args), "json": str(args.json)}
        content = {"machine": machine(args.device), "settings": settings, "unit": "microseconds", "results": rows}
        args.json.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
