"""Where along an answer, or at which confidence, a figure is what it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.measure.figure import Figure, mean_of_units, mean_over_units, sums_by_unit

CONFIDENCE_EDGES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
"""Of the teacher's confidence: damage where it hesitates is often harmless, where it is sure hardly ever."""

POSITION_BINS = 12


@dataclass(frozen=True)
class Bin:
    """The tokens whose key is in [low, high), in the last bin [low, high].

    Args:
        low, high: its ends.
        tokens: how many are in it.
        figure: their mean, with its error over units.
    """

    low: float
    high: float
    tokens: int
    figure: Figure


def in_bins(
    values: Float[Tensor, " tokens"],
    unit: Int64[Tensor, " tokens"],
    keys: Tensor,
    edges: Sequence[float],
) -> list[Bin]:
    """The mean of `values` in each bin of `keys`; bins without a token are left out.

    Args:
        unit: what a token belongs to (its answer), for the errors.
        keys: what decides the bin, [tokens].
        edges: ascending; keys outside of them are in no bin.
    """
    found = []
    for low, high in pairwise(edges):
        inside = (keys >= low) & ((keys <= high) if high == edges[-1] else (keys < high))
        if inside.any():
            found.append(Bin(low, high, int(inside.sum()), mean_over_units(values[inside], unit[inside])))
    return found


def position_edges(lengths: Sequence[int], bins: int = POSITION_BINS) -> list[int]:
    """Ends of about `bins` equally long stretches of an answer, up to where the second longest answer ends.

    Beyond it one answer is left alone, whose error cannot be told.
    """
    longest = sorted(lengths)[-2:][0]
    width = max(1, -(-longest // bins))
    return list(range(0, longest + width, width))


def growth(
    values: Float[Tensor, " tokens"], unit: Int64[Tensor, " tokens"], position: Int64[Tensor, " tokens"]
) -> tuple[Figure, Figure, Figure]:
    """Whether a figure grows along an answer: its mean in the first halves of answers, in the second, the difference.

    Halves and not a line, since a few positions at the start of an answer are often far off. The difference is taken
    answer by answer (those of one token are left out), so that its error is not that of easy and hard answers.
    """
    lengths = torch.zeros(int(unit.max()) + 1, dtype=torch.int64).index_add_(0, unit, torch.ones_like(unit))
    long_enough = lengths[unit] > 1
    values, unit, position = values[long_enough].double(), unit[long_enough], position[long_enough]
    late = 2 * position >= lengths[unit]
    first, second = (sums_by_unit(values[half], unit[half]) for half in (~late, late))
    means = [sums[:, 0] / sums[:, 1] for sums in (first, second)]
    alike = torch.ones(len(means[0]), dtype=torch.float64)
    difference = mean_of_units(torch.stack([means[1] - means[0], alike], 1))
    return mean_of_units(first), mean_of_units(second), difference
