"""Compiled quantizers are what they are uncompiled."""

import gc
import shutil
import weakref

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model

from logitwise import fit, fused
from logitwise.fit import Window
from logitwise.grid import Grid
from logitwise.quantizers import QUANTIZERS, STARTS, Quantizer
from logitwise.skeleton import Skeleton

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [name for name, method in QUANTIZERS.items() if method.learns and not method.reads_progress]
)
def test_a_compiled_weight_and_its_gradients_are_those_of_the_method(
    method: str, dtype: torch.dtype, device: str
) -> None:
    for grid, shape in [(Grid(2, 16, False), (24, 64)), (Grid(3, None, True), (24, 64)), (Grid(2, 16, False), (8, 32))]:
        quantizer = learned(method, grid, shape, device)
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        expected = quantizer(0.0).to(dtype)
        true = torch.autograd.grad(expected, list(quantizer.parameters()), upstream)
        weight = fused.compiled_weight(quantizer, dtype)
        found = torch.autograd.grad(weight, list(quantizer.parameters()), upstream)
        # On a GPU a division may differ in its last bit, and a code with it where it is as near to the next.
        same = torch.isclose(weight, expected, rtol=1e-6)
        assert torch.equal(weight, expected) if device == "cpu" else (~same).sum() <= 1
        for one, other in zip(found, true, strict=True):
            assert not bool(same.all()) or torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_is_compiled_holds_no_quantizer(device: str) -> None:
    quantizer = learned("flexround", Grid(2, 16, False), (24, 64), device)
    fused.compiled_weight(quantizer).sum().backward()
    gone = weakref.ref(quantizer)
    del quantizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("blocks", "steps", "matrices", "weights", "expected"),
    [
        (12, 300, 7, 147_456 * 12, False),  # a model of 22M parameters, each block once
        (12, 4000, 7, 147_456 * 12, False),  # all its blocks together
        (12, 12_000, 7, 147_456 * 12, True),  # the same for long
        (32, 300, 7, 218_000_000, True),  # one of 8B
    ],
)
def test_compiling_pays_in_long_runs_and_for_large_models(
    blocks: int, steps: int, matrices: int, weights: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: name)
    assert fused.pays(blocks * steps * matrices, blocks * steps * weights) == expected
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert not fused.pays(blocks * steps * matrices, blocks * steps * weights)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_window_that_is_compiled_learns_what_one_that_is_not_learns(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, calls = [], [0]
    plainly = fit.compiled_weight

    def counting(quantizer: Quantizer, dtype: torch.dtype) -> torch.Tensor:
        calls[0] += 1
        return plainly(quantizer, dtype)

    monkeypatch.setattr(fit, "compiled_weight", counting)
    for compiled in (True, False):
        skeleton = Skeleton(MemorySource(tiny_model("llama")), torch.device(device), torch.float32)
        ids = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
        window = Window(skeleton, range(1, 3), skeleton.calls(12), lambda slot: False, compiled)
        quantizers = window.quantizers(QUANTIZERS["flexround"], lambda _: Grid(3, 16, False), STARTS["searched"])
        window.learn(quantizers)(skeleton.embed(ids), 0.0).square().mean().backward()
        found.append([p.grad for quantizer in quantizers.values() for p in quantizer.parameters()])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-7) for one, other in zip(*found, strict=True))
    assert any(bool(gradient.abs().max() > 0) for gradient in found[0])
    assert calls[0] >= 14  # of the compiled window alone, at least once for each slot
