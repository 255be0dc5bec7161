"""Block-AP against its published formula with gradients derived by hand, in float64 loops."""

import numpy as np
import pytest
import torch
from formulas import COLUMNS, ROWS, STEPS, Adam, Array, assert_slopes_of_the_frozen_rounding, layer

from logitwise.grid import Grid
from logitwise.quantizers import STARTS, block_ap
from logitwise.quantizers.block_ap import BlockAP

RATES = {"weight": 2e-3, "scale": 1e-2, "zero": 1e-1}  # high enough that codes and zero points change


def forward_and_backward(
    weight: Array, scale: Array, zero: Array, upstream: Array, levels: int
) -> tuple[Array, dict[str, Array]]:
    """What, and the gradients; rounding has slope one, the clamp of codes none outside."""
    size = COLUMNS // scale.shape[1]
    what = np.zeros_like(weight)
    found = {"weight": np.zeros_like(weight), "scale": np.zeros_like(scale), "zero": np.zeros_like(zero)}
    for i in range(ROWS):
        for j in range(COLUMNS):
            g = j // size
            s, z = min(max(scale[i, g], 1e-4), 1e4), min(max(np.round(zero[i, g]), 0), levels)
            rounded = np.round(weight[i, j] / s) + z
            inside = 0 <= rounded <= levels
            q = min(max(rounded, 0), levels)
            what[i, j] = s * (q - z)
            found["weight"][i, j] = upstream[i, j] * inside
            found["scale"][i, g] += upstream[i, j] * ((q - z) - inside * weight[i, j] / s)
            found["zero"][i, g] += upstream[i, j] * s * (inside - 1)
    return what, found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 4), (4, None)])
@pytest.mark.parametrize("start", STARTS)
def test_thirty_steps_are_those_of_the_formula(start: str, bits: int, size: int | None, symmetric: bool) -> None:
    weight, inputs = layer(bits)
    grid = Grid(bits, size, symmetric, torch.float32)
    quantizer = BlockAP.start(torch.from_numpy(weight.copy()), grid, STARTS[start])
    x = torch.from_numpy(inputs)
    learned = {role: own[0] for role, own in quantizer.groups().items()}
    assert ("zero" in learned) == (not symmetric)
    optimizer = torch.optim.Adam([{"params": [p], "lr": RATES[role]} for role, p in learned.items()])
    now = {role: getattr(quantizer, role).detach().numpy().copy() for role in RATES}
    adams = {role: Adam(now[role].shape) for role in learned}
    start_codes, start_zero = quantizer.freeze().codes, quantizer.freeze().zero
    for step in range(STEPS):
        found = quantizer(step / STEPS)
        loss = (x @ (found - torch.from_numpy(weight)).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantizer.after_step()
        what, _ = forward_and_backward(*now.values(), np.zeros_like(weight), grid.levels)
        np.testing.assert_allclose(found.detach().numpy(), what, rtol=1e-6, atol=1e-6)
        error = inputs @ (what - weight).T
        _, gradients = forward_and_backward(*now.values(), 2 * error.T @ inputs / error.size, grid.levels)
        for role, adam in adams.items():
            now[role] = now[role] - adam.step(gradients[role], RATES[role])
            np.testing.assert_allclose(learned[role].detach().numpy(), now[role], rtol=0, atol=1e-6)
    assert not torch.equal(quantizer.freeze().codes, start_codes)
    assert symmetric or not torch.equal(quantizer.freeze().zero, start_zero)


def test_bounds_pass_the_gradient_on() -> None:
    weight = torch.ones(1, 4)
    quantizer = BlockAP(weight, torch.tensor([[1e-6]]), torch.tensor([[9.0]]), Grid(2, None, False, torch.float32))
    quantized = quantizer.freeze()
    assert quantized.scale.item() == pytest.approx(1e-4)
    assert quantized.zero.item() == 3
    quantizer(0.0).sum().backward()
    assert quantizer.scale.grad is not None
    assert quantizer.zero.grad is not None
    assert quantizer.zero.grad.item() == pytest.approx(-4e-4)  # all codes are clipped


@pytest.mark.parametrize("name", ["weight", "scale", "zero"])
def test_gradients_are_finite_differences_of_the_frozen_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Codes away from both ends by more than a difference reaches, some of them clipped.
    generator = torch.Generator().manual_seed(0)
    fraction = 0.8 * torch.rand(4, 6, generator=generator, dtype=torch.float64) - 0.4
    integers = torch.randint(-3, 3, (4, 6), generator=generator).double()
    integers[0, 0], integers[1, 3], integers[2, 2] = 9, -9, 20
    scale = torch.tensor([[0.1, 0.2]], dtype=torch.float64).repeat(4, 1)
    zero = torch.full((4, 2), 4.0, dtype=torch.float64)
    quantizer = BlockAP((integers + fraction) * scale.repeat_interleave(3, 1), scale, zero, Grid(3, 3, False))
    upstream = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    assert_slopes_of_the_frozen_rounding(quantizer, name, upstream, block_ap, monkeypatch)
