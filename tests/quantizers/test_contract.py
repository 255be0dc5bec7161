"""What every method promises, over the whole registry."""

import tomllib
from dataclasses import replace
from importlib import resources

import pytest
import torch
from torch import Tensor

from logitwise.errors import RecipeError
from logitwise.grid import Grid
from logitwise.quantizers import INFORMED, QUANTIZERS, STARTS, Quantizer
from logitwise.quantizers.starts import Start, StartPoint, of_share
from logitwise.recipe import Recipe

GRIDS = [
    Grid(bits, size, symmetric, dtype)
    for bits in (2, 3, 4, 8)
    for size in (8, None)
    for symmetric in (True, False)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
]


def shrunken(weight: Tensor, grid: Grid) -> StartPoint:
    """A start that clips, without the search's time."""
    return of_share(weight, grid, torch.full((weight.shape[0], grid.groups(weight.shape[1])), 0.8))


LEARNED = [name for name, method in QUANTIZERS.items() if method.learns]


def id_of(grid: Grid) -> str:
    size = "channel" if grid.group_size is None else f"g{grid.group_size}"
    return f"{grid.bits}-{size}-{'sym' if grid.symmetric else 'asym'}-{str(grid.scale_dtype)[6:]}"


over_grids = pytest.mark.parametrize("grid", GRIDS, ids=id_of)
over_methods = pytest.mark.parametrize("method", QUANTIZERS)
over_learned = pytest.mark.parametrize("method", LEARNED)
over_starts = pytest.mark.parametrize("start", STARTS)


def awkward(seed: int = 0) -> Tensor:
    """Weights with a row and a group of zeros, constant rows, one-sided rows, tiny and large ones."""
    weight = 0.1 * torch.randn(9, 24, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    weight[1, 8:16] = 0
    weight[2] = 0.25
    weight[3] = -0.25
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs()
    weight[6, 5] = 1e4
    weight[7] *= 1e-6
    weight[7, ::5] = 0
    return weight


def disturb(quantizer: Quantizer, seed: int, size: float = 0.05) -> None:
    """What an optimiser may do to the parameters in a step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    quantizer.after_step()


@over_grids
@over_methods
def test_forward_at_the_end_is_what_is_stored(method: str, grid: Grid) -> None:
    quantizer = QUANTIZERS[method].start(awkward(), grid, shrunken)
    for step in range(3):
        quantized = quantizer.freeze()
        assert torch.equal(quantizer(1.0), quantized.dequantize())  # NaN is equal to nothing
        assert quantizer(1.0).dtype == torch.float32
        assert quantized.codes.dtype == torch.uint8
        assert int(quantized.codes.max()) <= grid.levels
        assert int(quantized.zero.max()) <= grid.levels
        assert quantized.scale.dtype == grid.scale_dtype
        assert torch.isfinite(quantized.scale).all()
        assert (quantized.scale != 0).all()
        assert quantized.scale.shape == quantized.zero.shape == (9, grid.groups(24))
        assert quantized.grid == grid
        if grid.symmetric:
            assert (quantized.zero == grid.middle).all()
        disturb(quantizer, step)


@over_learned
@over_grids
def test_a_long_way_from_the_start_what_is_stored_still_holds(method: str, grid: Grid) -> None:
    quantizer = QUANTIZERS[method].start(awkward(), grid, STARTS["minmax"])
    for step in range(2):
        disturb(quantizer, step, size=1.0)
        quantized = quantizer.freeze()
        assert torch.equal(quantizer(1.0), quantized.dequantize())
        assert torch.isfinite(quantized.scale).all()
        assert (quantized.scale != 0).all()
        assert int(quantized.codes.max()) <= grid.levels


@over_learned
@over_grids
def test_a_fit_starts_at_round_to_nearest(method: str, grid: Grid) -> None:
    if method == "signround" and grid.symmetric:
        grid = replace(grid, symmetric=False)  # its full-range symmetric grid is another one; see test_signround.py
    weight = awkward()[[1, 2, 3, 4, 5, 6, 8]]
    plain = QUANTIZERS["rtn"].start(weight, grid, shrunken).freeze()
    found = QUANTIZERS[method].start(weight, grid, shrunken).freeze()
    filled = (weight.view(7, plain.scale.shape[1], -1) != 0).any(-1)  # the scale of a group of zeros says nothing
    assert torch.equal(plain.zero, found.zero)
    if method in ("flexround", "lrq") and grid.scale_dtype == torch.float32:
        # The logarithm of a float32 scale comes back but for its last digits, so that a tie may fall to the other side.
        assert torch.allclose(plain.scale, found.scale, rtol=2e-6, atol=0)
        error, plain_error = ((q.dequantize() - weight).abs() for q in (found, plain))
        assert torch.allclose(error, plain_error, rtol=0, atol=2e-6 * float(weight.abs().max()))
    else:
        assert torch.equal(plain.scale[filled], found.scale[filled])
        assert torch.equal(plain.dequantize(), found.dequantize())
        assert torch.equal(plain.codes, found.codes)


@over_methods
@over_starts
def test_the_same_start_twice_is_the_same_to_the_bit(method: str, start: str) -> None:
    grid = Grid(3, 8, False)
    torch.manual_seed(0)
    first = QUANTIZERS[method].start(awkward(), grid, STARTS[start])
    torch.manual_seed(1)
    second = QUANTIZERS[method].start(awkward(), grid, STARTS[start])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first(0.0), second(0.0))
    assert torch.equal(first.freeze().codes, second.freeze().codes)


@over_methods
def test_the_weight_itself_is_not_changed(method: str) -> None:
    weight = awkward()
    quantizer = QUANTIZERS[method].start(weight, Grid(2, 8, False), STARTS["searched"])
    disturb(quantizer, 0)
    quantizer(0.5)
    quantizer.freeze()
    assert torch.equal(weight, awkward())


@over_methods
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_and_rows_do_not_meet(method: str, symmetric: bool) -> None:
    grid = Grid(4, 8, symmetric)
    whole = QUANTIZERS[method].start(awkward(), grid, STARTS["searched"])(1.0)
    assert torch.equal(whole[0], torch.zeros(24))
    assert torch.equal(whole[1, 8:16], torch.zeros(8))
    alone = QUANTIZERS[method].start(awkward()[6:7], grid, STARTS["searched"])(1.0)
    assert torch.equal(whole[6], alone[0])


@pytest.mark.parametrize("method", ["flexround", "lrq", "signround", "gsq"])
@pytest.mark.parametrize("start", [*STARTS, *INFORMED])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_that_moves_makes_no_weight_of_zeros(method: str, start: str, symmetric: bool) -> None:
    """The scale of a group of zeros says nothing: a code more or less must not be a step of it."""
    quantizer = QUANTIZERS[method].start(awkward(), Grid(4, 8, symmetric), start_of(start))
    with torch.no_grad():
        for parameter in quantizer.groups()["rounding"]:
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    whole = quantizer(1.0)
    assert whole[0].abs().max() < 1e-3
    if start != "gptq":  # whose errors are made up for there
        assert whole[1, 8:16].abs().max() < 1e-3


def start_of(name: str) -> Start:
    """One of the starts; those that know what inputs are like know of inputs that are not independent."""
    if name in STARTS:
        return STARTS[name]
    inputs = torch.randn(64, 24, generator=torch.Generator().manual_seed(5))
    inputs[:, 1:] += inputs[:, :-1]
    return lambda weight, grid: INFORMED[name](weight, grid, inputs.T @ inputs / len(inputs))


@over_methods
@over_starts
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_overflows_is_refused(method: str, start: str, symmetric: bool) -> None:
    weight = awkward()
    weight[6, 5] = -4e7
    with pytest.raises(RecipeError, match=r"does not fit float16\n.*65504\n.*--scale-dtype bfloat16 or float32"):
        QUANTIZERS[method].start(weight, Grid(8, 8, symmetric), STARTS[start])
    quantizer = QUANTIZERS[method].start(weight, Grid(8, 8, symmetric, torch.bfloat16), STARTS[start])
    assert torch.isfinite(quantizer(1.0)).all()


@over_methods
def test_every_parameter_has_one_role_and_each_role_its_settings(method: str) -> None:
    quantizer = QUANTIZERS[method].start(awkward(), Grid(4, 8, False), STARTS["minmax"])
    listed = [id(parameter) for parameters in quantizer.groups().values() for parameter in parameters]
    assert sorted(listed) == sorted(id(parameter) for parameter in quantizer.parameters())
    assert quantizer.learns == bool(listed)
    shipped = tomllib.loads((resources.files("logitwise") / "recipes" / f"{method}.toml").read_text("utf-8"))
    assert set(shipped) - {"stages"} == {"learning"}
    assert set(shipped["learning"]) == set(quantizer.groups())
    recipe = Recipe(method=method)
    for role in quantizer.groups():
        assert recipe.learning_of(role).rate == shipped["learning"][role]["rate"]


@over_learned
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_reaches_every_parameter(method: str, symmetric: bool) -> None:
    quantizer = QUANTIZERS[method].start(awkward(), Grid(3, 8, symmetric), STARTS["searched"])
    disturb(quantizer, 0)
    upstream = torch.randn(9, 24, generator=torch.Generator().manual_seed(1))
    (quantizer(0.3) * upstream).sum().backward()
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@over_learned
def test_after_step_is_idempotent_and_bounds_hold(method: str) -> None:
    quantizer = QUANTIZERS[method].start(awkward(), Grid(3, 8, False), STARTS["searched"])
    disturb(quantizer, 0, size=3.0)
    once = [parameter.detach().clone() for parameter in quantizer.parameters()]
    quantizer.after_step()
    assert all(torch.equal(a, b) for a, b in zip(once, quantizer.parameters(), strict=True))
