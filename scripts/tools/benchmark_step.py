"""Measures what a training step costs with XGrad, as a ratio to the same step without it.

    python scripts/benchmark_step.py --output outputs/benchmark_step.json
    python scripts/benchmark_step.py --xgrad_steps auto --output outputs/benchmark_auto.json

The second measures what choosing s costs: a step with s = auto as a ratio to the same step with s = 1. Both run in one
process on the same model and batch, alternating step by step, so that whatever else the machine does meets both alike.
Printed are the median ratio over all pairs of steps and its quartiles.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from hf_xgrad import WeightPredictor, XGradConfig
from hf_xgrad.core.config import AUTO_STEPS
from hf_xgrad.optim import AdaM3
from hf_xgrad.recipes.arguments import ScriptParser
from hf_xgrad.recipes.input_errors import InputError, run_script
from hf_xgrad.recipes.results import format_table, write_json
from hf_xgrad.trainer.arguments import Steps

PROG = "benchmark_step.py"
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-5),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
    "sgd_momentum": lambda params: torch.optim.SGD(params, lr=1e-5, momentum=0.9),
    "adam3": lambda params: AdaM3(params, lr=1e-5),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-5),
}


@dataclass
class BenchmarkArguments:
    """A BERT classifier from config, by default of the size of MiniLM-L6 (22 million weights)."""

    optimizers: list[str] = field(
        default_factory=lambda: list(OPTIMIZERS), metadata={"help": f"Some of {', '.join(OPTIMIZERS)}."}
    )
    rules: list[str] = field(
        default_factory=lambda: ["auto", "last_update"], metadata={"help": "Prediction rules to measure."}
    )
    xgrad_steps: Steps = field(
        default=1.0,
        metadata={"help": "s, measured against the plain optimizer; auto is measured against s = 1."},
    )
    layers: int = field(default=6, metadata={"help": "Number of layers."})
    hidden_size: int = field(default=384, metadata={"help": "Width of the model."})
    batch_size: int = field(default=16, metadata={"help": "Sentences in a batch."})
    length: int = field(default=64, metadata={"help": "Tokens in a sentence."})
    pairs: int = field(default=20, metadata={"help": "Pairs of steps measured; three more go before them unmeasured."})
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where the model is trained."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results and the machine."})

    def __post_init__(self) -> None:
        self.xgrad_steps = XGradConfig.from_args(self).steps
        for rule in self.rules:
            XGradConfig(rule=rule)


class Training:
    """A model, its optimizer and its predictor."""

    def __init__(self, args: BenchmarkArguments, optimizer: str, config: XGradConfig) -> None:
        torch.manual_seed(0)
        bert = BertConfig(
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.hidden_size // 32),
            intermediate_size=4 * args.hidden_size,
        )
        with torch.device(args.device):
            self.model = BertForSequenceClassification(bert)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.predictor = WeightPredictor(self.optimizer, config)
        ids = torch.randint(0, bert.vocab_size, (args.batch_size, args.length), device=args.device)
        self.batch = {"input_ids": ids, "labels": ids[:, 0] % 2}
        self.on_gpu = args.device.startswith("cuda")

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds_of_a_step(self) -> float:
        self._wait()
        start = time.perf_counter()
        with self.predictor.predicted():
            self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - start


def measure(args: BenchmarkArguments, optimizer: str, rule: str) -> dict[str, Any]:
    """Ratios of steps with `rule` to steps without XGrad, or of s = auto to s = 1."""
    config = XGradConfig(steps=args.xgrad_steps, rule=rule)
    against = XGradConfig(enabled=args.xgrad_steps == AUTO_STEPS, steps=1.0, rule=rule)
    plain, xgrad = Training(args, optimizer, against), Training(args, optimizer, config)
    pairs = []
    for i in tqdm(range(args.pairs + 3), desc=f"{optimizer}, {rule}", leave=False):
        # Which of the two goes first changes every time: the second finds warmer caches.
        order = (plain, xgrad) if i % 2 else (xgrad, plain)
        seconds = {training: training.seconds_of_a_step() for training in order}
        if i >= 3:
            pairs.append((seconds[plain], seconds[xgrad]))
    low, median, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    return {
        "optimizer": optimizer,
        "rule": rule,
        "ratio": median,
        "ratio_first_quartile": low,
        "ratio_third_quartile": high,
        "against_seconds": statistics.median(a for a, _ in pairs),
        "xgrad_seconds": statistics.median(b for _, b in pairs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    return run_script(PROG, _run, arguments)


def _run(arguments: list[str]) -> None:
    parser = ScriptParser(BenchmarkArguments, prog=PROG, description=(__doc__ or "").splitlines()[0])
    (args,) = parser.parse(arguments)
    unknown = [name for name in args.optimizers if name not in OPTIMIZERS]
    if unknown:
        raise InputError(f"--optimizers {unknown[0]} is not one of {', '.join(OPTIMIZERS)}")
    results = [measure(args, optimizer, rule) for optimizer in args.optimizers for rule in args.rules]
    against = "s = 1" if args.xgrad_steps == AUTO_STEPS else "plain"
    header = ("optimizer", "rule", "ratio", "1st quartile", "3rd quartile", f"{against}, seconds", "XGrad, seconds")
    print(format_table(header, [list(result.values()) for result in results]))
    if args.output:
        on_gpu = args.device.startswith("cuda")
        machine = {
            "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output), {"machine": machine, "settings": asdict(args), "results": results})


if __name__ == "__main__":
    sys.exit(main())
