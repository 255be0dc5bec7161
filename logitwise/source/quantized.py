"""Models whose weights are already quantized, read through the format that wrote them: a folder or a .gguf file."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import FormatError, SourceError
from logitwise.formats import FORMATS, auto_round
from logitwise.formats.checkpoint import replace_tensors, writing
from logitwise.formats.checks import refusal
from logitwise.formats.gguf import TYPES
from logitwise.formats.gguf_file import ARCHITECTURES, FLOATS, in_file_order
from logitwise.formats.safetensors import SafetensorsFormat
from logitwise.grid import Grid, Quantized
from logitwise.source.base import QuantizedSource, Source
from logitwise.source.folder import FolderSource, read_config
from logitwise.source.gguf import GgufSource, holds_codes
from logitwise.source.outside import BESIDE, check_generation, found
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

    def write_changed(self, folder: Path, changed: Mapping[str, Tensor | Quantized]) -> int:
        tensors: dict[str, Tensor] = {}
        for name, content in changed.items():
            stored = self._places[name]
            if isinstance(content, Quantized):
                tensors |= self.format.tensors(stored.removesuffix(".weight"), content)
            else:
                tensors[stored] = content
        for file in sorted(file for file in self.folder.iterdir() if file.is_file()):
            replace_tensors(file, folder / file.name, tensors)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

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
        method = str(self.config.quantization_config.get("quant_method"))
        if method == auto_round.METHOD:
            return auto_round.packed_as(self.config.quantization_config)
        named = {name: form for name, form in IN_CONFIG.items() if form.config_keys[0] == "quantization_config"}
        if method not in named:
            raise SourceError(
                f"{self.folder} is quantized by {method}",
                f"that method is not read yet; those that are: {', '.join([*IN_CONFIG, auto_round.METHOD])}",
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


class QuantizedGguf(GgufSource, QuantizedSource):
    """A .gguf file with quantized weights, as it is stored: nothing is rounded.

    Args:
        file, folder: as of any.

    Errors: as any .gguf file; FormatError, too, where it holds tensors that the model has no place for.
    """

    def __init__(self, file: Path, folder: Path | None = None) -> None:
        super().__init__(file, folder)
        self.format = FORMATS["gguf"]
        if self.unused:
            raise refusal(self.unused[0], f"{file.name} is a {self.config.model_type}, which has no place for it")
        floats = [kind for name in self.names() if (kind := self._float_of(name)) and len(self.shape(name)) > 1]
        self.dtype = self.config.dtype = max(sorted(set(floats), key=str), key=floats.count, default=torch.float16)

    def read(self, name: str) -> Tensor:
        """A quantized weight of any type dequantized in float32; any other tensor as it is stored."""
        tensor = self._loaded(name, self._dequantize)
        self._layout.check_shape(name, tuple(tensor.shape), self.file.name)
        return tensor.to(self._float_of(name) or torch.float32)

    def quantized(self, name: str) -> Quantized | None:
        """The codes, scales and zero points or minima of a weight, as its type has them."""
        grid = self.grid(name)
        if grid is None:
            return None
        prefix, blocks = name.removesuffix(".weight"), self._loaded(name, self._bytes)
        quantized = self.format.read(prefix, {f"{prefix}.{self._kind(name)}": blocks}, grid)
        self._layout.check_shape(name, tuple(quantized.codes.shape), self.file.name)
        return quantized

    def grid(self, name: str) -> Grid | None:
        """The grid of a weight's type.

        Errors: FormatError, naming the tensor, where its codes lie on none that is known.
        """
        if self._float_of(name) is not None:
            return None
        kind = self._kind(name)
        if self.architecture not in set(ARCHITECTURES.values()):
            raise refusal(self._parts[name][0], f"codes are not read of {self.architecture} files, only weights")
        if kind not in TYPES:
            why = f"its codes, of type {kind}, lie on no grid that is read; those of {', '.join(TYPES)} do"
            raise refusal(self._parts[name][0], why)
        return TYPES[kind].grid

    def write_changed(self, folder: Path, changed: Mapping[str, Tensor | Quantized]) -> int:
        out = folder / self.file.name
        with writing(out):
            for other in found(self.folder, BESIDE) if self.folder else []:
                shutil.copyfile(other, folder / other.name)
            shutil.copyfile(self.file, out)
            with out.open("r+b") as file:
                for name, content in changed.items():
                    (place,) = self._parts[name]
                    stored = self._tensors[place]
                    if isinstance(content, Quantized):
                        ((kind, tensor),) = self.format.tensors(name.removesuffix(".weight"), content).items()
                        kind = kind.rpartition(".")[2]
                    else:
                        kind, tensor = FLOATS[content.dtype], content
                    if kind != stored.tensor_type.name:
                        why = f"it is {stored.tensor_type.name} and would be {kind}"
                        raise FormatError(f"{place} would change its type", why, "report it as a bug")
                    ordered = in_file_order(place, tensor.detach().cpu(), self.config, self.architecture)
                    file.seek(int(stored.data_offset))
                    file.write(ordered.contiguous().view(torch.uint8).numpy().tobytes())
        return out.stat().st_size

    def stored_as(self, name: str) -> str:
        dtype, kind = self._float_of(name), self._kind(name)
        if dtype is not None:
            return str(dtype).removeprefix("torch.")
        return f"{TYPES[kind].grid.bits} bits" if kind in TYPES else kind

    def grid_in_words(self, name: str) -> str | None:
        """That of its type, also of one whose codes are not read, such as Q4_K."""
        kind = self._kind(name)
        if self._float_of(name) is not None:
            return None
        return str(TYPES[kind].grid) if kind in TYPES else f"{kind}, whose codes lie on no grid that is read"

    def bits_stored(self, name: str) -> int | None:
        """Bits of a weight of any quantized type."""
        size = sum(int(self._tensors[part].n_bytes) for part in self._parts[name])
        return None if self._float_of(name) else 8 * size

    def _kind(self, name: str) -> str:
        """The name of a tensor's type."""
        return str(self._tensors[self._parts[name][0]].tensor_type.name)

    def _float_of(self, name: str) -> torch.dtype | None:
        """The type of a tensor in full precision; None of a quantized one."""
        return {kind: dtype for dtype, kind in FLOATS.items()}.get(self._kind(name))


def open_gguf(file: Path, folder: Path | None = None) -> GgufSource:
    """The model in a .gguf file, perhaps given by its folder, as it is stored, quantized or in full precision.

    Errors: SourceError, FormatError, naming the file or tensor.
    """
    return (QuantizedGguf if holds_codes(file) else GgufSource)(file, folder)


def open_folder(folder: Path, name: str | None = None) -> Source:
    """The model in a folder, in full precision or quantized, as its config says, or as its only .gguf file has it.

    Errors: SourceError, naming the file, tensor or method.
    """
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1 and not (folder / "config.json").exists():
        check_generation(folder)
        return open_gguf(files[0], folder)
    config = read_config(folder)
    keys = {key for form in IN_CONFIG.values() for key in form.config_keys}
    quantized = any(getattr(config, key, None) is not None for key in keys)
    return QuantizedFolder(folder, name) if quantized else FolderSource(folder, name)
