"""Heads, random tensors, and the rule that every fast form is held to: no further from the truth than the naive one."""

from collections.abc import Callable

import torch
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives import reference

HEADS: dict[str, dict[str, float | bool]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "soft-cap": {"soft_cap": 3.0},
    "all": {"bias": True, "scale": 1.7, "soft_cap": 5.0},
}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def make_head(
    kind: str, vocabulary: int = 37, d: int = 6, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Head:
    """A head of one of HEADS; its logits of normal hidden states have deviation sqrt(6), whatever d is."""
    made = HEADS[kind]
    bias = random(vocabulary, seed=91, dtype=dtype, device=device) if made.get("bias") else None
    cap = float(made["soft_cap"]) if "soft_cap" in made else None
    weight = (random(vocabulary, d, seed=90) * (6 / d) ** 0.5).to(device, dtype)
    return Head({}, weight, bias, float(made.get("scale", 1.0)), cap)


def exact_head(head: Head) -> Head:
    """The same head in float64, on the CPU."""
    bias = None if head.bias is None else head.bias.double().cpu()
    return Head({}, head.weight.double().cpu(), bias, head.scale, head.soft_cap)


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight.T
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    return z if head.soft_cap is None else head.soft_cap * torch.tanh(z / head.soft_cap)


def naive(student: Tensor, teacher: Tensor, weights: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """The definition, every logit at once, differentiated by autograd."""
    return reference.soft_cross_entropy(plain_logits(student, head), plain_logits(teacher, head), weights, temperature)


def value_and_gradient(loss: Callable[..., Tensor], student: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *rest)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_no_worse(ours: Tensor, plain: Tensor, exact: Tensor, slack: float, what: str) -> None:
    """Element by element, `ours` is no further from `exact` than `plain` is, but for `slack` of its row's largest."""
    ours, plain = ours.double().cpu(), plain.double().cpu()
    allowed = slack * (exact.abs().amax(-1, keepdim=True) if exact.dim() else exact.abs())
    excess = ((ours - exact).abs() - (plain - exact).abs() - allowed).flatten()
    worst = int(excess.nan_to_num(torch.inf).argmax())
    assert excess[worst] <= 0, (  # also where it is nan
        f"{what}, element {worst}: ours {ours.flatten()[worst]:.9g}, plain {plain.flatten()[worst]:.9g}, "
        f"exact {exact.flatten()[worst]:.9g}, {excess[worst]:.3g} too far"
    )


def assert_loss_no_worse(
    loss: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    head: Head,
    temperature: float = 1.0,
) -> None:
    """Value and gradient of a soft cross-entropy against float64 and against the naive form in the same type.

    The slack is some roundings of the type: of slopes and of the gradient, of the logits where they pass through it;
    in float32, of a logit, whose size makes it a relative one of probabilities, and of the sum over the vocabulary,
    whose order is the matrix product's own.
    """
    exactly = (student.double().cpu(), teacher.double().cpu(), weights.double().cpu(), exact_head(head), temperature)
    exact, exact_gradient = value_and_gradient(naive, *exactly)
    plain, plain_gradient = value_and_gradient(naive, student, teacher, weights, head, temperature)
    value, gradient = value_and_gradient(loss, student, teacher, weights, head, temperature)
    assert value.dtype == torch.float32
    assert gradient.dtype == student.dtype
    epsilon = torch.finfo(student.dtype).eps
    if student.dtype == torch.float32:
        largest = max(float(plain_logits(x, exactly[3]).abs().max()) for x in exactly[:2])
        slack = (8 + largest + len(head.weight) ** 0.5 / 16) * epsilon
    else:
        slack = 2 * epsilon
    assert_no_worse(value, plain, exact, slack, "loss")
    assert_no_worse(gradient, plain_gradient, exact_gradient, slack, "gradient")
