"""What formats of safetensors files share: a folder with config.json that says how the weights are quantized."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.formats.base import Described, Format
from logitwise.formats.checkpoint import write_checkpoint, write_config, write_json
from logitwise.formats.checks import refusal, unread, whole
from logitwise.grid import Grid


class SafetensorsFormat(Format):
    """One way to lay quantized weights out in safetensors files and to describe them in config.json."""

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
    shape_suffix: str
    """The one of `suffixes` that tells a layer's shape."""

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

    def write(
        self, folder: Path, tensors: Iterable[tuple[str, Tensor]], model: Described, grids: Mapping[str, Grid]
    ) -> int:
        """Weight files, config.json and what a format has beside it, tokenizer."""
        size = write_checkpoint(folder, tensors, self.shard_bytes, self.written_for)
        described = self.quantization_config(grids, [name for name in model.linear if name not in grids])
        write_config(folder, model.config, described, model.dtype, self.config_keys)
        for name, content in self.files(described).items():
            write_json(folder / name, content)
        model.tokenizer.save_pretrained(folder)
        return size

    def described_by(self, quantization_config: Mapping[str, Any]) -> "SafetensorsFormat":
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
    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        """The grid of each layer, by its module, that a `quantization_config` describes.

        Args:
            config: the `quantization_config` of config.json.
            scale_dtype: the type of the stored scale tensors, which the config does not tell.

        Errors: FormatError, naming the key, for everything that is not read here; nothing is passed over. What is
        returned raises FormatError for a layer that the config does not describe.
        """


def described(form: Format, settings: Mapping[str, Any], scale_dtype: torch.dtype) -> Grid:
    """The grid that `bits`, `group_size` (-1 for one group a channel) and `sym` describe, if the format holds it.

    Errors: FormatError, naming the key.
    """
    rest = dict(settings)
    bits = whole(rest, "bits")
    group_size = whole(rest, "group_size", "a whole number, -1 for one group a channel")
    if type(rest["sym"]) is not bool:
        raise unread("sym", repr(rest["sym"]), "true or false")
    grid = Grid(bits, None if group_size == -1 else group_size, rest["sym"], scale_dtype)
    reason = form.holds(grid)
    if reason is not None:
        raise FormatError("this quantization_config is not read", reason, "give another checkpoint")
    return grid
