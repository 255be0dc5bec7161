"""Mean squared error of a window's output: what block-wise methods minimise."""

from jaxtyping import Float
from torch import Tensor

from logitwise.objectives.base import Objective
from logitwise.skeleton import Head


class MeanSquaredError(Objective):
    """Mean over all positions and channels of (student - teacher)^2."""

    unit = "mse"

    def loss(
        self,
        student: Float[Tensor, "rows tokens d"],
        teacher: Float[Tensor, "rows tokens d"],
        weights: Float[Tensor, "rows tokens"],
        head: Head | None,
    ) -> Float[Tensor, ""]:
        return (student.float() - teacher.float()).square().mean()

    def measure(
        self,
        student: Float[Tensor, "rows tokens d"],
        teacher: Float[Tensor, "rows tokens d"],
        weights: Float[Tensor, "rows tokens"],
        head: Head | None,
    ) -> tuple[float, float]:
        return float((student.float() - teacher.float()).square().sum()), float(student.numel())
