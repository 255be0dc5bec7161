"""A model in a folder as `save_pretrained` writes it: config.json, safetensors, tokenizer files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from logitwise.errors import SourceError
from logitwise.source.base import Source
from logitwise.source.growth import check_growth
from logitwise.source.layout import layout_of
from logitwise.source.outside import check_config, check_files, check_generation, found, read_json
from logitwise.source.shards import DTYPES, Shards


class FolderSource(Source):
    """A folder of safetensors.

    Args:
        folder: where config.json and the safetensors files are.
        name: what the model is called; the folder's own name by default.

    Errors: SourceError, naming the file or tensor.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or folder.resolve().name
        self.config = read_config(folder)
        self._shards = Shards(folder)
        self._layout = layout_of(self.config, len(self._shards.entries), str(folder))
        self._stored = self._stored_shapes()
        self._places = self._layout.match(self._stored, str(folder))
        for tensor in self._layout.shapes:
            self._layout.check_shape(tensor, self._stored[self._places[tensor]], str(folder))
        self._check_tied()
        self.dtype = self._choose_dtype()

    def names(self) -> list[str]:
        """Every tensor of the model, in the order of the files."""
        order = {stored: position for position, stored in enumerate(self._stored)}
        return sorted(self._layout.shapes, key=lambda name: order[self._places[name]])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, as the config says and the file was found to have."""
        return self._layout.shapes[name]

    def read(self, name: str) -> Tensor:
        """One tensor in `dtype`; whole numbers stay what they are."""
        tensor = self.raw(self._places[name])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    @property
    def unused(self) -> list[str]:
        """Tensors of the files that the model has no place for."""
        placed = set(self._places.values())
        return [stored for stored in self._stored if stored not in placed]

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """How the weights are quantized, as config.json says; None where they are not."""
        return None

    def raw_names(self) -> list[str]:
        """Every tensor by its name in the files."""
        return list(self._shards.entries)

    def raw(self, stored: str) -> Tensor:
        """One tensor as it is stored, by its name in the files.

        Errors: SourceError, naming the tensor and the file.
        """
        return self._shards.read(stored)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights."""
        try:
            if (file := self.folder / "tokenizer.json").is_file():
                check_growth(file)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except SourceError:
            raise
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
            raise SourceError(
                f"{self.folder} has no tokenizer that can be loaded",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}",
                "put the model's tokenizer.json and tokenizer_config.json beside config.json",
            ) from error
        return tokenizer

    def extra_files(self) -> list[Path]:
        return found(self.folder)

    @property
    def size_bytes(self) -> int:
        """What the weight files take on disk, in bytes."""
        return self._shards.size_bytes

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights that the files hold, by their names there."""
        return {name: entry.shape for name, entry in self._shards.entries.items()}

    def _choose_dtype(self) -> torch.dtype:
        """The config's type where it is a 16- or 32-bit float; else the one that most of the tensors have."""
        if self.config.dtype in (torch.float32, torch.float16, torch.bfloat16):
            return self.config.dtype
        found = [entry.dtype for entry in self._shards.entries.values() if entry.dtype in DTYPES]
        return DTYPES[max(sorted(set(found)), key=found.count)] if found else torch.float32

    def _check_tied(self) -> None:
        """A tied tensor that is stored all the same must equal the one it is tied to."""
        for name, owner in self._layout.tied.items():
            stored, place = self._places.pop(name, None), self._places[owner]
            if stored is not None and stored != place and not torch.equal(self.raw(stored), self.raw(place)):
                raise SourceError(
                    f"tensor {name} differs from {owner}",
                    "the config says that the two are tied, so only one of them would be used",
                    'set "tie_word_embeddings": false in config.json if the head is its own, or remove the one to drop',
                )


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a folder; code that comes with a model is never run.

    Errors: SourceError where there is none, only its own code could read it, or the folder is out of bounds.
    """
    check_files(folder)
    file = folder / "config.json"
    check_config(read_json(file), file)
    check_generation(folder)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config from outside may fail in any way inside transformers' constructors
        raise SourceError(
            f"{file} cannot be used",
            f"{type(error).__name__}: {error}",
            "check the file, or fetch the model again",
        ) from error
    return config
