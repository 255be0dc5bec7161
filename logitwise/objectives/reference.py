"""Each objective in its plainest form: what the fast forms are tested against."""

import torch
from jaxtyping import Float
from torch import Tensor


def soft_cross_entropy(
    student: Float[Tensor, "tokens vocabulary"],
    teacher: Float[Tensor, "tokens vocabulary"],
    weights: Float[Tensor, "tokens"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """-sum_i w_i sum_j softmax(teacher / T)_ij log softmax(student / T)_ij / sum_i w_i, from logits."""
    losses = -(torch.softmax(teacher / temperature, -1) * torch.log_softmax(student / temperature, -1)).sum(-1)
    return (weights * losses).sum() / weights.sum()


def divergence(
    student: Float[Tensor, "tokens vocabulary"], teacher: Float[Tensor, "tokens vocabulary"]
) -> Float[Tensor, "tokens"]:
    """KL(teacher || student) of each token in nats, from logits."""
    p, q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (p.exp() * (p - q)).sum(-1)
