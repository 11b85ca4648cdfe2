"""Prints what XGrad adds in memory and time on N GPUs: arithmetic for docs/scaling.md, nothing is measured.

    python scripts/scaling.py
    python scripts/scaling.py --billions 3 --gpus 4 16 --tokens 32768

The model is trained by AdamW in bf16 mixed precision, on nodes of eight H100; where the numbers and the equations come
from is in docs/scaling.md.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hf_xgrad.recipes.arguments import ScriptParser
from hf_xgrad.recipes.input_errors import run_script
from hf_xgrad.recipes.results import format_table

PROG = "scaling.py"

# One H100 SXM, as NVIDIA specifies it: nominal numbers, which no program reaches.
MEMORY = 80e9  # bytes
MEMORY_SPEED = 3.35e12  # bytes/s
FLOPS = 989e12  # dense, bf16
# What a collective brings to each GPU, in bytes/s: over NVLink within a node; across nodes by eight ports of 400 Gb/s,
# which together serve all eight GPUs of a node.
GPUS_OF_A_NODE = 8
NODE_SPEED = 450e9
NETWORK_SPEED = 8 * 400e9 / 8

# Bytes that XGrad's kernels read and write for each weight in a step: prediction and restoring.
CLOSED_FORM_BYTES = 56  # fp32 weights, in place, step counts on the device (as AdamW has them on a GPU)
MASTERS_BYTES = 54  # fp32 masters into bf16 compute weights, that is, without a copy to restore from


@dataclass(frozen=True)
class PerWeight:
    """An amount for each weight on one GPU, of which one part is divided by the number of GPUs."""

    whole: float = 0.0
    shared: float = 0.0

    def on(self, gpus: int) -> float:
        return self.whole + self.shared / gpus


@dataclass(frozen=True)
class Engine:
    """What an engine holds, and what XGrad adds to it (closed form, one micro-batch a step), in bytes."""

    name: str
    plain: PerWeight  # weights, gradients, the two moments of Adam
    copy: PerWeight
    traffic: PerWeight
    gathered: float = 0.0  # by one all-gather more

    def fits(self, weights: float, gpus: int) -> bool:
        return weights * (self.plain.on(gpus) + self.copy.on(gpus)) <= MEMORY


ENGINES = (
    Engine("DDP", PerWeight(16), PerWeight(4), PerWeight(CLOSED_FORM_BYTES)),
    Engine("FSDP", PerWeight(0, 16), PerWeight(0, 4), PerWeight(0, CLOSED_FORM_BYTES)),
    Engine("ZeRO-1", PerWeight(4, 12), PerWeight(), PerWeight(0, MASTERS_BYTES), gathered=2),
    Engine("ZeRO-2", PerWeight(2, 14), PerWeight(), PerWeight(0, MASTERS_BYTES), gathered=2),
    Engine("ZeRO-3", PerWeight(0, 16), PerWeight(), PerWeight(0, MASTERS_BYTES)),
)


@dataclass
class ScalingArguments:
    """Models, GPUs and the work of a step."""

    billions: list[float] = field(
        default_factory=lambda: [1.0, 7.0, 70.0, 405.0], metadata={"help": "Weights of the models, in billions."}
    )
    gpus: list[int] = field(default_factory=lambda: [1, 8, 64, 1024], metadata={"help": "Numbers of GPUs."})
    tokens: int = field(default=8192, metadata={"help": "Tokens in a micro-batch on one GPU."})
    utilisation: float = field(default=0.4, metadata={"help": "Share of its nominal speed that a GPU computes at."})

    def __post_init__(self) -> None:
        for name, values in (("billions", self.billions), ("gpus", self.gpus), ("tokens", [self.tokens])):
            for value in values:
                if not 0 < value < float("inf"):
                    raise ValueError(f"--{name} must be above 0 and finite, not {value}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"--utilisation must be above 0 and at most 1, not {self.utilisation}")


def step_seconds(weights: float, args: ScalingArguments) -> float:
    """Forward and backward of one micro-batch, 6 operations for each weight and token."""
    return 6 * weights * args.tokens / (args.utilisation * FLOPS)


def traffic_seconds(engine: Engine, weights: float, gpus: int) -> float:
    """What XGrad's kernels take to read and write the memory of a GPU."""
    return weights * engine.traffic.on(gpus) / MEMORY_SPEED


def gather_seconds(engine: Engine, weights: float, gpus: int) -> float:
    """What XGrad's own all-gather takes."""
    speed = NODE_SPEED if gpus <= GPUS_OF_A_NODE else NETWORK_SPEED
    return weights * engine.gathered * (gpus - 1) / gpus / speed


def largest_model(plain: PerWeight, added: PerWeight, gpus: int) -> float:
    """Weights whose states just fit."""
    return MEMORY / (plain.on(gpus) + added.on(gpus))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(PROG, _run, arguments)


def _run(arguments: list[str]) -> None:
    parser = ScriptParser(ScalingArguments, prog=PROG, description=(__doc__ or "").splitlines()[0])
    (args,) = parser.parse(arguments)
    print("Memory per GPU in GB: plain + XGrad; in brackets what does not fit in 80 GB\n")
    print(_table(args, lambda engine, weights, gpus: _memory(engine, weights, gpus)))
    print(
        f"\nXGrad's time in a step, in ms: memory, + all-gather, and share of forward and backward of {args.tokens} "
        f"tokens\nper GPU at {args.utilisation:.0%} utilisation; - where it does not fit\n"
    )
    print(_table(args, lambda engine, weights, gpus: _time(engine, weights, gpus, args)))
    print("\nLargest model in billions of weights, by weights, gradients and Adam alone: plain > with XGrad\n")
    print(format_table(("GPUs", *(engine.name for engine in ENGINES)), [_largest(gpus) for gpus in args.gpus]))


def _table(args: ScalingArguments, cell: Callable[[Engine, float, int], str | None]) -> str:
    rows = [
        [f"{_digits(billions)}B on {gpus}", *(cell(engine, billions * 1e9, gpus) for engine in ENGINES)]
        for billions in args.billions
        for gpus in args.gpus
    ]
    return format_table(("weights, GPUs", *(engine.name for engine in ENGINES)), rows)


def _memory(engine: Engine, weights: float, gpus: int) -> str:
    text = f"{_digits(weights * engine.plain.on(gpus) / 1e9)} + {_digits(weights * engine.copy.on(gpus) / 1e9)}"
    return text if engine.fits(weights, gpus) else f"({text})"


def _time(engine: Engine, weights: float, gpus: int, args: ScalingArguments) -> str | None:
    if not engine.fits(weights, gpus):
        return None
    traffic, gather = traffic_seconds(engine, weights, gpus), gather_seconds(engine, weights, gpus)
    share = (traffic + gather) / step_seconds(weights, args)
    gathering = f" + {_digits(1e3 * gather)}" if gather else ""
    return f"{_digits(1e3 * traffic)}{gathering}, {100 * share:.2g}%"


def _largest(gpus: int) -> list[str | float | None]:
    return [
        str(gpus),
        *(
            f"{_digits(largest_model(engine.plain, PerWeight(), gpus) / 1e9)} > "
            f"{_digits(largest_model(engine.plain, engine.copy, gpus) / 1e9)}"
            for engine in ENGINES
        ),
    ]


def _digits(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{float(f'{value:.3g}'):f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
