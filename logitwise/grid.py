"""The affine grid: scale, zero point, codes. The only place that rounds a weight.

A weight row is cut into groups along its inputs; each group has a scale s and an integer zero point z, and a weight is
stored as an unsigned code q in 0 .. 2^bits - 1 that stands for s * (q - z). A symmetric grid fixes z = 2^(bits - 1).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from logitwise.errors import RecipeError


@dataclass(frozen=True)
class Grid:
    """What the codes of one weight look like.

    Args:
        bits: bits a code, 2 to 8.
        group_size: inputs that share a scale and a zero point; None: one pair for each output channel.
        symmetric: the zero point is 2^(bits - 1) everywhere.
        scale_dtype: the type the scales are stored in; every computation uses scales already rounded to it.
        minimum: each group has a float minimum in place of a zero point, in the type of its scale, as MLX and
            llama.cpp's own quantizers make them; such grids are read and refitted, not chosen.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype = torch.float16
    minimum: bool = False

    @property
    def levels(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, 2^(bits - 1)."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """How many groups a row of `in_features` weights has."""
        return 1 if self.group_size is None else in_features // self.group_size

    def bits_stored(self, out_features: int, in_features: int) -> int:
        """Bits a weight of this shape takes: codes, scales and (asymmetric) zero points or minima."""
        of_scale = 8 * self.scale_dtype.itemsize
        of_group = of_scale + (of_scale if self.minimum else 0 if self.symmetric else self.bits)
        return out_features * (in_features * self.bits + self.groups(in_features) * of_group)

    def __str__(self) -> str:
        """As people say it."""
        group = f"groups of {self.group_size}" if self.group_size else "one scale a channel"
        kind = "float minima" if self.minimum else "symmetric" if self.symmetric else "asymmetric"
        return f"{self.bits} bits, {group}, {kind}, {str(self.scale_dtype).removeprefix('torch.')} scales"


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight as it is stored.

    Args:
        codes: unsigned codes [out, in].
        scale: [out, groups], in the grid's scale type; may be negative.
        zero: integer zero points [out, groups], as unsigned codes; 0 where there are minima.
        grid: the grid they lie on.
        minimum: of grids with float minima, what code 0 stands for, [out, groups], in the grid's scale type.
    """

    codes: UInt8[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: UInt8[Tensor, "out groups"]
    grid: Grid
    minimum: Float[Tensor, "out groups"] | None = None

    def dequantize(self) -> Float[Tensor, "out in"]:
        """The weight that the codes stand for, float32 [out, in]."""
        groups = self.scale.shape[1]
        difference = split(self.codes.float(), groups) - self.zero.float().unsqueeze(-1)
        weight = self.scale.float().unsqueeze(-1) * difference
        return merge(weight if self.minimum is None else weight + self.minimum.float().unsqueeze(-1))

    def parts(self) -> list[Tensor]:
        """What is stored: codes, scales, zero points and, where there are any, minima."""
        return [self.codes, self.scale, self.zero, *([] if self.minimum is None else [self.minimum])]

    def same_as(self, other: "Quantized") -> bool:
        """Whether what is stored is the same, bit for bit."""
        return all(torch.equal(*both) for both in zip(self.parts(), other.parts(), strict=True))

    def to(self, device: torch.device) -> "Quantized":
        """The same on another device."""
        codes, scale, zero, *minimum = (part.to(device) for part in self.parts())
        return Quantized(codes, scale, zero, self.grid, *minimum)

    def bits_stored(self) -> int:
        """Bits this weight takes: codes, scales and (asymmetric) zero points or minima."""
        return self.grid.bits_stored(*self.codes.shape)


def split(weight: Float[Tensor, "out in"], groups: int) -> Float[Tensor, "out groups size"]:
    """A weight with its groups as an axis of their own (a view)."""
    return weight.view(weight.shape[0], groups, -1)


def merge(weight: Float[Tensor, "out groups size"]) -> Float[Tensor, "out in"]:
    """The inverse of `split`."""
    return weight.reshape(weight.shape[0], -1)


class _Round(torch.autograd.Function):
    """Round to nearest (ties to even) whose gradient is one: the straight-through estimator."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient


def round_through(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Round to nearest; gradients pass unchanged (straight-through estimator)."""
    rounded: Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return rounded


@torch.library.custom_op("logitwise::stored", mutates_args=())
def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to a type and back: closed to torch's compiler, which would leave both casts out."""
    return x.to(dtype).to(x.dtype, copy=True)


@_stored.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


class _Store(torch.autograd.Function):
    """Round to a storage type and back; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, dtype: torch.dtype) -> Tensor:
        stored: Tensor = _stored(x, dtype) if torch.compiler.is_compiling() else x.to(dtype).to(x.dtype)
        return stored

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def store_through(x: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """`x` rounded to `dtype` but held in its own type; gradients pass unchanged."""
    stored: Tensor = _Store.apply(x, dtype)  # type: ignore[no-untyped-call]
    return stored


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient is one everywhere."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


def clamp_through(x: Float[Tensor, "..."], low: float, high: float) -> Float[Tensor, "..."]:
    """`x` within bounds; gradients pass unchanged, also outside of them."""
    clamped: Tensor = _Clamp.apply(x, low, high)  # type: ignore[no-untyped-call]
    return clamped


def codes_of(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"], grid: Grid
) -> Float[Tensor, "out in"]:
    """Nearest codes of a weight on a given grid, as floats: clamp(round(w / s) + z, 0, 2^bits - 1)."""
    grouped = split(weight, scale.shape[1])
    return merge((torch.round(grouped / scale.unsqueeze(-1)) + zero.unsqueeze(-1)).clamp(0, grid.levels))


def freeze(
    codes: Float[Tensor, "out in"], scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"], grid: Grid
) -> Quantized:
    """Codes, scales and zero points held as floats, as the integers and stored types they are."""
    return Quantized(codes.to(torch.uint8), scale.to(grid.scale_dtype), zero.to(torch.uint8), grid)


def scale_of_range(
    low: Float[Tensor, "out groups"], high: Float[Tensor, "out groups"], grid: Grid
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale (rounded to its stored type) and integer zero point, both float32, of a range low <= 0 <= high.

    Asymmetric: s = (high - low) / (2^bits - 1), z = round(-low / s). Symmetric: s = 2 max(-low, high) / (2^bits - 1).
    An empty range (a group of zeros) gets s = 1, so that its codes are its zero point.

    Errors: RecipeError where a scale overflows its stored type.
    """
    span = 2 * torch.maximum(-low, high) if grid.symmetric else high - low
    scale = safe_scale(span / grid.levels, grid)
    if grid.symmetric:
        return scale, torch.full_like(scale, float(grid.middle))
    return scale, torch.round(-low / scale).clamp(0, grid.levels)


def safe_scale(scale: Float[Tensor, "out groups"], grid: Grid) -> Float[Tensor, "out groups"]:
    """`scale` rounded to its stored type; 1 where that is zero (nothing but zeros to store).

    Errors: RecipeError where it overflows.
    """
    stored = scale.to(grid.scale_dtype).to(scale.dtype)
    if not bool(torch.isfinite(stored).all()):
        raise RecipeError(
            f"a scale of {float(scale.abs().max()):.3g} does not fit {str(grid.scale_dtype).removeprefix('torch.')}",
            f"the largest it holds is {torch.finfo(grid.scale_dtype).max:.5g}",
            "choose --scale-dtype bfloat16 or float32",
        )
    return torch.where(stored == 0, torch.ones_like(stored), stored)
