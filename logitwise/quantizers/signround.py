"""SignRound: a learned offset before rounding, a learned range (Cheng et al., EMNLP Findings 2024, arXiv 2309.05516).

Asymmetric:             s = (beta max(W) - alpha min(W)) / (2^bits - 1),  z = round(-alpha min(W) / s)
                        q = clamp(round(W / s + V) + z, 0, 2^bits - 1)
Symmetric, full range:  the side of larger magnitude lies on code -2^(bits - 1), so s is negative where that side is
                        the positive one.

V [out, in] starts at 0, alpha and beta [out, groups] at the start's share of the range; both stay in [0, 1].
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, round_through, safe_scale, split, store_through
from logitwise.quantizers.base import AffineQuantizer, Role
from logitwise.quantizers.starts import Start

LEAST_SCALE = 1e-5


class SignRound(AffineQuantizer):
    """One weight under SignRound.

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
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.low_factor = nn.Parameter(share.clone())
        self.high_factor = nn.Parameter(share.clone())

    @classmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "SignRound":
        at = start(weight, grid)
        quantizer = cls(at.weight, at.low, at.high, at.share, grid)
        safe_scale(quantizer._scale().detach(), grid)  # refuses one that overflows
        return quantizer

    def _scale(self) -> Float[Tensor, "out groups"]:
        """The scale before it is rounded to its stored type, its magnitude at least 1e-5."""
        low, high = self.low_factor * self.low, self.high_factor * self.high
        if self.grid.symmetric:
            larger = torch.maximum(-low, high)
            scale = torch.where(high < -low, larger, -larger) / self.grid.middle
        else:
            scale = (high - low) / self.grid.levels
        return torch.where(scale < 0, scale.clamp(max=-LEAST_SCALE), scale.clamp(min=LEAST_SCALE))

    def scale_and_zero(self) -> tuple[Float[Tensor, "out groups 1"], Float[Tensor, "out groups 1"]]:
        scale = store_through(self._scale(), self.grid.scale_dtype).unsqueeze(-1)
        if self.grid.symmetric:
            return scale, torch.full_like(scale, float(self.grid.middle))
        low = (self.low_factor * self.low).unsqueeze(-1)
        return scale, round_through(-low / scale).clamp(0, self.grid.levels)

    def codes(
        self, scale: Float[Tensor, "out groups 1"], zero: Float[Tensor, "out groups 1"]
    ) -> Float[Tensor, "out groups size"]:
        groups = self.low.shape[1]
        divided = split(self.weight, groups) / scale + split(self.offset, groups)
        return (round_through(divided) + zero).clamp(0, self.grid.levels)

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        return {"rounding": [self.offset], "range": [self.low_factor, self.high_factor]}

    @torch.no_grad()
    def after_step(self) -> None:
        self.low_factor.clamp_(0, 1)
        self.high_factor.clamp_(0, 1)
