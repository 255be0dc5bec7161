"""How much memory a device has left, and what is said where it was not enough."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from logitwise.errors import MachineError


def free_memory(device: torch.device) -> int:
    """Bytes that a device could still give; of a GPU, what torch keeps for later is given back first."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


SAID = ("can't allocate memory", "Cannot allocate memory", "out of memory")
"""How torch says that memory is not enough, where it has no error of its own for that."""


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Says what helps where memory runs out.

    Errors: MachineError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        sure = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not sure and not any(words in str(error) for words in SAID):
            raise
        asked = str(error).splitlines()[0] if str(error) else "nothing more was given"
        place = "GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        raise MachineError(f"the {place} is not enough", asked, remedy) from error
