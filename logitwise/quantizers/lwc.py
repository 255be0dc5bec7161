"""Learnable weight clipping (OmniQuant: Shao et al., ICLR 2024, arXiv 2308.13137).

    high' = sigmoid(u) max(W),  low' = sigmoid(l) min(W)
    s = (high' - low') / (2^bits - 1),  z = round(-low' / s)
    What = s (clamp(round(W / s) + z, 0, 2^bits - 1) - z)

u, l [out, groups] alone are learned: a weight is always rounded to the nearest code of the range that was found. As
in the authors' code no gradient goes through z, and s stays in [1e-5, 1e4]. A start that covers the whole range is at
their u = l = 4, a share of .982. Ours: zero is always in the range, since zero points are stored as codes, and a
symmetric grid has s = 2 max(-low', high') / (2^bits - 1), as elsewhere here.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, round_through, safe_scale, split, store_through
from logitwise.quantizers.base import AffineQuantizer, Role
from logitwise.quantizers.starts import Start

WIDEST = 4.0
LEAST_SCALE, LARGEST_SCALE = 1e-5, 1e4
STORED = 0.01  # more than a stored scale is rounded by


class LearnableClipping(AffineQuantizer):
    """One weight whose ranges are learned.

    Args:
        weight: float32 [out, in].
        low, high: the ends of each group's range, [out, groups].
        share: of it, what is covered at the start, [out, groups].
    """

    reads_progress = False
    weight: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, weight: Tensor, low: Tensor, high: Tensor, share: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("weight", weight)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.low_logit = nn.Parameter(torch.logit(share).clamp(max=WIDEST))
        self.high_logit = nn.Parameter(torch.logit(share).clamp(max=WIDEST))

    @classmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "LearnableClipping":
        at = start(weight, grid)
        low, high = at.low, at.high
        if grid.symmetric:  # the larger side alone decides the scale, which is to be the start's but for its rounding
            span = 2 * at.share * torch.maximum(-low, high)
            fit = at.scale * grid.levels / span
            other = (span > 0) & ((fit - 1).abs() > STORED)
            low, high = (torch.where(other, end * fit, end) for end in (low, high))
        quantizer = cls(at.weight, low, high, at.share, grid)
        safe_scale(quantizer._range()[0].detach(), grid)  # refuses one that overflows
        return quantizer

    def _range(self) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """The scale before it is bounded and rounded to its stored type, and the low end."""
        low, high = self.low_logit.sigmoid() * self.low, self.high_logit.sigmoid() * self.high
        span = 2 * torch.maximum(-low, high) if self.grid.symmetric else high - low
        return span / self.grid.levels, low

    def scale_and_zero(self) -> tuple[Float[Tensor, "out groups 1"], Float[Tensor, "out groups 1"]]:
        scale, low = self._range()
        scale = store_through(scale.clamp(LEAST_SCALE, LARGEST_SCALE), self.grid.scale_dtype).unsqueeze(-1)
        if self.grid.symmetric:
            return scale, torch.full_like(scale, float(self.grid.middle))
        return scale, (-low.unsqueeze(-1) / scale).detach().round().clamp(0, self.grid.levels)

    def codes(
        self, scale: Float[Tensor, "out groups 1"], zero: Float[Tensor, "out groups 1"]
    ) -> Float[Tensor, "out groups size"]:
        rounded = round_through(split(self.weight, self.low.shape[1]) / scale)
        return (rounded + zero).clamp(0, self.grid.levels)

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        return {"range": [self.low_logit, self.high_logit]}
