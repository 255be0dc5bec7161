"""Random quantized layers and models whose every projection is one, for the tests of formats."""

from pathlib import Path

import torch
from source_files import llama_config, random_model
from transformers import PreTrainedModel

from logitwise.formats import Format
from logitwise.formats.checkpoint import write_checkpoint, write_config
from logitwise.grid import Grid, Quantized


def random_quantized(out_features: int, in_features: int, grid: Grid, seed: int = 0) -> Quantized:
    """Codes and zero points from end to end; scales of both signs, as SignRound has them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, grid.groups(in_features))
    codes = torch.randint(0, grid.levels + 1, (out_features, in_features), generator=generator)
    zero = torch.randint(0, grid.levels + 1, shape, generator=generator)
    zero.view(-1)[:2] = torch.tensor([0, grid.levels])
    scale = torch.randn(shape, generator=generator) / 2**grid.bits
    minimum = torch.randn(shape, generator=generator).to(grid.scale_dtype) if grid.minimum else None
    if grid.symmetric or grid.minimum:
        zero = torch.full_like(zero, grid.middle if grid.symmetric else 0)
    return Quantized(codes.to(torch.uint8), scale.to(grid.scale_dtype), zero.to(torch.uint8), grid, minimum)


def assert_same(a: Quantized, b: Quantized) -> None:
    """Equal to the last bit, types included."""
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale) and a.scale.dtype == b.scale.dtype
    assert torch.equal(a.zero, b.zero)
    assert a.grid == b.grid


def write_model(form: Format, grid: Grid, folder: Path) -> tuple[PreTrainedModel, dict[str, Quantized]]:
    """A tiny Llama in a folder; the model in full precision, and every projection by its weight's name."""
    model = random_model(llama_config(hidden_size=64))
    state = model.state_dict()
    written = {
        name: random_quantized(*state[name].shape, grid, seed)
        for seed, name in enumerate(name for name in state if "_proj" in name)
    }
    for name, one in written.items():
        del state[name]
        state |= form.tensors(name.removesuffix(".weight"), one)
    write_checkpoint(folder, state.items())
    grids = {name.removesuffix(".weight"): grid for name in written}
    described = form.quantization_config(grids, ["lm_head"])
    write_config(folder, model.config, described, torch.float32, form.config_keys)
    return model, written
