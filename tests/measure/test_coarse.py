"""KL between coarser distributions: by hand, a bound, and exact where every token is named."""

import math

import pytest
import torch

from logitwise.measure.coarse import coarsely_compared
from logitwise.measure.divergence import compared


def distributions(seed: int, tokens: int = 50, vocabulary: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, vocabulary, generator=draws)
    other = logits + torch.randn(tokens, vocabulary, generator=draws)
    return logits.log_softmax(-1), other.log_softmax(-1)


def named(log_q: torch.Tensor, written: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens and the written one, as a server would name them."""
    values, ids = log_q.topk(count, -1)
    missing = ~(ids == written.unsqueeze(-1)).any(-1, keepdim=True)
    own = torch.where(missing, written.unsqueeze(-1), -1)
    value = torch.where(missing, log_q.gather(-1, written.unsqueeze(-1)), 0.0)
    return torch.cat([ids, own], -1), torch.cat([values, value], -1).double()


def test_by_hand() -> None:
    """p = (.5, .3, .1, .1), q = (.6, .1, .2, .1); named are 0 and, written, 1: the rest is .2 beside .3."""
    log_p = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    ids, log_q = torch.tensor([[0, 1, -1]]), torch.tensor([[0.6, 0.1, 1.0]], dtype=torch.float64).log()
    kl, reverse, _, margin, _, token, _, confidence, backing, p_written, q_written = (
        float(column) for column in coarsely_compared(log_p, ids, log_q, torch.tensor([1]))
    )
    assert kl == pytest.approx(0.5 * math.log(5 / 6) + 0.3 * math.log(3) + 0.2 * math.log(2 / 3), abs=1e-6)
    assert reverse == pytest.approx(0.6 * math.log(6 / 5) + 0.1 * math.log(1 / 3) + 0.3 * math.log(1.5), abs=1e-6)
    assert [margin, token, confidence, backing] == pytest.approx([0.2, 0, 0.6, 0.5])
    assert [p_written, q_written] == pytest.approx([0.3, 0.1])


@pytest.mark.parametrize("count", [1, 3, 10, 39, 40])
def test_never_above_the_whole_and_the_same_where_all_is_named(count: int) -> None:
    log_p, log_q = distributions(count)
    written = torch.arange(len(log_p)) % log_p.shape[1]
    whole = compared(log_p, log_q, written)
    coarse = coarsely_compared(log_p, *named(log_q, written, count), written)
    for index, (one, other) in enumerate(zip(coarse, whole, strict=True)):
        if index < 2:
            assert (one <= other + 1e-5).all()
            assert count < 39 or torch.allclose(one.float(), other, atol=1e-5)
        else:
            assert torch.allclose(one.double(), other.double(), atol=1e-6), index


def test_more_named_tokens_are_a_tighter_bound() -> None:
    log_p, log_q = distributions(0)
    written = log_p.argmax(-1)
    bounds = [float(coarsely_compared(log_p, *named(log_q, written, k), written)[0].mean()) for k in (1, 5, 20, 40)]
    assert bounds == sorted(bounds)


def test_no_probability_is_left_over() -> None:
    """Sums a little above 1, as rounding makes them, neither divide by 0 nor make KL infinite."""
    log_p, ids = torch.tensor([[0.0, -40.0, -40.0]]), torch.tensor([[0, 1]])
    log_q = torch.tensor([[1e-7, -9999.0]], dtype=torch.float64)
    kl, reverse, *_ = coarsely_compared(log_p, ids, log_q, torch.tensor([0]))
    assert kl.abs() < 1e-5
    assert reverse.abs() < 1e-5
