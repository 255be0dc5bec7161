"""GSQ: Gumbel-softmax over each weight's codes (Dadgarnia et al., 2026, arXiv 2604.18556; the authors' code).

    y = softmax((kappa l + Gumbel) / tau),  What = s (sum_k y_k c_k - z)

The logits l [out, in, K] and the scales s [out, groups] are learned together; in the end y is the hard argmax of l. tau
falls from 2 to .05 and kappa rises from 100 to 500, both linearly. With 2 bits the candidates c are all four codes,
with more the five about the start's code q, those outside of the grid left out. At the start

    l_k = .01 (noise_k + 6 (-(c_k - q)^2 / 2 - their mean)),  noise normal.

The scale may become negative. Ours: zero points other than a symmetric grid's, which stay as the start has them; scales
rounded to their stored type while they are learned; noise at the start only where it does not move the start's code
(in the authors' code one in thirty moves), so that a fit starts where all others do; a scale next to nothing for a
group of zeros, whose scale means nothing but would multiply the noise. tau and kappa reach their ends after the last
step, in the authors' code at it.

Logits, their gradients, Lion's mean of these and a step's sample each take K numbers a weight, four or five.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor, nn

from logitwise.grid import Grid, codes_of, merge, split, store_through
from logitwise.quantizers.base import AffineQuantizer, Role
from logitwise.quantizers.starts import Start

TEMPERATURE = (2.0, 0.05)
"""tau, at the start and at the end."""

SHARPNESS = (100.0, 500.0)
"""kappa, at the start and at the end."""

DEVIATION, STRENGTH = 0.01, 6.0
"""Of the logits at the start: the deviation of their noise, and how much nearness to the start's code counts beside."""

REACH = 2
"""How far from the start's code a candidate may be, where not all codes are candidates."""


class GumbelSoftmax(AffineQuantizer):
    """One weight under GSQ.

    Args:
        codes: where the fit starts, as floats [out, in].
        scale, zero: the same, [out, groups].
        seed: of the noise, which is another for each weight.
    """

    zero: Tensor
    lowest: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid, seed: int) -> None:
        super().__init__()
        self.grid, self.seed = grid, seed
        self.every_code = grid.levels < 2 * REACH + 1
        lowest = torch.zeros_like(codes) if self.every_code else codes - REACH
        self.register_buffer("zero", zero)
        self.register_buffer("lowest", lowest.to(torch.int16))  # the first candidate's code, -2 at the least
        self.logits = nn.Parameter(self._logits_of(codes))
        self.scale = nn.Parameter(scale.clone())

    @classmethod
    def start(cls, weight: Float[Tensor, "out in"], grid: Grid, start: Start) -> "GumbelSoftmax":
        at = start(weight, grid)
        codes = codes_of(at.weight, at.scale, at.zero, grid)
        empty = (split(at.weight, at.scale.shape[1]) == 0).all(-1)
        scale = torch.where(empty, _least(grid), at.scale)
        return cls(codes, scale, at.zero, grid, seed_of(weight))

    @torch.no_grad()
    def _logits_of(self, codes: Float[Tensor, "out in"]) -> Float[Tensor, "out in K"]:
        """The logits at the start: the likeliest candidate is the start's code."""
        places = torch.arange(2 * REACH + 1 if not self.every_code else self.grid.levels + 1, device=codes.device)
        own = codes - self.lowest
        nearness = (places - own.unsqueeze(-1)).square_().div_(-2)
        impossible = self._impossible(len(places))
        mean = nearness.masked_fill(impossible, 0).sum(-1, keepdim=True) / (~impossible).sum(-1, keepdim=True)
        plain = (nearness - mean).mul_(DEVIATION * STRENGTH)
        noise = torch.randn(plain.shape, generator=self._generator("start"), dtype=plain.dtype, device=plain.device)
        noisy = plain + DEVIATION * noise
        moved = noisy.masked_fill(impossible, -torch.inf).argmax(-1) != own
        return torch.where(moved.unsqueeze(-1), plain, noisy)

    def _impossible(self, candidates: int) -> Tensor:
        """Which candidates are no codes of the grid, bool [out, in, K]."""
        codes = self.lowest.unsqueeze(-1) + torch.arange(candidates, device=self.lowest.device, dtype=torch.int16)
        return (codes < 0) | (codes > self.grid.levels)

    def _generator(self, at: str) -> torch.Generator:
        """Random numbers of this weight alone; torch's own generator is the user's and stays where it is."""
        digest = hashlib.sha256(f"{self.seed} {at}".encode()).digest()
        return torch.Generator(self.lowest.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def noise(self, progress: float) -> Float[Tensor, "out in K"]:
        """Gumbel noise: always the same at the same progress, so that a block can be run again going backward."""
        drawn = torch.empty_like(self.logits, requires_grad=False)
        drawn.uniform_(generator=self._generator(repr(float(progress))))
        return drawn.clamp_(min=torch.finfo(drawn.dtype).tiny).log_().neg_().log_().neg_()  # 0 has no logarithm

    def forward(self, progress: float) -> Float[Tensor, "out in"]:
        scale, zero = self.scale_and_zero()
        codes = self.codes(scale, zero) if progress >= 1 else split(self.soft_codes(progress), scale.shape[1])
        return merge(scale * (codes - zero))

    def soft_codes(self, progress: float) -> Float[Tensor, "out in"]:
        """The mean of each weight's candidates under a sample of the softmax."""
        temperature, sharpness = ((1 - progress) * a + progress * b for a, b in (TEMPERATURE, SHARPNESS))
        # In place: what is as large as the logits is many times the weight.
        sample = self.noise(progress)
        candidates = sample.shape[-1]
        if not self.every_code:
            sample.masked_fill_(self._impossible(candidates), -torch.inf)
        shares = sample.add_(self.logits, alpha=sharpness).div_(temperature).softmax(-1)
        return self.lowest + shares @ torch.arange(candidates, dtype=shares.dtype, device=shares.device)

    def scale_and_zero(self) -> tuple[Float[Tensor, "out groups 1"], Float[Tensor, "out groups 1"]]:
        return store_through(self.scale, self.grid.scale_dtype).unsqueeze(-1), self.zero.unsqueeze(-1)

    def codes(
        self, scale: Float[Tensor, "out groups 1"], zero: Float[Tensor, "out groups 1"]
    ) -> Float[Tensor, "out groups size"]:
        logits = self.logits.detach()
        if not self.every_code:
            logits = logits.masked_fill(self._impossible(logits.shape[-1]), -torch.inf)
        return split((self.lowest + logits.argmax(-1)).to(logits.dtype), scale.shape[1])

    def groups(self) -> dict[Role, list[nn.Parameter]]:
        return {"rounding": [self.logits], "scale": [self.scale]}

    @torch.no_grad()
    def after_step(self) -> None:
        # A scale that its stored type rounds to zero or infinity, of either sign, is none.
        least, most = _least(self.grid), torch.finfo(self.grid.scale_dtype).max
        bounded = torch.where(self.scale < 0, self.scale.clamp(-most, -least), self.scale.clamp(least, most))
        self.scale.copy_(bounded)


def seed_of(weight: Float[Tensor, "out in"]) -> int:
    """A seed that a weight's own values and shape decide: another for each weight of a model, the same in each run.

    A quantizer starts from nothing but its weight, so a recipe's seed decides the order of the rows and not the noise.
    """
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(weight.detach().cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:7], "big")


def _least(grid: Grid) -> float:
    """The least positive number of the scales' stored type."""
    stored = torch.finfo(grid.scale_dtype)
    return stored.smallest_normal * stored.eps
