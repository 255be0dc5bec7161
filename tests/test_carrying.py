"""Hidden states on their way: the same values in the same order, with a bus of this machine's and with a real one."""

import threading
from collections.abc import Callable, Sequence
from contextlib import closing

import pytest
import torch
from torch import Tensor

from logitwise import carrying
from logitwise.carrying import Bus, Which, brought, bus_between, taken_back, through

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="has no bus to cross")


class Loopback(Bus):
    """A bus from RAM to RAM, which notes the threads that use it."""

    def __init__(self) -> None:
        self.brought_by: list[threading.Thread] = []

    def bring(self, tensors: Sequence[Tensor], rows: Which) -> Callable[[], list[Tensor]]:
        self.brought_by.append(threading.current_thread())
        return lambda: [tensor[rows].clone() for tensor in tensors]

    def send(self, tensor: Tensor) -> Callable[[], Tensor]:
        return tensor.clone


class Noted(Loopback):
    """One that says what it was asked for, by its first row, and cannot reach row 3."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = [threading.Event() for _ in range(6)]

    def bring(self, tensors: Sequence[Tensor], rows: Which) -> Callable[[], list[Tensor]]:
        assert isinstance(rows, slice)
        if rows.start == 3:
            raise OSError("the disk is gone")
        self.asked[rows.start].set()
        return super().bring(tensors, rows)


ROWS = torch.arange(20.0).view(10, 2)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_everything_arrives_in_its_turn(count: int) -> None:
    which: list[Which] = [slice(first, first + 2) if first % 2 else torch.tensor([first, 0]) for first in range(count)]
    bus = Loopback()
    for by in (None, bus):
        found = list(brought(iter(which), [ROWS, -ROWS], by))
        assert [rows for rows, _ in found] == which
        assert all(torch.equal(there, ROWS[rows]) and torch.equal(other, -there) for rows, (there, other) in found)
    assert len(bus.brought_by) == count
    assert threading.current_thread() not in bus.brought_by


def test_the_next_are_fetched_while_some_are_used_but_not_beside_the_first() -> None:
    bus = Noted()
    with closing(brought((slice(first, first + 1) for first in (0, 1, 2, 4, 5)), [ROWS], bus)) as arriving:
        next(arriving)
        assert not bus.asked[1].wait(0.1)  # what is computed with the first may be being recorded
        next(arriving)
        assert not bus.asked[2].wait(0.1)
        next(arriving)
        assert bus.asked[4].wait(10)
        assert not bus.asked[5].wait(0.1)  # one ahead, no more
    assert not any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())


def test_an_error_of_the_reader_or_the_writer_is_raised() -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        list(brought((slice(first, first + 1) for first in range(6)), [ROWS], Noted()))
    with pytest.raises(RuntimeError, match="must match"), taken_back(Loopback()) as take:
        take(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize(("rows", "batch"), [(12, 5), (12, 12), (3, 8), (9, 1)])
def test_rows_go_through_in_place(rows: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    expected = 2 * hidden + 1
    for bus in (None, Loopback()):
        monkeypatch.setattr(carrying, "bus_between", lambda *places, bus=bus: bus)
        found = hidden.clone()
        through(found, lambda part: 2 * part + 1, batch, CPU)
        assert torch.equal(found, expected)


def test_nothing_crosses_a_bus_on_one_device() -> None:
    assert bus_between(CPU, CPU) is None


@needs_gpu
@pytest.mark.parametrize(("rows", "batch"), [(13, 2), (4, 4)])
def test_a_gpu_computes_the_same_with_rows_from_elsewhere(rows: int, batch: int) -> None:
    device = torch.device("cuda", 0)
    hidden = torch.randn(rows, 512, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(device)

    def run(part: Tensor) -> Tensor:
        for _ in range(20):  # long enough to overlap
            part = torch.tanh(part @ weight)
        return part

    there, here = hidden.to(device), hidden.clone()
    through(there, run, batch, device)
    through(here, run, batch, device)
    assert torch.equal(here, there.cpu())
    order: list[Which] = [torch.tensor([row, 0]) if row % 2 else slice(row, row + 2) for row in range(rows)]
    for which, (part,) in brought(iter(order), [hidden], bus_between(CPU, device)):
        assert part.device == device
        assert torch.equal(part.cpu(), hidden[which])
