"""Learnable clipping against its published formula with gradients derived by hand, in float64 loops."""

import numpy as np
import pytest
import torch
from formulas import COLUMNS, ROWS, STEPS, Adam, Array, assert_slopes_of_the_frozen_rounding, layer

from logitwise.grid import Grid
from logitwise.quantizers import STARTS, lwc
from logitwise.quantizers.lwc import LearnableClipping
from logitwise.quantizers.starts import group_range

RATE = 1e-2


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def forward_and_backward(
    weight: Array, low_logit: Array, high_logit: Array, upstream: Array, grid: Grid
) -> tuple[Array, Array, Array]:
    """What, and the gradients of both logits; rounding has slope one, the clamp none outside, the zero
    point none at all."""
    groups = low_logit.shape[1]
    size = COLUMNS // groups
    what, d_l, d_u = np.zeros_like(weight), np.zeros_like(low_logit), np.zeros_like(high_logit)
    for i in range(ROWS):
        for g in range(groups):
            columns = range(g * size, (g + 1) * size)
            low, high = min(0.0, *weight[i, columns]), max(0.0, *weight[i, columns])
            share_low, share_high = sigmoid(low_logit[i, g]), sigmoid(high_logit[i, g])
            s_of_l = -low * share_low * (1 - share_low) / grid.levels
            s_of_u = high * share_high * (1 - share_high) / grid.levels
            if grid.symmetric:
                lower = -share_low * low > share_high * high
                s_of_l, s_of_u = (2 * s_of_l, 0.0) if lower else (0.0, 2 * s_of_u)
                s = float(np.float32(2 * max(-share_low * low, share_high * high) / grid.levels))
                z = float(grid.middle)
            else:
                s = (share_high * high - share_low * low) / grid.levels
                s = float(np.float32(s))  # as it is stored
                z = min(max(np.round(-share_low * low / s), 0), grid.levels)
            for j in columns:
                rounded = np.round(weight[i, j] / s) + z
                inside = 0 <= rounded <= grid.levels
                q = min(max(rounded, 0), grid.levels)
                what[i, j] = s * (q - z)
                by_s = (q - z) - inside * weight[i, j] / s
                d_l[i, g] += upstream[i, j] * by_s * s_of_l
                d_u[i, g] += upstream[i, j] * by_s * s_of_u
    return what, d_l, d_u


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 4), (4, None)])
@pytest.mark.parametrize("start", STARTS)
def test_thirty_steps_are_those_of_the_formula(start: str, bits: int, size: int | None, symmetric: bool) -> None:
    weight, inputs = layer(bits)
    grid = Grid(bits, size, symmetric, torch.float32)
    quantizer = LearnableClipping.start(torch.from_numpy(weight.copy()), grid, STARTS[start])
    x = torch.from_numpy(inputs)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=RATE)
    low_logit, high_logit = (logit.detach().numpy().copy() for logit in (quantizer.low_logit, quantizer.high_logit))
    assert (low_logit == high_logit).all()
    adams = [Adam(low_logit.shape), Adam(high_logit.shape)]
    for step in range(STEPS):
        found = quantizer(step / STEPS)
        loss = (x @ (found - torch.from_numpy(weight)).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantizer.after_step()
        what, *_ = forward_and_backward(weight, low_logit, high_logit, np.zeros_like(weight), grid)
        np.testing.assert_allclose(found.detach().numpy(), what, rtol=1e-6, atol=1e-6)
        error = inputs @ (what - weight).T
        _, *gradients = forward_and_backward(weight, low_logit, high_logit, 2 * error.T @ inputs / error.size, grid)
        low_logit, high_logit = (
            at - adam.step(g, RATE) for at, adam, g in zip((low_logit, high_logit), adams, gradients, strict=True)
        )
        np.testing.assert_allclose(quantizer.low_logit.detach().numpy(), low_logit, rtol=0, atol=1e-6)
        np.testing.assert_allclose(quantizer.high_logit.detach().numpy(), high_logit, rtol=0, atol=1e-6)


def test_the_whole_range_starts_at_the_published_share() -> None:
    weight = torch.from_numpy(layer()[0]).float()
    quantizer = LearnableClipping.start(weight, Grid(3, 4, False), STARTS["minmax"])
    assert (quantizer.low_logit == 4).all()
    assert (quantizer.high_logit == 4).all()


def test_a_scale_has_at_least_the_published_magnitude() -> None:
    weight = torch.tensor([[1e-7, -1e-8], [0.0, 0.0]])
    quantized = LearnableClipping.start(weight, Grid(4, None, False, torch.float32), STARTS["minmax"]).freeze()
    assert quantized.scale.flatten().tolist() == pytest.approx([1e-5] * 2)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["low_logit", "high_logit"])
def test_gradients_are_finite_differences_of_the_frozen_rounding(
    name: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.from_numpy(layer()[0])
    factor = torch.full((ROWS, 3), 0.7, dtype=torch.float64)
    grid = Grid(3, 4, symmetric, torch.float32)
    quantizer = LearnableClipping(weight, *group_range(weight, grid), factor, grid)
    # At a code of either end the clamp has a kink: what lies there is moved inward, and the outermost weights are out.
    scale, zero = (x.detach().expand(ROWS, 3, 4).flatten(1) for x in quantizer.scale_and_zero())
    code = (weight / scale).round() + zero
    weight += torch.where(code == 0, scale, 0) - torch.where(code == 7, scale, 0)
    code = (weight / scale).round() + zero
    assert bool(((code < 0) | (code > 7)).any())
    assert not bool(((code == 0) | (code == 7)).any())
    upstream = torch.from_numpy(np.random.default_rng(1).normal(size=weight.shape))
    assert_slopes_of_the_frozen_rounding(quantizer, name, upstream, lwc, monkeypatch)
