"""Mean squared error of logits: the head in the path without probabilities, the LFQ paper's own ablation ("head")."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.objectives.base import RuleObjective


@dataclass(frozen=True)
class LogitMeanSquaredError(RuleObjective):
    """Mean over the vocabulary of (student's logit - teacher's logit)^2."""

    def __call__(
        self, z: Float[Tensor, "n vocabulary"], target: Float[Tensor, "n _"], following: Int64[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n vocabulary"]]:
        difference = z.sub_(target)
        return difference.square().mean(-1), difference * (2 / z.shape[-1])
