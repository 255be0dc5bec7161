"""What the float64 loops of the methods' formulas have in common."""

from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import assert_finite_differences
from numpy.typing import NDArray

from logitwise.quantizers import Quantizer

Array = NDArray[np.float64]

ROWS, COLUMNS, TOKENS, STEPS = 3, 12, 20, 30


def layer(seed: int = 0) -> tuple[Array, Array]:
    """A weight and inputs that are not independent of one another across channels."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(COLUMNS, COLUMNS))
    return random.normal(size=(ROWS, COLUMNS)), random.normal(size=(TOKENS, COLUMNS)) @ mixing


class Adam:
    """Kingma and Ba (2015), one parameter."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

    def step(self, gradient: Array, rate: float) -> Array:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return rate * m / (np.sqrt(v) + 1e-8)


def divided_rounding(
    weight: Array, zero: Array, d1: Array, d2: Array, d3: Array, levels: int
) -> tuple[Array, Array, Array]:
    """FlexRound's What, dWhat / d log s1 and dWhat / d log S2 (equally s3), by element; rounding has slope one."""
    size = COLUMNS // d1.shape[1]
    what, slope1, slope2 = np.zeros_like(weight), np.zeros_like(weight), np.zeros_like(weight)
    for i in range(ROWS):
        for j in range(COLUMNS):
            s1 = float(np.float32(np.exp(d1[i, j // size])))
            z = zero[i, j // size]
            u = weight[i, j] / (s1 * np.exp(d2[i, j] + d3[i, 0]))
            n = np.round(u)
            inside = -z <= n <= levels - z
            n = min(max(n, -z), levels - z)
            what[i, j] = s1 * n
            slope1[i, j] = s1 * (n - u * inside)
            slope2[i, j] = -s1 * u * inside
    return what, slope1, slope2


def freeze_rounding(monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str) -> None:
    """From the next forward on, each rounding adds what it added then, whatever is rounded.

    A function that is called more than once in a forward is told apart by the shape of what it rounds.
    """
    original = getattr(module, function)
    added: dict[tuple[int, ...], torch.Tensor] = {}

    def frozen(x: torch.Tensor, *rest: object) -> torch.Tensor:
        key = tuple(x.shape)
        if key not in added:
            added[key] = (original(x, *rest) - x).detach()
        return x + added[key]

    monkeypatch.setattr(module, function, frozen)


def assert_slopes_of_the_frozen_rounding(
    quantizer: Quantizer, name: str, upstream: torch.Tensor, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter's gradient is that of finite differences while what rounding adds stays as it is."""
    (quantizer(0.0) * upstream).sum().backward()
    for function in ("round_through", "store_through"):
        freeze_rounding(monkeypatch, module, function)

    @torch.no_grad()
    def value() -> float:
        return float((quantizer(0.0) * upstream).sum())

    value()
    assert_finite_differences(quantizer.get_parameter(name), value)
