"""Every format gives back what was written, bit for bit, for any layer that it holds."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from quantized_files import assert_same, random_quantized

from logitwise.formats import FORMATS
from logitwise.formats.safetensors import SafetensorsFormat
from logitwise.grid import Grid

GRIDS = [
    Grid(bits, group_size, symmetric, dtype)
    for bits in range(2, 9)
    for group_size in (None, 16, 32, 64, 128)
    for symmetric in (False, True)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
]


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if isinstance(form, SafetensorsFormat)])
@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 6), groups=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_what_is_read_is_what_was_written(name: str, data: st.DataObject, rows: int, groups: int, seed: int) -> None:
    form, prefix = FORMATS[name], "model.layers.0.mlp.up_proj"
    grid = data.draw(st.sampled_from([grid for grid in GRIDS if form.holds(grid) is None]))
    outputs, inputs = 32 * rows, groups * max(32, grid.group_size or 32)
    assume(form.holds_layer(prefix, outputs, inputs, False, grid) is None)
    quantized = random_quantized(outputs, inputs, grid, seed)
    tensors = form.tensors(prefix, quantized)
    read = form.read(prefix, tensors, grid)
    assert_same(read, quantized)
    assert torch.equal(read.dequantize(), quantized.dequantize())
    assert sum(tensor.nbytes for tensor in tensors.values()) * 8 >= form.bits_stored(grid, outputs, inputs)
