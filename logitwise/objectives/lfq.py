"""LFQ: the final block is fitted to the full-precision model's token probabilities.

Lee et al., "Logit-aware Final-block Quantization", 2026, arXiv 2605.29756.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from logitwise.objectives.base import Objective
from logitwise.objectives.soft import compare, soft_cross_entropy
from logitwise.skeleton import Head


class LogitAware(Objective):
    """Soft cross-entropy from the teacher's token probabilities to the student's, over the positions that count.

    Both sides pass through the same frozen final norm and head; full vocabulary, temperature 1; no token id enters.
    Held-out rows are judged by KL(teacher || student), which differs from it by the teacher's entropy.
    """

    reads_head = True
    unit = "kl"

    def loss(
        self,
        student: Float[Tensor, "rows tokens d"],
        teacher: Float[Tensor, "rows tokens d"],
        weights: Float[Tensor, "rows tokens"],
        head: Head | None,
    ) -> Float[Tensor, ""]:
        assert head is not None
        counted = weights > 0
        with torch.no_grad():
            target = head.hidden(teacher[counted])
        return soft_cross_entropy(head.hidden(student[counted]), target, weights[counted], head).cross_entropy

    @torch.no_grad()
    def measure(
        self,
        student: Float[Tensor, "rows tokens d"],
        teacher: Float[Tensor, "rows tokens d"],
        weights: Float[Tensor, "rows tokens"],
        head: Head | None,
    ) -> tuple[float, float]:
        assert head is not None
        counted = weights > 0
        unused = torch.zeros(int(counted.sum()), dtype=torch.int64, device=student.device)
        found = compare(head.hidden(student[counted]), head, head.hidden(teacher[counted]), head, unused)
        shares = weights[counted].double().cpu()
        return float((found.kl * shares).sum()), float(shares.sum())
