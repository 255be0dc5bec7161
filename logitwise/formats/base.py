"""What a checkpoint format is: which grids and layers it holds, and how it writes and reads them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from logitwise.errors import FormatError
from logitwise.formats.checkpoint import SHARD_BYTES
from logitwise.formats.checks import check_on_grid
from logitwise.grid import Grid, Quantized

GROUP_SIZES = (16, 32, 64, 128, 256)
"""The group sizes that a refusal offers in place of one that does not divide a layer."""


@dataclass(frozen=True)
class Described:
    """A model as a checkpoint describes it, beside its tensors.

    Args:
        name: what it is called; of a hub id with its organization.
        config: its own, which stays as it is.
        dtype: the type of the tensors that are not quantized.
        tokenizer: its tokenizer, with its chat template where it has one.
        linear: every Linear module, quantized or not.
    """

    name: str
    config: PretrainedConfig
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    linear: Collection[str]


class Format(ABC):
    """One way to lay quantized weights out in files and to describe them there.

    Formats hold the weights of `nn.Linear` modules, [out, in]; a layer is named by its module
    (`model.layers.0.mlp.down_proj`). No format changes a code, a sign, a zero point or a type without saying so.
    """

    name: str
    group_sizes: tuple[int, ...] = GROUP_SIZES
    """The group sizes that a refusal offers."""
    library: str = "transformers"
    """The library that loads a checkpoint, as the hub names it."""
    per_channel: bool = True
    """Whether one group for each output channel is held."""
    holds_minima: bool = False
    """Whether grids with float minima are held."""
    stores_every_zero: bool = False
    """Whether the zero points of symmetric grids are stored too."""
    shard_bytes: int = SHARD_BYTES
    """Bytes of tensors that wait in RAM until a file of them is written."""
    keeps_codes: bool = True
    """Whether codes and zero points are read back as they were written; if not, the weights they stand for are."""

    def holds(self, grid: Grid) -> str | None:
        """None where every weight on the grid can be written exactly, else the reason why not."""
        if grid.minimum and not self.holds_minima:
            return f"{self.name} holds whole zero points, not float minima"
        return self._not_held(grid)

    @abstractmethod
    def _not_held(self, grid: Grid) -> str | None:
        """`holds` of a grid whose kind of zero point the format has."""

    def holds_layer(self, name: str, out_features: int, in_features: int, transposed: bool, grid: Grid) -> str | None:
        """None where this layer can be written on the grid, else the reason, which names the layer.

        Args:
            name: the layer's module.
            out_features: its outputs.
            in_features: its inputs, which the groups cut.
            transposed: the model keeps the weight as [in, out], as GPT-2's Conv1D does.
            grid: the grid it is to lie on.
        """
        if transposed:
            return f"{name} is stored transposed, [{in_features}, {out_features}]; {self.name} holds [out, in] only"
        if grid.group_size is None or in_features % grid.group_size == 0:
            return None
        sizes = [str(size) for size in self.group_sizes if in_features % size == 0]
        others = "only one group for each output channel does" if self.per_channel else "none that it holds do"
        other = f"groups of {', '.join(sizes)} do" if sizes else others
        return f"{name} has {in_features} inputs, which groups of {grid.group_size} do not divide; {other}"

    def holds_together(self, grids: Collection[Grid]) -> str | None:
        """None where layers on these grids may be in one checkpoint, else the reason why not."""
        return None if len(grids) == 1 else f"{self.name} holds one grid for all layers"

    def holds_grids(self, grids: Collection[Grid]) -> str | None:
        """None where each of these grids is held, and all of them in one checkpoint, else the reason why not."""
        return next(filter(None, map(self.holds, grids)), None) or self.holds_together(grids)

    def holds_model(self, model: Described) -> str | None:
        """None where the model and its tokenizer can be described, else the reason why not."""
        return None

    def bits_stored(self, grid: Grid, out_features: int, in_features: int) -> int:
        """Bits that a layer's weight takes: codes, scales, and zero points in whatever form they are stored."""
        stored = replace(grid, symmetric=False) if self.stores_every_zero else grid
        return stored.bits_stored(out_features, in_features)

    def tensors(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """Every tensor that takes the place of `{prefix}.weight`, by full name.

        Errors: FormatError where the weight does not lie on its grid, or the format does not hold the grid.
        """
        grid, (out_features, in_features) = quantized.grid, quantized.codes.shape
        reason = self.holds(grid) or self.holds_layer(prefix, out_features, in_features, False, grid)
        if reason is not None:
            raise FormatError(f"{prefix} cannot be written", reason, "choose another grid or format")
        check_on_grid(prefix, quantized)
        return self._laid_out(prefix, quantized)

    @abstractmethod
    def _laid_out(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """`tensors` of a weight that the format holds."""

    def kept(self, tensor: Tensor) -> Tensor:
        """A tensor in full precision as it is stored: of the same values."""
        return tensor

    @abstractmethod
    def write(
        self, folder: Path, tensors: Iterable[tuple[str, Tensor]], model: Described, grids: Mapping[str, Grid]
    ) -> int:
        """Writes a checkpoint: tensors as they come, and all that loaders need to know of them and of the model.

        Args:
            folder: where the files go.
            tensors: what `tensors` gives of each quantized layer, and every other tensor by its parameter's name.
            model: what is described.
            grids: of every quantized layer, by its module.

        Returns: the size of the weight files on disk, in bytes.
        Errors: MachineError where a file cannot be written.
        """

    @abstractmethod
    def loaders(self, grids: Collection[Grid], apart: str | None = None) -> str:
        """Which engines load a checkpoint on these grids, in half a sentence; what was not tried says so.

        Args:
            grids: of the quantized layers.
            apart: why vLLM cannot fuse them (`fusing.unfusable`).
        """

    @abstractmethod
    def read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """The inverse of `tensors`: one layer from the tensors of a checkpoint.

        Errors: FormatError, naming the tensor that is missing, of another type or shape, or out of range.
        """

    def loading(self, folder: str) -> str:
        """Python that loads a checkpoint and its tokenizer from a folder."""
        return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")"""
