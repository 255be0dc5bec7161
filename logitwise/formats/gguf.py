"""GGUF, which llama.cpp loads: quantized layers in the block types that hold their grids exactly.

A type has a float16 scale d for every 32 weights of a row and whole numbers in a fixed range around 0, so that code q
with zero point z becomes r = q - z, and the weight d * r is the same number to the last bit:

    type   r               bytes of a block                                        holds
    Q4_0   -8 .. 7         d, 16 bytes: r + 8 of weight j in the low half of byte  2 and 3 bits; 4 bits symmetric
                           j, of weight j + 16 in the high half
    Q5_0   -16 .. 15       d, 32 bits: the fifth bit of r + 16 of weight j, low    4 bits; 5 bits symmetric
                           bit first; the other four as in Q4_0
    Q8_0   -128 .. 127     d, 32 bytes: r                                          5 to 7 bits; 8 bits symmetric

Grids with float minima have types of their own, in which a weight is d * q + m:

    Q4_1   q: 0 .. 15      d, float16 m, then as Q4_0 with q for r + 8             2 to 4 bits
    Q5_1   q: 0 .. 31      d, float16 m, then as Q5_0 with q for r + 16            5 bits

They are not for whole zero points: -z * d would have to be rounded to float16. Larger groups repeat what is theirs.
Blocks are made of the codes as they are: gguf's own `quantize` would choose other scales. Layouts are those of ggml
(`ggml-common.h`, `block_q4_0` and others).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float16, Int16, UInt8
from torch import Tensor

from logitwise.formats.base import Described, Format
from logitwise.formats.checks import name_of, refusal, take, take_nothing_else
from logitwise.formats.gguf_file import file_of, not_described, write_file
from logitwise.grid import Grid, Quantized

BLOCK = 32
"""Weights of a row that share a scale."""


@dataclass(frozen=True)
class BlockType:
    """How 32 weights are stored.

    Args:
        bits: of each weight.
        minimum: whether there is a float minimum beside the scale.
    """

    bits: int
    minimum: bool = False

    @property
    def grid(self) -> Grid:
        """The grid that its blocks are read on."""
        return Grid(self.bits, BLOCK, not self.minimum, torch.float16, self.minimum)

    @property
    def head_bytes(self) -> int:
        """Bytes of the scale and the minimum."""
        return 4 if self.minimum else 2

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.head_bytes + BLOCK * self.bits // 8

    def holds(self, grid: Grid) -> bool:
        """Whether q - z, or q beside a minimum, is in range wherever it lies on the grid."""
        low, high = _range(grid)
        own_low, own_high = _range(self.grid)
        return self.minimum == grid.minimum and own_low <= low and high <= own_high


TYPES = {
    "Q4_0": BlockType(4),
    "Q5_0": BlockType(5),
    "Q8_0": BlockType(8),
    "Q4_1": BlockType(4, True),
    "Q5_1": BlockType(5, True),
}
"""Every type that is written and read, the smallest of a kind first, by its name in ggml."""


class Gguf(Format):
    """GGUF: 2 to 8 bits (8 symmetric), float16 scales, groups of a multiple of 32 or channels."""

    name = "gguf"
    group_sizes = (32, 64, 128, 256)
    library = "llama-cpp-python"
    shard_bytes = 0  # tensors wait on disk
    keeps_codes = False
    holds_minima = True

    def _not_held(self, grid: Grid) -> str | None:
        if grid.scale_dtype != torch.float16:
            return f"{self.name} stores scales as float16, not {name_of(grid.scale_dtype)}"
        if grid.group_size is not None and (grid.group_size < 1 or grid.group_size % BLOCK):
            return (
                f"{self.name} has a scale for every {BLOCK} weights; groups of {grid.group_size} are not whole blocks"
            )
        if _type_of(grid) is None and grid.minimum:
            return f"{self.name} holds float minima with 2 to 5 bits, not {grid.bits}"
        if _type_of(grid) is None:
            low, high = _range(grid)
            held = f"{self.name} holds -128 to 127 around a zero point"
            return f"{held}; {grid.bits} bits reach from {low} to {high}, with --symmetric they do not"
        return None

    def holds_layer(self, name: str, out_features: int, in_features: int, transposed: bool, grid: Grid) -> str | None:
        """None, or why not: rows are cut into blocks."""
        reason = super().holds_layer(name, out_features, in_features, transposed, grid)
        if reason is None and in_features % BLOCK:
            return f"{name} has {in_features} inputs, which are not whole blocks of {BLOCK}, as {self.name} needs"
        return reason

    def holds_together(self, grids: Collection[Grid]) -> str | None:
        """None: each tensor has a type of its own."""
        return None

    def holds_model(self, model: Described) -> str | None:
        """None, or why not: llama.cpp knows a model by its architecture, its keys and the name of its tokenizer."""
        return not_described(model)

    def bits_stored(self, grid: Grid, out_features: int, in_features: int) -> int:
        """Bits that a layer's blocks take."""
        kind = _type_of(grid)
        assert kind is not None
        return out_features * in_features // BLOCK * TYPES[kind].block_bytes * 8

    def _laid_out(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """The blocks of a layer, uint8 [out, bytes], under the name of their type."""
        kind = _type_of(quantized.grid)
        assert kind is not None
        out_features, in_features = quantized.codes.shape
        groups = quantized.scale.shape[1]
        numbers = quantized.codes.short().unflatten(1, (groups, -1)) - quantized.zero.short().unsqueeze(-1)
        head = [quantized.scale] if quantized.minimum is None else [quantized.scale, quantized.minimum]
        of_blocks = torch.stack(head, dim=-1).repeat_interleave(in_features // groups // BLOCK, dim=1)
        return {f"{prefix}.{kind}": _blocks(numbers.reshape(out_features, -1, BLOCK), of_blocks, TYPES[kind])}

    def kept(self, tensor: Tensor) -> Tensor:
        """Vectors in float32, which llama.cpp asks for; all else as it is."""
        return tensor.float() if tensor.dim() == 1 else tensor

    def write(
        self, folder: Path, tensors: Iterable[tuple[str, Tensor]], model: Described, grids: Mapping[str, Grid]
    ) -> int:
        """One file, called as the model is."""
        return write_file(folder / file_of(model), tensors, model)

    def loaders(self, grids: Collection[Grid], apart: str | None = None) -> str:
        return "what is built on llama.cpp loads it, and transformers (`gguf_file`), which dequantizes it"

    def read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """One layer, on the grid of its type."""
        kind = next((kind for kind, known in TYPES.items() if known.grid == grid), None)
        if kind is None:
            raise refusal(prefix, f"no type of {self.name} is read on {grid}")
        take_nothing_else(tensors, prefix, (kind,))
        stored, size = f"{prefix}.{kind}", TYPES[kind].block_bytes
        shape = tuple(tensors[stored].shape) if stored in tensors else (0, 0)
        if len(shape) == 2 and shape[1] % size:
            raise refusal(stored, f"rows of {shape[1]} bytes are not whole blocks of {size}")
        packed = take(tensors, stored, torch.uint8, (shape[0], shape[-1]))
        codes, head = _unpacked(packed.view(shape[0], shape[1] // size, size), TYPES[kind])
        if not bool(torch.isfinite(head).all()):
            raise refusal(stored, "a scale or minimum is NaN or infinity")
        scale, *minimum = (part.contiguous() for part in head.unbind(-1))
        zero = torch.full(scale.shape, grid.middle if grid.symmetric else 0, dtype=torch.uint8)
        return Quantized(codes, scale, zero, grid, *minimum)

    def loading(self, folder: str) -> str:
        """llama.cpp's Python package."""
        return f"""\
from pathlib import Path
from llama_cpp import Llama  # pip install llama-cpp-python
(file,) = Path("{folder}").glob("*.gguf")
model = Llama(str(file))"""


def _range(grid: Grid) -> tuple[int, int]:
    """The least and the largest of q - z; of q where there are minima."""
    if grid.minimum:
        return 0, grid.levels
    return (-grid.middle, grid.levels - grid.middle) if grid.symmetric else (-grid.levels, grid.levels)


def _type_of(grid: Grid) -> str | None:
    """The smallest type that holds a grid; None where none does."""
    return next((kind for kind, known in TYPES.items() if known.holds(grid)), None)


def _blocks(
    numbers: Int16[Tensor, "out blocks 32"], head: Float16[Tensor, "out blocks parts"], kind: BlockType
) -> UInt8[Tensor, "out bytes"]:
    """Blocks of whole numbers, r or q, and what goes before them: scales, then minima."""
    parts = [head.contiguous().view(torch.uint8)]
    unsigned = (numbers - _range(kind.grid)[0]).to(torch.uint8)
    if kind.bits == 8:
        parts.append(unsigned ^ 128)  # r + 128 as the byte of r
    else:
        if kind.bits == 5:
            fifth = (unsigned >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
            parts.append(fifth.sum(-1, dtype=torch.uint8))
        low = unsigned & 15
        parts.append(low[..., :16] | low[..., 16:] << 4)
    return torch.cat(parts, dim=-1).flatten(1)


def _unpacked(
    blocks: UInt8[Tensor, "out blocks bytes"], kind: BlockType
) -> tuple[UInt8[Tensor, "out in"], Float16[Tensor, "out blocks parts"]]:
    """The inverse of `_blocks`: unsigned codes, and scales with minima."""
    head = blocks[..., : kind.head_bytes].contiguous().view(torch.float16)
    rest = blocks[..., kind.head_bytes :]
    if kind.bits == 8:
        return (rest ^ 128).flatten(1), head
    codes = torch.cat([rest[..., -16:] & 15, rest[..., -16:] >> 4], dim=-1)
    if kind.bits == 5:
        fifth = rest[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
        codes |= fifth.flatten(-2) << 4
    return codes.flatten(1), head
