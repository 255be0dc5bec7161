"""GSQ against its published formula with gradients derived by hand, in float64 loops."""

import numpy as np
import pytest
import torch
from formulas import COLUMNS, ROWS, STEPS, Array, layer
from helpers import assert_finite_differences

from logitwise.grid import Grid, codes_of
from logitwise.optimizers import Lion
from logitwise.quantizers import STARTS, gsq
from logitwise.quantizers.gsq import GumbelSoftmax

RATES, DECAY = {"logits": 3e-3, "scale": 2e-3}, 1.0  # high enough that codes change


def candidates(code: float, levels: int) -> list[float]:
    """Every code of 2 bits, else the five about one, also those outside of the grid."""
    return [float(c) for c in (range(4) if levels == 3 else range(int(code) - 2, int(code) + 3))]


def forward_and_backward(
    start: Array, logits: Array, scale: Array, zero: Array, noise: Array, progress: float, upstream: Array, levels: int
) -> tuple[Array, Array, Array]:
    """What under one sample, and the gradients of logits and scales."""
    tau, kappa = 2 + (0.05 - 2) * progress, 100 + (500 - 100) * progress
    size = COLUMNS // scale.shape[1]
    what, d_logits, d_scale = np.zeros_like(start), np.zeros_like(logits), np.zeros_like(scale)
    for i in range(ROWS):
        for j in range(COLUMNS):
            codes = candidates(start[i, j], levels)
            s, z = float(np.float32(scale[i, j // size])), zero[i, j // size]
            inside = [k for k, code in enumerate(codes) if 0 <= code <= levels]
            exponents = {k: (kappa * logits[i, j, k] + noise[i, j, k]) / tau for k in inside}
            largest = max(exponents.values())
            y = {k: np.exp(exponent - largest) for k, exponent in exponents.items()}
            total = sum(y.values())
            mean = sum(y[k] * codes[k] for k in inside) / total
            what[i, j] = s * (mean - z)
            d_scale[i, j // size] += upstream[i, j] * (mean - z)
            for k in inside:
                d_logits[i, j, k] = upstream[i, j] * s * kappa / tau * y[k] / total * (codes[k] - mean)
    return what, d_logits, d_scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 4), (3, 4), (4, None)])
@pytest.mark.parametrize("start", STARTS)
def test_thirty_steps_are_those_of_the_formula(start: str, bits: int, size: int | None, symmetric: bool) -> None:
    weight, inputs = layer(bits)
    grid = Grid(bits, size, symmetric, torch.float32)
    quantizer = GumbelSoftmax.start(torch.from_numpy(weight.copy()), grid, STARTS[start])
    x = torch.from_numpy(inputs)
    learned = {"logits": quantizer.logits, "scale": quantizer.scale}
    optimizers = {name: Lion([{"params": [p]}], DECAY if name == "logits" else 0.0) for name, p in learned.items()}
    now = {name: p.detach().numpy().copy() for name, p in learned.items()}
    means = {name: np.zeros_like(p) for name, p in now.items()}
    start_codes = quantizer.freeze().codes
    codes, zero = start_codes.double().numpy(), quantizer.zero.numpy()
    for step in range(STEPS):
        found = quantizer(step / STEPS)
        (x @ (found - torch.from_numpy(weight)).T).square().mean().backward()
        noise = quantizer.noise(step / STEPS).numpy()
        given = (codes, *now.values(), zero, noise, step / STEPS)
        what, *_ = forward_and_backward(*given, np.zeros_like(weight), grid.levels)
        np.testing.assert_allclose(found.detach().numpy(), what, rtol=0, atol=1e-6)
        error = inputs @ (what - weight).T
        _, *gradients = forward_and_backward(*given, 2 * error.T @ inputs / error.size, grid.levels)
        for (name, optimizer), gradient in zip(optimizers.items(), gradients, strict=True):
            optimizer.param_groups[0]["lr"] = RATES[name]
            optimizer.step()
            optimizer.zero_grad()
            decay = DECAY * now[name] if name == "logits" else 0
            now[name] = now[name] - RATES[name] * (np.sign(0.9 * means[name] + 0.1 * gradient) + decay)
            means[name] = 0.95 * means[name] + 0.05 * gradient
        quantizer.after_step()
        for name, parameter in learned.items():
            np.testing.assert_allclose(parameter.detach().numpy(), now[name], rtol=0, atol=1e-6)
    assert not torch.equal(quantizer.freeze().codes, start_codes)


def nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of round to nearest."""
    at = STARTS["minmax"](weight, grid)
    return codes_of(at.weight, at.scale, at.zero, grid).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_logits_start_at_their_nearness_with_noise_that_moves_no_code(bits: int) -> None:
    grid = Grid(bits, 16, True, torch.float32)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quantizer = GumbelSoftmax.start(weight, grid, STARTS["minmax"])
    codes = quantizer.freeze().codes
    assert torch.equal(codes, nearest(weight, grid))
    noise, moving = [], 0
    for code, logits in zip(
        codes.flatten().tolist(), quantizer.logits.detach().view(64 * 64, -1).tolist(), strict=True
    ):
        among = [k for k, c in enumerate(candidates(code, grid.levels)) if 0 <= c <= grid.levels]
        near = {k: -((candidates(code, grid.levels)[k] - code) ** 2) / 2 for k in among}
        mean = sum(near.values()) / len(near)
        left = [logits[k] / 0.01 - 6 * (near[k] - mean) for k in among]
        if max(map(abs, left)) < 1e-9:
            moving += 1
        else:
            noise += left
    assert np.mean(noise) == pytest.approx(0, abs=0.05)
    assert np.std(noise) == pytest.approx(1, abs=0.05)
    assert 0.01 < moving / 64**2 < 0.05


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("progress", [0.0, 0.4])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("name", ["logits", "scale"])
def test_gradients_are_finite_differences(
    name: str, bits: int, progress: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gsq, "store_through", lambda x, dtype: x)  # all else is smooth
    weight, _ = layer()
    quantizer = GumbelSoftmax.start(torch.from_numpy(weight), Grid(bits, 4, True, torch.float32), STARTS["minmax"])
    quantizer.scale.data *= sign
    upstream = torch.from_numpy(np.random.default_rng(1).normal(size=weight.shape))
    (quantizer(progress) * upstream).sum().backward()

    @torch.no_grad()
    def value() -> float:
        return float((quantizer(progress) * upstream).sum())

    assert_finite_differences(quantizer.get_parameter(name), value)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [8, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_the_grid_however_far_logits_go(bits: int, size: int | None, symmetric: bool) -> None:
    grid = Grid(bits, size, symmetric)
    weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 1e4
    quantizer = GumbelSoftmax.start(weight, grid, STARTS["minmax"])
    before = quantizer.freeze().codes.int()
    quantizer.logits.data = torch.randn(quantizer.logits.shape, generator=torch.Generator().manual_seed(1))
    quantizer.scale.data *= -1
    quantizer.after_step()
    found = quantizer.freeze()
    moved = (found.codes.int() - before).abs()
    assert int(found.codes.min()) == 0
    assert int(found.codes.max()) == grid.levels
    assert int(moved.max()) == (3 if bits == 2 else 2)
    assert bool((found.scale < 0).all())
    assert torch.equal(quantizer(1.0), found.dequantize())
    soft = quantizer.soft_codes(0.2)
    assert float(soft.detach().min()) >= 0
    assert float(soft.detach().max()) <= grid.levels


@torch.no_grad()
def test_the_softmax_hardens_into_what_is_stored() -> None:
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    quantizer = GumbelSoftmax.start(weight, Grid(4, 16, True), STARTS["minmax"])
    quantizer.logits.data = torch.randn(quantizer.logits.shape, generator=torch.Generator().manual_seed(1))
    far = [float((quantizer(progress) - quantizer(1.0)).abs().mean()) for progress in (0.0, 0.5, 0.999)]
    quantizer.logits.data /= 100
    assert far[0] > far[1] > far[2]
    assert float((quantizer(0.0) - quantizer(1.0)).abs().mean()) > 10 * far[0]


def test_noise_is_gumbels_and_the_same_for_a_weight_and_a_progress() -> None:
    weight, grid = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), Grid(2, 16, True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (GumbelSoftmax.start(weight, grid, STARTS["minmax"]) for _ in range(2))
    other = GumbelSoftmax.start(weight + 1e-3, grid, STARTS["minmax"])
    noise = first.noise(0.25)
    assert torch.equal(noise, again.noise(0.25))
    assert torch.equal(first(0.25), again(0.25))
    assert not torch.equal(first(0.25), first(0.26))
    for different in (first.noise(0.26), other.noise(0.25)):
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), different.flatten()]))[0, 1])) < 0.05
    assert float(noise.mean()) == pytest.approx(np.euler_gamma, abs=0.05)
    assert float(noise.var()) == pytest.approx(np.pi**2 / 6, abs=0.1)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_the_same_numbers_in_another_shape_have_other_noise() -> None:
    weight = torch.randn(8, 16)
    assert gsq.seed_of(weight) == gsq.seed_of(weight.clone()) != gsq.seed_of(weight.view(16, 8))
    assert gsq.seed_of(weight) == gsq.seed_of(weight.T.contiguous().T)


@pytest.mark.parametrize("symmetric", [True, False])
def test_noise_adds_next_to_nothing_to_a_group_of_zeros(symmetric: bool) -> None:
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight[1, :8] = 0
    soft = GumbelSoftmax.start(weight, Grid(2, 8, symmetric), STARTS["searched"])(0.0).detach()
    assert float(soft[1, :8].abs().max()) < 1e-6
    assert float((soft - weight)[1, 8:].abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_either_sign_stay_numbers_that_can_be_stored(dtype: torch.dtype) -> None:
    quantizer = GumbelSoftmax.start(torch.randn(6, 8), Grid(2, 8, True, dtype), STARTS["minmax"])
    quantizer.scale.data = torch.tensor([0.0, 1e-46, -1e-46, 1e39, -1e39, -0.5]).view(6, 1)
    quantizer.after_step()
    stored = quantizer.freeze().scale.flatten()
    assert torch.isfinite(stored).all()
    assert stored.sign().tolist() == [1, 1, 1, 1, -1, -1]  # in float32 -1e-46 is -0
    assert torch.equal(quantizer(1.0), quantizer.freeze().dequantize())
    quantizer.scale.data[0] = torch.nan
    quantizer.after_step()
    assert bool(torch.isnan(quantizer.scale[0]))  # for the fit to refuse
