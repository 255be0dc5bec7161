"""Each objective in its plainest form: what the fast forms are tested against."""

import torch
from jaxtyping import Float
from torch import Tensor


def soft_cross_entropy(
    student: Float[Tensor, "tokens vocabulary"],
    teacher: Float[Tensor, "tokens vocabulary"],
    weights: Float[Tensor, "tokens"],
) -> Float[Tensor, ""]:
    """-sum_i w_i sum_j softmax(teacher)_ij log softmax(student)_ij / sum_i w_i, from logits."""
    losses = -(torch.softmax(teacher, -1) * torch.log_softmax(student, -1)).sum(-1)
    return (weights * losses).sum() / weights.sum()


def divergence(
    student: Float[Tensor, "tokens vocabulary"], teacher: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens"]:
    """KL(teacher || student) of each token in nats, from logits."""
    p, q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (p.exp() * (p - q)).sum(-1)
