"""The grid against its definition written out in float64 loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitwise.errors import RecipeError
from logitwise.grid import (
    Grid,
    Quantized,
    codes_of,
    freeze,
    merge,
    round_through,
    safe_scale,
    scale_of_range,
    split,
    store_through,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored(x: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(x, dtype=torch.float64).to(dtype))


def half_even(x: float) -> int:
    """Nearest integer, ties to even, from its definition."""
    below = math.floor(x)
    if x - below == 0.5:
        return below if below % 2 == 0 else below + 1
    return math.floor(x + 0.5)


def ranges(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    grouped = weight.view(weight.shape[0], groups, -1)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def quantize(weight: Tensor, grid: Grid) -> Quantized:
    scale, zero = scale_of_range(*ranges(weight, grid.groups(weight.shape[1])), grid)
    return freeze(codes_of(weight, scale, zero, grid), scale, zero, grid)


def test_levels_middle_and_groups() -> None:
    grid = Grid(3, 16, False)
    assert (grid.levels, grid.middle, grid.groups(48)) == (7, 4, 3)
    assert Grid(8, None, True).groups(48) == 1
    assert Grid(8, None, True).levels == 255


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    groups=st.integers(1, 4),
    size=st.integers(1, 9),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([1e-2, 1.0, 300.0]),
    shift=st.sampled_from([-2.0, 0.0, 2.0]),
    seed=st.integers(0, 999),
)
def test_scale_zero_codes_and_weight_are_the_definition(
    bits: int, groups: int, size: int, symmetric: bool, dtype: torch.dtype, spread: float, shift: float, seed: int
) -> None:
    grid = Grid(bits, size, symmetric, dtype)
    weight = spread * (random_weight(3, groups * size, seed) + shift)
    low, high = ranges(weight, groups)
    scale, zero = scale_of_range(low, high, grid)
    codes = codes_of(weight, scale, zero, grid)
    quantized = freeze(codes, scale, zero, grid)
    found = quantized.dequantize()
    assert quantized.scale.dtype == dtype
    assert torch.equal(quantized.scale.float(), scale)
    levels = 2**bits - 1
    for row in range(3):
        for group in range(groups):
            span = (
                (2 * max(-low[row, group].item(), high[row, group].item()))
                if symmetric
                else (high[row, group].item() - low[row, group].item())
            )
            s, z = scale[row, group].item(), int(zero[row, group])
            # Float32 arithmetic before the rounding to the stored type: one step of that type, at most.
            step = max(torch.finfo(dtype).eps * abs(s), 2.0**-24 if dtype == torch.float16 else 0.0)
            assert abs(s - span / levels) <= step
            if symmetric:
                assert z == 2 ** (bits - 1)
            else:
                assert abs(z - min(max(-low[row, group].item() / s, 0), levels)) <= 0.5 + 1e-4
            for column in range(group * size, (group + 1) * size):
                w, q = weight[row, column].item(), int(quantized.codes[row, column])
                exact = w / s + z
                assert 0 <= q <= levels
                assert abs(q - min(max(exact, 0), levels)) <= 0.5 + 1e-4  # float32 quotients of up to 255 near a tie
                assert found[row, column].item() == float(np.float32(s * (q - z)))


@pytest.mark.parametrize("value", [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 0.49999997, 2.5000002])
def test_ties_go_to_even(value: float) -> None:
    grid = Grid(4, None, True, torch.float32)
    codes = codes_of(torch.tensor([[value]]), torch.ones(1, 1), torch.full((1, 1), 8.0), grid)
    assert codes.item() == half_even(value) + 8
    assert round_through(torch.tensor([value])).item() == half_even(value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_is_rounded_to_its_stored_type_before_anything_is_computed_with_it(dtype: torch.dtype) -> None:
    grid = Grid(4, None, False, dtype)
    low, high = torch.tensor([[-0.1234567]]), torch.tensor([[1.7654321]])
    scale, zero = scale_of_range(low, high, grid)
    expected = stored(float((high - low) / 15), dtype)
    assert scale.dtype == torch.float32
    assert scale.item() == expected
    assert zero.item() == half_even(0.1234567 / expected)
    weight = torch.linspace(-0.12, 1.76, 50).unsqueeze(0)
    assert codes_of(weight, scale, zero, grid).tolist()[0] == [
        min(max(half_even(w / expected) + int(zero), 0), 15) for w in weight[0].double().tolist()
    ]


@pytest.mark.parametrize(
    ("dtype", "name", "largest"), [(torch.float16, "float16", "65504"), (torch.bfloat16, "bfloat16", "3.3895e[+]38")]
)
def test_a_scale_that_overflows_is_refused(dtype: torch.dtype, name: str, largest: str) -> None:
    size = torch.finfo(dtype).max * (1.0 + 1e-3 if dtype == torch.float16 else 1.0039)
    with pytest.raises(
        RecipeError, match=rf"a scale of .* does not fit {name}\n.*largest it holds is {largest}\n.*--scale-dtype"
    ):
        safe_scale(torch.tensor([[1.0, size]]), Grid(4, None, False, dtype))


def test_a_range_whose_scale_overflows_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"a scale of 6\.67e\+04 does not fit float16"):
        scale_of_range(torch.tensor([[0.0]]), torch.tensor([[1.0e6]]), Grid(4, None, False))
    scale, _ = scale_of_range(torch.tensor([[0.0]]), torch.tensor([[1.0e6]]), Grid(4, None, False, torch.bfloat16))
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_group_of_zeros_comes_back_as_zeros(bits: int, symmetric: bool) -> None:
    weight = torch.cat([torch.zeros(2, 8), random_weight(2, 8, 0)], 1)
    quantized = quantize(weight, Grid(bits, 8, symmetric))
    assert torch.equal(quantized.dequantize()[:, :8], torch.zeros(2, 8))
    assert torch.equal(quantized.scale[:, 0], torch.ones(2, dtype=torch.float16))
    assert torch.equal(quantized.codes[:, :8], quantized.zero[:, :1].expand(2, 8))


def test_a_group_too_small_for_its_scale_type_comes_back_as_zeros() -> None:
    weight = torch.full((1, 8), 1e-9)
    assert torch.equal(quantize(weight, Grid(4, None, False)).dequantize(), torch.zeros(1, 8))
    assert torch.allclose(
        quantize(weight, Grid(4, None, False, torch.bfloat16)).dequantize(), weight, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("value", [3.0, -3.0, 0.017])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_constant_row_keeps_its_value_to_the_rounding_of_its_scale(bits: int, value: float) -> None:
    weight = torch.full((1, 16), value)
    found = quantize(weight, Grid(bits, None, False)).dequantize()
    assert torch.allclose(found, weight, rtol=2**-11 + 1e-6, atol=0)
    symmetric = quantize(weight, Grid(bits, None, True)).dequantize()
    half_a_step = abs(value) / (2**bits - 1)
    assert (symmetric - weight).abs().max() <= half_a_step + abs(value) * 2**-11


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_costs_its_own_group_only(symmetric: bool) -> None:
    weight = random_weight(2, 32, 3)
    spoiled = weight.clone()
    spoiled[0, 5] = 1e4
    grid = Grid(4, 16, symmetric)
    before, after = quantize(weight, grid), quantize(spoiled, grid)
    assert torch.equal(before.codes[:, 16:], after.codes[:, 16:])
    assert torch.equal(before.dequantize()[1], after.dequantize()[1])
    error = (after.dequantize() - spoiled)[0, :16].abs().max()
    assert error <= 0.51 * float(after.scale[0, 0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_inside_the_range_is_half_a_step(bits: int, symmetric: bool) -> None:
    weight = random_weight(8, 64, bits)
    quantized = quantize(weight, Grid(bits, 16, symmetric, torch.float32))
    error = split((quantized.dequantize() - weight).abs(), 4)
    # An asymmetric zero point is itself rounded, so that the ends may lie one further half step outside.
    reach = 0.5 if symmetric else 1.0
    assert (error <= (reach + 1e-4) * quantized.scale.unsqueeze(-1)).all()


def test_split_and_merge_are_inverse_and_keep_the_order() -> None:
    weight = random_weight(3, 12, 0)
    grouped = split(weight, 4)
    assert grouped.shape == (3, 4, 3)
    assert torch.equal(grouped[1, 2], weight[1, 6:9])
    assert torch.equal(merge(grouped), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_passes_its_gradient_unchanged(dtype: torch.dtype) -> None:
    x = (5 * random_weight(4, 5, 1)).requires_grad_()
    upstream = random_weight(4, 5, 2)
    round_through(x).backward(upstream)
    assert torch.equal(x.grad, upstream)
    x.grad = None
    held = store_through(x, dtype)
    assert torch.equal(held, x.detach().to(dtype).float())
    held.backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_bits_stored_counts_codes_scales_and_zero_points() -> None:
    weight = random_weight(3, 32, 0)
    assert quantize(weight, Grid(4, 8, False)).bits_stored() == 96 * 4 + 12 * 16 + 12 * 4
    assert quantize(weight, Grid(4, 8, True)).bits_stored() == 96 * 4 + 12 * 16
    assert quantize(weight, Grid(3, None, False, torch.float32)).bits_stored() == 96 * 3 + 3 * 32 + 3 * 3


def test_to_another_device_keeps_every_value() -> None:
    quantized = quantize(random_weight(2, 8, 0), Grid(4, 8, False))
    assert torch.equal(quantized.to(torch.device("cpu")).dequantize(), quantized.dequantize())
    assert quantized.to(torch.device("meta")).codes.is_meta


def test_a_float_minimum_takes_as_many_bits_as_a_scale() -> None:
    assert Grid(4, 32, False, minimum=True).bits_stored(2, 64) == 2 * (64 * 4 + 2 * 32)
    assert str(Grid(4, 32, False, minimum=True)) == "4 bits, groups of 32, float minima, float16 scales"
