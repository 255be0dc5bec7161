"""The teacher's likeliest token as a hard label: what is lost when the rest of its distribution is left out."""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.objectives.base import RuleObjective
from logitwise.objectives.hard_labels import label_loss


@dataclass(frozen=True)
class TeacherArgmax(RuleObjective):
    """-log p of the token that the full-precision model finds the likeliest."""

    def __call__(
        self, z: Float[Tensor, "n vocabulary"], target: Float[Tensor, "n _"], following: Int64[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n vocabulary"]]:
        return label_loss(z, target.argmax(-1))
