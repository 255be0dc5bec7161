"""Codes that are there already, learned further: against float64 loops of the formula, on any checkpoint's grid."""

import numpy as np
import pytest
import torch
from quantized_files import random_quantized
from torch import Tensor

from logitwise.grid import Grid, Quantized
from logitwise.quantizers import STARTS, Reopened

GRIDS = [
    Grid(2, 8, True),
    Grid(3, None, False),
    Grid(4, 8, False, torch.bfloat16),
    Grid(4, 8, False, torch.float32),
    Grid(4, 8, False, minimum=True),
    Grid(8, 16, False, torch.float32, minimum=True),
]
"""Their scales have both signs."""

over_grids = pytest.mark.parametrize("grid", GRIDS, ids=str)


def opened(grid: Grid, seed: int = 0) -> tuple[Reopened, Quantized, Tensor]:
    """A layer with a group of no scale, and an original that is near its codes here and far there."""
    quantized = random_quantized(6, 16, grid, seed)
    quantized.scale[1, 0] = 0
    generator = torch.Generator().manual_seed(seed)
    away = torch.randn(6, 16, generator=generator) * quantized.scale.float().abs().mean()
    weight = quantized.dequantize() + away
    return Reopened(quantized, weight), quantized, weight


@over_grids
def test_it_begins_as_the_checkpoint_is(grid: Grid) -> None:
    for seed in range(20):
        quantizer, quantized, _ = opened(grid, seed)
        assert torch.equal(quantizer(0.0), quantized.dequantize())
        for made, stored in zip(quantizer.freeze().parts(), quantized.parts(), strict=True):
            assert made.dtype == stored.dtype
            assert torch.equal(made, stored)


@over_grids
def test_what_is_seen_is_what_is_stored(grid: Grid) -> None:
    quantizer, quantized, _ = opened(grid)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        quantizer.after_step()
        made = quantizer.freeze()
        assert torch.equal(quantizer(1.0), made.dequantize())
        assert made.grid == grid
        assert int(made.codes.max()) <= grid.levels
        assert torch.equal(made.zero, quantized.zero)
        assert torch.equal(made.scale.sign(), quantized.scale.sign())
    assert not torch.equal(made.codes, quantized.codes)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.scale_dtype == torch.float32], ids=str)
def test_steps_are_those_of_the_formula(grid: Grid) -> None:
    """Each weight by itself in float64, gradients derived by hand."""
    quantizer, quantized, _ = opened(grid)
    rows, columns = quantized.codes.shape
    size = grid.group_size or columns
    what = quantizer.weight.double().flatten(1).numpy()
    scale, zero = quantized.scale.double().numpy(), quantized.zero.double().numpy()
    minimum = np.zeros_like(scale) if quantized.minimum is None else quantized.minimum.double().numpy()
    factor, divisor, row_divisor = np.zeros_like(scale), np.zeros((rows, columns)), np.zeros((rows, 1))
    target = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.05)
    dtype = grid.scale_dtype
    for _ in range(5):
        by_factor, by_divisor = np.zeros_like(scale), np.zeros((rows, columns))
        expected = np.zeros((rows, columns))
        for i in range(rows):
            for j in range(columns):
                g = j // size
                s = float(torch.tensor(scale[i, g] * np.exp(factor[i, g])).to(dtype))
                m = float(torch.tensor(minimum[i, g] * np.exp(factor[i, g])).to(dtype))
                ratio = what[i, j] / ((s or 1.0) * np.exp(divisor[i, j] + row_divisor[i, 0]))
                low, high = -zero[i, g], grid.levels - zero[i, g]
                integer = min(max(round(ratio), low), high)
                expected[i, j] = s * integer + m
                upstream = 2 * (expected[i, j] - float(target[i, j]))
                inside = low <= round(ratio) <= high
                # d/d log f of s * round(W / (s d)): the integer, less the ratio where it is not clipped.
                by_factor[i, g] += upstream * (s * (integer - (ratio if inside else 0.0)) + m)
                by_divisor[i, j] = upstream * s * (-ratio if inside else 0.0)
        found = quantizer(0.0)
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
        loss = (found - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        np.testing.assert_allclose(quantizer.log_factor.grad.numpy(), by_factor, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(quantizer.log_divisor.grad.numpy(), by_divisor, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(
            quantizer.log_row_divisor.grad.numpy()[:, 0], by_divisor.sum(1), rtol=2e-4, atol=2e-4
        )
        with torch.no_grad():  # small, so that no weight passes a border that the two find on different sides
            for parameter in quantizer.parameters():
                parameter -= 1e-3 * parameter.grad
        factor = quantizer.log_factor.detach().double().numpy()
        divisor = quantizer.log_divisor.detach().double().numpy()
        row_divisor = quantizer.log_row_divisor.detach().double().numpy()


def test_a_weight_stays_with_its_code_and_beyond_the_ends() -> None:
    grid = Grid(2, 4, False, torch.float32)
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    stored = Quantized(codes, torch.tensor([[2.0]]), torch.tensor([[1]], dtype=torch.uint8), grid)
    quantizer = Reopened(stored, torch.tensor([[-9.0, 5.0, 2.3, 40.0]]))
    assert quantizer.weight.flatten().tolist() == pytest.approx([-9.0, 0.998, 2.3, 40.0])


def test_its_usual_start_rounds_to_nearest() -> None:
    weight, grid = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), Grid(4, 8, False)
    at = STARTS["minmax"](weight, grid)
    quantizer = Reopened.start(weight, grid, STARTS["minmax"])
    error = (quantizer(1.0).detach() - weight).abs().view(4, 2, 8) / at.scale.unsqueeze(-1)
    assert float(error.max()) <= 1.0  # half a step, and where z was rounded another half at the ends
