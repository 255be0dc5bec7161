"""The "gemm" layout of AWQ, which transformers loads with gptqmodel, and vLLM.

For a Linear module P of shape [out, in], in place of P.weight:

    P.qweight  int32   [in, out / 8]      codes of 4 bits, packed along the OUTPUTS
    P.qzeros   int32   [groups, out / 8]  zero points, packed likewise
    P.scales   float16 [groups, out]

Word k of a row holds the outputs 8k .. 8k + 7, but not in their order: nibble j, lowest first, holds output
8k + (0, 2, 4, 6, 1, 3, 5, 7)[j]. Zero points are stored as they are; the 8 of a symmetric grid is one like any other.
AutoRound writes `zero_point: false` where all of them are 8.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from logitwise.formats.checks import (
    AUTOROUND_KEYS,
    expect,
    integers_only,
    name_of,
    nothing_left,
    refusal,
    take,
    take_nothing_else,
    take_scale,
    unread,
)
from logitwise.formats.packing import WORD, pack_codes, unpack_codes
from logitwise.formats.safetensors import SafetensorsFormat, described
from logitwise.grid import Grid, Quantized

BITS = 4
PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of the eight outputs of a word each of its nibbles holds, lowest first."""

# Keys that a config may hold and that say nothing about the values of the weights.
NEUTRAL_KEYS = AUTOROUND_KEYS | {
    *("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert"),
}


class Awq(SafetensorsFormat):
    """AWQ "gemm": 4 bits, groups, float16 scales."""

    name = "awq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")  # the last is GPTQ's: seen, so that it is refused
    scale_suffix, shape_suffix = "scales", "qweight"
    stores_every_zero = True

    def _not_held(self, grid: Grid) -> str | None:
        if grid.bits != BITS:
            return f"{self.name} holds 4 bits, not {grid.bits}; gptq and compressed-tensors hold others"
        if grid.group_size is None:
            return f"{self.name} holds groups of inputs, not one scale a channel; give a --group-size that divides them"
        if grid.group_size < 1:
            return f"a group size of {grid.group_size} is not a number of inputs"
        if grid.scale_dtype != torch.float16:
            return f"{self.name} stores scales as float16, not {name_of(grid.scale_dtype)}"
        return None

    def holds_layer(self, name: str, out_features: int, in_features: int, transposed: bool, grid: Grid) -> str | None:
        """None, or why not: eight outputs make a word."""
        reason = super().holds_layer(name, out_features, in_features, transposed, grid)
        if reason is None and out_features % len(PLACES):
            return f"{name} has {out_features} outputs; {self.name} needs a multiple of {len(PLACES)}"
        return reason

    def _laid_out(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """The three tensors of a layer."""
        return {
            f"{prefix}.qweight": _pack(quantized.codes.T),
            f"{prefix}.qzeros": _pack(quantized.zero.T),
            f"{prefix}.scales": quantized.scale.T.contiguous(),
        }

    def quantization_config(self, grids: Mapping[str, Grid], ignored: list[str]) -> dict[str, Any]:
        """One grid for all. `zero_point` says that zero points are stored, which they always are."""
        (grid,) = set(grids.values())
        return {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": grid.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignored,
        }

    def loaders(self, grids: Collection[Grid], apart: str | None = None) -> str:
        served = f"vLLM does not: {apart}" if apart else "and vLLM serves it"
        return f"transformers loads it with gptqmodel, {served}"

    def shape(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], Tensor], grid: Grid
    ) -> tuple[int, int]:
        """As `qweight` has it; what else there is must fit."""
        name = f"{prefix}.qweight"
        if name not in shapes:
            raise refusal(name, "it is missing")
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            raise refusal(name, f"its shape is {list(shapes[name])}, which is no matrix")
        in_features, words = shapes[name]
        return words * len(PLACES), in_features

    def read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """One layer."""
        take_nothing_else(tensors, prefix, ("qweight", "qzeros", "scales"))
        out_features, in_features = self.shape_read(prefix, tensors, grid)
        groups, words = grid.groups(in_features), out_features * BITS // WORD
        packed = take(tensors, f"{prefix}.qweight", torch.int32, (in_features, words))
        scale = take_scale(tensors, f"{prefix}.scales", grid.scale_dtype, (groups, out_features))
        stored = take(tensors, f"{prefix}.qzeros", torch.int32, (groups, words))
        zero = _unpack(stored)
        if grid.symmetric and not bool((zero == grid.middle).all()):
            why = f"a symmetric grid has {grid.middle} everywhere, this has {int(zero.min())} to {int(zero.max())}"
            raise refusal(f"{prefix}.qzeros", why)
        return Quantized(_unpack(packed).T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), grid)

    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        """One grid for every quantized layer, asymmetric unless the config says that no zero point is needed."""
        rest = dict(config)
        expect(rest, "quant_method", "awq")
        asymmetric = rest.pop("zero_point", None)
        if type(asymmetric) is not bool:
            raise unread("zero_point", repr(asymmetric), "true or false")
        expect(rest, "sym", None, not asymmetric)
        integers_only(rest)
        version = rest.pop("version", None)
        if not isinstance(version, str) or version.lower() != "gemm":
            raise unread("version", repr(version), "'gemm'")
        settings = {"bits": rest.pop("bits", None), "group_size": rest.pop("group_size", None), "sym": not asymmetric}
        nothing_left(rest, NEUTRAL_KEYS)
        grid = described(self, settings, scale_dtype)
        return lambda module: grid


def _pack(codes: Tensor) -> Tensor:
    """Codes [rows, out] as words [rows, out / 8]."""
    rows, outputs = codes.shape
    return pack_codes(codes.reshape(rows, -1, len(PLACES))[..., PLACES].reshape(rows, outputs), BITS)


def _unpack(words: Tensor) -> Tensor:
    """The inverse of `_pack`."""
    rows, outputs = words.shape[0], words.shape[1] * len(PLACES)
    codes = torch.empty(rows, words.shape[1], len(PLACES), dtype=torch.uint8)
    codes[..., PLACES] = unpack_codes(words, BITS, outputs).view_as(codes)
    return codes.view(rows, outputs)
