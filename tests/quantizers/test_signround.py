"""SignRound against its published formula with gradients derived by hand, in float64 loops."""

import numpy as np
import pytest
import torch
from formulas import COLUMNS, ROWS, STEPS, Array, assert_slopes_of_the_frozen_rounding, layer

from logitwise.grid import Grid
from logitwise.optimizers import SignSGD
from logitwise.quantizers import STARTS, signround
from logitwise.quantizers.signround import SignRound
from logitwise.quantizers.starts import group_range


def stored(x: float) -> float:
    return float(np.float32(x))


def forward_and_backward(
    weight: Array, offset: Array, alpha: Array, beta: Array, upstream: Array | None, grid: Grid
) -> tuple[Array, Array, Array, Array]:
    """What, and the gradients of V, alpha and beta; rounding has slope one, clipping slope zero outside."""
    groups = alpha.shape[1]
    size = COLUMNS // groups
    what, d_offset = np.zeros_like(weight), np.zeros_like(weight)
    d_alpha, d_beta = np.zeros_like(alpha), np.zeros_like(beta)
    for i in range(ROWS):
        for g in range(groups):
            columns = range(g * size, (g + 1) * size)
            low, high = min(0.0, *weight[i, columns]), max(0.0, *weight[i, columns])
            a, b = alpha[i, g], beta[i, g]
            z_of_a = z_of_s = 0.0
            if grid.symmetric:
                negative_side = b * high < -a * low
                s = -a * low / grid.middle if negative_side else -b * high / grid.middle
                s_of_a = -low / grid.middle if negative_side else 0.0
                s_of_b = 0.0 if negative_side else -high / grid.middle
                s, z = stored(s), float(grid.middle)
            else:
                s = stored((b * high - a * low) / grid.levels)
                s_of_a, s_of_b = -low / grid.levels, high / grid.levels
                z = float(np.round(-a * low / s))
                if 0 <= z <= grid.levels:
                    z_of_a, z_of_s = -low / s, a * low / s**2
                z = min(max(z, 0.0), grid.levels)
            for j in columns:
                q = np.round(weight[i, j] / s + offset[i, j]) + z
                inside = 0 <= q <= grid.levels
                q = min(max(q, 0.0), grid.levels)
                what[i, j] = s * (q - z)
                if upstream is None:
                    continue
                q_of_s = inside * (-weight[i, j] / s**2 + z_of_s)
                by_s = (q - z) + s * (q_of_s - z_of_s)
                by_a = s * (inside * z_of_a - z_of_a)
                d_offset[i, j] = upstream[i, j] * s * inside
                d_alpha[i, g] += upstream[i, j] * (by_s * s_of_a + by_a)
                d_beta[i, g] += upstream[i, j] * by_s * s_of_b
    return what, d_offset, d_alpha, d_beta


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 4), (4, None)])
@pytest.mark.parametrize("start", STARTS)
def test_thirty_steps_are_those_of_the_formula(start: str, bits: int, size: int | None, symmetric: bool) -> None:
    weight, inputs = layer(bits)
    grid = Grid(bits, size, symmetric, torch.float32)
    quantizer = SignRound.start(torch.from_numpy(weight.copy()), grid, STARTS[start])
    x = torch.from_numpy(inputs)
    optimizer = SignSGD([{"params": list(quantizer.parameters()), "lr": 1 / STEPS}])
    offset = np.zeros_like(weight)
    alpha = STARTS[start](torch.from_numpy(weight), grid).share.double().numpy().copy()
    beta = alpha.copy()
    start_codes = quantizer.freeze().codes
    for step in range(STEPS):
        rate = (1 - step / STEPS) / STEPS
        optimizer.param_groups[0]["lr"] = rate
        found = quantizer(step / STEPS)
        what, *_ = forward_and_backward(weight, offset, alpha, beta, None, grid)
        np.testing.assert_allclose(found.detach().numpy(), what, rtol=1e-6, atol=1e-6)
        optimizer.zero_grad()
        (x @ (found - torch.from_numpy(weight)).T).square().mean().backward()
        optimizer.step()
        quantizer.after_step()
        error = inputs @ (what - weight).T
        upstream = 2 * error.T @ inputs / error.size
        _, d_offset, d_alpha, d_beta = forward_and_backward(weight, offset, alpha, beta, upstream, grid)
        offset = offset - rate * np.sign(d_offset)
        alpha = np.clip(alpha - rate * np.sign(d_alpha), 0, 1)
        beta = np.clip(beta - rate * np.sign(d_beta), 0, 1)
        np.testing.assert_allclose(quantizer.offset.detach().numpy(), offset, rtol=0, atol=1e-6)
        np.testing.assert_allclose(quantizer.low_factor.detach().numpy(), alpha, rtol=0, atol=1e-6)
        np.testing.assert_allclose(quantizer.high_factor.detach().numpy(), beta, rtol=0, atol=1e-6)
    assert not torch.equal(quantizer.freeze().codes, start_codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_puts_the_larger_side_on_the_lowest_code(bits: int) -> None:
    weight = torch.tensor([[-1.0, 0.25, 0.5], [-0.5, 0.25, 1.0], [-1.0, 0.0, 1.0]])
    quantized = SignRound.start(weight, Grid(bits, None, True, torch.float32), STARTS["minmax"]).freeze()
    assert quantized.codes[0, 0] == quantized.codes[1, 2] == quantized.codes[2, 2] == 0
    assert quantized.scale.flatten().tolist() == [2.0 ** (1 - bits), -(2.0 ** (1 - bits)), -(2.0 ** (1 - bits))]
    found = quantized.dequantize()
    assert found[0, 0] == -1.0
    assert found[1, 2] == found[2, 2] == 1.0


def test_a_scale_has_at_least_the_published_magnitude() -> None:
    weight = torch.tensor([[1e-7, -1e-8], [-1e-7, 1e-8], [0.0, 0.0]])
    for symmetric in (True, False):
        scale = SignRound.start(weight, Grid(4, None, symmetric, torch.float32), STARTS["minmax"]).freeze().scale
        assert scale.abs().flatten().tolist() == pytest.approx([1e-5] * 3)


def test_range_shares_stay_between_nothing_and_the_whole_range() -> None:
    quantizer = SignRound.start(torch.randn(3, 8), Grid(4, 8, False), STARTS["minmax"])
    with torch.no_grad():
        quantizer.low_factor += 0.3
        quantizer.high_factor -= 1.7
        quantizer.offset += 9
    quantizer.after_step()
    assert torch.equal(quantizer.low_factor, torch.ones(3, 1))
    assert torch.equal(quantizer.high_factor, torch.zeros(3, 1))
    assert torch.equal(quantizer.offset, torch.full((3, 8), 9.0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["offset", "low_factor", "high_factor"])
def test_gradients_are_finite_differences_of_the_frozen_rounding(
    name: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = layer()
    share = torch.full((ROWS, 3), 0.9, dtype=torch.float64)
    grid = Grid(3, 4, symmetric, torch.float32)
    quantizer = SignRound(torch.from_numpy(weight), *group_range(torch.from_numpy(weight), grid), share, grid)
    with torch.no_grad():  # the end codes are kinks of the clamp: off them, some inside and some outside
        quantizer.low_factor -= 0.1
        stored = quantizer.freeze()
        scale, zero = (x.double().repeat_interleave(4, 1) for x in (stored.scale, stored.zero))
        rounded = torch.round(quantizer.weight / scale) + zero
        inward = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(COLUMNS // 2)
        quantizer.offset += torch.where((rounded == 0) | (rounded == 7), inward, 0.0)
    upstream = torch.from_numpy(np.random.default_rng(1).normal(size=weight.shape))
    assert_slopes_of_the_frozen_rounding(quantizer, name, upstream, signround, monkeypatch)
