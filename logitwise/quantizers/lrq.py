"""LRQ: FlexRound whose divisor is of low rank (Lee et al., NAACL 2025, arXiv 2407.11534).

    What = s1 * clamp(round(W / (s1 * exp(L U + r + c))), -z, 2^bits - 1 - z)

L [out, rank], U [rank, in], r [out, 1] and c [1, in] are learned beside the logarithm of s1. L, r and c start at 0, U
as a linear layer's weight does (uniform in +-1 / sqrt(in)), so that a fit starts at round to nearest. Fewer
parameters than weights cannot fit so much that is only in the calibration text. The authors' rank is 1,024, and 2,048
where both sides are 8,192 or more: a quarter of the smaller side, which is what is taken here for all. (Their code
takes FlexRound for weights with one side up to 4,096 and the other above; that is left out.)
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid
from logitwise.quantizers.base import Role
from logitwise.quantizers.flexround import DividedRounding

SHARE = 4


class LowRank(DividedRounding):
    """One weight under LRQ.

    Args:
        weight: float32 [out, in].
        scale, zero: where the fit starts, float32 [out, groups].
    """

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> None:
        super().__init__(weight, scale, zero, grid)
        rows, columns = weight.shape
        rank = max(1, min(rows, columns) // SHARE)
        draws = torch.Generator().manual_seed(columns)  # the same for the same shape, wherever it is made
        right = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=5**0.5, generator=draws)
        self.left = nn.Parameter(weight.new_zeros(rows, rank))
        self.right = nn.Parameter(right.to(weight))
        self.log_row_divisor = nn.Parameter(torch.zeros_like(weight[:, :1]))
        self.log_column_divisor = nn.Parameter(torch.zeros_like(weight[:1]))

    def log_divisor_of_weights(self) -> Float[Tensor, "out in"]:
        return self.left @ self.right + self.log_row_divisor + self.log_column_divisor

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        rounding = [self.left, self.right, self.log_row_divisor, self.log_column_divisor]
        return {"scale": [self.log_scale], "rounding": list(rounding)}
