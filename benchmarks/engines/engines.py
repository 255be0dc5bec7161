"""The engines: what each loads, how near its log-probabilities must come to ours, and what it is known not to run."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import IO, Any

import torch
from cases import KINDS, RELABELLED, Case

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Gate:
    """The most by which log-probabilities of the same tokens may differ, in nats.

    Args:
        largest: of any token.
        mean: of all, without their signs.
        likelihood: of the means over all tokens, where errors of both signs cancel.
    """

    largest: float = inf
    mean: float = inf
    likelihood: float = inf

    def met(self, found: "Difference") -> bool:
        return found.largest <= self.largest and found.mean <= self.mean and abs(found.likelihood) <= self.likelihood

    def __str__(self) -> str:
        names = {"largest": "largest", "mean": "mean", "likelihood": "of the mean"}
        limits = {said: getattr(self, name) for name, said in names.items()}
        return ", ".join(f"{said} {limit:g}" for said, limit in limits.items() if limit < inf)


@dataclass(frozen=True)
class Difference:
    """An engine's log-probabilities less ours: as `Gate` has them, and both perplexities."""

    largest: float
    mean: float
    likelihood: float
    perplexity: float
    perplexity_ours: float

    @classmethod
    def of(cls, found: torch.Tensor, ours: torch.Tensor) -> "Difference":
        apart = found - ours
        return cls(
            float(apart.abs().max()),
            float(apart.abs().mean()),
            float(apart.mean()),
            float((-found.mean()).exp()),
            float((-ours.mean()).exp()),
        )


@dataclass(frozen=True)
class Engine:
    """How an engine is asked and judged.

    Args:
        name: also that of its environment, `.venv-NAME`.
        words: its script, and what the script is told.
        formats: what it loads, by name.
        gate: of a checkpoint.
        fails: whether it is known not to run a checkpoint here; it then may, but must meet the gate if it does.
        misreads: what it is known to leave out of a checkpoint, in words: such must miss the gate.
        asked: whether it is asked about a small checkpoint at all.
    """

    name: str
    words: tuple[str, ...]
    formats: tuple[str, ...]
    gate: Callable[[Case], Gate]
    fails: Callable[[Case], bool] = lambda case: False
    misreads: Callable[[Case], str] = lambda case: ""
    asked: Callable[[Case], bool] = lambda case: True

    @property
    def python(self) -> Path:
        """That of its environment, as the Makefile makes it; transformers is in logitwise's own."""
        return Path(sys.executable) if self.name == "transformers" else ROOT / f".venv-{self.name}" / "bin" / "python"


def _transformers(case: Case) -> Gate:
    """Exact, but for weights that transformers itself computes in the 16 bits of asymmetric layers' scales."""
    grid = case.grid if case.format == "compressed-tensors" else None
    rounds = grid is not None and not grid.symmetric and grid.scale_dtype != torch.float32
    return Gate(largest=1e-2 if rounds else 1e-6)


def _transformers_fails(case: Case) -> bool:
    """Of a GGUF file it does not read the size of Qwen3's heads."""
    return case.format == "gguf" and "qwen3" in case.model


def _transformers_misreads(case: Case) -> str:
    """Of a GGUF file it does not read a Llama's attention biases."""
    return "transformers reads no biases" if case.format == "gguf" and "attention_bias" in case.model else ""


def _transformers_asked(case: Case) -> bool:
    """Of GGUF, whose weights it only dequantizes, a grid of each type."""
    return case.format != "gguf" or case.wrong or (case.grid in KINDS and not case.dense)


def _llama_cpp(case: Case) -> Gate:
    """Beside codes llama.cpp rounds activations to 8 bits."""
    return Gate(largest=1e-4) if case.dense else Gate(mean=0.3, likelihood=0.03)


def _gptqmodel_fails(case: Case) -> bool:
    """Its 4-bit product on a CPU has no groups of more than 256 inputs."""
    return case.grid is not None and case.grid.bits == 4 and case.grid.group_size is None


def _vllm_fails(case: Case) -> bool:
    """On a CPU it has a product for 4 bits alone, and that only with AVX-512; of GPTQ it loads symmetric grids."""
    if case.grid is None:
        return not _avx512()
    return not _avx512() or case.grid.bits != 4 or (case.format == "gptq" and not case.grid.symmetric)


def _vllm_asked(case: Case) -> bool:
    """Of each kind one, since a server takes half a minute to start."""
    grid = case.grid
    if grid is None or case.what == RELABELLED:  # of symmetric GPTQ it does not read the zero points
        return False
    if case.what:
        return grid.symmetric or case.format != "gptq"
    if grid.bits == 4 and case.format != "gptq":
        return grid.group_size == 64 or grid.symmetric is (grid.group_size is None)
    return grid.group_size == 64 and grid.scale_dtype == torch.float16 and (grid.bits == 4 or grid.symmetric)


def _avx512() -> bool:
    """Whether this processor has AVX-512, as Linux says."""
    info = Path("/proc/cpuinfo")
    return info.exists() and " avx512f " in info.read_text()


def cpu() -> str:
    """The processor that runs this, in words."""
    kind = platform.machine()
    return kind if kind != "x86_64" else f"{kind} with{'' if _avx512() else 'out'} AVX-512"


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "transformers",
            ("by_transformers.py", "transformers", "compressed-tensors", "gguf", "torch"),
            ("compressed-tensors", "gguf"),
            _transformers,
            _transformers_fails,
            _transformers_misreads,
            _transformers_asked,
        ),
        Engine(
            "gptqmodel",
            ("by_transformers.py", "gptqmodel", "optimum", "transformers", "torch"),
            ("gptq", "awq"),
            lambda case: Gate(largest=2e-2),
            _gptqmodel_fails,
        ),
        Engine("mlx", ("by_mlx.py",), ("mlx",), lambda case: Gate(largest=5e-5)),
        Engine("llama-cpp", ("by_llama_cpp.py",), ("gguf",), _llama_cpp),
        Engine(
            "vllm",
            ("by_vllm.py",),
            ("compressed-tensors", "gptq", "awq"),
            lambda case: Gate(largest=0.1, mean=0.02),
            _vllm_fails,
            asked=_vllm_asked,
        ),
    )
}


class Process:
    """An engine's script, started when first asked, and again after it has ended."""

    def __init__(self, engine: Engine, log: IO[str]) -> None:
        self.engine, self.log = engine, log
        self.versions: dict[str, str] = {}
        self._running: subprocess.Popen[str] | None = None

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer; `error` where the engine ended instead."""
        running = self._started()
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            running.stdin.write(json.dumps(question) + "\n")
            running.stdin.flush()
            answer = running.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return dict(json.loads(answer))
        self._running = None
        return {"error": f"ended with exit code {running.wait()}: {self._last_line()}"}

    def end(self) -> None:
        """Lets the script go."""
        if self._running is not None:
            self._running.communicate()

    def _started(self) -> "subprocess.Popen[str]":
        if self._running is None:
            script, *words = self.engine.words
            self._running = subprocess.Popen(
                [self.engine.python, HERE / script, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert self._running.stdout is not None
            first = self._running.stdout.readline()
            if not first:
                raise SystemExit(f"{self.engine.name} does not start: {self._last_line()}")
            self.versions = json.loads(first)
        return self._running

    def _last_line(self) -> str:
        self.log.seek(0)
        return next((line.strip() for line in reversed(self.log.readlines()) if line.strip()), "")


@contextmanager
def process(engine: Engine, log: IO[str]) -> Iterator[Process]:
    """An engine to ask, which ends with the body."""
    if not engine.python.exists():
        raise SystemExit(f"{engine.name} has no environment ({engine.python}): make .venv-{engine.name}/.made")
    one = Process(engine, log)
    try:
        yield one
    finally:
        one.end()
