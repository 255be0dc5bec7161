"""Every logit-aware objective is its definition in float64, through norm, bias, scale and soft-cap."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from logitwise.head import Head
from logitwise.objectives import OBJECTIVES, Taps

ROWS, TOKENS, WIDTH, VOCABULARY = 2, 5, 6, 37


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def taps(norm: nn.Module, bias: bool, scale: float, soft_cap: float | None) -> Taps:
    generator = torch.Generator().manual_seed(3)
    head = Head(
        {"norm": norm}, random(VOCABULARY, WIDTH, seed=6), random(VOCABULARY, seed=7) if bias else None, scale, soft_cap
    )
    weights = torch.tensor([[1.0, 0.0, 0.5, 1, 1], [0.0, 0.0, 2.0, 1, 0]], dtype=torch.float64)
    following = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    student = random(ROWS, TOKENS, WIDTH, seed=1).requires_grad_()
    return Taps(student, random(ROWS, TOKENS, WIDTH, seed=2), weights, following, head)


Z = Callable[[Tensor, Tensor, Tensor], Tensor]


def soft(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return -(torch.softmax(t, -1) * torch.log_softmax(z, -1)).sum(-1)


def label(z: Tensor, y: Tensor) -> Tensor:
    return -torch.log_softmax(z, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


def topk(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    keep = t >= t.sort(-1, descending=True).values[:, 4:5]
    p = torch.softmax(t, -1) * keep
    return -(p / p.sum(-1, keepdim=True) * torch.log_softmax(z, -1)).sum(-1)


DEFINITIONS: dict[str, tuple[dict[str, float], Z]] = {
    "lfq": ({}, soft),
    "lfq, temperature": ({"temperature": 2.5}, lambda z, t, y: soft(z / 2.5, t / 2.5, y)),
    "logit_mse": ({}, lambda z, t, y: (z - t).square().mean(-1)),
    "hard_labels": ({}, lambda z, t, y: label(z, y)),
    "teacher_argmax": ({}, lambda z, t, y: label(z, t.argmax(-1))),
    "topk": ({"k": 5}, topk),
}
HEADS = {
    "plain": (nn.Identity(), False, 1.0, None),
    "layer norm, bias": (nn.LayerNorm(WIDTH, dtype=torch.float64), True, 1.0, None),
    "soft-cap, scale": (nn.RMSNorm(WIDTH, dtype=torch.float64), False, 0.7, 2.0),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_are_the_definition(name: str, head: str) -> None:
    settings, definition = DEFINITIONS[name]
    given = taps(*HEADS[head])
    found = OBJECTIVES[name.partition(",")[0]](**settings).loss(given)
    (gradient,) = torch.autograd.grad(found, given.student)
    counted, norm = given.weights > 0, given.head.after[0]
    z, t = (given.head.logits(norm(x[counted])) for x in (given.student, given.teacher))
    losses = definition(z, t, given.following[counted])
    expected = (losses * given.weights[counted]).sum() / given.weights.sum()
    (slope,) = torch.autograd.grad(expected, given.student)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(gradient, slope, rtol=1e-9, atol=1e-13)


def test_hard_labels_may_read_the_prompts_too() -> None:
    given = taps(*HEADS["plain"])
    found = OBJECTIVES["hard_labels"](prompts=True).loss(given)
    z = given.head.logits(given.student)
    expected = label(z.flatten(0, 1), given.following.flatten()).mean()
    assert torch.allclose(found, expected)
    assert (torch.autograd.grad(found, given.student)[0].abs().amax(-1) > 0).all()


def test_mixed_is_both() -> None:
    given = taps(*HEADS["plain"])
    lfq, mse = (OBJECTIVES[name]().loss(given) for name in ("lfq", "mse"))
    found = OBJECTIVES["mixed"](share=0.25).loss(given)
    assert torch.allclose(found, 0.25 * lfq + mse)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if objective.reads_head])
def test_every_logit_objective_is_judged_by_the_divergence(name: str) -> None:
    given = taps(*HEADS["plain"])
    assert OBJECTIVES[name].unit == "kl"
    with torch.no_grad():
        assert OBJECTIVES[name]().measure(given) == OBJECTIVES["lfq"]().measure(given)
