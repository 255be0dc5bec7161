"""Block-AP: everything of a weight is trained (EfficientQAT: Chen et al., ACL 2025, arXiv 2407.11062).

    What = s (clamp(round(W / s) + z, 0, 2^bits - 1) - z)

W [out, in], s and z [out, groups] are all learned. As in the authors' code s is clamped to [1e-4, 1e4] and z rounded
and clamped to [0, 2^bits - 1] with gradients passed unchanged. A symmetric grid's z is fixed; that is ours.
"""

from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, clamp_through, round_through, split, store_through
from logitwise.quantizers.base import AffineQuantizer, Role
from logitwise.quantizers.starts import Start

LEAST_SCALE, LARGEST_SCALE = 1e-4, 1e4


class BlockAP(AffineQuantizer):
    """One weight under Block-AP.

    Args:
        weight: float32 [out, in].
        scale, zero: where the fit starts, float32 [out, groups].
    """

    reads_progress = False
    zero: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(weight.clone())
        self.scale = nn.Parameter(scale.clone())
        if grid.symmetric:
            self.register_buffer("zero", zero)
        else:
            self.zero = nn.Parameter(zero.clone())

    @classmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "BlockAP":
        at = start(weight, grid)
        return cls(at.weight, at.scale, at.zero, grid)

    def scale_and_zero(self) -> tuple[Float[Tensor, "out groups 1"], Float[Tensor, "out groups 1"]]:
        scale = store_through(clamp_through(self.scale, LEAST_SCALE, LARGEST_SCALE), self.grid.scale_dtype)
        zero = clamp_through(round_through(self.zero), 0, self.grid.levels)
        return scale.unsqueeze(-1), zero.unsqueeze(-1)

    def codes(
        self, scale: Float[Tensor, "out groups 1"], zero: Float[Tensor, "out groups 1"]
    ) -> Float[Tensor, "out groups size"]:
        rounded = round_through(split(self.weight, self.scale.shape[1]) / scale)
        return (rounded + zero).clamp(0, self.grid.levels)

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        learned: dict[Role, list[nn.Parameter]] = {"weight": [self.weight], "scale": [self.scale]}
        if isinstance(self.zero, nn.Parameter):
            learned["zero"] = [self.zero]
        return learned
