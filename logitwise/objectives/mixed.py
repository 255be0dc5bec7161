"""Both at once: the window's mean squared error with the soft cross-entropy beside it."""

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from logitwise.objectives.base import Taps
from logitwise.objectives.lfq import LogitAware
from logitwise.objectives.mse import MeanSquaredError
from logitwise.ranks import Ranks


@dataclass(frozen=True)
class Mixed(LogitAware):
    """share * soft cross-entropy + mean squared error, the latter over all positions.

    Args:
        share: what a nat of cross-entropy counts beside a unit of squared error.
    """

    share: Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)] = 1.0

    def loss(self, taps: Taps) -> Float[Tensor, ""]:
        return self.share * super().loss(taps) + MeanSquaredError().loss(taps)

    def shared(self, taps: Taps, ranks: Ranks) -> Float[Tensor, ""]:
        # The two means are over different positions.
        return self.share * LogitAware(self.temperature).shared(taps, ranks) + MeanSquaredError().shared(taps, ranks)
