"""A source with changed tensors reads as the other does, but for these."""

import torch
from helpers import MemorySource, tiny_model

from logitwise.source.rewritten import Changes, Rewritten


def test_only_what_is_changed_is_read_otherwise() -> None:
    source = MemorySource(tiny_model("llama"))
    source.dtype, source.state = torch.bfloat16, {name: x.bfloat16() for name, x in source.state.items()}
    norm, up, down = (f"model.layers.1.{x}.weight" for x in ("input_layernorm", "mlp.up_proj", "mlp.down_proj"))
    generator = torch.Generator().manual_seed(0)
    inner, outer = torch.rand(80, generator=generator), torch.rand(48, generator=generator)
    other = torch.rand(48, generator=generator).bfloat16()
    rewritten = Rewritten(source, Changes({norm: other}, {up: inner}, {up: outer, down: inner}))
    assert (rewritten.name, rewritten.config, rewritten.dtype) == (source.name, source.config, torch.bfloat16)
    assert rewritten.names() == source.names()
    assert rewritten.size_bytes == source.size_bytes
    assert rewritten.unused == source.unused
    for name in source.names():
        assert rewritten.shape(name) == source.shape(name)
        if name not in (norm, up, down):
            assert rewritten.read(name).dtype == torch.bfloat16
            assert torch.equal(rewritten.read(name), source.read(name))
    assert torch.equal(rewritten.read(norm), other)
    for row, column in ((3, 5), (79, 47)):
        expected = float(source.read(up)[row, column]) * float(inner[row]) * float(outer[column])
        torch.testing.assert_close(rewritten.read(up)[row, column], torch.tensor(expected))
    torch.testing.assert_close(rewritten.read(down), source.read(down).float() * inner)


def test_read_is_a_copy() -> None:
    source = MemorySource(tiny_model("llama"))
    name = "model.layers.0.input_layernorm.weight"
    rewritten = Rewritten(source, Changes({name: torch.ones(48)}))
    rewritten.read(name).zero_()
    assert bool((rewritten.read(name) == 1).all())
