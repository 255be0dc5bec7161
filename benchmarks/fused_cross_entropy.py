"""Soft cross-entropy from hidden states, forward and backward: time, memory and error beside other ways.

    python benchmarks/fused_cross_entropy.py --out results.json [--shapes 8192x4096x128256 ...] [--repeats 20]

A shape is positions x hidden width x vocabulary; hidden states and head are bfloat16 on CUDA, float32 elsewhere. All
ways are given the same frozen head and find the gradient to the student's hidden states:

- products: the three matrix products alone, of all positions at once, the projections with float32 output;
- products, chunked: the same in the chunks that triton takes, so that triton's own cost is what it takes beyond;
- triton, eager: `soft_triton.soft_cross_entropy` and `soft.eager`;
- naive: the definition, through autograd, on the logits of all positions, projected in their type and cast to float32;
- liger jsd: LigerFusedLinearJSD with beta 0, which is KL(teacher || student);
- liger chunked: LigerFusedLinearJSDLoss with beta 0 and no hard loss; it computes the head's gradient too.

Times are medians over repeats in which the ways take turns, after two calls that do not count; naive, whose memory
pushes others' out of the allocator, is timed after the rest. Memory is the peak above what is allocated before the
call. Errors are those of the first 64 positions, as a batch of their own, against float64. What cannot run here is
said and left out.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitwise.head import Head
from logitwise.machine import versions
from logitwise.objectives import reference, soft

SHAPES = ["8192x4096x128256", "16384x4096x128256", "8192x4096x151936", "16384x4096x151936"]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
CHECKED = 64


@dataclass
class Given:
    """One batch, its head, and something like slopes [positions, vocabulary] for the products alone."""

    student: Tensor
    teacher: Tensor
    weights: Tensor
    head: Head
    slopes: Tensor | None = None

    def first(self, count: int) -> "Given":
        """The first `count` positions as a batch of their own."""
        student = self.student[:count].detach().clone().requires_grad_()
        return Given(student, self.teacher[:count], self.weights[:count], self.head)


Way = Callable[[Given], Tensor | None]
"""Runs forward and backward and returns the loss, if it has one."""


def make(tokens: int, d: int, vocabulary: int) -> Given:
    torch.manual_seed(0)
    # Logits of deviation 3, and a student whose hidden states are off by a third.
    weight = torch.randn(vocabulary, d, device=DEVICE, dtype=DTYPE).mul_(3 / d**0.5)
    teacher = torch.randn(tokens, d, device=DEVICE)
    student = (teacher + torch.randn(tokens, d, device=DEVICE) / 3).to(DTYPE).requires_grad_()
    slopes = torch.randn(tokens, vocabulary, device=DEVICE, dtype=DTYPE).div_(vocabulary)
    head = Head({}, weight, None, 1.0, None)
    return Given(student, teacher.to(DTYPE), torch.ones(tokens, device=DEVICE), head, slopes)


def product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if CUDA else a @ b


def products(given: Given) -> None:
    assert given.slopes is not None
    with torch.no_grad():
        product(given.student, given.head.weight.T)
        product(given.teacher, given.head.weight.T)
        product(given.slopes, given.head.weight)


def run(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def eager(given: Given) -> Tensor:
    return run(soft.eager(given.student, given.teacher, given.weights, given.head).cross_entropy)


def naive(given: Given) -> Tensor:
    z_student, z_teacher = ((x @ given.head.weight.T).float() for x in (given.student, given.teacher))
    return run(reference.soft_cross_entropy(z_student, z_teacher, given.weights))


def triton_ways() -> dict[str, Way]:
    from logitwise.objectives import soft_triton

    def ours(given: Given) -> Tensor:
        return run(soft_triton.soft_cross_entropy(given.student, given.teacher, given.weights, given.head)[0])

    def chunked(given: Given) -> None:
        assert given.slopes is not None
        weight = given.head.weight
        rows = soft_triton.chunk_rows(len(weight), given.student.nbytes)
        z = soft_triton._projections(2 * rows, len(weight), weight.device)
        out = torch.empty(rows, weight.shape[1], device=DEVICE)
        with torch.no_grad():
            parts = (x.split(rows) for x in (given.student, given.teacher, given.slopes))
            for student, teacher, slopes in zip(*parts, strict=True):
                n = len(student)
                soft_triton._product(torch.cat((student, teacher)), weight.T, out=z[: 2 * n])
                soft_triton._product(slopes, weight, out=out[:n])

    return {"products, chunked": chunked, "triton": ours}


def liger_ways() -> dict[str, Way]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=0.0)
    chunked = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def fused(given: Given) -> Tensor:
        weight = given.head.weight
        return run(jsd(given.student, weight, given.teacher, weight, None))

    def by_chunks(given: Given) -> Tensor:
        weight = given.head.weight
        labels = torch.zeros(len(given.student), dtype=torch.int64, device=DEVICE)
        return run(chunked(given.student, weight, given.teacher, weight, labels))

    return {"liger jsd": fused, "liger chunked": by_chunks}


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(way: Way, given: Given) -> float:
    given.student.grad = None
    synchronize()
    if not CUDA:
        began = time.perf_counter()
        way(given)
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    way(given)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_mib(way: Way, given: Given) -> float | None:
    given.student.grad = None
    if not CUDA:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way(given)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def truth(given: Given) -> dict[str, Tensor]:
    """Cross-entropy, divergence and gradient in float64."""
    weight = given.head.weight.double()
    student = given.student.detach().double().requires_grad_()
    z_student, z_teacher = student @ weight.T, given.teacher.double() @ weight.T
    loss = reference.soft_cross_entropy(z_student, z_teacher, given.weights.double())
    loss.backward()
    assert student.grad is not None
    kl = reference.divergence(z_student, z_teacher).mean()
    return {"cross-entropy": loss.detach(), "kl": kl.detach(), "gradient": student.grad}


def errors(name: str, way: Way, given: Given, exact: dict[str, Tensor]) -> dict[str, float]:
    """Of the loss, relative; of the gradient, in norm and of the worst element beside its row's largest."""
    given.student.grad = None
    loss, expected = way(given), exact["kl" if name.startswith("liger") else "cross-entropy"]
    assert loss is not None
    assert given.student.grad is not None
    off = (given.student.grad.double() - exact["gradient"]).abs()
    return {
        "loss": float((loss.double() - expected).abs() / expected),
        "gradient": float(off.norm() / exact["gradient"].norm()),
        "worst": float((off / exact["gradient"].abs().amax(-1, keepdim=True)).max()),
    }


def stages(given: Given) -> dict[str, float]:
    """Milliseconds of one chunk's projection, kernel and gradient product, each the median of 20."""
    from logitwise.objectives import soft_triton

    weight = given.head.weight
    n = min(soft_triton.chunk_rows(len(weight), given.student.nbytes), len(given.student))
    hidden = torch.cat((given.student[:n], given.teacher[:n])).detach()
    z = soft_triton._projections(2 * n, len(weight), weight.device)
    out = torch.empty(n, weight.shape[1], device=DEVICE)
    slopes = z[:n].view(DTYPE)[:, : len(weight)]
    parts: dict[str, Callable[[], Any]] = {
        "projection": lambda: soft_triton._product(hidden, weight.T, out=z),
        "kernel": lambda: soft_triton._slopes(z, given.head, 1.0),
        "gradient": lambda: soft_triton._product(slopes, weight, out=out),
    }
    times: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(22):
        for part, act in parts.items():
            times[part].append(1000 * seconds(lambda _, act=act: act(), given))
    return {"rows": n, **{part: statistics.median(found[2:]) for part, found in times.items()}}


def measure(given: Given, ways: dict[str, Way], repeats: int) -> dict[str, dict[str, Any]]:
    """Each way's figures; a way that fails or does not fit has its reason instead."""
    checked = given.first(CHECKED)
    exact = truth(checked)
    found: dict[str, dict[str, Any]] = {}
    for group in ([name for name in ways if name != "naive"], ["naive"]):
        times: dict[str, list[float]] = {}
        for name in group:
            try:
                row = {} if name.startswith("products") else {"errors": errors(name, ways[name], checked, exact)}
                for _ in range(2):
                    seconds(ways[name], given)
                found[name] = {**row, "peak_mib": peak_mib(ways[name], given)}
                times[name] = []
            except Exception as error:  # another package's, or out of memory
                found[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                print(f"{name} is left out: {found[name]['skipped']}", flush=True)
            given.student.grad = None
        for _ in range(repeats):
            for name in times:
                times[name].append(seconds(ways[name], given))
        for name, taken in times.items():
            found[name]["ms"] = 1000 * statistics.median(taken)
            found[name]["ms_range"] = [1000 * min(taken), 1000 * max(taken)]
        given.slopes = None  # room for naive
        if CUDA:
            torch.cuda.empty_cache()
    return found


def table(shape: str, found: dict[str, dict[str, Any]]) -> list[str]:
    base = found["products"].get("ms")
    lines = [f"{shape:32} {'ms':>9} {'/products':>9} {'peak MiB':>9} {'loss err':>9} {'grad err':>9}"]
    for name, row in found.items():
        if "ms" not in row:
            lines.append(f"  {name:30} {row['skipped'][:60]}")
            continue
        ratio = f"{row['ms'] / base:9.3f}" if base else f"{'':9}"
        peak = f"{'':9}" if row["peak_mib"] is None else f"{row['peak_mib']:9.0f}"
        off = "".join(f" {row['errors'][of]:9.2e}" for of in ("loss", "gradient")) if "errors" in row else ""
        lines.append(f"  {name:30} {row['ms']:9.2f} {ratio} {peak}{off}")
    return lines


def commit() -> str:
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()

    ways: dict[str, Way] = {"products": products}
    if CUDA:
        for source in (triton_ways, liger_ways):
            try:
                ways |= source()
            except ImportError as error:
                print(f"{source.__name__} are left out: {error}", flush=True)
    else:
        print("triton and liger are left out: no GPU", flush=True)
    ways |= {"eager": eager, "naive": naive}

    results, lines = [], []
    for shape in arguments.shapes:
        given = make(*map(int, shape.split("x")))
        found = measure(given, ways, arguments.repeats)
        one_chunk = stages(given) if "ms" in found.get("triton", {}) else None
        results.append({"shape": shape, "dtype": str(DTYPE), "ways": found, "one_chunk_ms": one_chunk})
        lines += table(shape, found)
        if one_chunk:
            lines.append("  one chunk: " + ", ".join(f"{part} {value:.4g}" for part, value in one_chunk.items()))
        del given
    about = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor(),
        "versions": {**versions(), **{name: version(name) for name in ("triton", "liger_kernel")}},
        "commit": commit(),
        "arguments": sys.argv[1:],
        "repeats": arguments.repeats,
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(about, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
