"""AutoRound's own config, as auto-round 0.16.1 writes it: packings, settings of single layers, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import assert_same, random_quantized
from source_files import llama_config, random_model, tokenizer

from logitwise.errors import FormatError, SourceError
from logitwise.evaluation import inspect
from logitwise.formats.auto_round import PACKINGS, packed_as
from logitwise.formats.awq import Awq
from logitwise.formats.checkpoint import write_checkpoint, write_config
from logitwise.formats.gptq import V1, V2, Gptq
from logitwise.grid import Grid, Quantized
from logitwise.source import QuantizedFolder, open_source

LAYER = "model.layers.0.mlp.up_proj"
CONFIG = {
    "amp": False,
    "autoround_version": "0.16.1",
    "bits": 3,
    "block_name_to_quantize": "model.layers",
    "data_type": "int",
    "enable_quanted_input": False,
    "group_size": 32,
    "iters": 2,
    "packing_format": "auto_round:auto_gptq",
    "quant_method": "auto-round",
    "sym": True,
}


def within_v1(quantized: Quantized) -> Quantized:
    """With no zero point of 0, which v1 has no place for and AutoRound raises to 1."""
    return replace(quantized, zero=quantized.zero.clamp(min=1))


@pytest.mark.parametrize(
    ("packing", "same", "suffixes"),
    [
        ("auto_round", Gptq(V2), {"qweight", "qzeros", "scales"}),
        ("auto_round:auto_gptq", Gptq(V1), {"qweight", "qzeros", "scales"}),
        ("auto_round:gptq", Gptq(V1), {"qweight", "qzeros", "scales"}),
        ("auto_round:gptqmodel", Gptq(V2), {"qweight", "qzeros", "scales", "g_idx"}),
        ("auto_round:auto_awq", Awq(), {"qweight", "qzeros", "scales"}),
        ("auto_round:awq", Awq(), {"qweight", "qzeros", "scales"}),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_packings(packing: str, same: Gptq | Awq, suffixes: set[str], symmetric: bool):
    config = CONFIG | {"packing_format": packing, "bits": 4, "sym": symmetric}
    form, grid = packed_as(config), Grid(4, 32, symmetric)
    assert form.grids_of(config, torch.float16)(LAYER) == grid
    quantized = within_v1(random_quantized(32, 64, grid))
    assert bool((quantized.scale < 0).any())
    stored = form.tensors(LAYER, quantized)
    assert set(stored) == {f"{LAYER}.{suffix}" for suffix in suffixes}
    theirs = same.tensors(LAYER, quantized)
    assert all(torch.equal(stored[name], theirs[name]) for name in stored)
    assert_same(form.read(LAYER, stored, grid), quantized)
    extra = stored | {f"{LAYER}.qscales": torch.zeros(1)}
    with pytest.raises(FormatError, match=r"qscales is refused\n.*no other tensor"):
        form.read(LAYER, extra, grid)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_number_of_bits_in_the_dense_stream(bits: int):
    config = CONFIG | {"bits": bits}
    form, grid = packed_as(config), Grid(bits, 32, True)
    assert form.grids_of(config, torch.float16)(LAYER) == grid
    quantized = random_quantized(64, 96, grid)
    stored = form.tensors(LAYER, quantized)
    assert stored[f"{LAYER}.qweight"].shape == (3 * bits, 64)
    words = [int(word) & 0xFFFFFFFF for word in stored[f"{LAYER}.qweight"][:, 7]]
    whole = sum(word << (32 * place) for place, word in enumerate(words))
    assert [whole >> (bits * i) & grid.levels for i in range(96)] == quantized.codes[7].tolist()
    assert_same(form.read(LAYER, stored, grid), quantized)
    assert "multiple of 32" in str(form.holds_layer(LAYER, 40, 96, False, Grid(5, 32, True)))


def test_zero_points_that_v1_cannot_tell_are_refused():
    form, grid = PACKINGS["auto_round:auto_gptq"], Grid(4, 32, False)
    stored = form.tensors(LAYER, within_v1(random_quantized(32, 64, grid)))
    stored[f"{LAYER}.qzeros"][0, 0] |= 0xF
    with pytest.raises(FormatError, match=r"qzeros is refused\n.*out of range"):
        form.read(LAYER, stored, grid)


def test_layers_with_settings_of_their_own():
    config = CONFIG | {
        "extra_config": {
            r".*layers\.1\.mlp.*": {"bits": 4, "sym": False},
            r"layers\.1\.": {"bits": 8},
            "model.layers.0.mlp.down_proj": {"bits": 16},
            "model.layers.1.mlp.gate_proj": {"bits": 2, "group_size": -1},
            "model.layers.0.mlp.gate": {"bits": 16},  # a router, and no pattern of gate_proj
            "lm_head": {"bits": 8, "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16, "act_sym": None},
        }
    }
    grid_of = packed_as(config).grids_of(config, torch.float16)
    assert grid_of("model.layers.0.mlp.up_proj") == Grid(3, 32, True)
    assert grid_of("model.layers.0.mlp.gate_proj") == Grid(3, 32, True)
    assert grid_of("model.layers.1.mlp.up_proj") == Grid(4, 32, False)
    assert grid_of("model.layers.1.mlp.gate_proj") == Grid(2, None, True)  # its name before any pattern
    assert grid_of("model.layers.1.self_attn.q_proj") == Grid(8, 32, True)
    assert grid_of("lm_head") == Grid(8, 64, True)
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.down_proj has no grid\n.*full precision"):
        grid_of("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing_format": "auto_round:fp8_static"}, r"packing_format is not read\n.*'auto_round:auto_gptq'"),
        ({"packing_format": None}, "packing_format is not read"),
        ({"packing_format": ["auto_round"]}, "packing_format is not read"),
        ({"data_type": "mx_fp"}, "data_type is not read\n.*'mx_fp'"),
        ({"act_bits": 8}, "act_bits is not read\n.*8"),
        ({"super_bits": 6}, "super_bits is not read"),
        ({"rotation_config": {"mode": "hadamard"}}, "rotation_config is not read"),
        ({"surprise": 1}, "quantization_config: surprise is not read"),
        ({"bits": "4"}, "bits is not read"),
        ({"bits": 9}, "8 bits, not 9"),
        ({"group_size": None}, "group_size is not read"),
        ({"sym": None}, "sym is not read"),
        ({"extra_config": ["lm_head"]}, "extra_config is not read"),
        ({"extra_config": {"lm_head": 4}}, "extra_config: lm_head is not read"),
        ({"extra_config": {"lm_head": {"bits": 9}}}, "8 bits, not 9"),
        ({"extra_config": {"lm_head": {"act_bits": 8}}}, "extra_config: lm_head: act_bits is not read"),
        ({"extra_config": {"lm_head": {"odd": 8}}}, "extra_config: lm_head: odd is not read"),
        ({"extra_config": {"*": {"bits": 4}}}, r"extra_config: \* is not read\n.*no regular expression"),
    ],
)
def test_what_is_not_read_is_refused(change: dict[str, Any], message: str):
    config = CONFIG | change
    with pytest.raises(FormatError, match=message):
        packed_as(config).grids_of(config, torch.float16)


def write(folder: Path, config: dict[str, Any]) -> dict[str, Quantized]:
    """A tiny Llama as AutoRound writes it, one layer of it in full precision; its quantized layers."""
    model = random_model(llama_config(hidden_size=64))
    state, form = model.state_dict(), packed_as(config)
    grid_of, written = form.grids_of(config, torch.float16), {}
    for seed, name in enumerate([name for name in state if "_proj" in name and "0.mlp.down_proj" not in name]):
        prefix = name.removesuffix(".weight")
        written[name] = within_v1(random_quantized(*state[name].shape, grid_of(prefix), seed))
        del state[name]
        state |= form.tensors(prefix, written[name])
    write_checkpoint(folder, state.items())
    write_config(folder, model.config, config, torch.bfloat16)
    tokenizer().save_pretrained(folder)
    return written


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_checkpoint_is_read_and_its_layers_put_back(packing: str, tmp_path: Path):
    config = CONFIG | {"packing_format": packing, "bits": 4}
    config["extra_config"] = {
        "model.layers.0.mlp.down_proj": {"bits": 16},
        r".*layers\.1\.mlp.*": {"group_size": 16, "sym": False},
    }
    (tmp_path / "came").mkdir()
    written = write(tmp_path / "came", config)
    source = open_source(tmp_path / "came")
    assert isinstance(source, QuantizedFolder)
    assert source.unused == []
    assert source.grid("model.layers.0.mlp.down_proj.weight") is None
    for name, one in written.items():
        found = source.quantized(name)
        assert found is not None
        assert_same(found, one)
    assert "asymmetric" in inspect(tmp_path / "came").grid
    name = "model.layers.1.mlp.up_proj.weight"
    changed = replace(written[name], codes=written[name].codes ^ 1)
    (tmp_path / "made").mkdir()
    source.write_changed(tmp_path / "made", {name: changed})
    made = open_source(tmp_path / "made")
    assert isinstance(made, QuantizedFolder)
    for other in written:
        again = made.quantized(other)
        assert again is not None
        assert_same(again, changed if other == name else written[other])
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "made" / file).read_bytes() == (tmp_path / "came" / file).read_bytes()


def test_a_quantized_head_is_read(tmp_path: Path):
    model = random_model(llama_config(vocab_size=104))
    config = CONFIG | {"bits": 2, "extra_config": {"lm_head": {"bits": 8, "group_size": -1, "data_type": "int"}}}
    state, form, grid = model.state_dict(), packed_as(config), Grid(8, None, True)
    head = random_quantized(104, 32, grid)
    del state["lm_head.weight"]
    write_checkpoint(tmp_path, (state | form.tensors("lm_head", head)).items())
    write_config(tmp_path, model.config, config, torch.bfloat16)
    source = open_source(tmp_path)
    assert isinstance(source, QuantizedFolder)
    found = source.quantized("lm_head.weight")
    assert found is not None
    assert_same(found, head)
    assert source.grid("model.layers.0.mlp.up_proj.weight") is None


def test_a_layer_that_should_be_in_full_precision_is_refused(tmp_path: Path):
    write(tmp_path, CONFIG)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"]["extra_config"] = {"model.layers.1.mlp.up_proj": {"bits": 16}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj has no grid"):
        open_source(tmp_path)
    described["quantization_config"] = {"quant_method": "intel/auto-round"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(SourceError, match=r"is quantized by intel/auto-round\n.*gptq.*auto-round"):
        open_source(tmp_path)
