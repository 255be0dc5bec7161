"""A source whose tensors were changed so that the model computes what it did."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitwise.source.base import Source


@dataclass(frozen=True)
class Changes:
    """What becomes of a model's tensors, by name.

    Args:
        vectors: 1-D tensors in place of the source's, in its type.
        first, second: what a matrix as it is stored is multiplied by, along its first and its second axis, float32.
    """

    vectors: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)


class Rewritten(Source):
    """Another source with some of its tensors changed.

    Matrices that are changed are read in float32, since they do not fit the source's type; they are multiplied when
    they are read, so that no more is held than a few vectors a block.

    Args:
        source: the model as it came.
        changes: what is different.
    """

    def __init__(self, source: Source, changes: Changes) -> None:
        self.source, self.changes = source, changes
        self.name, self.config, self.dtype = source.name, source.config, source.dtype

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        changes = self.changes
        if name in changes.vectors:
            return changes.vectors[name].clone()
        tensor = self.source.read(name)
        if name in changes.first:
            tensor = tensor.float() * changes.first[name].unsqueeze(1)
        if name in changes.second:
            tensor = tensor.float() * changes.second[name]
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.source.tokenizer()

    @property
    def unused(self) -> list[str]:
        return self.source.unused

    def extra_files(self) -> list[Path]:
        return self.source.extra_files()

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes
