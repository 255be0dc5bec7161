"""Soft cross-entropy to the teacher's k likeliest tokens: all that servers with top log-probabilities tell."""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from pydantic import Field
from torch import Tensor

from logitwise.objectives.base import RuleObjective


@dataclass(frozen=True)
class TopK(RuleObjective):
    """-sum_j p_j log softmax(z)_j, p the teacher's probabilities of its k likeliest tokens, made to sum to 1.

    Args:
        k: how many tokens.
    """

    k: Annotated[int, Field(ge=1, strict=True)] = 64

    def __call__(
        self, z: Float[Tensor, "n vocabulary"], target: Float[Tensor, "n _"], following: Int64[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n vocabulary"]]:
        top, index = target.topk(min(self.k, target.shape[-1]), -1)
        p = torch.softmax(top, -1)
        log_q = torch.log_softmax(z, -1)
        losses = -(p * log_q.gather(-1, index)).sum(-1)
        return losses, log_q.exp_().scatter_add_(-1, index, -p)
