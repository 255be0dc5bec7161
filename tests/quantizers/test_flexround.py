"""FlexRound against its published formula with gradients derived by hand, in float64 loops."""

import numpy as np
import pytest
import torch
from formulas import COLUMNS, ROWS, STEPS, Adam, assert_slopes_of_the_frozen_rounding, divided_rounding, layer

from logitwise.grid import Grid
from logitwise.quantizers import STARTS, flexround
from logitwise.quantizers.flexround import FlexRound


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
        what, slope1, slope2 = divided_rounding(weight, zero, d1, d2, d3, grid.levels)
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
    assert_slopes_of_the_frozen_rounding(quantizer, name, upstream, flexround, monkeypatch)
