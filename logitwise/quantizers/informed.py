"""Starts that know which inputs a weight meets: M = mean of x x^T over the calibration tokens, [in, in].

The error of a layer's output is e M e^T for an error e of one row of weights: M's diagonal says how much the error of
each input counts alone, the rest which errors make up for each other. M is taken once for all weights of a block, of
the student's inputs and the block's own weights in full precision (GPTQ's "true sequential" takes it anew in a block).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.grid import Grid, codes_of, merge, safe_scale, split
from logitwise.quantizers.starts import StartPoint, group_range, of_grid, of_share, range_factor, searched

NEARLY_HALF = 0.49

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it, as GPTQ does."""

COLUMNS_AT_ONCE = 128

SWEEPS, LAST_FREE_SWEEP = 30, 25
"""QuantEase's: passes over all columns, and from which on none is left between codes."""

FRACTIONS = 2048
ROUNDS = (range(64, FRACTIONS + 1, 64), range(-56, 57, 8), range(-7, 8))
"""NeUQI's: scales are so many fractions of the min-max scale, looked at ever more closely about the best so far."""

NEAR = 8
"""Zero points tried on each side of that of the range; at up to 3 bits these are all."""


def weighted(weight: Float[Tensor, "out in"], grid: Grid, moments: Float[Tensor, "inputs inputs"]) -> StartPoint:
    """The best of 26 shares of each group's range, by the squared error, each input counted by its moment."""
    return of_share(weight, grid, range_factor(weight, grid, _importance(moments)))


def neuqi(weight: Float[Tensor, "out in"], grid: Grid, moments: Float[Tensor, "inputs inputs"]) -> StartPoint:
    """Scale and zero point found together (NeUQI, ICML 2026, arXiv 2505.17595), by the same measure as `weighted`.

    Of 2,048 fractions of the min-max scale 62 are tried, from coarse to fine, each with the best zero point. Theirs is
    any number, found by a sweep; here it is a code near the range's own. A symmetric grid has the scale alone.
    """
    low, high = group_range(weight, grid)
    whole = (2 * torch.maximum(-low, high) if grid.symmetric else high - low) / grid.levels
    best = _Best(split(weight, low.shape[1]), split(_importance(moments).expand(1, -1), low.shape[1]), grid)
    fraction = torch.zeros_like(whole)
    for offsets in ROUNDS:
        centre = fraction
        for offset in offsets:
            tried = (centre + offset).clamp(1, FRACTIONS)
            scale = safe_scale(tried / FRACTIONS * whole, grid)
            near = torch.full_like(low, grid.middle) if grid.symmetric else torch.round(-low / scale)
            for shift in (0,) if grid.symmetric else range(-NEAR, NEAR + 1):
                better = best.offer(scale, near.clamp(0, grid.levels) + shift)
                fraction = torch.where(better, tried, fraction)
    return of_grid(weight, grid, best.scale, best.zero)


class _Best:
    """Of each group the grid of the least error so far."""

    def __init__(self, weight: Tensor, importance: Tensor, grid: Grid) -> None:
        self.weight, self.importance, self.levels = weight, importance, grid.levels
        self.least = torch.full(weight.shape[:2], torch.inf, device=weight.device)
        self.scale, self.zero = torch.ones_like(self.least), torch.zeros_like(self.least)

    def offer(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Which groups have a smaller error so."""
        s, z = scale.unsqueeze(-1), zero.unsqueeze(-1)
        codes = (torch.round(self.weight / s) + z).clamp(0, self.levels)
        error = ((s * (codes - z) - self.weight).square_() * self.importance).mean(-1)
        better = (error < self.least) & (zero >= 0) & (zero <= self.levels)
        self.least = torch.where(better, error, self.least)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        return better


def gptq(weight: Float[Tensor, "out in"], grid: Grid, moments: Float[Tensor, "inputs inputs"]) -> StartPoint:
    """Columns rounded one by one, each error made up for in those that follow (GPTQ: Frantar et al., 2210.17323).

    With U the upper Cholesky factor of M^-1: e = (w_i - q_i) / U_ii, W[:, i:] -= e U[i, i:]. A group's grid is searched
    when its turn comes. What is rounded is the weight as it is then, so that a fit starts at GPTQ's codes. An input
    that never was anything but 0 keeps its weights (the authors' code makes them 0); columns stay in order.
    """
    upper = _upper_root_of_inverse(moments).to(weight)
    rows, columns = weight.shape
    size = columns // grid.groups(columns)
    at_once = COLUMNS_AT_ONCE if grid.group_size is None else size
    left, rounded = weight.clone(), torch.empty_like(weight)
    of_group = replace(grid, group_size=None)
    grids: list[StartPoint] = []
    for first in range(0, columns, at_once):
        last = min(first + at_once, columns)
        if first % size == 0:
            grids.append(searched(left[:, first : first + size].contiguous(), of_group))
        scale, zero = grids[-1].scale, grids[-1].zero
        errors = torch.empty(rows, last - first, dtype=weight.dtype, device=weight.device)
        for column in range(first, last):
            now = left[:, column : column + 1].clone()
            quantized = scale * (codes_of(now, scale, zero, of_group) - zero)
            rounded[:, column : column + 1] = now
            error = (now - quantized) / upper[column, column]
            left[:, column:last] -= error * upper[column, column:last]
            errors[:, column - first : column - first + 1] = error
        left[:, last:] -= errors @ upper[first:last, last:]
    scale, zero = (torch.cat([getattr(at, name) for at in grids], 1) for name in ("scale", "zero"))
    return of_grid(_within(rounded, grid, scale, zero), grid, scale, zero)


def quantease(weight: Float[Tensor, "out in"], grid: Grid, moments: Float[Tensor, "inputs inputs"]) -> StartPoint:
    """Cyclic coordinate descent over the columns (QuantEase, arXiv 2309.01885), on the grid of `weighted`.

    u_j = w_j + sum over k != j of (w_k - what_k) M_kj / M_jj,  what_j = the nearest code's value. 30 sweeps; every
    third, up to the 25th, leaves what_j = u_j. What is rounded is u of the last sweep; a group of zeros, whose scale
    says nothing, stays what it is.
    """
    at = weighted(weight, grid, moments)
    scale, zero = (x.repeat_interleave(weight.shape[1] // x.shape[1], 1) for x in (at.scale, at.zero))
    diagonal = moments.diagonal()
    seen = (diagonal > 0).tolist()
    what = scale * (codes_of(weight, at.scale, at.zero, grid) - zero)
    pull = (weight - what) @ moments
    rounded = weight.clone()
    for sweep in range(SWEEPS):
        free = sweep % 3 == 1 and sweep < LAST_FREE_SWEEP
        for first in range(0, weight.shape[1], COLUMNS_AT_ONCE):
            block = slice(first, min(first + COLUMNS_AT_ONCE, weight.shape[1]))
            before = what[:, block].clone()
            for column in range(block.start, block.stop):
                if not seen[column]:
                    continue
                u = what[:, column] + pull[:, column] / diagonal[column]
                s, z = scale[:, column], zero[:, column]
                rounded[:, column] = u
                new = u if free else s * ((torch.round(u / s) + z).clamp(0, grid.levels) - z)
                pull[:, block] -= torch.outer(new - what[:, column], moments[column, block])
                what[:, column] = new
            moved = what[:, block] - before
            pull[:, : block.start] -= moved @ moments[block, : block.start]
            pull[:, block.stop :] -= moved @ moments[block, block.stop :]
    anything = split(weight, at.scale.shape[1]).any(-1, keepdim=True)
    rounded = merge(split(rounded, at.scale.shape[1]) * anything)
    return of_grid(_within(rounded, grid, at.scale, at.zero), grid, at.scale, at.zero)


def _within(
    rounded: Float[Tensor, "out in"], grid: Grid, scale: Float[Tensor, "out groups"], zero: Float[Tensor, "out groups"]
) -> Float[Tensor, "out in"]:
    """The same codes, none from beyond the grid by more than half a step: what is far out cannot be learned."""
    step, middle = scale.unsqueeze(-1), zero.unsqueeze(-1)
    low, high = step * (-middle - NEARLY_HALF), step * (grid.levels - middle + NEARLY_HALF)
    return merge(split(rounded, scale.shape[1]).clamp(low, high))


def _importance(moments: Float[Tensor, "inputs inputs"]) -> Float[Tensor, " inputs"]:
    """How much an error at each input counts; something also where an input was always 0."""
    diagonal = moments.diagonal()
    return torch.where(diagonal.mean() > 0, diagonal + DAMPING * diagonal.mean(), torch.ones_like(diagonal))


def _upper_root_of_inverse(moments: Float[Tensor, "inputs inputs"]) -> Tensor:
    """U with U^T U = M^-1, in float64; M's diagonal is damped, and 1 where an input was always 0."""
    device = "cpu" if moments.device.type == "mps" else moments.device  # which has no float64
    damped = moments.to(device, torch.float64, copy=True)
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[moments.diagonal().to(device) == 0] = 1
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


InformedStart = Callable[[Tensor, Grid, Tensor], StartPoint]
"""A weight [out, in], its grid and the second moments of its inputs [in, in] -> where its fit starts."""

INFORMED: dict[str, InformedStart] = {"weighted": weighted, "neuqi": neuqi, "gptq": gptq, "quantease": quantease}
"""Starts that need second moments."""
