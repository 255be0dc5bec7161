"""Compiled quantizers are what they are uncompiled."""

import gc
import shutil
import weakref

import pytest
import torch

from logitwise import fused
from logitwise.grid import Grid
from logitwise.quantizers import QUANTIZERS, STARTS, Quantizer

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++"))


def learned(method: str, grid: Grid, shape: tuple[int, int], device: str) -> Quantizer:
    """A quantizer away from its start."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(device)
    quantizer = QUANTIZERS[method].start(weight, grid, STARTS["searched"])
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.sub_(0.02 * torch.rand(parameter.shape, generator=generator).to(device))
    return quantizer


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("method", [name for name, method in QUANTIZERS.items() if not method.reads_progress])
def test_a_compiled_weight_and_its_gradients_are_those_of_the_method(method: str, device: str) -> None:
    for grid, shape in [(Grid(2, 16, False), (24, 64)), (Grid(3, None, True), (24, 64)), (Grid(2, 16, False), (8, 32))]:
        quantizer = learned(method, grid, shape, device)
        if not list(quantizer.parameters()):
            return
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        expected = quantizer(0.0)
        true = torch.autograd.grad(expected, list(quantizer.parameters()), upstream)
        weight = fused.compiled_weight(quantizer)
        found = torch.autograd.grad(weight, list(quantizer.parameters()), upstream)
        assert torch.equal(weight, expected)
        for one, other in zip(found, true, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_is_compiled_holds_no_quantizer(device: str) -> None:
    quantizer = learned("flexround", Grid(2, 16, False), (24, 64), device)
    fused.compiled_weight(quantizer).sum().backward()
    gone = weakref.ref(quantizer)
    del quantizer
    gc.collect()
    assert gone() is None


def test_on_a_processor_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "compiled_weight", lambda quantizer: pytest.fail("compiled"))
    quantizer = learned("flexround", Grid(2, 16, False), (24, 64), "cpu")
    assert torch.equal(fused.learned_weight(quantizer, 0.0), quantizer(0.0))
