"""The tokens that greedy decoding would take differently, and how sure full precision was of its own.

A flip where full precision hesitated between two tokens says little; one where it was sure is a decision that
quantization has overturned. The margin tells them apart.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from logitwise.measure.bins import Bin, in_bins
from logitwise.measure.divergence import Divergence
from logitwise.measure.figure import Figure, Spread, mean_over_units, spread

MARGIN_EDGES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
DECIDED = 0.5
"""A margin from which full precision had decided: its first token leads its second by half of all probability."""


@dataclass(frozen=True)
class Flips:
    """The positions where the likeliest token is another.

    Args:
        share: of all positions.
        decided: share of all positions that flip although full precision had decided.
        margin: of full precision, at the flips; None where nothing flips.
        by_margin: the share that flips, among positions of each margin.
        worst: the flips of largest margin, the largest first.
    """

    share: Figure
    decided: Figure
    margin: Spread | None
    by_margin: list[Bin]
    worst: Int64[Tensor, " some"]


def flips(found: Divergence, unit: Int64[Tensor, " tokens"], most: int = 8) -> Flips:
    """What flips; at most `most` positions are named.

    Args:
        unit: the answer that each token belongs to.
    """
    flipped = found.teacher_token != found.student_token
    positions = flipped.nonzero().squeeze(1)
    margin = found.margin[flipped]
    return Flips(
        share=mean_over_units(flipped.double(), unit),
        decided=mean_over_units((flipped & (found.margin >= DECIDED)).double(), unit),
        margin=spread(margin) if len(margin) else None,
        by_margin=in_bins(flipped.double(), unit, found.margin, MARGIN_EDGES),
        worst=positions[torch.argsort(margin, descending=True, stable=True)][:most],
    )
