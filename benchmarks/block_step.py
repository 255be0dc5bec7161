"""Where a step of one block's fit goes: eager, recorded as a CUDA graph, compiled, both; beside the block alone.

    python benchmarks/block_step.py --out results.json [--shapes cot-22m llama-3.1-8b] [--methods ...] [--steps 60]
        [--blocks 4]

Random weights of real shapes, all ways in one run, by mean squared error on the same rows. "block" is the forward and
backward pass of the block with its own weights as parameters, in the computing type: no quantizer, no optimiser. A
step's time is that of all after the first ten over their number, waited for only at the end, as in a run. The losses of
every way are compared with those of the eager one. With more --blocks, that are learned together, one way runs each
once more going backward, as where there is no memory for all their activations. The largest kernels of the fastest way
are listed by the profiler.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lfq_cost import SHAPES, RandomSource
from torch import Tensor, nn
from transformers import LlamaConfig

from logitwise import learnable
from logitwise.descent import Schedule
from logitwise.fit import Data, Window, fit
from logitwise.grid import Grid
from logitwise.machine import versions
from logitwise.objectives import OBJECTIVES
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.recipe import Recipe
from logitwise.skeleton import Skeleton
from logitwise.watch import Stage

CUDA = torch.cuda.is_available()
ROWS = {"cot-22m": (8, 256), "llama-3.1-8b": (8, 2048), "toy": (2, 32)}
COT = dict(hidden_size=384, intermediate_size=1024, num_attention_heads=6, num_key_value_heads=2, vocab_size=8192)
WAYS = {  # compiled, recorded, run again
    "eager": (False, False, False),
    "run again": (False, False, True),
    "recorded": (False, True, False),
    "compiled": (True, False, False),
    "compiled and recorded": (True, True, False),
}
WARM = 10


class Clock(Stage):
    """Seconds of the steps after the first few, waited for twice only."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.began, self.seconds = steps, 0, 0.0, 0.0

    def advance(self, units: float = 1, detail: str = "") -> None:
        self.done += 1
        if self.done in (WARM, self.steps):
            wait()
            self.seconds, self.began = time.perf_counter() - self.began, time.perf_counter()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def main() -> None:
    """A line for each way, then the profile of the fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["cot-22m", "llama-3.1-8b"], choices=ROWS)
    parser.add_argument("--methods", nargs="+", default=["flexround"], choices=QUANTIZERS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--blocks", type=int, default=1, help="learned together")
    parser.add_argument("--dtype", default="bfloat16" if CUDA else "float32", help="that blocks are computed in")
    given = parser.parse_args()
    found = []
    for shape in given.shapes:
        config = dict(COT if shape == "cot-22m" else SHAPES[shape])
        config.pop("depth", None)
        device, dtype = "cuda" if CUDA else "cpu", getattr(torch, given.dtype)
        made = LlamaConfig(**config, num_hidden_layers=given.blocks, tie_word_embeddings=False, dtype="bfloat16")
        skeleton = Skeleton(RandomSource(made), torch.device(device), dtype)
        rows, tokens = ROWS[shape]
        ids = torch.randint(made.vocab_size, (2 * rows, tokens), generator=torch.Generator().manual_seed(0))
        window = Window(skeleton, range(given.blocks), skeleton.calls(tokens), lambda slot: False)
        student = skeleton.embed(ids)
        teacher = student.clone()
        window.advance(teacher, {}, rows)
        data = Data(student, teacher, torch.ones(ids.shape, device=device), ids.to(device), len(ids), 0)
        block = seconds_of(plain(window, student[:rows]), given.steps)
        found.append({"shape": shape, "way": "block", "step_ms": 1e3 * block})
        print(f"{shape}, {given.blocks} blocks alone: {1e3 * block:.2f} ms", flush=True)
        for method in given.methods:
            losses: dict[str, Tensor] = {}
            times = {}
            weights = sum(slot.out_features * slot.in_features for slot in window.slots)
            for way, (compiled, recorded, again) in WAYS.items():
                if (recorded and (weights > RECORDED or not CUDA)) or (again and given.blocks == 1):
                    continue
                go(window, compiled, recorded, again)
                times[way], peak, losses[way] = learned(window, method, data, rows, given.steps)
                off = float(((losses[way] - losses["eager"]) / losses["eager"]).abs().max())
                row = {"shape": shape, "method": method, "way": way, "step_ms": 1e3 * times[way], "peak_mib": peak}
                found.append({**row, "of_the_block": times[way] / block, "losses_off": off})
                against = (
                    f"{times[way] / block:.2f} of the block, {times['eager'] / times[way]:.2f} times as fast as eager"
                )
                end = f"losses off by {off:.1e}; {peak:.0f} MiB"
                print(f"{shape} {method}, {way}: {1e3 * times[way]:.2f} ms a step, {against}; {end}", flush=True)
            fastest = min(times, key=lambda way: times[way])
            go(window, *WAYS[fastest])
            if CUDA:
                found.append({"shape": shape, "method": method, "profile": profile(window, method, data, rows)})
        del window, data, student, teacher
    about = {"device": torch.cuda.get_device_name() if CUDA else "cpu", "versions": versions()}
    given.out.write_text(json.dumps({**about, "arguments": sys.argv[1:], "results": found}, indent=1))


RECORDED, FREE = learnable.RECORDED_WEIGHTS, learnable.free_memory


def go(window: Window, compiled: bool, recorded: bool, again: bool) -> None:
    """Fits from here on go this way."""
    window.compiled, learnable.RECORDED_WEIGHTS = compiled, RECORDED if recorded else 0
    learnable.free_memory = (lambda device: 0) if again else FREE


def learned(window: Window, method: str, data: Data, rows: int, steps: int) -> tuple[float, float, Tensor]:
    """Seconds a step of a fit, its peak memory in MiB, and its losses."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    quantizers = window.quantizers(QUANTIZERS[method], lambda _: Grid(2, 64, False), STARTS["minmax"])
    clock, schedule = Clock(WARM + steps), Schedule(WARM + steps, rows, 1, Recipe(method=method).learning_of, 0)
    fitted = fit(window, quantizers, OBJECTIVES["mse"](), None, data, schedule, clock)
    peak = torch.cuda.max_memory_allocated() / 2**20 if CUDA else 0.0
    return clock.seconds / steps, peak, torch.tensor(fitted.course.losses)


def plain(window: Window, hidden: Tensor) -> Callable[[], None]:
    """The forward and backward pass of the blocks with their own weights as parameters."""
    dtype = window.skeleton.dtype
    weights = [
        {key: nn.Parameter(weight.to(dtype)) for key, weight in window.weights[block].items()}
        for block in window.blocks
    ]

    def act() -> None:
        leaving = hidden
        for block, own in zip(window.blocks, weights, strict=True):
            for weight in own.values():
                weight.grad = None
            leaving = window.skeleton.run(block, own, leaving, window.calls[block])
        leaving.square().mean().backward()

    return act


def seconds_of(act: Callable[[], None], steps: int) -> float:
    """Seconds of one call, of many without waiting between them."""
    for _ in range(WARM):
        act()
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        act()
    wait()
    return (time.perf_counter() - began) / steps


def profile(window: Window, method: str, data: Data, rows: int) -> list[dict[str, Any]]:
    """The kernels that take most of the GPU's time in twenty steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        learned(window, method, data, rows, 10)
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    kernels = []
    for event in events[:12]:
        share = event.self_device_time_total / total
        kernels.append({"kernel": event.key[:80], "calls": event.count, "share": share})
        print(f"  {share:6.1%} {event.count:6} {event.key[:90]}", flush=True)
    return kernels


if __name__ == "__main__":
    main()
