"""A run that has lost a process ends, whatever the others wait for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as distributed
from rank_environment import as_rank, free_port
from torch.multiprocessing import get_context

from logitwise.errors import MachineError, RecipeError
from logitwise.lost import ending_with_others

LONG = 120.0
"""Seconds that a rank waits for a GPU that waits for another rank."""


def wait_long() -> None:
    time.sleep(LONG)


def nothing() -> None:
    return None


def leave_later() -> None:
    time.sleep(0.5)


def die() -> None:
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    time.sleep(0.5)
    raise MachineError("the GPU's memory is not enough", "made up", "none")


def refuse() -> None:
    raise RecipeError("it is refused", "all ranks say so", "none")


def rank_of_run(rank: int, world: int, port: int, work: Callable[[], None], place: Path) -> None:
    """One process; what it says is in a file of its number."""
    os.environ.update(as_rank(rank, world, port))
    said = os.open(place / str(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 2)
    distributed.init_process_group("gloo")
    code = 0
    try:
        with ending_with_others(timedelta(seconds=LONG)):
            work()
    except (MachineError, RecipeError) as error:
        sys.stderr.write(str(error))
        code = error.exit_code
    sys.exit(code)


def run(works: list[Callable[[], None]], place: Path) -> tuple[list[int | None], list[str], float]:
    """Exit codes, what was said, and how long it took."""
    port, context = free_port(), get_context("spawn")
    processes = [
        context.Process(target=rank_of_run, args=(rank, len(works), port, work, place))
        for rank, work in enumerate(works)
    ]
    began = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(LONG)
    seconds = time.monotonic() - began
    return (
        [process.exitcode for process in processes],
        [(place / str(n)).read_text() for n in range(len(works))],
        seconds,
    )


@pytest.mark.parametrize("end", [die, fail])
def test_whoever_waits_ends_when_another_is_gone_and_says_so(end: Callable[[], None], tmp_path: Path) -> None:
    (first, second, last), said, seconds = run([wait_long, wait_long, end], tmp_path)
    assert first == second == 1
    assert last == (1 if end is fail else -signal.SIGKILL)
    assert seconds < LONG / 2
    for rank, name in enumerate(("logitwise: ", "logitwise, process 1 counted from 0: ")):
        assert f"{name}another process of this run is gone" in said[rank]
        assert "run the same command again" in said[rank]
    assert end is die or "made up" in said[2]


@pytest.mark.parametrize(("work", "code"), [(nothing, 0), (leave_later, 0), (refuse, 2)])
def test_ranks_that_leave_in_order_end_nobody(work: Callable[[], None], code: int, tmp_path: Path) -> None:
    """One leaves before the other, which says nothing of it."""
    codes, said, seconds = run([work, refuse if work is refuse else leave_later], tmp_path)
    assert codes == [code, code]
    assert not any("is gone" in each for each in said)
    assert seconds < LONG / 2


def supervised() -> None:
    """One of the processes that torchrun starts: the last fails."""
    distributed.init_process_group("gloo")
    last = distributed.get_rank() == distributed.get_world_size() - 1
    try:
        with ending_with_others(timedelta(seconds=LONG)):
            fail() if last else wait_long()
    except MachineError as error:
        time.sleep(0.2)  # what is around it takes a moment to end
        sys.exit(f"this is why: {error}")


def test_whoever_fails_says_why_before_torchrun_ends_the_rest(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("from test_lost import supervised\n\nsupervised()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONG, check=False)
    assert ran.returncode == 1
    assert "this is why: the GPU's memory is not enough" in ran.stderr
