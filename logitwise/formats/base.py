"""What a checkpoint format is: which grids and layers it holds, and how it writes and reads them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.formats.checks import check_on_grid, refusal
from logitwise.grid import Grid, Quantized

GROUP_SIZES = (16, 32, 64, 128, 256)
"""The group sizes that a refusal offers in place of one that does not divide a layer."""


class Format(ABC):
    """One way to lay quantized weights out in safetensors files and to describe them in config.json.

    Formats hold the weights of `nn.Linear` modules, [out, in]; a layer is named by its module
    (`model.layers.0.mlp.down_proj`). No format changes a code, a sign, a zero point or a type without saying so.
    """

    name: str
    suffixes: tuple[str, ...]
    """What stands after the module's name in the names of a quantized layer's tensors; some may be absent.

    Where "weight" is one of them, a layer is quantized if it has another of them too.
    """
    scale_suffix: str
    """The one of `suffixes` that is the scale, whose type is the grid's."""
    config_keys: tuple[str, ...] = ("quantization_config",)
    """Where config.json says how weights are quantized: each key says the same, and loaders read the first.

    A first key that is not `quantization_config` is the format's own and tells a folder of it.
    """
    written_for: str = "pt"
    """The framework that the metadata of safetensors files names."""
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
    shape_suffix: str
    """The one of `suffixes` that tells a layer's shape."""

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

    @abstractmethod
    def quantization_config(self, grids: Mapping[str, Grid], ignored: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json.

        Args:
            grids: of every quantized layer, by its module.
            ignored: every Linear module kept in full precision.
        """

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, object]:
        """What else says the same, for old readers: the content of each JSON file beside config.json, by its name."""
        return {}

    @abstractmethod
    def loaders(self, grids: Collection[Grid]) -> str:
        """Which engines load a checkpoint on these grids, in half a sentence; what was not tried says so."""

    def described_by(self, quantization_config: Mapping[str, Any]) -> "Format":
        """The format as this config says that its files were written; itself where there is one way only.

        Errors: FormatError, naming the key.
        """
        return self

    @abstractmethod
    def shape(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], Tensor], grid: Grid
    ) -> tuple[int, int]:
        """Outputs and inputs of a layer, as its stored tensors tell.

        Args:
            prefix: the layer's module.
            shapes: of its tensors in the files, by their names there.
            load: one of them.
            grid: the layer's grid.

        Errors: FormatError, naming the tensor that does not tell.
        """

    def shape_read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> tuple[int, int]:
        """`shape` of a layer whose tensors are there.

        Errors: FormatError, naming the tensor, also where the format holds no such layer.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        out_features, in_features = self.shape(prefix, shapes, tensors.__getitem__, grid)
        reason = self.holds_layer(prefix, out_features, in_features, False, grid)
        if reason is not None:
            raise refusal(f"{prefix}.{self.shape_suffix}", reason)
        return out_features, in_features

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

    @abstractmethod
    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        """The grid of each layer, by its module, that a `quantization_config` describes.

        Args:
            config: the `quantization_config` of config.json.
            scale_dtype: the type of the stored scale tensors, which the config does not tell.

        Errors: FormatError, naming the key, for everything that is not read here; nothing is passed over. What is
        returned raises FormatError for a layer that the config does not describe.
        """
