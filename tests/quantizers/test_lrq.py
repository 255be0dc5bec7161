"""LRQ against its published formula with gradients derived by hand, in float64 loops."""

import numpy as np
import pytest
import torch
from formulas import COLUMNS, ROWS, STEPS, Adam, divided_rounding, layer

from logitwise.grid import Grid
from logitwise.quantizers import STARTS
from logitwise.quantizers.lrq import LowRank

RATE = 5e-3
LEARNED = ("log_scale", "left", "right", "log_row_divisor", "log_column_divisor")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 4), (4, None)])
def test_thirty_steps_are_those_of_the_formula(bits: int, size: int | None, symmetric: bool) -> None:
    weight, inputs = layer(bits)
    grid = Grid(bits, size, symmetric, torch.float32)
    quantizer = LowRank.start(torch.from_numpy(weight.copy()), grid, STARTS["searched"])
    x = torch.from_numpy(inputs)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=RATE)
    zero = quantizer.zero.numpy().copy()
    now = {name: quantizer.get_parameter(name).detach().numpy().copy() for name in LEARNED}
    assert {name: at.shape for name, at in now.items()} == {
        "log_scale": zero.shape,
        "left": (ROWS, 1),
        "right": (1, COLUMNS),
        "log_row_divisor": (ROWS, 1),
        "log_column_divisor": (1, COLUMNS),
    }
    adams = {name: Adam(at.shape) for name, at in now.items()}
    start_codes = quantizer.freeze().codes
    for step in range(STEPS):
        divisor = now["left"] @ now["right"] + now["log_column_divisor"]
        given = (weight, zero, now["log_scale"], divisor, now["log_row_divisor"], grid.levels)
        what, slope1, slope2 = divided_rounding(*given)
        found = quantizer(step / STEPS)
        np.testing.assert_allclose(found.detach().numpy(), what, rtol=1e-6, atol=1e-6)
        loss = (x @ (found - torch.from_numpy(weight)).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantizer.after_step()
        error = inputs @ (what - weight).T
        upstream = 2 * error.T @ inputs / error.size
        by_divisor = upstream * slope2
        gradients = {
            "log_scale": (upstream * slope1).reshape(ROWS, zero.shape[1], -1).sum(-1),
            "left": by_divisor @ now["right"].T,
            "right": now["left"].T @ by_divisor,
            "log_row_divisor": by_divisor.sum(1, keepdims=True),
            "log_column_divisor": by_divisor.sum(0, keepdims=True),
        }
        for name, adam in adams.items():
            now[name] = now[name] - adam.step(gradients[name], RATE)
            np.testing.assert_allclose(quantizer.get_parameter(name).detach().numpy(), now[name], rtol=0, atol=1e-6)
    assert not torch.equal(quantizer.freeze().codes, start_codes)


@pytest.mark.parametrize(("shape", "rank"), [((4096, 4096), 1024), ((64, 16), 4), ((2, 100), 1)])
def test_the_rank_is_a_quarter_of_the_smaller_side(shape: tuple[int, int], rank: int) -> None:
    scale = torch.ones(shape[0], 1)
    quantizer = LowRank(torch.zeros(shape), scale, 0 * scale, Grid(4, None, False))
    assert quantizer.left.shape == (shape[0], rank)
    assert quantizer.right.shape == (rank, shape[1])
    assert not quantizer.left.any()
    bound = shape[1] ** -0.5
    assert 0.9 * bound < quantizer.right.abs().max() <= bound
