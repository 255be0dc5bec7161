"""Ends a process whose run has lost another one, also while it waits for its GPU.

NCCL does not say that a process has died: a GPU goes on waiting for the other, and whoever waits for the GPU with it.
So each rank listens in a thread, over gloo, to the next one, which says how it leaves. Where its connection ends
without a word, or it has failed and is not gone yet, this process says so and ends, and so on around.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

import torch
import torch.distributed as distributed

from logitwise.errors import InputError, MachineError
from logitwise.launch import speaker

IN_ORDER, FAILED = 0, 1
"""How a rank leaves: done or refused, as all of them are, or not."""

GRACE = 0.05
"""Seconds in which a rank that has noticed by itself may leave by itself; torchrun ends it after a tenth."""

LONG_GRACE = 5.0
"""Seconds for a rank that has failed to say why, since torchrun ends it with the first that ends; for the next rank to
leave in its order as well."""


def gone(why: str) -> MachineError:
    """What is said where another rank does not answer."""
    return MachineError(
        "another process of this run is gone",
        why,
        "see what it said; finished blocks are kept: run the same command again, on as many processes as you like",
    )


@contextmanager
def ending_with_others(patience: timedelta) -> Iterator[None]:
    """Inside, this process ends at once, with exit code 1, where another rank does; all ranks enter it together."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    group = distributed.new_group(backend="gloo", timeout=patience)
    leaving = Event()

    def listen() -> None:
        how, grace = torch.tensor(FAILED, device="cpu"), GRACE
        with suppress(RuntimeError):  # the connection ended
            distributed.recv(how, (rank + 1) % world, group=group)
            grace = LONG_GRACE
        if how != IN_ORDER and not leaving.wait(grace):
            sys.stderr.write(f"{speaker()}: {gone('it failed or was killed')}\n")
            sys.stderr.flush()
            os._exit(MachineError.exit_code)

    listener = Thread(target=listen, daemon=True)
    listener.start()
    how = FAILED
    try:
        yield
        how = IN_ORDER
    except InputError:
        how = IN_ORDER
        raise
    finally:
        leaving.set()
        with suppress(RuntimeError):  # it has left already
            distributed.send(torch.tensor(how, device="cpu"), (rank - 1) % world, group=group)
        if how == IN_ORDER:
            listener.join(LONG_GRACE)
