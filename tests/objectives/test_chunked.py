"""Any rule's mean and gradient, in chunks, are what autograd makes of every logit at once."""

import math
from typing import ClassVar

import pytest
import torch
from numerics import HEADS, make_head, plain_logits, random, value_and_gradient
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives import chunked
from logitwise.objectives.chunked import Rule, counted, head_loss

over_heads = pytest.mark.parametrize("kind", HEADS)


class Following(Rule):
    """Cross-entropy of the token that follows."""

    reads_teacher: ClassVar[bool] = False

    def __call__(self, z: Tensor, target: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        assert target.shape == (len(z), 0)
        log_q = z.log_softmax(-1)
        slopes = log_q.exp()
        slopes[torch.arange(len(z)), following] -= 1
        return -log_q.gather(-1, following[:, None]).squeeze(-1), slopes


class Squares(Rule):
    """Sum of squared differences, beside what follows; overwrites both sides."""

    def __call__(self, z: Tensor, target: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        z.sub_(target).mul_(1 + following.unsqueeze(-1))
        target.fill_(torch.nan)
        losses = (z.square() / (2 + 2 * following.unsqueeze(-1))).sum(-1)
        return losses, z


def plain_following(student: Tensor, teacher: Tensor, weights: Tensor, following: Tensor, head: Head) -> Tensor:
    losses = -plain_logits(student, head).log_softmax(-1).gather(-1, following[:, None]).squeeze(-1)
    return (weights * losses).sum() / weights.sum()


def plain_squares(student: Tensor, teacher: Tensor, weights: Tensor, following: Tensor, head: Head) -> Tensor:
    difference = plain_logits(student, head) - plain_logits(teacher, head)
    losses = ((1 + following) * difference.square().sum(-1)) / 2
    return (weights * losses).sum() / weights.sum()


RULES = {"following": (Following(), plain_following), "squares": (Squares(), plain_squares)}
over_rules = pytest.mark.parametrize("rule", RULES)


def setting(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = random(tokens, seed=3).abs()
    weights[1::3] = 0
    following = torch.randint(11, (tokens,), generator=torch.Generator().manual_seed(0))
    return random(tokens, 6, seed=1), random(tokens, 6, seed=2), weights, following


def in_chunks_of(monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int) -> None:
    # Not a multiple of the vocabulary, so that the division is rounded.
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", tokens * vocabulary + vocabulary // 2)


@over_rules
@over_heads
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (1, 100), (7, 2), (8, 3), (12, 8), (12, 1)])
def test_value_and_gradient_are_autograds(
    rule: str, kind: str, tokens: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, (ours, plain) = make_head(kind, 11), RULES[rule]
    in_chunks_of(monkeypatch, size, 11)
    given = setting(tokens)
    value, gradient = value_and_gradient(head_loss, *given, head, ours)
    expected, expected_gradient = value_and_gradient(plain, *given, head)
    assert value.dtype == torch.float64
    assert torch.allclose(value, expected, rtol=1e-12, atol=0)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    assert expected_gradient[0].abs().max() > 0


@over_rules
def test_gradcheck(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(monkeypatch, 2, 11)
    student, teacher, weights, following = setting(5)
    head = make_head("all", 11)
    assert torch.autograd.gradcheck(
        lambda s: -2.5 * head_loss(s, teacher, weights, following, head, RULES[rule][0]), (student.requires_grad_(),)
    )


@over_rules
def test_positions_that_do_not_count_are_not_even_read(rule: str) -> None:
    head, (ours, _) = make_head("all", 11), RULES[rule]
    student, teacher, weights, following = setting(6)
    expected, expected_gradient = value_and_gradient(head_loss, student, teacher, weights, following, head, ours)
    student[1], teacher[4], following[1] = torch.nan, torch.nan, -100
    value, gradient = value_and_gradient(head_loss, student, teacher, weights, following, head, ours)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(gradient[[1, 4]], torch.zeros(2, 6, dtype=torch.float64))


@over_rules
@pytest.mark.parametrize("tokens", [0, 3])
def test_where_nothing_counts_the_loss_is_zero(rule: str, tokens: int) -> None:
    hidden, weights = torch.full((tokens, 6), torch.nan), torch.zeros(tokens)
    given = hidden, hidden, weights, torch.zeros(tokens, dtype=torch.int64)
    head = make_head("all", 11, dtype=torch.float32)
    value, gradient = value_and_gradient(head_loss, *given, head, RULES[rule][0])
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros(tokens, 6))


def test_a_rule_that_needs_no_teacher_costs_no_product_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    head = make_head("plain", 11)
    logits = head.logits
    monkeypatch.setattr(head, "logits", lambda hidden: calls.append(len(hidden)) or logits(hidden))
    student, teacher, weights, following = setting(6)
    head_loss(student, torch.full_like(teacher, torch.nan), weights, following, head, Following())
    assert calls == [4]
    head_loss(student, teacher, weights, following, head, Squares())
    assert calls == [4, 4, 4]


def test_no_chunk_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    head = make_head("plain", 11)
    in_chunks_of(monkeypatch, 5, 11)
    logits = head.logits
    monkeypatch.setattr(head, "logits", lambda hidden: calls.append(len(hidden)) or logits(hidden))
    student, teacher, weights, following = setting(24)
    head_loss(student, teacher, weights, following, head, Squares())
    assert max(calls) == 5
    assert len(calls) == 2 * math.ceil(16 / 5)


def test_counted_positions_and_their_shares() -> None:
    parts = list(counted(torch.tensor([1.0, 0.0, 2.0, -1.0, 1.0]), 2))
    assert [index.tolist() for index, _ in parts] == [[0, 2], [4]]
    assert [shares.tolist() for _, shares in parts] == [[0.25, 0.5], [0.25]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_loss_is_at_least_float32(dtype: torch.dtype) -> None:
    head = make_head("all", 11, dtype=dtype)
    student, teacher, weights, following = setting(6)
    value, gradient = value_and_gradient(
        head_loss, student.to(dtype), teacher.to(dtype), weights.to(dtype), following, head, Following()
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype


def test_small_shares_do_not_vanish_in_float16() -> None:
    """A slope of 1/1000 with a share of 1/10,000 is under float16's smallest number; the gradient is not."""
    head = Head({}, torch.full((1000, 4), 100.0, dtype=torch.float16), None, 1.0, None)
    head.weight[0] = -100
    tokens = 10_000
    hidden = torch.zeros(tokens, 4, dtype=torch.float16)
    following = torch.zeros(tokens, dtype=torch.int64)
    _, gradient = value_and_gradient(head_loss, hidden, hidden, torch.ones(tokens), following, head, Following())
    assert torch.allclose(gradient.float(), torch.full((tokens, 4), 199.8 / tokens), rtol=2e-3)
