"""What every objective is: a loss of the student given the teacher at a window's end."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives.chunked import Rule, head_loss, positions
from logitwise.objectives.soft import compare
from logitwise.ranks import Ranks


@dataclass(frozen=True)
class Taps:
    """What a batch gives at a window's end.

    Args:
        student: what the quantized window puts out.
        teacher: what the full-precision window puts out.
        weights: how much each position counts.
        following: the token after each position.
        head: what turns hidden states into logits; None where the window does not end with the last block.
        teacher_head: the teacher's, where it is another. Losses read its norms alone, and their logits of the teacher
            are by the student's vocabulary projection; what is measured is by all of it.
    """

    student: Float[Tensor, "rows tokens d"]
    teacher: Float[Tensor, "rows tokens d"]
    weights: Float[Tensor, "rows tokens"]
    following: Int64[Tensor, "rows tokens"]
    head: Head | None
    teacher_head: Head | None = None


class Objective(ABC):
    """A loss between what the quantized window and the full-precision window put out.

    Subclasses are frozen dataclasses; their fields are the settings that a recipe gives under `objective_settings`.
    """

    reads_head: ClassVar[bool] = False
    """Whether it looks through the head, so that it fits only windows that end with the last block."""

    unit: ClassVar[str]
    """What `measure` counts in."""

    @abstractmethod
    def loss(self, taps: Taps) -> Float[Tensor, ""]:
        """The mean loss of a batch, whose gradient reaches `taps.student` alone."""

    def over(self, taps: Taps) -> Float[Tensor, ""]:
        """How much that mean is over: every position alike."""
        return taps.weights.new_full((), taps.weights.numel())  # written there: a GPU is not waited for

    def shared(self, taps: Taps, ranks: Ranks) -> Float[Tensor, ""]:
        """What these rows add to the mean loss of a batch that all ranks share."""
        return self.loss(taps) if ranks.world == 1 else self.loss(taps) * ranks.part(self.over(taps))

    @abstractmethod
    def measure(self, taps: Taps) -> tuple[float, float]:
        """What held-out rows are judged by: a sum over a batch and how much it counts."""


class LogitObjective(Objective):
    """A loss of logits, over the positions that count; both sides pass through a frozen final norm and head.

    Held-out rows are judged by KL(teacher || student), whatever is minimised: it is what the checkpoint is measured by.
    """

    reads_head = True
    unit = "kl"

    def over(self, taps: Taps) -> Float[Tensor, ""]:
        return taps.weights.sum()

    @torch.no_grad()
    def measure(self, taps: Taps) -> tuple[float, float]:
        student, teacher, weights, following, head = what_counts(taps)
        found = compare(student, head, teacher, taps.teacher_head or head, following)
        shares = weights.double().cpu()
        return float((found.kl * shares).sum()), float(shares.sum())


class RuleObjective(LogitObjective, Rule):
    """A loss of logits that says, as a rule does, what one token's logits cost."""

    def loss(self, taps: Taps) -> Float[Tensor, ""]:
        student, teacher, weights, following, head = what_counts(taps)
        return head_loss(student, teacher, weights, following, head, self)


def what_counts(taps: Taps) -> tuple[Tensor, Tensor, Tensor, Tensor, Head]:
    """Student's and teacher's hidden states, weights and following tokens at the positions that count; the head."""
    assert taps.head is not None
    index = positions(taps.weights)
    with torch.no_grad():
        teacher = (taps.teacher_head or taps.head).hidden(taps.teacher.flatten(0, 1)[index])
    student = taps.head.hidden(taps.student.flatten(0, 1)[index])
    return student, teacher, taps.weights.flatten()[index], taps.following.flatten()[index], taps.head
