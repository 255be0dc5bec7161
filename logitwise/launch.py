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
