"""Mean squared error of a window's output: what block-wise methods minimise."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from logitwise.objectives.base import Objective, Taps


@dataclass(frozen=True)
class MeanSquaredError(Objective):
    """Mean over all positions and channels of (student - teacher)^2.

    Args:
        left_out: the share of the largest errors of a batch, and what is as large as the least of them, that are not
            learned from; they are measured all the same. AutoRound's extension leaves out .001 below 4 bits.
    """

    left_out: float = 0.0

    unit = "mse"

    def loss(self, taps: Taps) -> Float[Tensor, ""]:
        errors = (taps.student.float() - taps.teacher.float()).square()
        count = int(self.left_out * errors.numel())
        if not count:
            return errors.mean()
        least_left_out = errors.detach().flatten().topk(count).values[-1]
        kept = errors < least_left_out
        return (errors * kept).sum() / kept.sum().clamp(min=1)  # none is kept where all are as large

    def measure(self, taps: Taps) -> tuple[float, float]:
        return float((taps.student.float() - taps.teacher.float()).square().sum()), float(taps.student.numel())
