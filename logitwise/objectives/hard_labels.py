"""Hard labels: cross-entropy to the token that the text has next. A control: no full-precision model enters it.

It is what AutoRound ships under the name of LFQ (`enable_lfq`), there over the prompts' positions too.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from logitwise.objectives.base import Objective, RuleObjective, Taps


@dataclass(frozen=True)
class HardLabels(RuleObjective):
    """-log p of the calibration text's next token.

    Args:
        prompts: learn from every position, those that do not count (prompts) included.
    """

    prompts: Annotated[bool, Field(strict=True)] = False
    reads_teacher = False

    def loss(self, taps: Taps) -> Float[Tensor, ""]:
        return super().loss(replace(taps, weights=torch.ones_like(taps.weights)) if self.prompts else taps)

    def over(self, taps: Taps) -> Float[Tensor, ""]:
        return Objective.over(self, taps) if self.prompts else super().over(taps)

    def __call__(
        self, z: Float[Tensor, "n vocabulary"], target: Float[Tensor, "n _"], following: Int64[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n vocabulary"]]:
        return label_loss(z, following)


def label_loss(
    z: Float[Tensor, "n vocabulary"], label: Int64[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n vocabulary"]]:
    """-log softmax(z)_label of each token, and its slope softmax(z) - onehot(label)."""
    log_q = torch.log_softmax(z, -1)
    index = label.unsqueeze(-1)
    losses = -log_q.gather(-1, index).squeeze(-1)
    slope = log_q.exp_()
    return losses, slope.scatter_add_(-1, index, torch.full_like(index, -1, dtype=slope.dtype))
