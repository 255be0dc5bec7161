"""What every method is: parameters that stand for one weight on a grid while a window is fitted."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, Quantized, freeze, merge
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


class AffineQuantizer(Quantizer):
    """A weight whose scale, zero point and codes are computed anew from what is learned."""

    grid: Grid

    @abstractmethod
    def scale_and_zero(self) -> tuple[Float[Tensor, "out groups 1"], Float[Tensor, "out groups 1"]]:
        """Scales as they are stored, and zero points, both float."""

    @abstractmethod
    def codes(
        self, scale: Float[Tensor, "out groups 1"], zero: Float[Tensor, "out groups 1"]
    ) -> Float[Tensor, "out groups size"]:
        """Codes on that grid, as floats."""

    def forward(self, progress: float) -> Float[Tensor, "out in"]:
        scale, zero = self.scale_and_zero()
        return merge(scale * (self.codes(scale, zero) - zero))

    @torch.no_grad()
    def freeze(self) -> Quantized:
        scale, zero = self.scale_and_zero()
        return freeze(merge(self.codes(scale, zero)), scale.squeeze(-1), zero.squeeze(-1), self.grid)
