"""FlexRound: learnable division before rounding (Lee et al., ICML 2023, arXiv 2306.00317).

    What = s1 * clamp(round(W / (s1 * S2 * s3)), -z, 2^bits - 1 - z)

s1 [out, groups] is the scale that is stored, S2 [out, in] and s3 [out, 1] divide each weight and each row. All three
are positive: their logarithms are learned, as in the authors' code. z is fixed when the fit starts. Groups are our
extension: the authors' code is per channel.
"""

import math
from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, Quantized, freeze, merge, round_through, split, store_through
from logitwise.quantizers.base import Quantizer, Role
from logitwise.quantizers.starts import Start


class DividedRounding(Quantizer):
    """One weight, each of whose elements is divided by a learned factor before it is rounded.

    Args:
        weight: float32 [out, in].
        scale, zero: where the fit starts, float32 [out, groups].
    """

    reads_progress = False
    weight: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("weight", weight)
        self.register_buffer("zero", zero)
        self.log_scale = nn.Parameter(scale.log())

    @classmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "DividedRounding":
        at = start(weight, grid)
        return cls(at.weight, at.scale, at.zero, grid)

    @abstractmethod
    def log_divisor_of_weights(self) -> Float[Tensor, "out in"]:
        """The logarithm of what divides each weight, beside the scale."""

    def forward(self, progress: float) -> Float[Tensor, "out in"]:
        scale = self._scale()
        return merge(scale * self._integers(scale))

    def _scale(self) -> Float[Tensor, "out groups 1"]:
        return store_through(self.log_scale.exp(), self.grid.scale_dtype).unsqueeze(-1)

    def _integers(self, scale: Float[Tensor, "out groups 1"]) -> Float[Tensor, "out groups size"]:
        """Codes less their zero point."""
        groups = self.zero.shape[1]
        divisor = scale * split(self.log_divisor_of_weights().exp(), groups)
        zero = self.zero.unsqueeze(-1)
        return torch.clamp(round_through(split(self.weight, groups) / divisor), -zero, self.grid.levels - zero)

    @torch.no_grad()
    def freeze(self) -> Quantized:
        scale = self._scale()
        codes = self._integers(scale) + self.zero.unsqueeze(-1)
        return freeze(merge(codes), scale.squeeze(-1), self.zero, self.grid)

    @torch.no_grad()
    def after_step(self) -> None:
        # A scale that its stored type rounds to zero or infinity would make weights that are not numbers.
        stored = torch.finfo(self.grid.scale_dtype)
        self.log_scale.clamp_(math.log(stored.smallest_normal * stored.eps), math.log(stored.max))


class FlexRound(DividedRounding):
    """One weight under FlexRound.

    Args:
        weight: float32 [out, in].
        scale, zero: where the fit starts, float32 [out, groups].
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> None:
        super().__init__(weight, scale, zero, grid)
        self.log_divisor = nn.Parameter(torch.zeros_like(weight))
        self.log_row_divisor = nn.Parameter(torch.zeros_like(weight[:, :1]))

    def log_divisor_of_weights(self) -> Float[Tensor, "out in"]:
        return self.log_divisor + self.log_row_divisor

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        return {"scale": [self.log_scale], "rounding": [self.log_divisor, self.log_row_divisor]}
