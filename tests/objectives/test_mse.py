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


def test_the_largest_errors_may_be_left_out_of_what_is_learned() -> None:
    student = torch.arange(40.0).view(1, 4, 10)[:, :, torch.randperm(10)].requires_grad_()
    taps = Taps(student, torch.zeros_like(student), torch.ones(1, 4), NONE.expand(1, 4), None)
    loss = OBJECTIVES["mse"](left_out=0.1).loss(taps)
    assert loss.item() == pytest.approx(sum(x**2 for x in range(36)) / 36)
    loss.backward()
    assert torch.allclose(student.grad, torch.where(student < 36, 2 * student / 36, 0))
    with torch.no_grad():
        assert OBJECTIVES["mse"](left_out=0.1).measure(taps) == MSE.measure(taps)
        assert OBJECTIVES["mse"](left_out=0.01).loss(taps) == MSE.loss(taps)  # of 40 not one
    equal = Taps(torch.ones(1, 4, 10), torch.zeros(1, 4, 10), torch.ones(1, 4), NONE.expand(1, 4), None)
    assert OBJECTIVES["mse"](left_out=0.1).loss(equal) == 0


def test_what_it_says_of_itself() -> None:
    assert not MSE.reads_head
    assert MSE.unit == "mse"
