"""Codes that are there already, learned further in FlexRound's way: what a refit of a finished checkpoint begins with.

    What = f s * clamp(round((W - m) / (f s * S2 * s3)), -z, 2^bits - 1 - z) + f m

s, z and m are the checkpoint's own scales, zero points and minima (0 where it has none), f [out, groups] is a learned
factor, S2 [out, in] and s3 [out, 1] are FlexRound's divisors (`flexround.py`). Scales may be negative or 0, as other
tools write them. W is the original weight moved into the interval that rounds to its stored code, so that the fit
begins at the checkpoint as it is, and codes change where it pays, the nearest to an interval's end first.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, Quantized, codes_of, freeze, merge, round_through, split, store_through
from logitwise.quantizers.base import Quantizer, Role
from logitwise.quantizers.starts import Start

WITHIN = 0.499
"""How far from its code a weight may be, in steps: less than half by what float32 may lose on the way."""

ROLES: tuple[Role, ...] = ("scale", "rounding")

FURTHEST = math.log(16.0)
"""How far a factor may go: no useful one is further, and few scales leave the range of float16 by it."""


class Reopened(Quantizer):
    """One quantized weight.

    Args:
        quantized: as it is stored.
        weight: the original, float32 [out, in].
    """

    reads_progress = False
    weight: Tensor
    scale: Tensor
    zero: Tensor
    minimum: Tensor

    def __init__(self, quantized: Quantized, weight: Float[Tensor, "out in"]) -> None:
        super().__init__()
        self.grid = quantized.grid
        scale, zero = quantized.scale.float(), quantized.zero.float()
        minimum = torch.zeros_like(scale) if quantized.minimum is None else quantized.minimum.float()
        for name, buffer in (("scale", scale), ("zero", zero), ("minimum", minimum)):
            self.register_buffer(name, buffer.unsqueeze(-1))
        self.register_buffer("weight", self._within(quantized.codes, weight))
        self.log_factor = nn.Parameter(torch.zeros_like(scale))
        self.log_divisor = nn.Parameter(torch.zeros_like(weight))
        self.log_row_divisor = nn.Parameter(torch.zeros_like(weight[:, :1]))

    @classmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "Reopened":
        at = start(weight, grid)
        return cls(freeze(codes_of(at.weight, at.scale, at.zero, grid), at.scale, at.zero, grid), weight)

    def _within(self, codes: Tensor, weight: Tensor) -> Float[Tensor, "out groups size"]:
        """The weight less its minimum, where it rounds to its code: for the first and last code also beyond."""
        groups = self.scale.shape[1]
        codes, steps = split(codes.float(), groups), self._steps(self.scale)
        away = (split(weight, groups) - self.minimum) / steps + self.zero - codes
        least = torch.where(codes == 0, -torch.inf, -WITHIN)
        most = torch.where(codes == self.grid.levels, torch.inf, WITHIN)
        return (codes - self.zero + away.clamp(least, most)) * steps

    @staticmethod
    def _steps(scale: Tensor) -> Tensor:
        """What weights are divided by: a group whose scale is 0 is all zeros, whatever its codes."""
        return torch.where(scale == 0, 1.0, scale)

    def _scale(self) -> Float[Tensor, "out groups 1"]:
        return store_through(self.scale * self.log_factor.exp().unsqueeze(-1), self.grid.scale_dtype)

    def _minimum(self) -> Float[Tensor, "out groups 1"]:
        return store_through(self.minimum * self.log_factor.exp().unsqueeze(-1), self.grid.scale_dtype)

    def _integers(self, scale: Float[Tensor, "out groups 1"]) -> Float[Tensor, "out groups size"]:
        """Codes less their zero point."""
        divisor = self._steps(scale) * split((self.log_divisor + self.log_row_divisor).exp(), scale.shape[1])
        return torch.clamp(round_through(self.weight / divisor), -self.zero, self.grid.levels - self.zero)

    def forward(self, progress: float) -> Float[Tensor, "out in"]:
        scale = self._scale()
        weight = scale * self._integers(scale)
        return merge(weight + self._minimum() if self.grid.minimum else weight)

    @torch.no_grad()
    def freeze(self) -> Quantized:
        scale, zero = self._scale(), self.zero.squeeze(-1)
        made = freeze(merge(self._integers(scale) + self.zero), scale.squeeze(-1), zero, self.grid)
        if not self.grid.minimum:
            return made
        minimum = self._minimum().squeeze(-1).to(self.grid.scale_dtype)
        return Quantized(made.codes, made.scale, made.zero, made.grid, minimum)

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        learned = [self.log_factor], [self.log_divisor, self.log_row_divisor]
        return dict(zip(ROLES, learned, strict=True))

    @torch.no_grad()
    def after_step(self) -> None:
        self.log_factor.clamp_(-FURTHEST, FURTHEST)
