"""Soft cross-entropy from hidden states, in chunks: no [tokens, vocabulary] tensor ever lives.

    z_t = logits(teacher), z_s = logits(student)
    loss = -sum_i w_i sum_j softmax(z_t)_ij log softmax(z_s)_ij / sum_i w_i

The gradient is computed in the forward pass, chunk by chunk, since the loss is a scalar whose gradient is only scaled
later: dloss / dz_s = w_i (softmax(z_s) - softmax(z_t)) / sum w. A chunk costs three products with the head: teacher
logits, student logits, and the gradient to the student's hidden states. The head is frozen and gets none.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.skeleton import Head

CHUNK_ELEMENTS = 1 << 24
"""Logits held at a time on each side: 64 MiB in float32."""


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of positions whose logits fit into one chunk; one empty slice where there are no positions."""
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, max(1, tokens), step):
        yield slice(start, min(start + step, tokens))


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, student: Tensor, teacher: Tensor, weights: Tensor, head: Head
    ) -> Tensor:
        total = weights.sum()
        loss = torch.zeros(
            (), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32, device=student.device
        )
        gradient = torch.empty_like(student)
        for part in chunks(student.shape[0], head.weight.shape[0]):
            share = (weights[part] / total).unsqueeze(-1)
            target = torch.softmax(head.logits(teacher[part]), -1)
            z = head.logits(student[part])
            q = torch.log_softmax(z, -1)
            loss -= (share * (target * q)).sum()
            slope = share * q.exp_().sub_(target)
            if head.soft_cap is not None:
                slope *= 1 - (z / head.soft_cap) ** 2  # d tanh
            if head.scale != 1:
                slope *= head.scale
            gradient[part] = slope.to(head.weight.dtype) @ head.weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * upstream.to(gradient.dtype), None, None, None


def soft_cross_entropy(
    student: Float[Tensor, "tokens d"], teacher: Float[Tensor, "tokens d"], weights: Float[Tensor, "tokens"], head: Head
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats from the teacher's token probabilities to the student's; see the module's text.

    Args:
        student, teacher: hidden states that the vocabulary projection reads (final norm applied).
        weights: how much each position counts; positions of weight 0 are left out.
        head: the frozen head of both.

    The gradient reaches `student` alone.
    """
    counted = weights > 0
    given = student[counted], teacher[counted].detach(), weights[counted]
    loss: Tensor = _SoftCrossEntropy.apply(*given, head)  # type: ignore[no-untyped-call]
    return loss


@dataclass(frozen=True)
class Comparison:
    """What a student's token probabilities are beside the teacher's, at each position (float64, on the CPU).

    Args:
        kl: KL(teacher || student) in nats.
        agrees: 1 where both find the same token the likeliest.
        student_nll, teacher_nll: -log p of the token that follows, in nats.
    """

    kl: Float[Tensor, "tokens"]
    agrees: Float[Tensor, "tokens"]
    student_nll: Float[Tensor, "tokens"]
    teacher_nll: Float[Tensor, "tokens"]


@torch.no_grad()
def compare(
    student: Float[Tensor, "tokens d"],
    student_head: Head,
    teacher: Float[Tensor, "tokens d"],
    teacher_head: Head,
    following: Tensor,
) -> Comparison:
    """Student against teacher at every position, in chunks; each side through its own head."""
    found: list[tuple[Tensor, ...]] = []
    for part in chunks(student.shape[0], teacher_head.weight.shape[0]):
        p = torch.log_softmax(teacher_head.logits(teacher[part]), -1)
        q = torch.log_softmax(student_head.logits(student[part]), -1)
        agrees = p.argmax(-1) == q.argmax(-1)
        index = following[part].unsqueeze(-1)
        nll = -q.gather(-1, index).squeeze(-1), -p.gather(-1, index).squeeze(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        found.append((kl, agrees, *nll))
    kl, agrees, student_nll, teacher_nll = (torch.cat(column).double().cpu() for column in zip(*found, strict=True))
    return Comparison(kl, agrees, student_nll, teacher_nll)
