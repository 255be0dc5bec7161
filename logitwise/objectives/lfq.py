"""LFQ: the final block is fitted to the full-precision model's token probabilities.

Lee et al., "Logit-aware Final-block Quantization", 2026, arXiv 2605.29756.
"""

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from logitwise.objectives.base import LogitObjective, Taps, what_counts
from logitwise.objectives.soft import soft_cross_entropy


@dataclass(frozen=True)
class LogitAware(LogitObjective):
    """Soft cross-entropy from the teacher's token probabilities to the student's: full vocabulary, no token id.

    Args:
        temperature: both sides' logits are divided by it; 1 is the paper's.
    """

    temperature: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] = 1.0

    def loss(self, taps: Taps) -> Float[Tensor, ""]:
        student, teacher, weights, _, head = what_counts(taps)
        return soft_cross_entropy(student, teacher, weights, head, self.temperature).cross_entropy
