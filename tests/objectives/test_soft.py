"""The chunked soft cross-entropy against two lines of float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from logitwise.objectives import reference, soft
from logitwise.objectives.soft import chunks, compare, soft_cross_entropy
from logitwise.skeleton import Head

HEADS: dict[str, dict[str, float | bool]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "soft-cap": {"soft_cap": 3.0},
    "all": {"bias": True, "scale": 1.7, "soft_cap": 5.0},
}
over_heads = pytest.mark.parametrize("kind", HEADS)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(kind: str, vocabulary: int = 37, d: int = 6, dtype: torch.dtype = torch.float64) -> Head:
    made = HEADS[kind]
    bias = random(vocabulary, seed=91, dtype=dtype) if made.get("bias") else None
    cap = float(made["soft_cap"]) if "soft_cap" in made else None
    return Head({}, random(vocabulary, d, seed=90, dtype=dtype), bias, float(made.get("scale", 1.0)), cap)


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    z = hidden @ head.weight.T
    if head.bias is not None:
        z = z + head.bias
    z = z * head.scale
    return z if head.soft_cap is None else head.soft_cap * torch.tanh(z / head.soft_cap)


def naive(student: Tensor, teacher: Tensor, weights: Tensor, head: Head) -> Tensor:
    """The definition, every logit at once, differentiated by autograd."""
    losses = -(torch.softmax(plain_logits(teacher, head), -1) * plain_logits(student, head).log_softmax(-1)).sum(-1)
    return (weights * losses).sum() / weights.sum()


def value_and_gradient(loss: Callable[..., Tensor], student: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *rest)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def in_chunks_of(monkeypatch: pytest.MonkeyPatch, tokens: int, head: Head) -> None:
    # Not a multiple of the vocabulary, so that the division is rounded.
    monkeypatch.setattr(soft, "CHUNK_ELEMENTS", tokens * head.weight.shape[0] + 11)


@over_heads
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_value_and_gradient_are_the_definitions(
    kind: str, tokens: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(kind)
    in_chunks_of(monkeypatch, size, head)
    assert len(list(chunks(tokens, 37))) == math.ceil(tokens / size)
    student, teacher = random(tokens, 6, seed=1), random(tokens, 6, seed=2)
    weights = random(tokens, seed=3).abs()
    weights[1::3] = 0
    value, gradient = value_and_gradient(soft_cross_entropy, student, teacher, weights, head)
    expected, expected_gradient = value_and_gradient(naive, student, teacher, weights, head)
    assert torch.allclose(value, expected, rtol=1e-12, atol=0)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    assert torch.equal(gradient[1::3], torch.zeros_like(gradient[1::3]))
    assert expected_gradient[0].abs().min() > 0


@over_heads
def test_gradcheck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(kind, vocabulary=11, d=3)
    in_chunks_of(monkeypatch, 2, head)
    student, teacher = random(5, 3, seed=1).requires_grad_(), random(5, 3, seed=2)
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: 3 * soft_cross_entropy(s, teacher, weights, head), (student,))


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 1009])
def test_any_vocabulary(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head("bias", vocabulary)
    in_chunks_of(monkeypatch, 3, head)
    student, teacher, weights = random(7, 6, seed=1), random(7, 6, seed=2), torch.ones(7, dtype=torch.float64)
    value, gradient = value_and_gradient(soft_cross_entropy, student, teacher, weights, head)
    expected, expected_gradient = value_and_gradient(naive, student, teacher, weights, head)
    assert torch.allclose(value, expected, rtol=1e-12, atol=1e-15)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@over_heads
def test_float32_is_as_exact_as_the_plain_form_in_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Element by element: no further from float64 than the plain form, give or take the rounding of one product."""
    exact_head, head = make_head(kind, 301, 24), make_head(kind, 301, 24, torch.float32)
    exact_head.weight = head.weight.double()
    exact_head.bias = None if head.bias is None else head.bias.double()
    in_chunks_of(monkeypatch, 5, head)
    student, teacher = random(23, 24, seed=1, dtype=torch.float32), random(23, 24, seed=2, dtype=torch.float32)
    weights = random(23, seed=3, dtype=torch.float32).abs()
    exact, exact_gradient = value_and_gradient(naive, student.double(), teacher.double(), weights.double(), exact_head)
    plain, plain_gradient = value_and_gradient(naive, student, teacher, weights, head)
    value, gradient = value_and_gradient(soft_cross_entropy, student, teacher, weights, head)
    epsilon = torch.finfo(torch.float32).eps
    assert abs(value - exact) <= abs(plain - exact) + 4 * epsilon * abs(exact)
    # One row's gradient is a sum over the vocabulary; its rounding is bounded by the sum of magnitudes.
    slack = 8 * epsilon * exact_gradient.abs().amax(-1, keepdim=True)
    assert ((gradient - exact_gradient).abs() <= (plain_gradient - exact_gradient).abs() + slack).all()


def test_logits_of_eighty_neither_overflow_nor_vanish() -> None:
    head = Head({}, torch.eye(4), None, 1.0, None)
    student = torch.tensor([[80.0, -80.0, 0.0, 79.0], [-80.0, -80.0, -80.0, -80.0], [-80.0, 80.0, 80.0, -80.0]])
    teacher = torch.tensor([[-80.0, 80.0, 0.0, 0.0], [80.0, -80.0, -80.0, -80.0], [-80.0, 80.0, 80.0, -80.0]])
    weights = torch.ones(3)
    value, gradient = value_and_gradient(soft_cross_entropy, student, teacher, weights, head)
    exact_head = Head({}, torch.eye(4, dtype=torch.float64), None, 1.0, None)
    expected, expected_gradient = value_and_gradient(
        naive, student.double(), teacher.double(), weights.double(), exact_head
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert value > 50  # the first position is 160 nats off
    assert torch.allclose(gradient.double(), expected_gradient, rtol=1e-6, atol=1e-7)


@over_heads
def test_cross_entropy_is_divergence_and_the_teachers_entropy(kind: str) -> None:
    head = make_head(kind)
    student, teacher, weights = random(9, 6, seed=1), random(9, 6, seed=2), random(9, seed=3).abs()
    p = torch.softmax(plain_logits(teacher, head), -1)
    entropy = -(p * p.log()).sum(-1)
    kl = compare(student, head, teacher, head, torch.zeros(9, dtype=torch.int64)).kl
    expected = (weights * (kl + entropy)).sum() / weights.sum()
    assert soft_cross_entropy(student, teacher, weights, head).item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_gradient_vanishes_where_the_student_is_the_teacher() -> None:
    head, hidden = make_head("all"), random(5, 6, seed=1)
    _, gradient = value_and_gradient(
        soft_cross_entropy, hidden, hidden.clone(), torch.ones(5, dtype=torch.float64), head
    )
    assert gradient.abs().max() < 1e-15


def test_only_the_student_gets_a_gradient() -> None:
    head = make_head("bias")
    assert head.bias is not None
    student, teacher = random(4, 6, seed=1).requires_grad_(), random(4, 6, seed=2).requires_grad_()
    head.weight.requires_grad_()
    head.bias.requires_grad_()
    soft_cross_entropy(student, teacher, torch.ones(4, dtype=torch.float64), head).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert head.weight.grad is None
    assert head.bias.grad is None


def test_the_gradient_scales_with_what_follows() -> None:
    head, student, teacher = make_head("plain"), random(4, 6, seed=1), random(4, 6, seed=2)
    weights = torch.ones(4, dtype=torch.float64)
    _, once = value_and_gradient(soft_cross_entropy, student, teacher, weights, head)
    _, scaled = value_and_gradient(lambda *given: -2.5 * soft_cross_entropy(*given), student, teacher, weights, head)
    assert torch.allclose(scaled, -2.5 * once, rtol=1e-14, atol=0)


def test_positions_that_do_not_count_are_not_even_read() -> None:
    head, student, teacher = make_head("plain"), random(6, 6, seed=1), random(6, 6, seed=2)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    expected, expected_gradient = value_and_gradient(soft_cross_entropy, student, teacher, weights, head)
    student[1], teacher[4] = torch.nan, torch.nan
    value, gradient = value_and_gradient(soft_cross_entropy, student, teacher, weights, head)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)


def test_a_batch_where_nothing_counts_costs_nothing() -> None:
    head, student = make_head("plain"), random(3, 6, seed=1)
    value, gradient = value_and_gradient(
        soft_cross_entropy, student, random(3, 6, seed=2), torch.zeros(3, dtype=torch.float64), head
    )
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros(3, 6, dtype=torch.float64))


def test_sixteen_bits_are_compared_in_float32() -> None:
    head = make_head("bias", 301, 24, torch.bfloat16)
    exact = make_head("bias", 301, 24)
    assert head.bias is not None
    exact.weight, exact.bias = head.weight.double(), head.bias.double()
    student, teacher = random(9, 24, seed=1, dtype=torch.bfloat16), random(9, 24, seed=2, dtype=torch.bfloat16)
    value, gradient = value_and_gradient(soft_cross_entropy, student, teacher, torch.ones(9), head)
    expected, expected_gradient = value_and_gradient(
        naive, student.double(), teacher.double(), torch.ones(9, dtype=torch.float64), exact
    )
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert value.item() == pytest.approx(expected.item(), rel=1e-2)
    assert (gradient - expected_gradient).abs().max() <= 0.05 * expected_gradient.abs().max()


@over_heads
def test_compare_is_the_plain_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher_head, student_head = make_head(kind), make_head(kind)
    student_head.weight = student_head.weight + 0.1 * random(37, 6, seed=5)  # each side through its own head
    in_chunks_of(monkeypatch, 4, teacher_head)
    student, teacher = random(11, 6, seed=1), random(11, 6, seed=2)
    following = torch.randint(37, (11,), generator=torch.Generator().manual_seed(0))
    found = compare(student, student_head, teacher, teacher_head, following)
    z_student, z_teacher = plain_logits(student, student_head), plain_logits(teacher, teacher_head)
    assert torch.allclose(found.kl, reference.divergence(z_student, z_teacher), rtol=1e-10, atol=1e-13)
    assert torch.equal(found.agrees, (z_student.argmax(-1) == z_teacher.argmax(-1)).double())
    for nll, z in ((found.student_nll, z_student), (found.teacher_nll, z_teacher)):
        assert torch.allclose(nll, -z.log_softmax(-1).gather(-1, following[:, None])[:, 0], rtol=1e-12, atol=0)
    assert found.kl.min() >= 0


def test_compare_of_a_model_with_itself_finds_nothing() -> None:
    head, hidden = make_head("all"), random(11, 6, seed=1)
    found = compare(hidden, head, hidden, head, torch.zeros(11, dtype=torch.int64))
    assert torch.equal(found.kl, torch.zeros(11, dtype=torch.float64))
    assert torch.equal(found.agrees, torch.ones(11, dtype=torch.float64))
    assert torch.equal(found.student_nll, found.teacher_nll)


def test_compare_of_no_position_at_all_is_empty() -> None:
    head = make_head("plain")
    found = compare(torch.zeros(0, 6).double(), head, torch.zeros(0, 6).double(), head, torch.zeros(0).long())
    assert found.kl.shape == found.agrees.shape == found.student_nll.shape == found.teacher_nll.shape == (0,)
