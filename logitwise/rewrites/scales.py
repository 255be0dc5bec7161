"""Which scale a fold takes: AWQ's by what the readers put out, D2Quant's dual scale by the readers' weights alone.

Both start from no scale at all and keep it where nothing is better by their own measure. The producer's rows are
rounded too, but each row's grid grows and shrinks with it, so that their part of the error stays what it was.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.rewrites.folds import Fold

RATIOS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4

ROUNDS = 15
"""D2Quant's: how often the weight is rounded anew."""


@dataclass(frozen=True)
class Inputs:
    """What a fold's readers read, over all calibration tokens.

    Args:
        moments: mean of x x^T, [in, in].
        size: mean of |x|, [in].
    """

    moments: Float[Tensor, "inputs inputs"]
    size: Float[Tensor, " inputs"]


@dataclass(frozen=True)
class Problem:
    """One fold to choose a scale for.

    Args:
        weight: the readers' weights, one below another, float32 [out, in].
        rounded: a weight -> the same rounded on its grid, [out, in].
        storable: a scale [in] -> the one near it that can be stored.
        inputs: what the readers read; None where no text is read.
    """

    weight: Float[Tensor, "out inputs"]
    rounded: Callable[[Tensor], Tensor]
    storable: Callable[[Tensor], Tensor]
    inputs: Inputs | None = None

    def error(self, scale: Float[Tensor, " inputs"]) -> Float[Tensor, "out inputs"]:
        """What rounding changes with that scale: Q(W s) / s - W."""
        return self.rounded(self.weight * scale) / scale - self.weight


@dataclass(frozen=True)
class Chosen:
    """The scale of a fold by one rewrite.

    Args:
        scale: [in], storable.
        before, after: the rewrite's own measure without and with it, as a share of that of the weight itself.
        by: what was chosen: AWQ's ratio, the dual scale's round.
    """

    scale: Float[Tensor, " inputs"]
    before: float
    after: float
    by: dict[str, float]


def awq(problem: Problem) -> Chosen:
    """Activation-aware scaling (AWQ: Lin et al., 2306.00978; grid of ratios and scales as in its code, auto_scale.py).

    t = mean|x| of each input; for r in 0, 1/20, ..., 19/20: s = clamp(t^r, 1e-4), s /= sqrt(max s * min s); the s of
    the least squared error of what the readers put out, tr(E M E^T) with E = Q(W s) / s - W and M = mean of x x^T.
    The authors measure the output of the module around the readers (attention, say) and then search clips; here it is
    the readers' own, and clipping is the start's.
    """
    if problem.inputs is None:
        raise ValueError("AWQ needs what the readers read")
    moments, size = problem.inputs.moments, problem.inputs.size

    def power(error: Tensor) -> float:
        return float(((error @ moments) * error).sum())

    found: list[tuple[float, float, Tensor]] = []
    for ratio in RATIOS:
        target = (size**ratio).clamp(min=SMALLEST)
        scale = problem.storable(target / (target.max() * target.min()).sqrt())
        found.append((power(problem.error(scale)), ratio, scale))
    least, ratio, scale = min(found, key=lambda tried: tried[0])
    whole = power(problem.weight) or 1.0
    return Chosen(scale, found[0][0] / whole, least / whole, {"ratio": ratio})


def dual_scale(problem: Problem) -> Chosen:
    """A second scale for each input (D2Quant, arXiv 2602.02546), without data: min over c of ||W - Q(W / c) c||^2.

    By turns D = Q(W / c), and for each input h: c_h = sum_r W_rh D_rh / sum_r D_rh^2. Inputs where that is not a
    positive number keep their c. The authors' c of the last round is taken; here that of the best, with c = 1 as
    round 0. c is the inverse of the scale that the readers' columns are multiplied by.
    """
    weight = problem.weight
    best: tuple[float, int, Tensor] | None = None
    before, scale = 0.0, problem.storable(torch.ones_like(weight[0]))
    for turn in range(ROUNDS + 1):
        rounded = problem.rounded(weight * scale)
        least = float((rounded / scale - weight).square().sum())
        if best is None:
            before, best = least, (least, turn, scale)
        elif least < best[0]:
            best = (least, turn, scale)
        c = (weight * rounded).sum(0) / rounded.square().sum(0)
        scale = problem.storable(torch.where(torch.isfinite(c) & (c > 0), 1 / c, scale))
    assert best is not None
    least, turn, scale = best
    whole = float(weight.square().sum()) or 1.0
    return Chosen(scale, before / whole, least / whole, {"round": turn})


SCALES: dict[str, Callable[[Problem], Chosen]] = {"awq": awq, "dual_scale": dual_scale}
"""Every rewrite by its name, in the order in which they are applied."""

READ_INPUTS = ("awq",)
"""Those that need what the readers read; they are applied first, to weights that have no scale yet."""

OF_PROJECTIONS = ("dual_scale",)
"""Those that fold into projections alone."""


def takes(rewrite: str, fold: Fold) -> bool:
    """Whether a rewrite chooses a scale for this fold."""
    return fold.rows is not None or rewrite not in OF_PROJECTIONS
