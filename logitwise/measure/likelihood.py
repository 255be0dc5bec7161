"""What a model's token probabilities are on given text, and how far they are from another model's.

Perplexity says how well the text is predicted; it hides damage, because errors in both directions cancel and common
tokens dominate. KL to the full-precision model counts every change of every probability and needs no labels. Top-1
agreement is the share of positions where greedy decoding would take the same token. All three are teacher-forced: what
happens once a model has gone its own way, they do not see.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.calibration.rows import Rows
from logitwise.objectives.soft import Comparison, compare
from logitwise.skeleton import Head, Skeleton
from logitwise.source.base import Source
from logitwise.watch import SILENT, Watcher

VERSION = 1
"""Raised when the same model and text would give another figure."""


@dataclass(frozen=True)
class Figure:
    """A mean and its standard error over rows."""

    mean: float
    error: float


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


def outputs(
    skeleton: Skeleton, source: Source, rows: Rows, batch: int = 4, watcher: Watcher = SILENT, title: str = "Measuring"
) -> Outputs:
    """Runs a source's weights through the skeleton, one block in memory at a time.

    Returns: hidden states at the counted positions, after the final norm, [tokens, d].
    """
    with torch.no_grad(), watcher.stage(title, len(skeleton)) as stage:
        hidden = skeleton.embed(rows.ids, source, batch)
        for block, call in enumerate(skeleton.calls(rows.ids.shape[1])):
            skeleton.advance(block, skeleton.load_block(block, source), hidden, call, batch)
            stage.advance()
        head = skeleton.head(source)
        return Outputs(head.hidden(hidden[(rows.weights > 0).to(skeleton.device)]), head)


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
    nll = _mean(_by_row(found.student_nll, row, weights))
    kl_by_row = _by_row(found.kl, row, weights)
    return Likelihood(
        # The error of exp(x) is exp(x) times that of x.
        perplexity=Figure(math.exp(nll.mean), math.exp(nll.mean) * nll.error),
        kl=_mean(kl_by_row),
        top1=_mean(_by_row(found.agrees, row, weights)),
        tokens=len(weights),
        kl_by_row=kl_by_row,
    )


def kl_difference(one: Likelihood, other: Likelihood) -> Figure:
    """KL of `one` less that of `other` on the same rows: surer than either, since both find the same rows hard."""
    difference = one.kl_by_row[:, 0] - other.kl_by_row[:, 0]
    return _mean(torch.stack([difference, one.kl_by_row[:, 1]], 1))


def _by_row(values: Tensor, row: Tensor, weights: Tensor) -> Float[Tensor, "rows 2"]:
    """Each row's weighted sum and weight; rows where nothing counts are left out."""
    sums = torch.zeros(int(row.max()) + 1, 2, dtype=torch.float64)
    sums.index_add_(0, row, torch.stack([values * weights, weights], 1))
    return sums[sums[:, 1] > 0]


def _mean(by_row: Float[Tensor, "rows 2"]) -> Figure:
    """A ratio estimator's mean and error: rows differ in how many of their tokens count."""
    total, count = by_row.unbind(1)
    mean = float(total.sum() / count.sum())
    if len(count) < 2:
        return Figure(mean, math.nan)
    residual = total - mean * count
    n = len(count)
    return Figure(mean, float((n / (n - 1) * residual.square().sum()).sqrt() / count.sum()))


def as_json(found: Likelihood) -> dict[str, Any]:
    """The figures as JSON values, each with its standard error."""
    figures = {name: getattr(found, name) for name in ("perplexity", "kl", "top1")}
    return {
        **{name: {"mean": figure.mean, "standard_error": figure.error} for name, figure in figures.items()},
        "tokens": found.tokens,
    }
