"""Means, spreads and intervals against closed forms."""

import math

import numpy as np
import pytest
import torch

from logitwise.measure.figure import bootstrap_interval, mean_over_units, spread


def test_one_token_a_unit_has_the_textbook_error() -> None:
    values = torch.tensor([1.0, 4.0, 2.0, 7.0, 6.0], dtype=torch.float64)
    found = mean_over_units(values, torch.arange(5))
    assert found.mean == pytest.approx(4.0)
    assert found.error == pytest.approx(float(values.std()) / math.sqrt(5))


def test_units_that_count_differently() -> None:
    """A ratio estimator's mean is over tokens; its error, by hand, from the residuals of two units."""
    found = mean_over_units(torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 2]))
    assert found.mean == pytest.approx(2.0)
    assert found.error == pytest.approx(math.sqrt(2 / 1 * ((3 - 6) ** 2 + (5 - 2) ** 2)) / 4)


def test_spread_is_numpy_s() -> None:
    values = torch.rand(997, generator=torch.Generator().manual_seed(0)).double() ** 3
    found = spread(values)
    array = values.numpy()
    assert found.mean == pytest.approx(array.mean())
    assert [found.median, found.p90, found.p99] == pytest.approx(np.percentile(array, [50, 90, 99]).tolist())


def test_the_bootstrap_agrees_with_the_normal_interval_and_repeats() -> None:
    """For a mean of many differences the percentile bootstrap is mean -+ 1.96 standard errors."""
    differences = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    low, high = bootstrap_interval(differences, seed=5)
    error = float(differences.std(correction=0)) / 20
    assert low == pytest.approx(float(differences.mean()) - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(float(differences.mean()) + 1.96 * error, abs=0.1 * error)
    assert (low, high) == bootstrap_interval(differences, seed=5)
    assert (low, high) != bootstrap_interval(differences, seed=6)


def test_the_bootstrap_of_one_value_is_that_value() -> None:
    assert bootstrap_interval(torch.full((7,), -0.25, dtype=torch.float64)) == (-0.25, -0.25)


def test_the_bootstrap_of_few_binary_differences_is_the_binomial_s() -> None:
    """Of 4 differences of which one is 1, the mean of a resample is Binomial(4, 1/4) / 4: P(0) = .316, P(4) = .004."""
    low, high = bootstrap_interval(torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    assert (low, high) == (0.0, 0.75)
