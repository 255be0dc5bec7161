"""Every tensor of the input accounted for: quantized, kept (and why), or not part of the model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from logitwise.skeleton import Slot
from logitwise.source.base import Source


@dataclass(frozen=True)
class Fate:
    """What became of one tensor of the input."""

    tensor: str
    fate: Literal["quantized", "kept", "dropped"]
    why: str


def keeper(patterns: Iterable[str]) -> Callable[[Slot], bool]:
    """Whether a slot stays in full precision: its module's name matches one of the patterns."""
    chosen = tuple(patterns)
    return lambda slot: any(matches(pattern, slot.module) for pattern in chosen)


def matches(pattern: str, module: str) -> bool:
    """Whether a shell pattern is that of a module's name, or of a part of it from one dot to another."""
    return fnmatch(f".{module}.", f"*.{pattern}.*")


def audit(source: Source, slots: list[Slot], kept: Callable[[Slot], bool]) -> list[Fate]:
    """The fate of every tensor: those of the model in the order of the input, then those it has no place for."""
    by_name = {slot.name: slot for slot in slots}
    fates: list[Fate] = []
    for name in source.names():
        slot = by_name.get(name)
        if slot is None:
            fates.append(Fate(name, "kept", "not the weight of a linear layer inside a block"))
        elif kept(slot):
            fates.append(Fate(name, "kept", "--keep"))
        else:
            fates.append(Fate(name, "quantized", ""))
    return fates + [Fate(name, "dropped", "the model has no place for it") for name in source.unused]
