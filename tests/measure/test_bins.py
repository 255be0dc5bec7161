"""Bins by position and confidence, and growth along answers, by hand."""

import pytest
import torch

from logitwise.measure.bins import growth, in_bins, position_edges


def test_a_bin_holds_its_lower_end_and_the_last_both() -> None:
    keys = torch.tensor([0.0, 0.5, 0.9, 1.0, 1.0])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 8.0])
    found = in_bins(values, torch.arange(5), keys, (0.0, 0.5, 0.9, 1.0))
    assert [(part.low, part.tokens, part.figure.mean) for part in found] == [(0.0, 1, 1), (0.5, 1, 2), (0.9, 3, 5)]


def test_an_empty_bin_is_left_out() -> None:
    found = in_bins(torch.ones(2), torch.arange(2), torch.tensor([0.1, 0.95]), (0.0, 0.5, 0.9, 1.0))
    assert [part.low for part in found] == [0.0, 0.9]


def test_positions_reach_to_the_second_longest_answer() -> None:
    assert position_edges([3, 90, 24], bins=12) == list(range(0, 26, 2))
    assert position_edges([5]) == [0, 1, 2, 3, 4, 5]


def test_growth_is_the_difference_of_halves_answer_by_answer() -> None:
    values = torch.tensor([1.0, 1.0, 3.0, 3.0, 10.0, 5.0, 13.0, 99.0])
    unit = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3])  # two halves of 2; one token; halves of 1; one token
    position = torch.tensor([0, 1, 2, 3, 0, 0, 1, 0])
    first, second, more = growth(values, unit, position)
    assert first.mean == pytest.approx((1 + 1 + 5) / 3)
    assert second.mean == pytest.approx((3 + 3 + 13) / 3)
    assert more.mean == pytest.approx((2 + 8) / 2)
    assert more.error == pytest.approx(3.0)  # of the two differences 2 and 8
