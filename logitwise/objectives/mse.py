"""Mean squared error of a window's output: what block-wise methods minimise."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from logitwise.objectives.base import Objective, Taps


@dataclass(frozen=True)
class MeanSquaredError(Objective):
    """Mean over all positions and channels of (student - teacher)^2."""

    unit = "mse"

    def loss(self, taps: Taps) -> Float[Tensor, ""]:
        return (taps.student.float() - taps.teacher.float()).square().mean()

    def measure(self, taps: Taps) -> tuple[float, float]:
        return float((taps.student.float() - taps.teacher.float()).square().sum()), float(taps.student.numel())
