"""Hidden states on their way between where they are and a GPU, while it computes.

What is read next is brought and what was computed last is taken back by a thread each, through pinned memory and on a
stream of its own. Where nothing crosses a bus everything happens in its turn.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Which: TypeAlias = slice | Int64[Tensor, " taken"]
"""Rows of a tensor: those of a slice, or by their numbers."""

Taken = TypeVar("Taken", slice, Tensor)

UNDER_WAY = 2
"""Batches at most that are on their way back: each takes its size of the GPU's memory and of pinned RAM."""


class Bus:
    """The way between RAM and a GPU, beside what it computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.device = self.stream.device

    def bring(self, tensors: Sequence[Tensor], rows: Which) -> Callable[[], list[Tensor]]:
        """What gives these rows of tensors of the RAM on the GPU, to what is computed from then on."""
        torch.cuda.set_device(self.device)  # of a new thread it is the first GPU, which is another rank's
        with torch.cuda.stream(self.stream):
            brought = [_pinned(tensor, rows).to(self.device, non_blocking=True) for tensor in tensors]
            there = self._now()

        def receive() -> list[Tensor]:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(there)
            for tensor in brought:
                tensor.record_stream(computing)
            return brought

        return receive

    def send(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What waits until a tensor, as it is computed by then, is in RAM, and gives it there."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            landed = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            landed.copy_(tensor, non_blocking=True)
            tensor.record_stream(self.stream)
            there = self._now()

        def receive() -> Tensor:
            there.synchronize()
            return landed

        return receive

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self.stream)
        return event


def _pinned(tensor: Tensor, rows: Which) -> Tensor:
    """Rows copied once, to memory that torch keeps for the next: new memory takes several times as long as the copy."""
    count = len(rows) if isinstance(rows, Tensor) else len(range(*rows.indices(len(tensor))))
    pinned = torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    return torch.index_select(tensor, 0, rows, out=pinned) if isinstance(rows, Tensor) else pinned.copy_(tensor[rows])


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on a device; a GPU is not waited for, so that what comes next is launched while it computes."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def bus_between(place: torch.device, device: torch.device) -> Bus | None:
    """The bus that hidden states cross where they are not on the GPU that computes; None where there is none."""
    return Bus(device) if device.type == "cuda" and place.type == "cpu" else None


def brought(
    which: Iterable[Taken], tensors: Sequence[Tensor], bus: Bus | None
) -> Generator[tuple[Taken, list[Tensor]], None, None]:
    """Rows of these tensors again and again, brought by the bus: the next are fetched while the last are used.

    The first two are fetched when they are asked for, and nothing is under way once the generator is closed: what is
    computed with the first may be recorded as a CUDA graph, while which no other thread may touch the GPU.
    """
    if bus is None:
        yield from ((rows, [tensor[rows] for tensor in tensors]) for rows in which)
        return
    coming: deque[tuple[Taken, Future[Callable[[], list[Tensor]]]]] = deque()
    with ThreadPoolExecutor(1) as reader:
        for count, rows in enumerate(which):
            coming.append((rows, reader.submit(bus.bring, tensors, rows)))
            if count < 2 or len(coming) > 1:
                first, found = coming.popleft()
                yield first, found.result()()
        for last, found in coming:
            yield last, found.result()()


@contextmanager
def taken_back(bus: Bus | None) -> Iterator[Callable[[Tensor, Tensor], object]]:
    """A function that copies what was computed to its place; in the end all of it is there."""
    if bus is None:
        yield Tensor.copy_
        return
    leaving: deque[Future[None]] = deque()

    def land(place: Tensor, receive: Callable[[], Tensor]) -> None:
        place.copy_(receive())

    with ThreadPoolExecutor(1) as writer:

        def take(place: Tensor, computed: Tensor) -> None:
            leaving.append(writer.submit(land, place, bus.send(computed)))
            while len(leaving) > UNDER_WAY:
                leaving.popleft().result()

        yield take
        for each in leaving:
            each.result()


def through(
    hidden: Float[Tensor, "rows ..."], run: Callable[[Tensor], Tensor], batch: int, device: torch.device
) -> None:
    """`hidden` in place becomes what `run` makes of it on the device, `batch` rows at a time."""
    bus = bus_between(hidden.device, device)
    parts = (slice(start, start + batch) for start in range(0, len(hidden), batch))
    with taken_back(bus) as take, closing(brought(parts, [hidden], bus)) as arriving:
        for part, (there,) in arriving:
            take(hidden[part], run(there.to(device)))
