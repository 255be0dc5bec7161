"""Whether a model's confidence is still worth what it says.

Where text is sampled from full precision, the model's likeliest token turns out right with the probability that full
precision gives it. So calibration needs no labels: confidence is compared with that probability, its *backing*. Full
precision itself lies on the diagonal.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitwise.measure.divergence import Divergence
from logitwise.measure.figure import Figure, mean_over_units

BINS = 10
FORKING_SHARE = 0.2
"""Of all tokens, those of the highest entropy: where reasoning forks (Wang et al., 2025, arXiv 2506.01939)."""

TURNS = ("Wait", "But", "However", "Actually", "Alternatively", "Hmm", "Instead", "No")
"""Words with which a reasoning model turns around."""


@dataclass(frozen=True)
class Reliability:
    """One bin of a reliability diagram.

    Args:
        confidence: mean probability that the model gives to its likeliest token.
        backing: mean probability that full precision gives to that token.
        tokens: how many are in the bin.
    """

    confidence: float
    backing: float
    tokens: int


@dataclass(frozen=True)
class Calibration:
    """Confidence against what backs it, at some of the positions.

    Args:
        tokens: how many positions.
        kl: KL(full precision || model) there, nats a token.
        agrees: share where both find the same token the likeliest.
        overconfidence: mean of confidence less backing; negative where a model is too timid.
        error: expected calibration error: mean of |confidence - backing| over the bins of confidence, by tokens (Guo
            et al., 2017, arXiv 1706.04599).
        bins: the reliability diagram; empty bins are left out.
    """

    tokens: int
    kl: Figure
    agrees: Figure
    overconfidence: Figure
    error: float
    bins: list[Reliability]


def calibration(
    found: Divergence, unit: Int64[Tensor, " tokens"], where: Bool[Tensor, " tokens"] | None = None
) -> Calibration | None:
    """How a model's confidence stands at the positions of `where` (all of them by default); None where there is none.

    Args:
        unit: the answer that each token belongs to.
    """
    where = torch.ones_like(unit, dtype=torch.bool) if where is None else where
    if not where.any():
        return None
    confidence, backing = found.student_confidence[where], found.backing[where]
    bins = reliability(confidence, backing)
    error = sum(part.tokens * abs(part.confidence - part.backing) for part in bins) / len(confidence)
    figures = (found.kl[where], found.agrees[where], confidence - backing)
    kl, agrees, over = (mean_over_units(values, unit[where]) for values in figures)
    return Calibration(len(confidence), kl, agrees, over, error, bins)


def reliability(confidence: Float[Tensor, " tokens"], backing: Float[Tensor, " tokens"]) -> list[Reliability]:
    """Mean confidence and backing in bins of equal width of the confidence."""
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    found = []
    for index in range(BINS):
        inside = place == index
        if inside.any():
            means = float(confidence[inside].mean()), float(backing[inside].mean())
            found.append(Reliability(*means, int(inside.sum())))
    return found


def forking(entropy: Float[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
    """The positions of highest entropy, a fifth of all."""
    threshold = torch.quantile(entropy, 1 - FORKING_SHARE)
    return entropy > threshold


def turning_ids(tokenizer: PreTrainedTokenizerBase, words: Iterable[str] = TURNS) -> Int64[Tensor, " ids"]:
    """The tokens that are one of the words, with or without a space before; words of several tokens are left out."""
    written = (tokenizer.encode(space + word, add_special_tokens=False) for word in words for space in ("", " "))
    return torch.tensor(sorted({ids[0] for ids in written if len(ids) == 1}), dtype=torch.int64)
