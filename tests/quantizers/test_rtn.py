"""Round to nearest is nearest."""

import pytest
import torch

from logitwise.grid import Grid
from logitwise.quantizers import STARTS
from logitwise.quantizers.rtn import RoundToNearest


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_other_code_is_nearer(bits: int, symmetric: bool, start: str) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(bits))
    quantized = RoundToNearest.start(weight, Grid(bits, 8, symmetric), STARTS[start]).freeze()
    scale, zero = (x.double().repeat_interleave(8, 1) for x in (quantized.scale, quantized.zero))
    every = torch.stack([scale * (code - zero) for code in range(2**bits)])
    nearest = (every - weight.double()).abs().amin(0)
    found = (quantized.dequantize().double() - weight.double()).abs()
    assert torch.allclose(found, nearest, rtol=0, atol=1e-6)


def test_nothing_is_learned() -> None:
    quantizer = RoundToNearest.start(torch.randn(2, 8), Grid(4, 8, False), STARTS["minmax"])
    assert not quantizer.learns
    assert quantizer.groups() == {}
    assert list(quantizer.parameters()) == []
    assert torch.equal(quantizer(0.0), quantizer(1.0))
