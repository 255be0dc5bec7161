"""One process for each grid and seed of a benchmark, and one file of all that they have found so far."""

import argparse
import fcntl
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from logitwise.machine import versions


def each_grid_and_seed(given: argparse.Namespace, *more: str) -> None:
    """`each` of the grids and seeds; `more` are arguments of every one of them."""
    each(given, [["--grids", grid, "--seeds", str(seed), *more] for seed in given.seeds for grid in given.grids])


def each(given: argparse.Namespace, wanted: list[list[str]]) -> None:
    """Starts this script again with each of these arguments and --only FILE, --jobs at a time; ends when all have.

    What they write is gathered into --out all the while, so that a stop loses nothing.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        running: list[subprocess.Popen[bytes]] = []
        files: list[Path] = []
        waiting = list(wanted)
        while waiting or any(process.poll() is None for process in running):
            while waiting and sum(process.poll() is None for process in running) < given.jobs:
                files.append(Path(temporary) / f"{len(files)}.json")
                own = [*waiting.pop(0), "--only", str(files[-1])]
                running.append(subprocess.Popen([sys.executable, *sys.argv, *own]))
            time.sleep(2)
            gather(files, given, time.monotonic() - began)
        gather(files, given, time.monotonic() - began)
    failed = sum(process.returncode != 0 for process in running)
    raise SystemExit(f"{failed} of {len(running)} processes failed" if failed else 0)


@contextmanager
def few(most: int = 3) -> Iterator[None]:
    """At most so many processes at a time: for what takes much of the memory of a GPU that processes share."""
    with ExitStack() as stack:
        names = (Path(tempfile.gettempdir()) / f"logitwise-{index}.lock" for index in range(most))
        files = [stack.enter_context(name.open("w")) for name in names]
        while not any(free(file) for file in files):
            time.sleep(0.05)
        empty()
        yield
        empty()


def free(file: IO[str]) -> bool:
    """Whether no other process holds the lock of a file; if so, this one does from now on."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def empty() -> None:
    """Gives memory back that nothing uses."""
    gc.collect()
    torch.cuda.empty_cache()


def gather(files: list[Path], given: argparse.Namespace, seconds: float) -> None:
    """Everything found so far, into --out."""
    found = [row for file in files if file.exists() for row in json.loads(file.read_text())]
    save(given.out, {**about(given.device), "seconds": round(seconds), "results": found})


def about(device: str) -> dict[str, Any]:
    """Where figures are from: device, versions, arguments."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"
    return {"device": name, "versions": versions(), "arguments": sys.argv[1:]}


def peak_ram() -> int:
    """Bytes of RAM that this process had at the most; getrusage would count its parent's too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def save(file: Path, found: Any) -> None:
    """JSON that appears at once, since another process may be reading it."""
    written = file.with_name(f"{file.name}.new")
    written.write_text(json.dumps(found))
    written.replace(file)
