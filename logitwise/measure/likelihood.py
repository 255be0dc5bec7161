"""What a model's token probabilities are on given text, and how far they are from another model's.

Perplexity says how well the text is predicted; it hides damage, because errors in both directions cancel and common
tokens dominate. KL to the full-precision model counts every change of every probability and needs no labels. Top-1
agreement is the share of positions where greedy decoding would take the same token. All three are teacher-forced: what
happens once a model has gone its own way, they do not see.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.calibration.rows import Rows
from logitwise.head import Head
from logitwise.measure.figure import Figure, exponential, figure_as_json, mean_of_units, sums_by_unit
from logitwise.objectives.soft import Comparison, compare
from logitwise.skeleton import Skeleton
from logitwise.source.base import Source
from logitwise.watch import SILENT, Watcher

VERSION = 1
"""Raised when the same model and text would give another figure."""


@dataclass(frozen=True)
class Likelihood:
    """One model's figures on one text.

    Args:
        perplexity: exp of the mean -log p of the tokens that count.
        kl: KL(reference || model), nats a token.
        top1: share of positions where both find the same token the likeliest.
        tokens: how many predictions count.
        kl_by_row: each row's KL summed over its tokens, and what they count, [rows, 2].
    """

    perplexity: Figure
    kl: Figure
    top1: Figure
    tokens: int
    kl_by_row: Float[Tensor, "rows 2"]


class Outputs:
    """A model's last hidden states on the rows, with the head that reads them."""

    def __init__(self, hidden: Float[Tensor, "tokens d"], head: Head) -> None:
        self.hidden, self.head = hidden, head


def last_hidden(
    skeleton: Skeleton, source: Source, rows: Rows, batch: int = 4, watcher: Watcher = SILENT, title: str = "Measuring"
) -> Float[Tensor, "tokens d"]:
    """Runs a source's weights through the skeleton, one block in memory at a time.

    Returns: what enters the final norm at the counted positions, [tokens, d].
    """
    with torch.no_grad(), watcher.stage(title, len(skeleton)) as stage:
        hidden = skeleton.embed(rows.ids, source, batch)
        for block, call in enumerate(skeleton.calls(rows.ids.shape[1])):
            skeleton.advance(block, skeleton.load_block(block, source), hidden, call, batch)
            stage.advance()
        return hidden[(rows.weights > 0).to(skeleton.device)]


def outputs(
    skeleton: Skeleton, source: Source, rows: Rows, batch: int = 4, watcher: Watcher = SILENT, title: str = "Measuring"
) -> Outputs:
    """As `last_hidden`, after the final norm, with the head that reads it."""
    hidden = last_hidden(skeleton, source, rows, batch, watcher, title)
    head = skeleton.head(source)
    with torch.no_grad():
        return Outputs(head.hidden(hidden), head)


def likelihood(model: Outputs, reference: Outputs, rows: Rows) -> Likelihood:
    """A model's figures beside a reference's, at the positions of `rows` that count."""
    counted = rows.weights > 0
    following = rows.following[counted].to(model.hidden.device)
    found = compare(model.hidden, model.head, reference.hidden, reference.head, following)
    return summarise(found, counted.nonzero()[:, 0], rows.weights[counted].double())


def summarise(found: Comparison, row: Tensor, weights: Float[Tensor, "tokens"]) -> Likelihood:
    """Weighted means over tokens, with the standard error of rows as the units that were sampled.

    Args:
        found: figures of each token.
        row: the row that each token is in.
        weights: how much each token counts.
    """
    nll = mean_of_units(sums_by_unit(found.student_nll, row, weights))
    kl_by_row = sums_by_unit(found.kl, row, weights)
    return Likelihood(
        perplexity=exponential(nll),
        kl=mean_of_units(kl_by_row),
        top1=mean_of_units(sums_by_unit(found.agrees, row, weights)),
        tokens=len(weights),
        kl_by_row=kl_by_row,
    )


def kl_difference(one: Likelihood, other: Likelihood) -> Figure:
    """KL of `one` less that of `other` on the same rows: surer than either, since both find the same rows hard."""
    difference = one.kl_by_row[:, 0] - other.kl_by_row[:, 0]
    return mean_of_units(torch.stack([difference, one.kl_by_row[:, 1]], 1))


def as_json(found: Likelihood) -> dict[str, Any]:
    """The figures as JSON values, each with its standard error."""
    figures = {name: figure_as_json(getattr(found, name)) for name in ("perplexity", "kl", "top1")}
    return {**figures, "tokens": found.tokens}
