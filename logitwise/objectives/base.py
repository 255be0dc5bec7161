"""What every objective is: a loss of the student given the teacher at a window's end."""

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from logitwise.skeleton import Head


class Objective(ABC):
    """A loss between what the quantized window and the full-precision window put out."""

    reads_head: ClassVar[bool] = False
    """Whether it looks through the head, so that it fits only windows that end with the last block."""

    unit: ClassVar[str]
    """What `measure` counts in."""

    @abstractmethod
    def loss(
        self,
        student: Float[Tensor, "rows tokens d"],
        teacher: Float[Tensor, "rows tokens d"],
        weights: Float[Tensor, "rows tokens"],
        head: Head | None,
    ) -> Float[Tensor, ""]:
        """The mean loss of a batch, whose gradient reaches `student` alone."""

    @abstractmethod
    def measure(
        self,
        student: Float[Tensor, "rows tokens d"],
        teacher: Float[Tensor, "rows tokens d"],
        weights: Float[Tensor, "rows tokens"],
        head: Head | None,
    ) -> tuple[float, float]:
        """What held-out rows are judged by: a sum over a batch and how much it counts."""
