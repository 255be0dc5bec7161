"""Where a fit starts: what is rounded, and the range that its codes cover before anything is learned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.grid import Grid, codes_of, scale_of_range, split


@dataclass(frozen=True)
class StartPoint:
    """A weight on a grid.

    Args:
        weight: what is rounded to the nearest code: the weight, or one that makes up for others' errors, [out, in].
        scale, zero: of each group, float32 [out, groups], the scale as it is stored.
        low, high: the ends of each group's range, zero between them, [out, groups].
        share: of that range, what the codes cover at the start, on both sides of zero alike, 0 to 1.
    """

    weight: Float[Tensor, "out in"]
    scale: Float[Tensor, "out groups"]
    zero: Float[Tensor, "out groups"]
    low: Float[Tensor, "out groups"]
    high: Float[Tensor, "out groups"]
    share: Float[Tensor, "out groups"]


Start = Callable[[Tensor, Grid], StartPoint]
"""A weight [out, in] and its grid -> where its fit starts."""

FACTORS = tuple(1.0 - 0.02 * step for step in range(26))
NEARLY_ALL = 0.98
ERROR_EXPONENT = 2.4  # FlexRound's and GPTQ's range search


def group_range(
    weight: Float[Tensor, "out in"], grid: Grid
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Smallest and largest weight of each group, zero always between them."""
    grouped = split(weight, grid.groups(weight.shape[1]))
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def range_factor(
    weight: Float[Tensor, "out in"], grid: Grid, importance: Float[Tensor, " inputs"] | None = None
) -> Float[Tensor, "out groups"]:
    """The best of 26 shrinkages 1.0, .98, ... .5 of each group's range.

    By the mean of |error|^2.4, or of importance * error^2 where an importance of each input is given.
    """
    low, high = group_range(weight, grid)
    grouped = split(weight, low.shape[1])
    counts = None if importance is None else split(importance.expand(1, -1), low.shape[1])
    best = torch.ones_like(low)
    least = torch.full_like(low, torch.inf)
    for factor in FACTORS:
        scale, zero = scale_of_range(factor * low, factor * high, grid)
        codes = split(codes_of(weight, scale, zero, grid), low.shape[1])
        error = scale.unsqueeze(-1) * (codes - zero.unsqueeze(-1)) - grouped
        cost = error.abs_().pow_(ERROR_EXPONENT) if counts is None else error.square_() * counts
        loss = cost.mean(-1)
        better = loss < least
        best = torch.where(better, factor, best)
        least = torch.where(better, loss, least)
    return best


def of_share(weight: Float[Tensor, "out in"], grid: Grid, share: Float[Tensor, "out groups"]) -> StartPoint:
    """The grid that covers a share of each group's range, on both sides of zero alike.

    Errors: RecipeError where a scale overflows its stored type.
    """
    low, high = group_range(weight, grid)
    return StartPoint(weight, *scale_of_range(share * low, share * high, grid), low, high, share)


def of_grid(
    weight: Float[Tensor, "out in"], grid: Grid, scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"]
) -> StartPoint:
    """A grid that was found otherwise; its range is a little wider than its codes, so that shares may grow too.

    A group of zeros has no range, whatever its scale: what is learned of it must not make it another.
    """
    anything = split(weight, scale.shape[1]).any(-1)
    low, high = (end * scale / NEARLY_ALL * anything for end in (-zero, grid.levels - zero))
    return StartPoint(weight, scale, zero, low, high, torch.full_like(scale, NEARLY_ALL))


def minmax(weight: Float[Tensor, "out in"], grid: Grid) -> StartPoint:
    """The whole range: nothing is clipped."""
    return of_share(weight, grid, torch.ones_like(group_range(weight, grid)[0]))


def searched(weight: Float[Tensor, "out in"], grid: Grid) -> StartPoint:
    """The best of 26 shares of each group's range, by the mean of |error|^2.4."""
    return of_share(weight, grid, range_factor(weight, grid))


STARTS: dict[str, Start] = {"minmax": minmax, "searched": searched}
"""Starts that need nothing but the weight."""
