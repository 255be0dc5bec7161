"""Quantized folders, as a format wrote them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from source_files import llama_config, random_model, save

from logitwise.errors import FormatError, SourceError
from logitwise.formats import FORMATS
from logitwise.grid import Grid, Quantized, codes_of, freeze, scale_of_range
from logitwise.source import FolderSource, QuantizedFolder, open_source

FORMAT = FORMATS["compressed-tensors"]
KEPT = "model.layers.0.mlp.down_proj"


def round_to_nearest(weight: torch.Tensor, grid: Grid) -> Quantized:
    groups = weight.view(weight.shape[0], grid.groups(weight.shape[1]), -1)
    scale, zero = scale_of_range(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), grid)
    return freeze(codes_of(weight, scale, zero, grid), scale, zero, grid)


def quantize(folder: Path, grid: Grid) -> dict[str, Quantized]:
    """Every projection of the folder but one, in place."""
    stored = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in stored if "_proj" in name and KEPT not in name]
    quantized = {module: round_to_nearest(stored.pop(f"{module}.weight").float(), grid) for module in modules}
    for module, one in quantized.items():
        stored |= FORMAT.tensors(module, one)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder, FORMAT.quantization_config(dict.fromkeys(modules, grid), ["lm_head", KEPT]))
    return quantized


def describe(folder: Path, quantization: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize("grid", [Grid(3, 16, False), Grid(4, None, True, torch.float32)])
def test_weights_come_back_as_they_were_written(tmp_path: Path, grid: Grid):
    model = random_model(llama_config())
    written = quantize(save(model, tmp_path), grid)
    source = open_source(tmp_path)
    assert isinstance(source, QuantizedFolder)
    assert {source.grid(f"{module}.weight") for module in written} == {grid}
    assert source.quantization_config["quant_method"] == "compressed-tensors"
    assert sorted(source.names()) == sorted(model.state_dict())
    assert source.unused == []
    for name, tensor in model.state_dict().items():
        one, read = written.get(name.removesuffix(".weight")), source.quantized(name)
        assert source.shape(name) == tuple(tensor.shape)
        if one is None:
            assert read is None
            assert torch.equal(source.read(name), tensor)
        else:
            assert read is not None
            assert read.grid == grid
            assert torch.equal(read.codes, one.codes)
            assert torch.equal(read.zero, one.zero)
            assert source.read(name).dtype == torch.float32
            assert torch.equal(source.read(name), one.dequantize())


def test_kept_tensors_stay_in_the_type_of_the_file(tmp_path: Path):
    quantize(save(random_model(llama_config()).bfloat16(), tmp_path), Grid(4, 16, False))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    source = open_source(tmp_path)
    assert source.read(f"{KEPT}.weight").dtype == torch.bfloat16
    assert source.read("model.layers.0.mlp.up_proj.weight").dtype == torch.float32


def test_full_precision_folder_is_not_quantized(tmp_path: Path):
    assert type(open_source(save(random_model(llama_config()), tmp_path))) is FolderSource


def test_other_methods_are_refused_by_name(tmp_path: Path):
    describe(save(random_model(llama_config()), tmp_path), {"quant_method": "hqq", "bits": 4})
    with pytest.raises(SourceError) as refused:
        open_source(tmp_path)
    assert "is quantized by hqq" in str(refused.value)
    assert "not read yet" in str(refused.value)


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [("weight_shape", "weight_shape is refused\n  why:  it is missing"), ("weight_packed", "weight_packed")],
)
def test_missing_part_of_a_quantized_weight(tmp_path: Path, suffix: str, expected: str):
    quantize(save(random_model(llama_config()), tmp_path), Grid(4, 16, False))
    stored = load_file(tmp_path / "model.safetensors")
    del stored[f"model.layers.1.mlp.up_proj.{suffix}"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((SourceError, FormatError)) as refused:
        open_source(tmp_path).read("model.layers.1.mlp.up_proj.weight")
    assert f"model.layers.1.mlp.up_proj.{expected}" in str(refused.value)
