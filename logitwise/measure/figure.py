"""A mean with its uncertainty, and how values spread.

Tokens of one answer are not independent: a hard answer is hard at many tokens. So standard errors are taken over the
units that were sampled (rows or answers), and the intervals of two models' difference over what both were asked.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

DRAWS_AT_ONCE = 1 << 22
"""Of the bootstrap: 32 MiB of indices."""

FEWEST = 6
"""Pairs that can tell two shares apart: five that all differ one way do so by chance in 6 of 100 (sign test)."""


@dataclass(frozen=True)
class Figure:
    """A mean and its standard error over the units that were sampled; NaN where there is one unit alone."""

    mean: float
    error: float


@dataclass(frozen=True)
class Spread:
    """What the mean alone hides: most tokens lose nothing, and few lose much."""

    mean: float
    median: float
    p90: float
    p99: float


def exponential(figure: Figure) -> Figure:
    """exp(x), whose error is exp(x) times that of x; infinite beyond what a float holds."""
    try:
        value = math.exp(figure.mean)
    except OverflowError:
        return Figure(math.inf, math.nan)
    return Figure(value, value * figure.error)


def figure_as_json(figure: Figure) -> dict[str, float | None]:
    """A figure as JSON values: null where there is no such number."""
    both = {"mean": figure.mean, "standard_error": figure.error}
    return {name: value if math.isfinite(value) else None for name, value in both.items()}


def sums_by_unit(
    values: Float[Tensor, " tokens"], unit: Int64[Tensor, " tokens"], weights: Float[Tensor, " tokens"] | None = None
) -> Float[Tensor, "units 2"]:
    """Each unit's weighted sum and weight, float64; units where nothing counts are left out."""
    weights = torch.ones_like(values, dtype=torch.float64) if weights is None else weights
    sums = torch.zeros(int(unit.max()) + 1, 2, dtype=torch.float64)
    sums.index_add_(0, unit, torch.stack([values * weights, weights], 1))
    return sums[sums[:, 1] > 0]


def mean_of_units(sums: Float[Tensor, "units 2"]) -> Figure:
    """The mean over tokens with its error over units: a ratio estimator's, since units differ in how much counts.

    The error is that of Cochran, Sampling Techniques (1977), equation 6.9, without the finite population's correction.
    """
    total, count = sums.unbind(1)
    mean = float(total.sum() / count.sum())
    if len(count) < 2:
        return Figure(mean, math.nan)
    residual = total - mean * count
    n = len(count)
    return Figure(mean, float((n / (n - 1) * residual.square().sum()).sqrt() / count.sum()))


def mean_over_units(values: Float[Tensor, " tokens"], unit: Int64[Tensor, " tokens"]) -> Figure:
    """The mean of tokens' values, with its error over the units (answers, rows) that they belong to."""
    return mean_of_units(sums_by_unit(values.double(), unit))


def spread(values: Float[Tensor, " tokens"]) -> Spread:
    """Mean, median, 90th and 99th percentile (linear between the two nearest values)."""
    values = values.double()
    levels = torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    return Spread(float(values.mean()), *torch.quantile(values, levels).tolist())


def paired_shares(own: Sequence[bool], original: Sequence[bool], seed: int = 0) -> tuple[float, list[float] | None]:
    """How much larger the share of yeses is in `own` than in `original`, asked the same, and its 95 % interval.

    None for the interval of fewer than `FEWEST`.
    """
    more = torch.tensor(own, dtype=torch.float64) - torch.tensor(original, dtype=torch.float64)
    return float(more.mean()), [*bootstrap_interval(more, seed)] if len(more) >= FEWEST else None


def bootstrap_interval(
    differences: Float[Tensor, " problems"], seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap's interval of a mean of paired differences (Efron, 1979).

    Args:
        differences: of two models on each problem; pairing takes out what makes a problem hard for both.
        seed: of the resampling.
        resamples: how many.
        level: the interval's coverage.
    """
    count, generator = len(differences), torch.Generator().manual_seed(seed)
    parts = torch.arange(resamples).split(max(1, DRAWS_AT_ONCE // count))
    drawn = (torch.randint(count, (len(part), count), generator=generator) for part in parts)
    means = torch.cat([differences[indices].mean(1) for indices in drawn])
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
    low, high = torch.quantile(means, ends).tolist()
    return low, high
