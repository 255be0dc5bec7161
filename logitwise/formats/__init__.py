"""Checkpoint formats: one a file, each behind `Format`."""

from collections.abc import Collection

from logitwise.errors import FormatError
from logitwise.formats.base import Format
from logitwise.formats.compressed_tensors import CompressedTensors
from logitwise.formats.mlx import Mlx
from logitwise.grid import Grid

FORMATS: dict[str, Format] = {one.name: one for one in (CompressedTensors(), Mlx())}
"""Every format by the name that `--format` takes."""


def choose(grids: Collection[Grid]) -> tuple[Format, str]:
    """The format that `--format auto` means for the grids of all layers, and the reason in one sentence.

    Errors: FormatError where no format holds the grids.
    """
    chosen = FORMATS["compressed-tensors"]
    reason = next(filter(None, map(chosen.holds, grids)), None) or chosen.holds_together(grids)
    if reason is not None:
        raise FormatError("no format holds this grid", reason, "choose other bits, group size or --scale-dtype")
    # On a CPU, vLLM 0.32 has a kernel for 4 bits only; what it serves on a GPU is read from its source, not run.
    four = all(grid.bits == 4 for grid in grids)
    served = "and vLLM serves it" if four else "vLLM should serve it on a GPU (not tried)"
    return chosen, f"transformers with compressed-tensors 0.18 loads it, {served}"


__all__ = ["FORMATS", "CompressedTensors", "Format", "Mlx", "choose"]
