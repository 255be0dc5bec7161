"""Mean squared error over every position, counted or not."""

import pytest
import torch

from logitwise.objectives import OBJECTIVES, Taps

MSE = OBJECTIVES["mse"]()
NONE = torch.zeros(1, 1, dtype=torch.int64)


def test_loss_and_measure_are_the_plain_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 5, generator=generator).requires_grad_()
    teacher = torch.randn(2, 3, 5, generator=generator).requires_grad_()
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]])
    differences = (student.double() - teacher.double()).detach()
    total = sum(float(x) ** 2 for x in differences.flatten())
    loss = MSE.loss(Taps(student, teacher.detach(), weights, NONE.expand(2, 3), None))
    assert loss.item() == pytest.approx(total / 30, rel=1e-6)
    found, count = MSE.measure(Taps(student.detach(), teacher.detach(), weights, NONE.expand(2, 3), None))
    assert found == pytest.approx(total, rel=1e-6)
    assert count == 30
    loss.backward()
    assert torch.allclose(student.grad, (2 * differences / 30).float(), rtol=1e-5)


def test_sixteen_bits_are_subtracted_in_float32() -> None:
    student, teacher = torch.full((1, 1, 4), 256.0).bfloat16(), torch.full((1, 1, 4), 0.5).bfloat16()
    assert MSE.loss(Taps(student, teacher, torch.ones(1, 1), NONE, None)).item() == 255.5**2


def test_what_it_says_of_itself() -> None:
    assert not MSE.reads_head
    assert MSE.unit == "mse"
