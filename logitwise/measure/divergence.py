"""What a model's token probabilities are beside full precision's, token by token.

Everything here is teacher-forced: both read the same text, full precision's own answers, and are asked at each position
for the next token. What happens once a model has gone its own way, `answers.py` measures.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives.soft import chunks

VERSION = 1
"""Raised when the same models and tokens would give another figure; what was measured before is then not reused."""


@dataclass(frozen=True)
class Divergence:
    """A student beside its teacher at every position, [tokens] each, on the CPU; p is the teacher's, q the student's.

    Args:
        kl: KL(p || q) in nats: what is lost where the teacher sees likely tokens.
        reverse_kl: KL(q || p) in nats: what the student makes up.
        entropy: of p, in nats.
        margin: by how much the teacher's likeliest token is likelier than its second: .01 is a tie, .9 a decision.
        teacher_token, student_token: the likeliest token of each.
        teacher_confidence, student_confidence: the probability that each gives to its own.
        backing: the probability that the teacher gives to the student's likeliest token.
        teacher_written, student_written: the probability of the token that the text goes on with.
    """

    kl: Float[Tensor, " tokens"]
    reverse_kl: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    margin: Float[Tensor, " tokens"]
    teacher_token: Int64[Tensor, " tokens"]
    student_token: Int64[Tensor, " tokens"]
    teacher_confidence: Float[Tensor, " tokens"]
    student_confidence: Float[Tensor, " tokens"]
    backing: Float[Tensor, " tokens"]
    teacher_written: Float[Tensor, " tokens"]
    student_written: Float[Tensor, " tokens"]

    @property
    def agrees(self) -> Float[Tensor, " tokens"]:
        """1 where both find the same token the likeliest."""
        return (self.teacher_token == self.student_token).double()


@torch.no_grad()
def divergence(
    student: Float[Tensor, "tokens d"],
    student_head: Head,
    teacher: Float[Tensor, "tokens d"],
    teacher_head: Head,
    written: Int64[Tensor, " tokens"],
) -> Divergence:
    """Student against teacher from what enters their final norms, in chunks: no [tokens, vocabulary] tensor lives.

    Args:
        student, teacher: the last block's output; the teacher's may be stored in 16 bits, and is read in the type of
            its head.
        written: the token that the text goes on with.
    """

    def columns(part: slice, log_p: Tensor) -> tuple[Tensor, ...]:
        log_q = torch.log_softmax(student_head.logits(student_head.hidden(student[part])), -1)
        return compared(log_p, log_q, written[part].to(log_p.device))

    return in_chunks(teacher, teacher_head, columns)


def in_chunks(
    teacher: Float[Tensor, "tokens d"], head: Head, columns: Callable[[slice, Tensor], tuple[Tensor, ...]]
) -> Divergence:
    """What `columns` makes of some positions and the teacher's log-probabilities there, for all of them."""
    found: list[tuple[Tensor, ...]] = []
    for part in chunks(len(teacher), head.weight.shape[0]):
        above = head.hidden(teacher[part].to(head.weight))
        found.append(columns(part, torch.log_softmax(head.logits(above), -1)))
    joined = [torch.cat(column).cpu() for column in zip(*found, strict=True)]
    return Divergence(*(column.double() if column.is_floating_point() else column for column in joined))


def compared(
    log_p: Float[Tensor, "tokens vocabulary"],
    log_q: Float[Tensor, "tokens vocabulary"],
    written: Int64[Tensor, " tokens"],
) -> tuple[Tensor, ...]:
    """The columns of `Divergence`, in its order, from log-probabilities of teacher and student."""
    p, q = log_p.exp(), log_q.exp()
    (first, second), teacher_token = p.topk(2, -1).values.unbind(-1), p.argmax(-1)
    student_confidence, student_token = q.max(-1)
    difference = log_p - log_q
    return (
        (p * difference).sum(-1),
        -(q * difference).sum(-1),
        -(p * log_p).sum(-1),
        first - second,
        teacher_token,
        student_token,
        first,
        student_confidence,
        p.gather(-1, student_token.unsqueeze(-1)).squeeze(-1),
        p.gather(-1, written.unsqueeze(-1)).squeeze(-1),
        q.gather(-1, written.unsqueeze(-1)).squeeze(-1),
    )
