"""What LFQ costs beside MSE, on a model shaped like Llama-3.1-8B with random weights: time a step and peak memory.

    python benchmarks/lfq_cost.py --out results.json [--shape llama-3.1-8b] [--blocks 4] [--steps 30]

Each of `--blocks` blocks is fitted by MSE, then the last by LFQ, on the same rows; a step's time is the median. A whole
model's cost is arithmetic on these: all its blocks by MSE, against all but the last so and the last by LFQ, and that
with the MSE fit of the last beside it, which the verdict needs.
"""

import argparse
import json
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase

from logitwise.descent import Schedule
from logitwise.fit import Data, Window, fit
from logitwise.grid import Grid
from logitwise.machine import versions
from logitwise.objectives import OBJECTIVES
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.recipe import Recipe
from logitwise.skeleton import Skeleton
from logitwise.source.base import Source
from logitwise.watch import Stage

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        depth=32,
    ),
    "llama-3.1-70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        depth=80,
    ),
    "small": dict(
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        depth=8,
    ),
    "toy": dict(
        hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=301, depth=6
    ),
}


class RandomSource(Source):
    """A model of random weights that are made when they are read: nothing is on disk."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.name, self.config, self.dtype = "random", config, torch.bfloat16
        with torch.device("meta"):
            self.shapes = {n: tuple(p.shape) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str) -> torch.Tensor:
        shape, device = self.shapes[name], "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        if len(shape) == 1:
            return torch.ones(shape, dtype=self.dtype, device=device)
        return torch.randn(shape, generator=generator, dtype=self.dtype, device=device) * 0.02

    def tokenizer(self) -> PreTrainedTokenizerBase:
        raise AssertionError("rows are random too")

    @property
    def size_bytes(self) -> int:
        return sum(2 * torch.Size(shape).numel() for shape in self.shapes.values())


class Clock(Stage):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def advance(self, units: float = 1, detail: str = "") -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Seconds a step: the median, the first five apart."""
        return statistics.median(b - a for a, b in zip(self.times[5:], self.times[6:], strict=False))


def main() -> None:
    """Prints a line for each fit, then the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--row-tokens", type=int, default=512)
    given = parser.parse_args()
    shape = dict(SHAPES[given.shape])
    depth = shape.pop("depth")
    config = LlamaConfig(**shape, num_hidden_layers=given.blocks, tie_word_embeddings=False, dtype="bfloat16")
    cuda = torch.cuda.is_available()
    skeleton = Skeleton(
        RandomSource(config), torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2 * given.batch, given.row_tokens), generator=generator)
    calls, recipe = skeleton.calls(given.row_tokens), Recipe()
    teacher = skeleton.embed(ids)
    found = []
    for block in range(given.blocks):
        window = Window(skeleton, range(block, block + 1), calls, lambda slot: False)
        student = teacher.clone()
        window.advance(teacher, {}, given.batch)
        last = block == given.blocks - 1
        weights = torch.ones(ids.shape, device=skeleton.device)
        data = Data(student, teacher, weights, ids.roll(-1, 1).to(skeleton.device), len(ids), 0)
        for objective in ("mse", "lfq") if last else ("mse",):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            head = skeleton.head() if objective == "lfq" else None
            quantizers = window.quantizers(QUANTIZERS["flexround"], lambda _: Grid(3, 128, False), STARTS["minmax"])
            clock, schedule = Clock(), Schedule(given.steps, given.batch, 1, recipe.learning_of, 0)
            fit(window, quantizers, OBJECTIVES[objective](), head, data, schedule, clock)
            peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
            found.append({"block": block, "objective": objective, "step_ms": 1e3 * clock.step, "peak_mib": peak})
            print(f"block {block} {objective}: {1e3 * clock.step:.1f} ms a step, peak {peak:.0f} MiB", flush=True)
            del quantizers, head
        del window
    mse = statistics.mean(entry["step_ms"] for entry in found if entry["objective"] == "mse")
    own, lfq = found[-2], found[-1]
    head_mib = config.vocab_size * config.hidden_size * torch.tensor([], dtype=skeleton.dtype).element_size() / 2**20
    summary = {
        "depth": depth,
        "more_time": (lfq["step_ms"] - own["step_ms"]) / (depth * mse),
        "more_time_with_the_verdicts_mse_fit": lfq["step_ms"] / (depth * mse),
        "more_memory_mib": lfq["peak_mib"] - own["peak_mib"],
        "head_mib": head_mib,
    }
    print(
        f"of {depth} blocks: LFQ for MSE in the last takes {summary['more_time']:.1%} more time, beside it "
        f"{summary['more_time_with_the_verdicts_mse_fit']:.1%}; {summary['more_memory_mib']:.0f} MiB more memory, "
        f"of them the head {head_mib:.0f}"
    )
    about = {"device": torch.cuda.get_device_name() if cuda else "cpu", "versions": versions()}
    given.out.write_text(json.dumps({**about, "arguments": sys.argv[1:], "fits": found, **summary}, indent=1))


if __name__ == "__main__":
    main()
