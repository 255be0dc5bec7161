"""What every method is: parameters that stand for one weight on a grid while a window is fitted."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, Quantized
from logitwise.quantizers.starts import Start

Role = Literal["scale", "zero", "weight", "rounding", "range"]
"""What a learned parameter is for; the recipe gives each role its optimiser and rate."""


class Quantizer(nn.Module, ABC):
    """One weight being quantized.

    At progress 1 `forward` equals `freeze().dequantize()` to the last bit: the scale is rounded to its stored type
    while it is learned.
    """

    learns: ClassVar[bool] = True
    """Whether there is anything to fit; a method that does not learn reads no calibration text."""

    reads_progress: ClassVar[bool] = True
    """Whether `forward` depends on how far the fit is, so that a step cannot be recorded and replayed."""

    @classmethod
    @abstractmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "Quantizer":
        """The quantizer of a float32 `weight`, with its range found by `start`."""

    @abstractmethod
    def forward(self, progress: float) -> Float[Tensor, "out in"]:
        """What the block sees, float32, at this point of the fit (0 at its start, 1 at its end)."""

    @abstractmethod
    def freeze(self) -> Quantized:
        """What is stored."""

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        """The learned parameters by role."""
        return {}

    def after_step(self) -> None:
        """Called after each optimiser step: puts parameters back into their bounds."""
        return None
