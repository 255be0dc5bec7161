"""Several processes, one run (torchrun): each has some of the rows, and all learn the same parameters.

Every rank takes the same way through the run and meets the others wherever something is summed or agreed on. The first
rank alone writes. The run folder has to lie where all of them see it.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as distributed
from jaxtyping import Shaped
from torch import Tensor, nn

from logitwise.errors import InputError, RecipeError
from logitwise.launch import started, started_here, threads_each
from logitwise.lost import ending_with_others, gone

PATIENCE = timedelta(days=7)
"""How long a rank waits for another: the first may write text for hours. torchrun ends them all when one has died."""

# Called so since torch 2.13, which warns where the older names are used.
_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_scatter_sum = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class Ranks:
    """The processes of a run, as one of them sees them.

    Args:
        rank: which one this is.
        world: how many there are.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of so many rows are this rank's: every `world`-th."""
        return slice(self.rank, count, self.world)

    def count(self, count: int) -> int:
        """How many of so many rows are this rank's."""
        return len(range(count)[self.share(count)])

    def part(self, count: Tensor) -> Tensor | float:
        """What a mean over all ranks is multiplied by here, where `count` of what it is over is this rank's."""
        if self.world == 1:
            return 1.0
        total = count.detach().clone()
        self.add([total])
        return torch.where(total > 0, count / total, torch.zeros_like(total))  # the loss is 0 where nothing counts

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor in place becomes its sum over all ranks.

        Errors: MachineError where another rank is gone.
        """
        if self.world > 1:
            with _others():
                _wait([distributed.all_reduce(tensor, async_op=True) for tensor in tensors])

    def exchange(self, rows: Shaped[Tensor, "world n"]) -> None:
        """Each row in place becomes what it is at the rank of its number, all at once.

        Errors: MachineError where another rank is gone.
        """
        if self.world > 1:
            with _others():
                _gather(rows.view(-1), rows[self.rank])

    def sum_own(self, rows: Shaped[Tensor, "world n"]) -> None:
        """The row of this rank in place becomes its sum over all ranks; the others are of no more use.

        Errors: MachineError where another rank is gone.
        """
        if self.world > 1:
            with _others():
                _scatter_sum(rows[self.rank], rows.view(-1))

    def give(self, tensors: Iterable[tuple[int, Tensor]]) -> None:
        """Each tensor in place becomes what it is at the rank beside it.

        Errors: MachineError where another rank is gone.
        """
        if self.world > 1:
            with _others():
                _wait([distributed.broadcast(_as_bytes(tensor), rank, async_op=True) for rank, tensor in tensors])

    def everyones(self, value: Any) -> list[Any]:
        """The value (small, of Python's own types) that each rank has.

        Errors: MachineError where another rank is gone.
        """
        found: list[Any] = [value] * self.world
        if self.world > 1:
            with _others():
                distributed.all_gather_object(found, value)
        return found

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All ranks' tensors, "rank R " before their names: at the first, on the CPU; elsewhere none.

        Errors: MachineError where another rank is gone.
        """
        found: dict[str, Tensor] = {}
        each = self.everyones([(name, tuple(t.shape), t.dtype, t.device.type) for name, t in tensors.items()])
        for rank, of_rank in enumerate(each):
            for name, shape, dtype, device in of_rank:
                own = rank == self.rank
                tensor = tensors[name].contiguous() if own else torch.empty(shape, dtype=dtype, device=device)
                self.give([(rank, tensor)])
                if self.first:
                    found[f"rank {rank} {name}"] = tensor.cpu()
        return found

    def gathered(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
        """The loss of all ranks, each of which has its part; the parameters' gradients are summed over them too.

        Errors: MachineError where another rank is gone.
        """
        loss = loss.detach()
        self.add([loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
        return loss

    def total(self, *values: float) -> tuple[float, ...]:
        """The sum of each number over all ranks.

        Errors: MachineError where another rank is gone.
        """
        summed = torch.tensor(values, dtype=torch.float64)
        self.add([summed])
        return tuple(summed.tolist())

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor in place becomes the first rank's.

        Errors: MachineError where another rank is gone.
        """
        self.give((0, tensor) for tensor in tensors)

    def agree(self, value: bool) -> bool:
        """What the first rank says; all wait for it.

        Errors: MachineError where another rank is gone.
        """
        said = torch.tensor(value)
        self.same([said])
        return bool(said)

    def refuse_others(self, key: str) -> None:
        """Refuses ranks that have another key (hexadecimal) than the first.

        Errors: RecipeError.
        """
        own = int(key[:12], 16)
        (of_first,) = self.total(own if self.first else 0)
        (others,) = self.total(own != of_first)
        if others:
            raise RecipeError(
                "not all processes have the same to do",
                f"{int(others)} of {self.world} have another model, other settings or other versions of packages",
                "give all machines the same model, command and environment",
            )

    def wait(self) -> None:
        """Until all ranks are here.

        Errors: MachineError where another rank is gone.
        """
        self.agree(True)

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        """Whether it is this rank that works inside, where there are no others; they wait for it at the end."""
        world, first = self.world, self.first
        self.world = 1
        try:
            yield first
        finally:
            self.world = world
        self.wait()


ALONE = Ranks()
"""The only process there is."""


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The processes that torchrun has started, or this one alone. On a GPU each has its own, `cuda` from here on.

    Errors: RecipeError where there are more processes than GPUs, or not all is said of them; MachineError where the
    others are not found.
    """
    if distributed.is_available() and distributed.is_initialized():  # the caller's, and so theirs to end
        if "cpu:" not in distributed.get_backend_config():
            raise RecipeError(
                "the process group has no backend for a CPU",
                f"it was made with {distributed.get_backend_config()}",
                'make it by init_process_group("cpu:gloo,cuda:nccl"), or leave that to logitwise',
            )
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
        return
    if started() == 1:
        yield ALONE
        return
    on_gpus = torch.cuda.is_available() and device != "cpu"
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", *(("LOCAL_RANK", "LOCAL_WORLD_SIZE") if on_gpus else ())):
        if not os.environ.get(name):
            raise RecipeError(
                f"{name} is not set", f"WORLD_SIZE is {started()}", "start with torchrun, or unset WORLD_SIZE"
            )
    if on_gpus:
        there = torch.cuda.device_count()
        if started_here() > there:
            raise RecipeError(
                "there are more processes than GPUs",
                f"this machine has {there} of them for {started_here()} processes",
                f"start torchrun with --nproc-per-node {there}",
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _others():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    ranks.total(1)  # where the first ends at once, with what it refuses, the others must have met it before
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_each() or threads)
    failed = False
    try:
        with ending_with_others(PATIENCE) if on_gpus else nullcontext():  # gloo says itself that another is gone
            yield ranks
    except BaseException as error:
        failed = not isinstance(error, InputError)
        raise
    finally:
        torch.set_num_threads(threads)
        if not (failed and on_gpus):  # NCCL might wait for what never comes before it is said what failed
            distributed.destroy_process_group()


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory, of a type that all backends know."""
    return tensor.detach().view(-1).view(torch.uint8)


def _wait(works: Iterable[Any]) -> None:
    """Until all are done that were begun."""
    for work in works:
        work.wait()


@contextmanager
def _others() -> Iterator[None]:
    """Names what torch says where another rank does not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error).splitlines()[0].split(". ")[0]
        raise gone(f"it failed, was killed or lost its connection ({said})") from error
