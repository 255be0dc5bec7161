"""Flipped tokens by hand."""

import pytest
import torch

from logitwise.measure.divergence import Divergence, compared
from logitwise.measure.flips import flips


def test_flips_and_their_margins() -> None:
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.52, 0.48], [0.3, 0.7]]).double()
    q = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.49, 0.51], [0.2, 0.8]]).double()
    found = flips(Divergence(*compared(p.log(), q.log(), torch.zeros(4, dtype=torch.int64))), torch.arange(4))
    assert found.share.mean == pytest.approx(0.5)
    assert found.decided.mean == pytest.approx(0.25)
    assert found.worst.tolist() == [1, 2]
    assert found.margin is not None
    assert found.margin.mean == pytest.approx((0.6 + 0.04) / 2)
    assert [(part.low, part.figure.mean) for part in found.by_margin] == [
        (0.0, 1.0),
        (0.25, 0.0),
        (0.5, 1.0),
        (0.75, 0.0),
    ]


def test_nothing_flips() -> None:
    p = torch.tensor([[0.9, 0.1]]).double().log()
    found = flips(Divergence(*compared(p, p, torch.zeros(1, dtype=torch.int64))), torch.arange(1))
    assert found.margin is None
    assert found.worst.tolist() == []
