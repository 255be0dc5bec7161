"""Where a fit starts: the range that a weight's codes cover before anything is learned."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.grid import Grid, codes_of, scale_of_range, split

FACTORS = tuple(1.0 - 0.02 * step for step in range(26))
ERROR_EXPONENT = 2.4  # FlexRound's and GPTQ's range search


def group_range(
    weight: Float[Tensor, "out in"], grid: Grid
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Smallest and largest weight of each group, zero always between them."""
    grouped = split(weight, grid.groups(weight.shape[1]))
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def range_factor(weight: Float[Tensor, "out in"], grid: Grid) -> Float[Tensor, "out groups"]:
    """The best of 26 shrinkages 1.0, .98, ... .5 of each group's range, by the mean of |error|^2.4."""
    low, high = group_range(weight, grid)
    best = torch.ones_like(low)
    least = torch.full_like(low, torch.inf)
    for factor in FACTORS:
        scale, zero = scale_of_range(factor * low, factor * high, grid)
        codes = split(codes_of(weight, scale, zero, grid), low.shape[1])
        error = scale.unsqueeze(-1) * (codes - zero.unsqueeze(-1)) - split(weight, low.shape[1])
        loss = error.abs_().pow_(ERROR_EXPONENT).mean(-1)
        better = loss < least
        best = torch.where(better, factor, best)
        least = torch.where(better, loss, least)
    return best


def minmax(weight: Float[Tensor, "out in"], grid: Grid) -> Float[Tensor, "out groups"]:
    """The whole range: nothing is clipped."""
    return torch.ones_like(group_range(weight, grid)[0])


Start = Callable[[Tensor, Grid], Tensor]
"""weight [out, in], grid -> the share of each group's min-max range that is covered, [out, groups]."""

STARTS: dict[str, Start] = {"minmax": minmax, "searched": range_factor}


def start_grid(
    weight: Float[Tensor, "out in"], grid: Grid, start: Start
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Scale and zero point at the start of a fit."""
    low, high = group_range(weight, grid)
    factor = start(weight, grid)
    return scale_of_range(factor * low, factor * high, grid)
