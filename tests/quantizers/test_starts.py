"""The range search against a float64 loop."""

import pytest
import torch
from torch import Tensor

from logitwise.errors import RecipeError
from logitwise.grid import Grid, codes_of, freeze, scale_of_range
from logitwise.quantizers.starts import ERROR_EXPONENT, FACTORS, STARTS, group_range, minmax, of_grid, range_factor

GRIDS = [
    Grid(bits, size, symmetric, dtype)
    for bits, dtype in ((2, torch.float16), (4, torch.bfloat16), (8, torch.float32))
    for size in (8, None)
    for symmetric in (True, False)
]


def heavy_tailed(rows: int = 3, columns: int = 24, seed: int = 0) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (weight**3).contiguous()


def plain_error(weight: list[float], factor: float, grid: Grid) -> float:
    """Mean |error|^2.4 of one group whose range is shrunk by `factor`, in float64."""
    low, high = min(0.0, *weight) * factor, max(0.0, *weight) * factor
    scale = 2 * max(-low, high) / grid.levels if grid.symmetric else (high - low) / grid.levels
    scale = float(torch.tensor(scale, dtype=torch.float64).to(grid.scale_dtype)) or 1.0
    zero = grid.middle if grid.symmetric else min(max(round(-low / scale), 0), grid.levels)
    total = 0.0
    for w in weight:
        code = min(max(round(w / scale) + zero, 0), grid.levels)
        total += abs(scale * (code - zero) - w) ** 2.4
    return total / len(weight)


def test_the_shrinkages_are_those_of_the_docstring() -> None:
    assert len(FACTORS) == 26
    assert FACTORS[0] == 1.0
    assert FACTORS[-1] == pytest.approx(0.5)
    assert ERROR_EXPONENT == 2.4


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_factor_has_the_least_error_of_a_plain_loop(grid: Grid) -> None:
    weight = heavy_tailed()
    found = range_factor(weight, grid)
    groups = grid.groups(weight.shape[1])
    for row in range(weight.shape[0]):
        for group in range(groups):
            size = weight.shape[1] // groups
            part = weight[row, group * size : (group + 1) * size].tolist()
            errors = {factor: plain_error(part, factor, grid) for factor in FACTORS}
            chosen = min(FACTORS, key=lambda factor: abs(factor - found[row, group].item()))
            assert abs(chosen - found[row, group].item()) < 1e-6
            # Float32 may settle a near tie the other way, but may not choose a worse range.
            assert errors[chosen] <= min(errors.values()) * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_is_never_worse_than_minmax_by_its_own_measure(grid: Grid) -> None:
    weight = heavy_tailed(9, 48, 1)

    def error(start: str) -> Tensor:
        at = STARTS[start](weight, grid)
        quantized = freeze(codes_of(weight, at.scale, at.zero, grid), at.scale, at.zero, grid)
        difference = (quantized.dequantize() - weight).double().abs() ** 2.4
        return difference.view(9, at.scale.shape[1], -1).mean(-1)

    searched, whole = error("searched"), error("minmax")
    assert (searched <= whole * (1 + 1e-5)).all()
    if grid.bits < 8:
        assert (searched < whole).any()


def test_minmax_clips_nothing() -> None:
    weight = heavy_tailed()
    assert torch.equal(minmax(weight, Grid(4, 8, False)).share, torch.ones(3, 3))
    low, high = group_range(weight, Grid(4, 8, False))
    assert torch.equal(low, weight.view(3, 3, 8).amin(-1).clamp(max=0))
    assert torch.equal(high, weight.view(3, 3, 8).amax(-1).clamp(min=0))


def test_a_range_always_has_zero_in_it() -> None:
    low, high = group_range(torch.tensor([[2.0, 3.0], [-3.0, -2.0], [0.0, 0.0]]), Grid(4, None, False))
    assert low.flatten().tolist() == [0.0, -3.0, 0.0]
    assert high.flatten().tolist() == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_start_grid_is_the_grid_of_the_shrunken_range(start: str, symmetric: bool) -> None:
    grid, weight = Grid(3, 8, symmetric), heavy_tailed()
    low, high = group_range(weight, grid)
    at = STARTS[start](weight, grid)
    scale, zero = scale_of_range(at.share * low, at.share * high, grid)
    assert torch.equal(at.scale, scale)
    assert torch.equal(at.zero, zero)
    assert at.weight is weight


def test_the_range_of_a_grid_gives_it_back() -> None:
    grid, weight = Grid(3, 8, False, torch.float32), heavy_tailed()
    at = STARTS["searched"](weight, grid)
    again = of_grid(weight, grid, at.scale, at.zero)
    scale, zero = scale_of_range(again.share * again.low, again.share * again.high, grid)
    assert torch.allclose(scale, at.scale, rtol=1e-5)
    assert torch.equal(zero, at.zero)
    assert (again.low <= 0).all()
    assert (again.high >= 0).all()


def test_zeros_keep_the_whole_range_and_a_large_weight_is_refused() -> None:
    assert torch.equal(range_factor(torch.zeros(2, 16), Grid(4, 8, False)), torch.ones(2, 2))
    with pytest.raises(RecipeError, match="does not fit float16"):
        range_factor(torch.full((1, 8), 1e7), Grid(4, 8, False))
