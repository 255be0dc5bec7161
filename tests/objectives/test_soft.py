"""The soft cross-entropy against two lines of float64."""

import pytest
import torch
from numerics import HEADS, assert_loss_no_worse, make_head, naive, plain_logits, random, value_and_gradient
from torch import Tensor

from logitwise.head import Head
from logitwise.objectives import chunked, reference
from logitwise.objectives.soft import chunks, compare, soft_cross_entropy

over_heads = pytest.mark.parametrize("kind", HEADS)
over_temperatures = pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def cross_entropy(student: Tensor, teacher: Tensor, weights: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    return soft_cross_entropy(student, teacher, weights, head, temperature).cross_entropy


def in_chunks_of(monkeypatch: pytest.MonkeyPatch, tokens: int, head: Head) -> None:
    # Not a multiple of the vocabulary, so that the division is rounded.
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", tokens * head.weight.shape[0] + head.weight.shape[0] // 2)


@over_heads
@over_temperatures
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (1, 100), (7, 1), (8, 4), (9, 4), (9, 100)])
def test_value_and_gradient_are_the_definitions(
    kind: str, temperature: float, tokens: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(kind)
    in_chunks_of(monkeypatch, size, head)
    student, teacher = random(tokens, 6, seed=1), random(tokens, 6, seed=2)
    weights = random(tokens, seed=3).abs()
    weights[1::3] = 0
    value, gradient = value_and_gradient(cross_entropy, student, teacher, weights, head, temperature)
    expected, expected_gradient = value_and_gradient(naive, student, teacher, weights, head, temperature)
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
    assert torch.autograd.gradcheck(lambda s: 3 * cross_entropy(s, teacher, weights, head, 1.5), (student,))


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 1009])
def test_any_vocabulary(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head("bias", vocabulary)
    in_chunks_of(monkeypatch, 3, head)
    student, teacher, weights = random(7, 6, seed=1), random(7, 6, seed=2), torch.ones(7, dtype=torch.float64)
    value, gradient = value_and_gradient(cross_entropy, student, teacher, weights, head)
    expected, expected_gradient = value_and_gradient(naive, student, teacher, weights, head)
    assert torch.allclose(value, expected, rtol=1e-12, atol=1e-15)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@over_heads
@over_temperatures
@pytest.mark.parametrize("dtype", TYPES)
def test_as_exact_as_the_plain_form_in_the_same_type(
    kind: str, temperature: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make_head(kind, 301, 24, dtype)
    in_chunks_of(monkeypatch, 5, head)
    student, teacher = random(23, 24, seed=1, dtype=dtype), random(23, 24, seed=2, dtype=dtype)
    weights = random(23, seed=3, dtype=torch.float32).abs()
    assert_loss_no_worse(cross_entropy, student, teacher, weights, head, temperature)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("tokens", "d", "vocabulary"), [(1, 576, 4999), (2, 16, 151_936)])
def test_as_exact_at_sizes_of_real_heads(tokens: int, d: int, vocabulary: int, dtype: torch.dtype) -> None:
    head = make_head("bias", vocabulary, d, dtype)
    student, teacher = random(tokens, d, seed=1, dtype=dtype), random(tokens, d, seed=2, dtype=dtype)
    assert_loss_no_worse(cross_entropy, student, teacher, torch.ones(tokens), head)


@over_temperatures
def test_logits_of_eighty_neither_overflow_nor_vanish(temperature: float) -> None:
    head = Head({}, torch.eye(4), None, 1.0, None)
    student = torch.tensor([[80.0, -80.0, 0.0, 79.0], [-80.0, -80.0, -80.0, -80.0], [-80.0, 80.0, 80.0, -80.0]])
    teacher = torch.tensor([[-80.0, 80.0, 0.0, 0.0], [80.0, -80.0, -80.0, -80.0], [-80.0, 80.0, 80.0, -80.0]])
    assert_loss_no_worse(cross_entropy, student, teacher, torch.ones(3), head, temperature)
    # The first position is 160 / temperature nats off.
    assert cross_entropy(student, teacher, torch.ones(3), head, temperature) > 50 / temperature


@over_heads
@over_temperatures
def test_cross_entropy_less_entropy_is_divergence(kind: str, temperature: float) -> None:
    head = make_head(kind)
    student, teacher, weights = random(9, 6, seed=1), random(9, 6, seed=2), random(9, seed=3).abs()
    weights[4] = 0
    found = soft_cross_entropy(student.requires_grad_(), teacher, weights, head, temperature)
    z_student, z_teacher = (plain_logits(x.detach(), head) / temperature for x in (student, teacher))
    p = torch.softmax(z_teacher, -1)
    entropy = (weights * -(p * p.log()).sum(-1)).sum() / weights.sum()
    kl = (weights * reference.divergence(z_student, z_teacher)).sum() / weights.sum()
    assert found.entropy.item() == pytest.approx(entropy.item(), rel=1e-12)
    assert (found.cross_entropy - found.entropy).item() == pytest.approx(kl.item(), rel=1e-12)
    assert not found.entropy.requires_grad


def test_the_gradient_vanishes_where_the_student_is_the_teacher() -> None:
    head, hidden = make_head("all"), random(5, 6, seed=1)
    _, gradient = value_and_gradient(cross_entropy, hidden, hidden.clone(), torch.ones(5, dtype=torch.float64), head)
    assert gradient.abs().max() < 1e-15


def test_only_the_student_gets_a_gradient() -> None:
    head = make_head("bias")
    assert head.bias is not None
    student, teacher = random(4, 6, seed=1).requires_grad_(), random(4, 6, seed=2).requires_grad_()
    head.weight.requires_grad_()
    head.bias.requires_grad_()
    cross_entropy(student, teacher, torch.ones(4, dtype=torch.float64), head).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert head.weight.grad is None
    assert head.bias.grad is None


def test_the_gradient_scales_with_what_follows() -> None:
    head, student, teacher = make_head("plain"), random(4, 6, seed=1), random(4, 6, seed=2)
    weights = torch.ones(4, dtype=torch.float64)
    _, once = value_and_gradient(cross_entropy, student, teacher, weights, head)
    _, scaled = value_and_gradient(lambda *given: -2.5 * cross_entropy(*given), student, teacher, weights, head)
    assert torch.allclose(scaled, -2.5 * once, rtol=1e-14, atol=0)


def test_positions_that_do_not_count_are_not_even_read() -> None:
    head, student, teacher = make_head("plain"), random(6, 6, seed=1), random(6, 6, seed=2)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    expected = soft_cross_entropy(student, teacher, weights, head)
    student[1], teacher[4] = torch.nan, torch.nan
    assert soft_cross_entropy(student, teacher, weights, head) == expected


def test_a_batch_where_nothing_counts_costs_nothing() -> None:
    head, student = make_head("plain"), random(3, 6, seed=1)
    given = student, random(3, 6, seed=2), torch.zeros(3, dtype=torch.float64), head
    value, gradient = value_and_gradient(cross_entropy, *given)
    assert value.item() == 0
    assert soft_cross_entropy(*given).entropy.item() == 0
    assert torch.equal(gradient, torch.zeros(3, 6, dtype=torch.float64))


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


def test_chunks_cover_every_position_once() -> None:
    assert list(chunks(0, 37)) == [slice(0, 0)]
    vocabulary = chunked.CHUNK_ELEMENTS // 4
    assert list(chunks(9, vocabulary)) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert len(list(chunks(3, 2 * chunked.CHUNK_ELEMENTS))) == 3
