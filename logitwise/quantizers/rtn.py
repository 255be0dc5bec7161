"""Round to nearest: nothing is learned."""

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.grid import Grid, Quantized, codes_of, freeze
from logitwise.quantizers.base import Quantizer
from logitwise.quantizers.starts import Start


class RoundToNearest(Quantizer):
    """Codes nearest to the weight on the grid that the start found."""

    learns = False
    reads_progress = False

    def __init__(self, quantized: Quantized) -> None:
        super().__init__()
        self.quantized = quantized

    @classmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "RoundToNearest":
        at = start(weight, grid)
        return cls(freeze(codes_of(at.weight, at.scale, at.zero, grid), at.scale, at.zero, grid))

    def forward(self, progress: float) -> Float[Tensor, "out in"]:
        return self.quantized.dequantize()

    @torch.no_grad()
    def freeze(self) -> Quantized:
        return self.quantized
