"""MLX's affine quantization, which mlx-lm loads.

For a Linear module P of shape [out, in], in place of P.weight:

    P.weight  uint32 [out, in * bits / 32]  codes, packed along the inputs in a dense stream (`packing.py`)
    P.scales  float [out, in / group_size]
    P.biases  float [out, in / group_size]  in the type of the scales

A weight is code * scale + bias. On a grid with float minima the bias is the minimum. Elsewhere bias = -zero * scale,
and that product must not move a zero point:

- A symmetric grid's zero point is a power of two, and the product exact in every type.
- Other zero points have up to `bits` significant bits, for which float16 and bfloat16 have no room beside those of the
  scale: they would move by up to zero/2048 and zero/256 of a step, at 8 bits an eighth of a step and a whole one. Such
  grids are refused before any work.
- float32 rounds the product by at most 2^-24 of itself, as it rounds every product, `Quantized.dequantize` included.
  The zero point is found again exactly, and weights are the measured ones but for float32's own rounding.

The layout does not tell these apart. A layer is read as asymmetric where every bias is exactly that product for a whole
zero point within the codes, those of symmetric grids with every zero point in the middle; and as one with float minima
elsewhere, as those that mlx's own quantizer makes. A group whose scale is 0 is all zeros; its zero point is not stored
and is read as the middle.

Layout and keys are those of mlx 0.32 (`mlx.core.quantize`) and mlx-lm 0.32 (`mlx_lm.utils.load_model`).
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.formats.checks import name_of, refusal, take, take_nothing_else, take_scale, unread
from logitwise.formats.packing import WORD, pack_codes, unpack_codes, words_of
from logitwise.formats.safetensors import SafetensorsFormat
from logitwise.grid import Grid, Quantized

BITS = (2, 3, 4, 5, 6, 8)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Mlx(SafetensorsFormat):
    """MLX affine: 2 to 6 and 8 bits, groups of 32, 64 or 128; asymmetric grids with float32 scales only."""

    name = "mlx"
    suffixes = ("weight", "scales", "biases")
    scale_suffix, shape_suffix = "scales", "weight"
    # mlx-lm loads by the first. As it does, logitwise repeats it in the second, where the hub looks, and where
    # transformers finds no quant_method and says so, before it comes to tensors of other shapes than it expects.
    config_keys = ("quantization", "quantization_config")
    written_for = "mlx"
    group_sizes = (32, 64, 128)
    library = "mlx"
    per_channel = False
    holds_minima = True

    def _not_held(self, grid: Grid) -> str | None:
        reason = self._not_laid_out(grid)
        if reason is not None or grid.symmetric or grid.minimum or grid.scale_dtype == torch.float32:
            return reason
        dtype = name_of(grid.scale_dtype)
        return (
            f"{self.name} stores -zero * scale in the scale's type, and {dtype} would round it, which "
            "moves zero points; --scale-dtype float32 or --symmetric does not"
        )

    def holds_together(self, grids: Collection[Grid]) -> str | None:
        """None, or why layers on these grids cannot share a checkpoint; bits and group sizes may differ."""
        dtypes = sorted({name_of(grid.scale_dtype) for grid in grids})
        return (
            None if len(dtypes) == 1 else f"{self.name} has one scale type for all layers, not {' and '.join(dtypes)}"
        )

    def bits_stored(self, grid: Grid, out_features: int, in_features: int) -> int:
        """Bits that a layer's weight takes; its biases are as large as its scales, also on a symmetric grid."""
        of_group = 2 * 8 * grid.scale_dtype.itemsize
        return out_features * (in_features * grid.bits + grid.groups(in_features) * of_group)

    def _laid_out(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """The three tensors of a layer."""
        grid = quantized.grid
        exact = _biases(quantized.scale, quantized.zero) if quantized.minimum is None else quantized.minimum.float()
        biases = exact.to(grid.scale_dtype)
        if not torch.equal(biases.float(), exact) or not bool(torch.isfinite(biases).all()):
            why = f"-zero * scale does not fit {name_of(grid.scale_dtype)}"
            raise FormatError(f"{prefix}: zero points cannot be stored", why, "choose --scale-dtype float32")
        return {
            f"{prefix}.weight": pack_codes(quantized.codes, grid.bits).view(torch.uint32),
            f"{prefix}.scales": quantized.scale.contiguous(),
            f"{prefix}.biases": biases,
        }

    def loaders(self, grids: Collection[Grid], apart: str | None = None) -> str:
        """mlx-lm, and no other that is known."""
        return "mlx-lm 0.32 loads it"

    def quantization_config(self, grids: Mapping[str, Grid], ignored: list[str]) -> dict[str, Any]:
        """What most layers have, and by their names what others have; layers without scales need not be named."""
        counts = Counter(grids.values())
        most = max(counts, key=lambda grid: (counts[grid], str(grid)))
        return _settings(most) | {
            module: _settings(grid) for module, grid in grids.items() if _settings(grid) != _settings(most)
        }

    def shape(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], Tensor], grid: Grid
    ) -> tuple[int, int]:
        """The outputs of the packed codes, and the inputs that they are as many bits of."""
        stored = f"{prefix}.weight"
        if stored not in shapes:
            raise refusal(stored, "it is missing")
        found = shapes[stored]
        if len(found) != 2 or found[1] * WORD % grid.bits:
            raise refusal(stored, f"{list(found)} words are not the codes of a matrix, {grid.bits} bits each")
        return found[0], found[1] * WORD // grid.bits

    def read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """One layer, its zero points found by its biases."""
        out_features, in_features = self.shape_read(prefix, tensors, grid)
        take_nothing_else(tensors, prefix, self.suffixes)
        groups = (out_features, grid.groups(in_features))
        packed = take(tensors, f"{prefix}.weight", torch.uint32, (out_features, words_of(in_features, grid.bits)))
        scale, biases = (
            take_scale(tensors, f"{prefix}.{suffix}", grid.scale_dtype, groups) for suffix in ("scales", "biases")
        )
        codes = unpack_codes(packed.view(torch.int32), grid.bits, in_features)
        zero = torch.where(scale == 0, float(grid.middle), torch.round(-biases.double() / scale.double()))
        within = (zero >= 0) & (zero <= grid.levels)
        if bool(within.all()) and torch.equal(_biases(scale, zero), biases.float()):
            middle = bool((zero == grid.middle).all())  # MLX has no word for it
            return Quantized(codes, scale, zero.to(torch.uint8), replace(grid, symmetric=middle))
        none = torch.zeros(groups, dtype=torch.uint8)
        return Quantized(codes, scale, none, replace(grid, minimum=True), biases)

    def loading(self, folder: str) -> str:
        """mlx-lm's own way."""
        return f"""\
from mlx_lm import load  # pip install mlx-lm
model, tokenizer = load("{folder}")"""

    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        """The grids of a `quantization` table: its own, and those of the layers that it names.

        A name with `false` is a layer in full precision, as mlx-lm has it.
        """
        own = {key: value for key, value in config.items() if not isinstance(value, Mapping) and value is not False}
        every = self._grid_of("quantization", own, scale_dtype)
        named = {
            module: self._grid_of(f"quantization: {module}", value, scale_dtype) if value is not False else None
            for module, value in config.items()
            if module not in own
        }

        def grid_of(module: str) -> Grid:
            grid = named.get(module, every)
            if grid is None:
                why = "config.json says that it is in full precision, and it has the tensors of a quantized layer"
                raise FormatError(f"{module} has no grid", why, "give another checkpoint")
            return grid

        return grid_of

    def _grid_of(self, where: str, table: Mapping[str, Any], scale_dtype: torch.dtype) -> Grid:
        rest = dict(table)
        bits, group_size, mode = rest.pop("bits", None), rest.pop("group_size", None), rest.pop("mode", "affine")
        if rest:
            key = min(rest)
            raise unread(key, repr(rest[key]), "tables without this key", where)
        if mode != "affine":
            raise unread("mode", repr(mode), "'affine'", where)
        for key, value in (("bits", bits), ("group_size", group_size)):
            if type(value) is not int:
                raise unread(key, repr(value), "a whole number", where)
        grid = Grid(bits, group_size, False, scale_dtype)
        reason = self._not_laid_out(grid)
        if reason is not None:
            raise FormatError(f"{where} is not read", reason, "give another checkpoint")
        return grid

    def _not_laid_out(self, grid: Grid) -> str | None:
        """None where there are tensors for the grid, whatever its zero points; else why not."""
        if grid.bits not in BITS:
            return f"{self.name} holds {', '.join(map(str, BITS[:-1]))} and {BITS[-1]} bits, not {grid.bits}"
        if grid.group_size not in self.group_sizes:
            found = f"groups of {grid.group_size}" if grid.group_size else "one scale a channel"
            return f"{self.name} holds groups of 32, 64 and 128, not {found}"
        if grid.scale_dtype not in SCALE_DTYPES:
            return f"{self.name} stores scales as float16, bfloat16 or float32, not {name_of(grid.scale_dtype)}"
        return None


def _settings(grid: Grid) -> dict[str, Any]:
    return {"group_size": grid.group_size, "bits": grid.bits, "mode": "affine"}


def _biases(scale: Float[Tensor, "out groups"], zero: Shaped[Tensor, "out groups"]) -> Float[Tensor, "out groups"]:
    """-zero * scale in float32, where the product is exact for scales of 16 bits."""
    return -(scale.float() * zero.float())
