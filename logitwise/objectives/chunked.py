"""The mean of a loss of logits, from hidden states, in chunks: no [tokens, vocabulary] tensor ever lives.

    loss = sum_i w_i l(z_i, target_i) / sum_i w_i,    z = logits(student), target = logits(teacher)

The gradient is computed in the forward pass, chunk by chunk, since the loss is a scalar whose gradient is only scaled
later. A chunk costs three products with the head: teacher logits, student logits, and the gradient to the student's
hidden states. The head is frozen and gets none.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.head import Head

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time on each side: 64 MiB in float32."""


class Rule(ABC):
    """What is made of the logits of one chunk: each token's loss and its slopes."""

    reads_teacher: ClassVar[bool] = True
    """Whether it looks at the teacher's logits; where it does not, they are not computed and `target` is [n, 0]."""

    @abstractmethod
    def __call__(
        self, z: Float[Tensor, "n vocabulary"], target: Float[Tensor, "n _"], following: Int64[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n vocabulary"]]:
        """Each token's loss and d loss / d z, from final logits in at least float32; may overwrite both of them.

        Args:
            z, target: the student's and the teacher's logits.
            following: the token ids that follow.
        """


def chunk_tokens(vocabulary: int) -> int:
    """How many positions' logits fit into one chunk."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def positions(weights: Float[Tensor, "*rows tokens"]) -> Int64[Tensor, "counted"]:
    """Which positions count, among those of all rows. A GPU is waited for, since they say how many there are."""
    return (weights.flatten() > 0).nonzero().squeeze(-1)


def counted(weights: Float[Tensor, "tokens"], step: int) -> Iterator[tuple[Int64[Tensor, "n"], Float[Tensor, "n"]]]:
    """The positions of weight above 0, `step` at a time, with their shares of the whole weight; none if none counts."""
    index = positions(weights)
    if len(index):
        shares = weights[index] / weights[index].sum()
        yield from zip(index.split(step), shares.split(step), strict=True)


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, student: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * upstream.to(gradient.dtype), None, None


def with_gradient(
    student: Float[Tensor, "tokens d"], loss: Float[Tensor, ""], gradient: Float[Tensor, "tokens d"]
) -> Float[Tensor, ""]:
    """`loss`, whose gradient to `student` is known already."""
    attached: Tensor = _WithGradient.apply(student, loss, gradient)  # type: ignore[no-untyped-call]
    return attached


def head_loss(
    student: Float[Tensor, "tokens d"],
    teacher: Float[Tensor, "tokens d"],
    weights: Float[Tensor, "tokens"],
    following: Int64[Tensor, "tokens"],
    head: Head,
    rule: Rule,
) -> Float[Tensor, ""]:
    """The weighted mean of a rule's loss; see the module's text.

    Args:
        student, teacher: hidden states that the vocabulary projection reads (final norm applied).
        weights: how much each position counts; positions of weight 0 are not even read, and where all are 0 so is
            the loss.
        following: the token ids that follow, for rules that look at them.
        head: the frozen head of both.
        rule: the loss of one token.

    At least float32, float64 where the hidden states are. The gradient reaches `student` alone.
    """
    with torch.no_grad():
        dtype = torch.promote_types(student.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=student.device)
        gradient = torch.zeros_like(student)
        for index, share in counted(weights.to(dtype), chunk_tokens(len(head.weight))):
            z = head.logits(student[index])
            target = head.logits(teacher[index]) if rule.reads_teacher else z[:, :0]
            # d tanh, before the rule overwrites z.
            bend = None if head.soft_cap is None else 1 - (z / head.soft_cap).square_()
            losses, slopes = rule(z, target, following[index])
            loss += (share * losses).sum()
            if bend is not None:
                slopes *= bend
            # A share of a probability is below what float16 can hold, so the product comes first.
            product = slopes.to(head.weight.dtype) @ head.weight
            gradient[index] = ((share * head.scale).unsqueeze(-1) * product).to(gradient.dtype)
    return with_gradient(student, loss, gradient)
