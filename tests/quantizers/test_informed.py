"""Starts that know their inputs, against float64 loops of what they are defined as."""

import itertools

import numpy as np
import pytest
import torch
from formulas import Array
from torch import Tensor

from logitwise.errors import RecipeError
from logitwise.grid import Grid, codes_of, freeze
from logitwise.quantizers import INFORMED, QUANTIZERS
from logitwise.quantizers.informed import (
    DAMPING,
    FRACTIONS,
    LAST_FREE_SWEEP,
    NEARLY_HALF,
    SWEEPS,
    gptq,
    neuqi,
    quantease,
    weighted,
)
from logitwise.quantizers.starts import FACTORS, StartPoint, group_range, searched

ROWS, COLUMNS = 4, 24
GRIDS = [
    Grid(bits, size, symmetric, dtype)
    for bits, dtype in ((2, torch.float16), (3, torch.float32), (4, torch.bfloat16))
    for size in (8, None)
    for symmetric in (True, False)
]


def layer(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of inputs that depend on one another and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.linspace(0.3, 3, COLUMNS)
    inputs = torch.randn(200, COLUMNS, generator=generator) @ mixing
    return torch.randn(ROWS, COLUMNS, generator=generator) ** 3, inputs.T @ inputs / 200


def values(at: StartPoint, grid: Grid) -> Tensor:
    """What a fit starts with."""
    return freeze(codes_of(at.weight, at.scale, at.zero, grid), at.scale, at.zero, grid).dequantize()


def error(weight: Tensor, at: StartPoint, grid: Grid, moments: Tensor) -> float:
    """Of the layer's output, a mean over tokens, summed over the channels."""
    difference = (values(at, grid) - weight).double()
    return float(((difference @ moments.double()) * difference).sum())


def group_error(weight: Array, importance: Array, scale: float, zero: float, levels: int) -> float:
    """Of one group, in float64."""
    codes = np.clip(np.round(weight / scale) + zero, 0, levels)
    return float((importance * (scale * (codes - zero) - weight) ** 2).mean())


def each_group(grid: Grid) -> itertools.product:
    return itertools.product(range(ROWS), range(grid.groups(COLUMNS)))


def importance_of(moments: Tensor) -> Array:
    diagonal = moments.diagonal().double().numpy()
    return diagonal + DAMPING * diagonal.mean()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weighted_has_the_least_weighted_error_of_all_shares(grid: Grid) -> None:
    weight, moments = layer()
    at, importance = weighted(weight, grid, moments), importance_of(moments)
    size = COLUMNS // grid.groups(COLUMNS)
    low, high = group_range(weight, grid)
    for row, group in each_group(grid):
        part = slice(group * size, (group + 1) * size)
        w, counts = weight[row, part].double().numpy(), importance[part]
        errors = []
        for factor in FACTORS:
            a, b = float(factor * low[row, group]), float(factor * high[row, group])
            span = 2 * max(-a, b) if grid.symmetric else b - a
            scale = float(torch.tensor(span / grid.levels).to(grid.scale_dtype))
            zero = grid.middle if grid.symmetric else np.clip(np.round(-a / scale), 0, grid.levels)
            errors.append(group_error(w, counts, scale, zero, grid.levels))
        found = group_error(w, counts, float(at.scale[row, group]), float(at.zero[row, group]), grid.levels)
        assert found <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_neuqi_is_near_the_best_of_all_scales_and_zero_points(grid: Grid) -> None:
    weight, moments = layer()
    at, importance = neuqi(weight, grid, moments), importance_of(moments)
    size = COLUMNS // grid.groups(COLUMNS)
    low, high = group_range(weight, grid)
    ratios = []
    for row, group in each_group(grid):
        part = slice(group * size, (group + 1) * size)
        w, counts = weight[row, part].double().numpy(), importance[part]
        span = float(
            2 * max(-low[row, group], high[row, group]) if grid.symmetric else high[row, group] - low[row, group]
        )
        zeros = [grid.middle] if grid.symmetric else range(grid.levels + 1)
        scales = (
            (torch.arange(1, FRACTIONS + 1) / FRACTIONS * span / grid.levels).to(grid.scale_dtype).double().tolist()
        )
        best = min(group_error(w, counts, s, z, grid.levels) for s in scales[::4] for z in zeros)
        found = group_error(w, counts, float(at.scale[row, group]), float(at.zero[row, group]), grid.levels)
        ratios.append(found / best)
    assert max(ratios) < 1.5  # a search from coarse to fine may end beside the best
    assert float(np.mean(ratios)) < 1.05


def plain_gptq(weight: Array, moments: Array, grid: Grid) -> tuple[Array, Array, Array]:
    """Frantar et al., column by column, in float64: codes, scales, zero points."""
    damped = moments.copy()
    np.fill_diagonal(damped, damped.diagonal() + DAMPING * damped.diagonal().mean())
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, size = weight.copy(), COLUMNS // grid.groups(COLUMNS)
    codes, scales, zeros = np.zeros_like(weight), [], []
    for column in range(COLUMNS):
        if column % size == 0:
            group = torch.from_numpy(left[:, column : column + size].astype(np.float32))
            at = searched(group, Grid(grid.bits, None, grid.symmetric, grid.scale_dtype))
            scales.append(at.scale.double().numpy())
            zeros.append(at.zero.double().numpy())
        scale, zero = scales[-1][:, 0], zeros[-1][:, 0]
        codes[:, column] = np.clip(np.round(left[:, column] / scale) + zero, 0, grid.levels)
        e = (left[:, column] - scale * (codes[:, column] - zero)) / upper[column, column]
        left[:, column:] -= np.outer(e, upper[column, column:])
    return codes, np.concatenate(scales, 1), np.concatenate(zeros, 1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gptq_rounds_to_the_codes_of_the_plain_loop(grid: Grid) -> None:
    weight, moments = layer()
    at = gptq(weight, grid, moments)
    codes, scale, zero = plain_gptq(weight.double().numpy(), moments.double().numpy(), grid)
    np.testing.assert_allclose(at.scale.numpy(), scale, rtol=1e-5)
    np.testing.assert_array_equal(at.zero.numpy(), zero)
    np.testing.assert_array_equal(codes_of(at.weight, at.scale, at.zero, grid).numpy(), codes)


def test_gptq_over_more_columns_than_a_block_is_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(3, None, False, torch.float32)
    weight, moments = layer(1)
    whole = gptq(weight, grid, moments)
    monkeypatch.setattr("logitwise.quantizers.informed.COLUMNS_AT_ONCE", 7)
    parts = gptq(weight, grid, moments)
    assert torch.allclose(whole.weight, parts.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(values(whole, grid), values(parts, grid))


def plain_quantease(weight: Array, moments: Array, scale: Array, zero: Array, what: Array, levels: int) -> Array:
    """Cyclic coordinate descent by its formula, in float64: what the last sweep rounds."""
    rounded = weight.copy()
    for sweep in range(SWEEPS):
        for j in range(COLUMNS):
            others = [k for k in range(COLUMNS) if k != j]
            u = weight[:, j] + (weight - what)[:, others] @ moments[others, j] / moments[j, j]
            rounded[:, j] = u
            nearest = scale[:, j] * (np.clip(np.round(u / scale[:, j]) + zero[:, j], 0, levels) - zero[:, j])
            what[:, j] = u if sweep % 3 == 1 and sweep < LAST_FREE_SWEEP else nearest
    return rounded


@pytest.mark.parametrize("at_once", [128, 5])
@pytest.mark.parametrize("grid", GRIDS[4:8], ids=str)
def test_quantease_is_the_descent_of_the_formula(grid: Grid, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logitwise.quantizers.informed.COLUMNS_AT_ONCE", at_once)
    weight, moments = layer()
    at, start = quantease(weight, grid, moments), weighted(weight, grid, moments)
    assert torch.equal(at.scale, start.scale)
    assert torch.equal(at.zero, start.zero)
    scale, zero = (x.double().repeat_interleave(COLUMNS // x.shape[1], 1).numpy() for x in (at.scale, at.zero))
    what = values(start, grid).double().numpy()
    rounded = plain_quantease(weight.double().numpy(), moments.double().numpy(), scale, zero, what, grid.levels)
    within = np.clip(rounded, scale * (-zero - NEARLY_HALF), scale * (grid.levels - zero + NEARLY_HALF))
    np.testing.assert_allclose(at.weight.numpy(), within, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_gives_less_error_than_the_one_that_knows_less(grid: Grid) -> None:
    errors = {}
    for seed in range(4):
        _, moments = layer(seed)
        weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
        points = {name: start(weight, grid, moments) for name, start in INFORMED.items()}
        points["searched"] = searched(weight, grid)
        for name, at in points.items():
            errors[name] = errors.get(name, 0.0) + error(weight, at, grid, moments)
    assert errors["quantease"] < errors["weighted"]
    assert errors["gptq"] < errors["searched"]
    weight, moments = layer()
    apart = torch.diag(moments.diagonal())  # what these two go by

    def alone(name: str) -> float:
        return error(weight, INFORMED[name](weight, grid, apart), grid, apart)

    assert alone("neuqi") <= 1.01 * alone("weighted")  # nearly all that `weighted` tries is among what it tries


@pytest.mark.parametrize("start", INFORMED)
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_are_always_zero_and_weights_that_are_do_no_harm(start: str, symmetric: bool) -> None:
    weight, moments = layer()
    moments[3], moments[:, 3] = 0, 0
    moments[8:16], moments[:, 8:16] = 0, 0
    weight[1] = 0
    for given in (moments, torch.zeros_like(moments)):
        for grid in (Grid(2, 8, symmetric), Grid(4, None, symmetric)):
            at = INFORMED[start](weight, grid, given)
            found = values(at, grid)
            assert torch.isfinite(found).all()
            assert not found[1].any()
            assert (found - weight)[:, 8:16].square().sum() < 0.7 * weight[:, 8:16].square().sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("start", INFORMED)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_every_method_starts_there(method: str, start: str, grid: Grid) -> None:
    weight, moments = layer()
    at = INFORMED[start](weight, grid, moments)
    quantizer = QUANTIZERS[method].start(weight, grid, lambda weight, grid: at)
    found, expected = quantizer(1.0), values(at, grid)
    assert torch.equal(found, quantizer.freeze().dequantize())
    # A scale that is found again from a range or a logarithm may differ in its last stored bit.
    step = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[grid.scale_dtype]
    same = torch.isclose(found, expected, rtol=step, atol=1e-6)
    if method == "lwc":  # starts that cover the whole range are at the published share
        same = same[(at.share < 0.982).repeat_interleave(COLUMNS // at.share.shape[1], 1)]
    if not (method == "signround" and grid.symmetric and start == "weighted"):  # whose grid is another one
        assert same.float().mean() > 0.98  # and a code with it, now and then


def test_what_is_rounded_lies_on_the_grid() -> None:
    """A weight far beyond the last code has no gradient."""
    weight, moments = layer()
    moments = moments * torch.outer(scales := torch.logspace(-2, 2, COLUMNS), scales)
    for start in ("gptq", "quantease"):
        for grid in GRIDS:
            at = INFORMED[start](weight, grid, moments)
            codes = at.weight / at.scale.repeat_interleave(COLUMNS // at.scale.shape[1], 1)
            zero = at.zero.repeat_interleave(COLUMNS // at.zero.shape[1], 1)
            assert (codes + zero > -0.5).all()
            assert (codes + zero < grid.levels + 0.5).all()


@pytest.mark.parametrize("start", INFORMED)
def test_a_scale_that_overflows_is_refused(start: str) -> None:
    weight, moments = layer()
    weight[0, 0] = -4e7
    with pytest.raises(RecipeError, match="does not fit float16"):
        INFORMED[start](weight, Grid(8, 8, False), moments)
