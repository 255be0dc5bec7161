"""Soft cross-entropy from hidden states, and how far a student's token probabilities are from a teacher's.

    p = softmax(logits(teacher) / T), q = softmax(logits(student) / T)
    cross-entropy = -sum_j p_j log q_j,    entropy = -sum_j p_j log p_j,    KL(p || q) is their difference
    d cross-entropy / d logits(student) = (q - p) / T

On CUDA with triton, `soft_triton.py` computes it in one kernel; everywhere else `eager` does, in chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives.chunked import Rule, chunk_tokens, counted, head_loss


class SoftLoss(NamedTuple):
    """Means over the positions that count, in nats; KL(teacher || student) is their difference.

    Args:
        cross_entropy: from the teacher's token probabilities to the student's; carries the gradient.
        entropy: of the teacher's token probabilities; carries none.
    """

    cross_entropy: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


def soft_cross_entropy(
    student: Float[Tensor, "tokens d"],
    teacher: Float[Tensor, "tokens d"],
    weights: Float[Tensor, "tokens"],
    head: Head,
    temperature: float = 1.0,
) -> SoftLoss:
    """Mean cross-entropy from the teacher's token probabilities to the student's. On final logits it is, for a token,

        p, log_q = softmax(teacher / temperature, -1), log_softmax(student / temperature, -1)
        -(p * log_q).sum(-1)

    Args:
        student, teacher: hidden states that the vocabulary projection reads (final norm applied).
        weights: how much each position counts; positions of weight 0 are left out.
        head: the frozen head of both.
        temperature: divides both sides' final logits (Hinton et al., 2015, arXiv 1503.02531). Loss and gradient are
            not multiplied by its square, as that paper does to keep their size beside another loss.

    The gradient reaches `student` alone.
    """
    if student.is_cuda and head.weight.dtype != torch.float64 and _has_triton():
        from logitwise.objectives import soft_triton

        return SoftLoss(*soft_triton.soft_cross_entropy(student, teacher, weights, head, temperature))
    return eager(student, teacher, weights, head, temperature)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class _Soft(Rule):
    """Cross-entropy at a temperature; notes the teacher's entropy at each token on the way."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.entropies: list[Tensor] = []

    def __call__(
        self, z: Float[Tensor, "n vocabulary"], target: Float[Tensor, "n _"], following: Int64[Tensor, "n"]
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n vocabulary"]]:
        log_p = torch.log_softmax(target.div_(self.temperature), -1)
        log_q = torch.log_softmax(z.div_(self.temperature), -1)
        p = log_p.exp()
        self.entropies.append(-log_p.mul_(p).sum(-1))
        losses = -(p * log_q).sum(-1)
        return losses, log_q.exp_().sub_(p).div_(self.temperature)


def eager(
    student: Float[Tensor, "tokens d"],
    teacher: Float[Tensor, "tokens d"],
    weights: Float[Tensor, "tokens"],
    head: Head,
    temperature: float = 1.0,
) -> SoftLoss:
    """`soft_cross_entropy` in PyTorch's own operations, on any device."""
    rule = _Soft(temperature)
    unused = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    cross_entropy = head_loss(student, teacher, weights, unused, head, rule)
    entropy = torch.zeros_like(cross_entropy)
    for _, shares in counted(weights.to(entropy.dtype), len(weights)):
        entropy = (shares * torch.cat(rule.entropies)).sum()
    return SoftLoss(cross_entropy, entropy)


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of positions whose logits fit into one chunk; one empty slice where there are no positions."""
    step = chunk_tokens(vocabulary)
    for start in range(0, max(1, tokens), step):
        yield slice(start, min(start + step, tokens))


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
