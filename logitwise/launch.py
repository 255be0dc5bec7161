"""What torchrun, or whoever sets the same variables, says of the processes that it has started. Imports no torch."""

import os


def started() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def started_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def rank() -> int:
    """Which of them this is, counted from 0."""
    return int(os.environ.get("RANK") or 0)


def speaker() -> str:
    """Who speaks, before what is said of an error."""
    return "logitwise" if rank() == 0 else f"logitwise, process {rank()} counted from 0"


def threads_each() -> int | None:
    """Threads for each process of this machine, where torchrun gave each one alone, for want of a number."""
    if started_here() == 1 or os.environ.get("OMP_NUM_THREADS") != "1":
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // started_here())
