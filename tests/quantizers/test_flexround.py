"""FlexRound against its published formula with gradients derived by hand, in float64 loops."""

import numpy as np
import pytest
import torch
from helpers import assert_finite_differences
from numpy.typing import NDArray

from logitwise.grid import Grid
from logitwise.quantizers import STARTS, flexround
from logitwise.quantizers.flexround import FlexRound

Array = NDArray[np.float64]

ROWS, COLUMNS, TOKENS, STEPS = 3, 12, 20, 30


def layer(seed: int = 0) -> tuple[Array, Array]:
    """A weight and inputs that are not independent of one another across channels."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(COLUMNS, COLUMNS))
    return random.normal(size=(ROWS, COLUMNS)), random.normal(size=(TOKENS, COLUMNS)) @ mixing


def weight_and_slopes(
    weight: Array, zero: Array, d1: Array, d2: Array, d3: Array, levels: int
) -> tuple[Array, Array, Array]:
    """What, dWhat / d log s1 and dWhat / d log S2 (equally s3), element by element; rounding has slope one."""
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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 4), (4, None)])
def test_thirty_steps_are_those_of_the_formula(bits: int, size: int | None, symmetric: bool) -> None:
    weight, inputs = layer(bits)
    grid = Grid(bits, size, symmetric, torch.float32)
    quantizer = FlexRound.start(torch.from_numpy(weight.copy()), grid, STARTS["searched"])
    x = torch.from_numpy(inputs)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=5e-3)
    zero = quantizer.zero.numpy().copy()
    d1, d2, d3 = quantizer.log_scale.detach().numpy().copy(), np.zeros((ROWS, COLUMNS)), np.zeros((ROWS, 1))
    adams = [Adam(d.shape) for d in (d1, d2, d3)]
    start_codes = quantizer.freeze().codes
    for step in range(STEPS):
        what, slope1, slope2 = weight_and_slopes(weight, zero, d1, d2, d3, grid.levels)
        found = quantizer(step / STEPS)
        np.testing.assert_allclose(found.detach().numpy(), what, rtol=1e-6, atol=1e-6)
        loss = (x @ (found - torch.from_numpy(weight)).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantizer.after_step()
        error = inputs @ (what - weight).T
        upstream = 2 * error.T @ inputs / error.size
        by_scale, by_divisor = upstream * slope1, upstream * slope2
        gradients = (
            by_scale.reshape(ROWS, d1.shape[1], -1).sum(-1),
            by_divisor,
            by_divisor.sum(1, keepdims=True),
        )
        d1, d2, d3 = (d - adam.step(g, 5e-3) for d, adam, g in zip((d1, d2, d3), adams, gradients, strict=True))
        np.testing.assert_allclose(quantizer.log_scale.detach().numpy(), d1, rtol=0, atol=1e-6)
        np.testing.assert_allclose(quantizer.log_divisor.detach().numpy(), d2, rtol=0, atol=1e-6)
        np.testing.assert_allclose(quantizer.log_row_divisor.detach().numpy(), d3, rtol=0, atol=1e-6)
    assert not torch.equal(quantizer.freeze().codes, start_codes)


@pytest.mark.parametrize("name", ["log_scale", "log_divisor", "log_row_divisor"])
def test_gradients_are_finite_differences_of_the_frozen_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Codes away from both ends by more than a difference reaches, some of them clipped.
    generator = torch.Generator().manual_seed(0)
    fraction = 0.8 * torch.rand(4, 6, generator=generator, dtype=torch.float64) - 0.4
    integers = torch.randint(-3, 3, (4, 6), generator=generator).double()
    integers[0, 0], integers[1, 3], integers[2, 2] = 9, -9, 20
    scale = torch.tensor([[0.1, 0.2]], dtype=torch.float64).repeat(4, 1)
    weight = (integers + fraction) * scale.repeat_interleave(3, 1)
    zero = torch.full((4, 2), 4.0, dtype=torch.float64)
    quantizer = FlexRound(weight, scale, zero, Grid(3, 3, False, torch.float32))
    upstream = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    (quantizer(0.0) * upstream).sum().backward()
    for function in ("round_through", "store_through"):
        freeze_rounding(monkeypatch, function)

    @torch.no_grad()
    def value() -> float:
        return float((quantizer(0.0) * upstream).sum())

    value()
    parameter = quantizer.get_parameter(name)
    assert_finite_differences(parameter, value)


def freeze_rounding(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """From the next forward on, rounding adds what it added then, whatever is rounded."""
    original = getattr(flexround, function)
    added: list[torch.Tensor] = []

    def frozen(x: torch.Tensor, *rest: object) -> torch.Tensor:
        if not added:
            added.append((original(x, *rest) - x).detach())
        return x + added[0]

    monkeypatch.setattr(flexround, function, frozen)
