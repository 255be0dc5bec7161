"""Checkpoint formats: one a file, each behind `Format`."""

from collections.abc import Collection

from logitwise.errors import FormatError
from logitwise.formats.awq import Awq
from logitwise.formats.base import Described, Format
from logitwise.formats.compressed_tensors import CompressedTensors
from logitwise.formats.gguf import Gguf
from logitwise.formats.gptq import Gptq
from logitwise.formats.mlx import Mlx
from logitwise.grid import Grid

FORMATS: dict[str, Format] = {one.name: one for one in (CompressedTensors(), Gptq(), Awq(), Mlx(), Gguf())}
"""Every format by the name that `--format` takes."""


def choose(grids: Collection[Grid]) -> tuple[Format, str]:
    """The format that `--format auto` means for the grids of all layers, and the reason in one sentence.

    Errors: FormatError where no format holds the grids.
    """
    chosen = FORMATS["compressed-tensors"]
    reason = chosen.holds_grids(grids)
    if reason is not None:
        raise FormatError("no format holds this grid", reason, "choose other bits, group size or --scale-dtype")
    return chosen, chosen.loaders(grids)


__all__ = ["FORMATS", "Awq", "CompressedTensors", "Described", "Format", "Gguf", "Gptq", "Mlx", "choose"]
