"""How much memory a device has left, what is said where it was not enough, and which garbage is looked for."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from logitwise.errors import MachineError, RecipeError

PYTHONS_OWN = 1 << 12
"""So many objects Python itself may have put out of sight: 3.12 begins with 375. A caller that did so has many more."""

CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where Linux says what a container may have (control groups, version 2)."""


def free_memory(device: torch.device) -> int:
    """Bytes that a device could still give; of a GPU, what torch keeps for later is given back first."""
    if device.type != "cuda":
        host = psutil.virtual_memory()
        return int(min(host.available, *(most - used for most, used in _limits())))
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def total_memory() -> int:
    """Bytes of RAM that this process may come to have."""
    return int(min(psutil.virtual_memory().total, *(most for most, _ in _limits())))


def _limits() -> list[tuple[int, int]]:
    """Of each group that this process is in, how much its processes may have and how much of it is not to be had."""
    found = [(sys.maxsize, 0)]
    with suppress(OSError, ValueError, IndexError):
        own = Path("/proc/self/cgroup").read_text("utf-8").rpartition("0::")[2].splitlines()[0].strip("/")
        for folder in [CONTROL_GROUPS / own, *(CONTROL_GROUPS / own).parents]:
            limit = folder / "memory.max"
            if limit.is_file() and (most := limit.read_text("utf-8").strip()) != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text("utf-8").splitlines())
                used = int((folder / "memory.current").read_text("utf-8")) - int(stat["inactive_file"])
                found.append((int(most), used))  # files that were read and are not in use make room
    return found


def ran_out(error: Exception) -> bool:
    """Whether an error says that memory was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


SAID = ("can't allocate memory", "Cannot allocate memory", "out of memory")
"""How torch says that memory is not enough, where it has no error of its own for that."""


@contextmanager
def enough_memory(remedy: str, begun: bool = True) -> Iterator[None]:
    """Says what helps where memory runs out.

    Errors: MachineError; RecipeError where the work has not begun.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        asked = str(error).splitlines()[0] if str(error) else "nothing more was given"
        place = "GPU's memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        kind = MachineError if begun else RecipeError
        raise kind(f"the {place} is not enough", asked, remedy) from error


@contextmanager
def only_new_collected() -> Iterator[None]:
    """Inside, Python looks for cycles among what was made inside alone.

    Windows leave cycles behind, which must not wait for Python to look. Modules and tokenizers are a million objects,
    of which each look takes a fifth of a second.
    """
    # A caller's are not ours to let go, nor are those of this context around it.
    if gc.get_freeze_count() > PYTHONS_OWN:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
