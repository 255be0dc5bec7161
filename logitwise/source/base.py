"""Where a model comes from: its config, its tensors one at a time, its tokenizer and the files beside them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from logitwise.formats import Format
from logitwise.grid import Grid, Quantized


class Source(ABC):
    """A model on disk, read one tensor at a time.

    Tensor names are transformers' own parameter names (`model.layers.0.self_attn.q_proj.weight`).
    """

    name: str
    config: PretrainedConfig
    dtype: torch.dtype
    """The type that tensors are read in and kept tensors are stored in."""

    @abstractmethod
    def names(self) -> list[str]:
        """Every tensor of the model, in the order of the files."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor in `dtype` (on the CPU); nothing else is held in memory.

        Errors: SourceError, naming the tensor and the file.
        """

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with its chat template where it has one."""

    def stored_as(self, name: str) -> str:
        """How a tensor is stored, in a word: its type, or the bits of its codes."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def unused(self) -> list[str]:
        """Tensors of the files that the model has no place for (masks, rotary tables of older versions)."""
        return []

    def extra_files(self) -> list[Path]:
        """Files to carry over unchanged: generation config, licence."""
        return []

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """What the weights take on disk, in bytes."""


class QuantizedSource(Source):
    """A model whose weights are quantized already.

    `read` gives quantized weights dequantized in float32 and every other tensor in the type of its file, so that
    the model is evaluated as it is stored when it is computed in float32.
    """

    format: Format

    @abstractmethod
    def quantized(self, name: str) -> Quantized | None:
        """The codes, scales and zero points of a weight; None where it is kept in full precision.

        Errors: FormatError, naming the tensor that does not fit the format.
        """

    @abstractmethod
    def write_changed(self, folder: Path, changed: Mapping[str, Tensor | Quantized]) -> int:
        """Writes all its files into a folder, with the content of some parameters changed and no other byte.

        Returns: the size of the weight files, in bytes.
        Errors: FormatError, naming the tensor, where one would be of another type or shape than it was. MachineError
        where a file cannot be written.
        """

    @abstractmethod
    def grid(self, name: str) -> Grid | None:
        """The grid of a weight; None where it is kept in full precision."""

    def stored_as(self, name: str) -> str:
        grid = self.grid(name)
        return f"{grid.bits} bits" if grid else super().stored_as(name)

    def grid_in_words(self, name: str) -> str | None:
        """Where the codes of a weight lie; None where it is kept in full precision."""
        grid = self.grid(name)
        return str(grid) if grid else None

    def bits_stored(self, name: str) -> int | None:
        """Bits that a quantized weight takes, scales and zero points included; None where it is in full precision."""
        quantized = self.quantized(name)
        return None if quantized is None else self.format.bits_stored(quantized.grid, *quantized.codes.shape)
