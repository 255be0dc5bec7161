"""A folder whose weights are already quantized, read through the format that wrote them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import SourceError
from logitwise.formats import FORMATS
from logitwise.formats.safetensors import SafetensorsFormat
from logitwise.grid import Grid, Quantized
from logitwise.source.base import QuantizedSource
from logitwise.source.folder import FolderSource, read_config
from logitwise.source.shards import DTYPES

IN_CONFIG = {name: form for name, form in FORMATS.items() if isinstance(form, SafetensorsFormat)}
"""The formats that config.json speaks of."""


class QuantizedFolder(FolderSource, QuantizedSource):
    """A quantized checkpoint in safetensors files.

    Args:
        folder: where config.json and the safetensors files are.
        name: what the model is called; the folder's own name by default.

    Errors: SourceError as for any folder, or where the method is not read yet; FormatError for its config or tensors.
    """

    format: SafetensorsFormat

    @property
    def quantization_config(self) -> dict[str, Any]:
        """How the weights are quantized, as config.json says."""
        return dict(getattr(self.config, self.format.config_keys[0]))

    def read(self, name: str) -> Tensor:
        """A quantized weight dequantized in float32, any other tensor as it is stored."""
        quantized = self.quantized(name)
        return self.raw(self._places[name]) if quantized is None else quantized.dequantize()

    def quantized(self, name: str) -> Quantized | None:
        prefix = self._places[name].removesuffix(".weight")
        tensors = {stored: self.raw(stored) for stored in self._tensors_of.get(prefix, [])}
        return self.format.read(prefix, tensors, self.grid_of(prefix)) if tensors else None

    def grid(self, name: str) -> Grid | None:
        prefix = self._places[name].removesuffix(".weight")
        if self.format.holds_minima:  # not told by the config, but by what is stored
            return None if (quantized := self.quantized(name)) is None else quantized.grid
        return self.grid_of(prefix) if prefix in self._tensors_of else None

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        self.format = self._find_format()
        self._tensors_of = self._group()
        self.grid_of = self._grids()
        shapes: dict[str, tuple[int, ...]] = {}
        for stored, entry in self._shards.entries.items():
            prefix = stored.rpartition(".")[0]
            if stored not in self._tensors_of.get(prefix, []):
                shapes[stored] = entry.shape
            elif f"{prefix}.weight" not in shapes:
                shapes[f"{prefix}.weight"] = self._shape_of(prefix)
        return shapes

    def _find_format(self) -> SafetensorsFormat:
        """The format with a key of its own in config.json, else the one that `quant_method` names.

        Errors: SourceError where no format reads the method, or two keys that should agree do not.
        """
        for form in IN_CONFIG.values():
            first, *others = form.config_keys
            said = getattr(self.config, first, None)
            if said is None:
                continue
            if not isinstance(said, Mapping):
                why = f"it is a {type(said).__name__}, not a JSON object"
                raise SourceError(f"{first} in config.json of {self.folder} is not read", why, "fetch the model again")
            if first == "quantization_config":
                continue
            if any(getattr(self.config, key, said) != said for key in others):
                raise SourceError(
                    f"config.json of {self.folder} contradicts itself",
                    f"{form.name} has the same under {' and '.join(form.config_keys)}, and here they differ",
                    "fetch the model again",
                )
            return form
        method = self.config.quantization_config.get("quant_method")
        named = {name: form for name, form in IN_CONFIG.items() if form.config_keys[0] == "quantization_config"}
        if method not in named:
            raise SourceError(
                f"{self.folder} is quantized by {method}",
                f"that method is not read yet; those that are: {', '.join(IN_CONFIG)}",
                "give the model it was quantized from, in full precision",
            )
        return named[method].described_by(self.config.quantization_config)

    def _group(self) -> dict[str, list[str]]:
        """The tensors of each quantized layer, by the layer's module in the files.

        A module with a `weight` and nothing else of the format is in full precision.
        """
        groups: dict[str, list[str]] = {}
        for stored in self._shards.entries:
            prefix, _, suffix = stored.rpartition(".")
            if suffix in self.format.suffixes:
                groups.setdefault(prefix, []).append(stored)
        return {prefix: found for prefix, found in groups.items() if found != [f"{prefix}.weight"]}

    def _grids(self) -> Callable[[str], Grid]:
        suffix = f".{self.format.scale_suffix}"
        scales = {entry.dtype for name, entry in self._shards.entries.items() if name.endswith(suffix)}
        known = sorted(scales & set(DTYPES))
        return self.format.grids_of(self.quantization_config, DTYPES[known[0]] if known else torch.float16)

    def _shape_of(self, prefix: str) -> tuple[int, ...]:
        shapes = {stored: self._shards.entries[stored].shape for stored in self._tensors_of[prefix]}
        if "weight" not in self.format.suffixes and f"{prefix}.weight" in self._shards.entries:
            what = f"{prefix} is stored twice"
            raise SourceError(what, "it has a weight in full precision and a quantized one", "fetch the model again")
        return self.format.shape(prefix, shapes, self.raw, self.grid_of(prefix))


def open_folder(folder: Path, name: str | None = None) -> FolderSource:
    """The model in a folder, in full precision or quantized, as its config says.

    Errors: SourceError, naming the file, tensor or method.
    """
    config = read_config(folder)
    keys = {key for form in IN_CONFIG.values() for key in form.config_keys}
    quantized = any(getattr(config, key, None) is not None for key in keys)
    return QuantizedFolder(folder, name) if quantized else FolderSource(folder, name)
