"""What torchrun, or whoever sets the same variables, says of the processes that it has started. Imports no torch."""

import os


def started() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, counted from 0."""
    return int(os.environ.get("RANK", "0"))
