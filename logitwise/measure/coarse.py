"""What a model's token probabilities are beside full precision's, where only the likeliest of them are known.

A server names its likeliest tokens at each position and the one that the text goes on with. Those tokens, and all
others together as one event, are a coarser distribution; KL between two coarser distributions is at most that between
the whole ones (the data-processing inequality: Cover and Thomas, Elements of Information Theory, 2006, section 2.8).
All figures but KL need no more than what is known, and are exact.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from logitwise.head import Head
from logitwise.measure.divergence import Divergence, in_chunks

LEAST_REST = 1e-6
"""What is left for all other tokens is 1 less a sum of float32 figures, wrong by about as much: none less divides."""


@dataclass(frozen=True)
class Reported:
    """What a server says of each position.

    Args:
        ids: the tokens it names, the likeliest first, the one that the text goes on with among them; -1 fills up.
        log_q: their log-probabilities, 0 where nothing is named.
        told: whether it says anything of a position; where it does not, the row is -1 throughout.
    """

    ids: Int64[Tensor, "tokens named"]
    log_q: Float[Tensor, "tokens named"]
    told: Bool[Tensor, " tokens"]

    def only_told(self) -> "Reported":
        """The positions of which something is said."""
        return Reported(self.ids[self.told], self.log_q[self.told], self.told[self.told])


@torch.no_grad()
def coarse_divergence(
    reported: Reported,
    teacher: Float[Tensor, "tokens d"],
    teacher_head: Head,
    written: Int64[Tensor, " tokens"],
) -> Divergence:
    """A served model against its teacher; `kl` and `reverse_kl` are lower bounds, and exact where all tokens are named.

    Args:
        reported: what the server says, of positions that are all told.
        teacher: what enters its final norm, read in the type of its head.
        written: the token that the text goes on with.
    """

    def columns(part: slice, log_p: Tensor) -> tuple[Tensor, ...]:
        return coarsely_compared(log_p.cpu(), reported.ids[part], reported.log_q[part], written[part])

    return in_chunks(teacher, teacher_head, columns)


def coarsely_compared(
    log_p: Float[Tensor, "tokens vocabulary"],
    ids: Int64[Tensor, "tokens named"],
    log_q: Float[Tensor, "tokens named"],
    written: Int64[Tensor, " tokens"],
) -> tuple[Tensor, ...]:
    """The columns of `Divergence`, in its order, from the teacher's log-probabilities and those that a server names."""
    named = ids >= 0
    log_p_named, log_q = log_p.gather(-1, ids.clamp(min=0)).double(), log_q.double()
    p, q = log_p_named.exp() * named, log_q.exp() * named
    (first, second), teacher_token = log_p.exp().topk(2, -1).values.unbind(-1), log_p.argmax(-1)
    is_written = ids == written.unsqueeze(-1)
    difference = log_p_named - log_q
    return (
        (p * difference).sum(-1) + _rest(p, q),
        -(q * difference).sum(-1) + _rest(q, p),
        -(log_p.exp() * log_p).sum(-1),
        first - second,
        teacher_token,
        ids[:, 0],
        first,
        q[:, 0],
        p[:, 0],
        (p * is_written).sum(-1),
        (q * is_written).sum(-1),
    )


def _rest(of: Float[Tensor, "tokens named"], to: Float[Tensor, "tokens named"]) -> Float[Tensor, " tokens"]:
    """The part of KL(of || to) that is of all tokens not named, as one event."""
    a, b = ((1 - named.sum(-1)).clamp(min=0) for named in (of, to))
    return torch.xlogy(a, a) - a * b.clamp(min=LEAST_REST).log()
