"""Where the hidden states of all rows are between two windows: on the device, in RAM, or in files that are mapped.

A batch of them is brought to the device when its turn comes, and what leaves a block goes back to where it came from.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Literal

import torch
from torch import Tensor

from logitwise.errors import MachineError
from logitwise.memory import free_memory
from logitwise.recipe import Choice

Place = Literal["device", "cpu", "disk"]


class Streams:
    """Makes tensors of hidden states in one place.

    Args:
        place: where.
        device: where blocks are computed.
        folder: for the files; each is gone from it as soon as it is open, so that none is left behind.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path) -> None:
        self.place, self.device, self.folder = place, device, folder

    @classmethod
    def on(cls, device: torch.device) -> "Streams":
        """Tensors on the device itself."""
        return cls("device", device, Path())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor to be filled.

        Errors: MachineError where the disk has no room for it.
        """
        if self.place == "device":
            return torch.empty(*shape, dtype=dtype, device=self.device)
        if self.place == "cpu":
            return torch.empty(*shape, dtype=dtype)
        count = torch.Size(shape).numel()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = mkstemp(".stream", dir=self.folder)
            try:
                # A page that cannot be stored would end the process, so its place is taken beforehand where it can be.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(handle, 0, max(1, count * dtype.itemsize))
                return torch.from_file(name, shared=True, size=count, dtype=dtype).view(*shape)
            finally:
                os.close(handle)
                with suppress(OSError):
                    os.unlink(name)
        except OSError as error:
            raise MachineError(
                f"{count * dtype.itemsize / 2**30:.1f} GiB of activations cannot be kept in {self.folder}",
                str(error),
                "make room there, or choose fewer --rows, shorter --row-tokens or --set streams=cpu",
            ) from error

    def copy(self, stream: Tensor) -> Tensor:
        """Another tensor with the same content."""
        return self.empty(stream.shape, stream.dtype).copy_(stream)


def choose_place(asked: Literal["auto"] | Place, size: int, device: torch.device, sharing: int = 1) -> Choice:
    """Where streams of so many bytes are, and why: the device where they leave half of what is free, RAM likewise.

    `sharing` processes, with as many bytes each, share the machine's RAM.
    """
    gib = f"{size / 2**30:.1f} GiB of activations"
    if asked != "auto":
        return Choice(asked, "as asked")
    if size * (sharing if device.type == "cpu" else 1) <= free_memory(device) // 2:
        return Choice("device", f"{gib} leave half of what is free")
    if device.type != "cpu" and size * sharing <= free_memory(torch.device("cpu")) // 2:
        return Choice("cpu", f"{gib} are more than half of what is free on {device}")
    return Choice("disk", f"{gib} are more than half of the free memory")
