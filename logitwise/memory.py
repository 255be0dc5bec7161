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


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Says what helps where memory runs out.

    Errors: MachineError.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        asked = str(error).splitlines()[0] if str(error) else "nothing more was given"
        if type(error) is RuntimeError and "can't allocate memory" not in asked:
            raise
        place = "GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        raise MachineError(f"the {place} is not enough", asked, remedy) from error
