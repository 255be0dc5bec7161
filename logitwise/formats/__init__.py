"""Checkpoint formats: one a file, each behind `Format`."""

from logitwise.errors import FormatError
from logitwise.formats.base import Format
from logitwise.formats.compressed_tensors import CompressedTensors
from logitwise.grid import Grid

FORMATS: dict[str, Format] = {one.name: one for one in (CompressedTensors(),)}
"""Every format by the name that `--format` takes."""


def choose(grid: Grid) -> tuple[Format, str]:
    """The format that `--format auto` means for a grid, and the reason in one sentence.

    Errors: FormatError where no format holds the grid.
    """
    chosen = FORMATS["compressed-tensors"]
    reason = chosen.holds(grid)
    if reason is not None:
        raise FormatError("no format holds this grid", reason, "choose other bits, group size or --scale-dtype")
    # On a CPU, vLLM 0.32 has a kernel for 4 bits only; what it serves on a GPU is read from its source, not run.
    served = "and vLLM serves it" if grid.bits == 4 else "vLLM should serve it on a GPU (not tried)"
    return chosen, f"transformers with compressed-tensors 0.18 loads it, {served}"


__all__ = ["FORMATS", "CompressedTensors", "Format", "choose"]
