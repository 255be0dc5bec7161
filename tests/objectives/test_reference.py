"""The plainest forms against sums written out by hand."""

import math

import pytest
import torch

from logitwise.objectives import reference


def probabilities(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


STUDENT = [[0.1, -1.0, 2.0], [3.0, 0.0, -0.5]]
TEACHER = [[1.0, 0.5, -2.0], [2.5, 1.0, 0.5]]
WEIGHTS = [0.25, 1.5]


def test_soft_cross_entropy_is_the_double_sum() -> None:
    total = 0.0
    for student, teacher, weight in zip(STUDENT, TEACHER, WEIGHTS, strict=True):
        pairs = zip(probabilities(teacher), probabilities(student), strict=True)
        total -= weight * math.fsum(p * math.log(q) for p, q in pairs)
    student, teacher, weights = (torch.tensor(x, dtype=torch.float64) for x in (STUDENT, TEACHER, WEIGHTS))
    assert float(reference.soft_cross_entropy(student, teacher, weights)) == pytest.approx(total / 1.75, rel=1e-13)


def test_divergence_is_the_sum_and_runs_from_teacher_to_student() -> None:
    expected = [
        math.fsum(p * math.log(p / q) for p, q in zip(probabilities(teacher), probabilities(student), strict=True))
        for student, teacher in zip(STUDENT, TEACHER, strict=True)
    ]
    student, teacher = (torch.tensor(x, dtype=torch.float64) for x in (STUDENT, TEACHER))
    assert reference.divergence(student, teacher).tolist() == pytest.approx(expected, rel=1e-13)
    assert reference.divergence(teacher, student).tolist() != pytest.approx(expected, rel=1e-3)
