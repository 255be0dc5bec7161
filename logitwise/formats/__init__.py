"""Checkpoint formats: one a file, each behind `Format`."""

from collections.abc import Collection

from logitwise.errors import FormatError
from logitwise.formats.awq import Awq
from logitwise.formats.base import Described, Format
from logitwise.formats.compressed_tensors import CompressedTensors
from logitwise.formats.fusing import unfusable
from logitwise.formats.gguf import Gguf
from logitwise.formats.gptq import Gptq
from logitwise.formats.mlx import Mlx
from logitwise.grid import Grid

FORMATS: dict[str, Format] = {one.name: one for one in (CompressedTensors(), Gptq(), Awq(), Mlx(), Gguf())}
"""Every format by the name that `--format` takes."""

AUTO = ("compressed-tensors", "mlx")
"""What `--format auto` tries, in order: what has most loaders at any bits, then what holds asymmetric layers on several
grids. GPTQ and AWQ hold nothing that the first does not; GGUF may need wider codes."""


def choose(grids: Collection[Grid], apart: str | None = None) -> tuple[Format, str]:
    """The format that `--format auto` means for the grids of all layers, and the reason in one sentence.

    Args:
        grids, apart: as `Format.loaders` has them.

    Errors: FormatError where no format holds the grids.
    """
    reasons: list[str] = []
    for form in map(FORMATS.__getitem__, AUTO):
        reason = form.holds_grids(grids)
        if reason is None:
            return form, "; ".join([form.loaders(grids, apart), *reasons[:1]])
        reasons.append(reason)
    raise FormatError(
        "no format holds this grid", reasons[0], "choose other bits, group size or --scale-dtype, or --symmetric"
    )


__all__ = ["FORMATS", "Awq", "CompressedTensors", "Described", "Format", "Gguf", "Gptq", "Mlx", "choose", "unfusable"]
