"""The logit-aware objective looks through final norm and head, at the positions that count."""

import torch
from torch import Tensor, nn

from logitwise.head import Head
from logitwise.objectives import OBJECTIVES, Taps, reference

LFQ = OBJECTIVES["lfq"]()
FOLLOWING = torch.tensor([[3, 9, 36], [0, 1, 20]])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setting() -> tuple[Tensor, Tensor, Tensor, Head]:
    norm = nn.LayerNorm(6).requires_grad_(False)
    norm.weight.copy_(random(6, seed=5))
    head = Head({"norm": norm}, random(37, 6, seed=6), random(37, seed=7), 1.0, None)
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]])
    return random(2, 3, 6, seed=1), random(2, 3, 6, seed=2), weights, head


def test_loss_is_soft_cross_entropy_after_the_norm_over_counted_positions() -> None:
    student, teacher, weights, head = setting()
    leaf, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = LFQ.loss(Taps(leaf, teacher, weights, FOLLOWING, head))
    loss.backward()
    z_student, z_teacher = (head.logits(head.hidden(x)).view(6, 37) for x in (plain, teacher))
    expected = reference.soft_cross_entropy(z_student, z_teacher, weights.view(6))
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(leaf.grad, plain.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(leaf.grad[weights == 0], torch.zeros(3, 6))
    assert (leaf.grad[weights > 0].abs().amax(-1) > 0).all()


def test_measure_is_the_weighted_divergence() -> None:
    student, teacher, weights, head = setting()
    total, count = LFQ.measure(Taps(student, teacher, weights, FOLLOWING, head))
    z_student, z_teacher = (head.logits(head.hidden(x)).double().view(6, 37) for x in (student, teacher))
    kl = reference.divergence(z_student, z_teacher)
    assert count == 3.5
    assert abs(total - float((kl * weights.view(6)).sum())) <= 1e-5
    assert LFQ.measure(Taps(teacher, teacher, weights, FOLLOWING, head)) == (0.0, 3.5)


def test_a_teacher_with_a_head_of_its_own() -> None:
    """Its norms are read by both; the loss has one projection for both sides, what is measured has each its own."""
    student, teacher, weights, head = setting()
    norm = nn.LayerNorm(6).requires_grad_(False)
    norm.weight.copy_(random(6, seed=8))
    own = Head({"norm": norm}, random(37, 6, seed=9), random(37, seed=7), 1.0, None)
    taps = Taps(student, teacher, weights, FOLLOWING, head, own)
    z, t, shared = (
        one.logits(norms.hidden(x)).double().view(6, 37)
        for one, norms, x in ((head, head, student), (own, own, teacher), (head, own, teacher))
    )
    assert abs(LFQ.loss(taps) - reference.soft_cross_entropy(z, shared, weights.view(6).double())) <= 1e-5
    total, _ = LFQ.measure(taps)
    assert abs(total - float((reference.divergence(z, t) * weights.view(6)).sum())) <= 1e-5


def test_held_out_rows_where_nothing_counts_add_nothing() -> None:
    student, teacher, weights, head = setting()
    assert LFQ.measure(Taps(student, teacher, torch.zeros_like(weights), FOLLOWING, head)) == (0.0, 0.0)


def test_only_the_student_gets_a_gradient() -> None:
    student, teacher, weights, head = setting()
    student.requires_grad_()
    teacher.requires_grad_()
    head.requires_grad_()
    head.weight.requires_grad_()
    LFQ.loss(Taps(student, teacher, weights, FOLLOWING, head)).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert head.weight.grad is None


def test_what_it_says_of_itself() -> None:
    assert LFQ.reads_head
    assert LFQ.unit == "kl"
