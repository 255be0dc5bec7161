"""The pack-quantized format: its tensors, its refusals, and transformers loading what was written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from logitwise.errors import FormatError
from logitwise.formats import FORMATS, choose
from logitwise.formats.checkpoint import write_checkpoint, write_config
from logitwise.formats.compressed_tensors import CompressedTensors
from logitwise.grid import Grid, Quantized

FORMAT = CompressedTensors()
LAYER = "model.layers.0.mlp.up_proj"
SIGNS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def random_quantized(out_features: int, in_features: int, grid: Grid, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, grid.groups(in_features))
    codes = torch.randint(0, grid.levels + 1, (out_features, in_features), generator=generator)
    zero = torch.randint(0, grid.levels + 1, shape, generator=generator)
    scale = (0.5 + torch.rand(shape, generator=generator)) / (2**grid.bits * in_features**0.5)
    return Quantized(
        codes.to(torch.uint8),
        scale.to(grid.scale_dtype),
        torch.full_like(zero, grid.middle).to(torch.uint8) if grid.symmetric else zero.to(torch.uint8),
        grid,
    )


def assert_same(a: Quantized, b: Quantized):
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scale, b.scale) and a.scale.dtype == b.scale.dtype
    assert torch.equal(a.zero, b.zero)
    assert a.grid == b.grid


def test_golden_layer():
    # Two outputs of four inputs in groups of two, 4 bits. Codes: a hex digit each, low digit first, so the row
    # 1 2 3 4 is 0x4321 and 5 6 7 15 is 0xf765. Zero points [[8, 9], [10, 11]] packed along the outputs: group 0 holds
    # 8 then 10, 0xa8; group 1 holds 9 then 11, 0xb9.
    quantized = Quantized(
        torch.tensor([[1, 2, 3, 4], [5, 6, 7, 15]], dtype=torch.uint8),
        torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float16),
        torch.tensor([[8, 9], [10, 11]], dtype=torch.uint8),
        Grid(4, 2, False),
    )
    stored = FORMAT.tensors("p", quantized)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in stored.items()} == {
        "p.weight_packed": (torch.int32, [[0x4321], [0xF765]]),
        "p.weight_scale": (torch.float16, [[1.0, 2.0], [0.5, -1.0]]),
        "p.weight_shape": (torch.int64, [2, 4]),
        "p.weight_zero_point": (torch.int32, [[0xA8, 0xB9]]),
    }
    assert set(stored) == {f"p.{suffix}" for suffix in FORMAT.suffixes}


@SIGNS
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [4, None])
def test_round_trip(bits: int, group_size: int | None, symmetric: bool):
    grid = Grid(bits, group_size, symmetric, torch.bfloat16)
    quantized = random_quantized(33, 44, grid)
    stored = FORMAT.tensors(LAYER, quantized)
    assert (f"{LAYER}.weight_zero_point" in stored) is not symmetric
    assert_same(FORMAT.read(LAYER, stored, grid), quantized)


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_points_as_the_package_packs_them(bits: int):
    quantized = random_quantized(37, 64, Grid(bits, 32, False))
    signed = (quantized.zero.int() - 2 ** (bits - 1)).to(torch.int8)
    stored = FORMAT.tensors(LAYER, quantized)[f"{LAYER}.weight_zero_point"]
    assert torch.equal(stored, pack_to_int32(signed, bits, packed_dim=0))


def without(stored: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in stored.items() if not name.endswith(suffix)}


@pytest.mark.parametrize("suffix", FORMAT.suffixes)
def test_missing_tensor_is_refused(suffix: str):
    grid = Grid(3, 32, False)
    stored = without(FORMAT.tensors(LAYER, random_quantized(8, 64, grid)), suffix)
    with pytest.raises(FormatError, match=rf"{LAYER}.{suffix} is refused\n.*it is missing"):
        FORMAT.read(LAYER, stored, grid)


def test_old_packing_is_refused():
    # compressed-tensors before 0.18 put ten 3-bit codes in a word: 7 words for 64 codes, where a dense stream takes 6.
    grid = Grid(3, 32, True)
    stored = FORMAT.tensors(LAYER, random_quantized(8, 64, grid))
    stored[f"{LAYER}.weight_packed"] = torch.zeros(8, 7, dtype=torch.int32)
    with pytest.raises(FormatError, match=r"weight_packed is refused\n.*\[8, 6\], found int32 \[8, 7\].*before 0.18"):
        FORMAT.read(LAYER, stored, grid)


@pytest.mark.parametrize(
    ("suffix", "tensor", "why"),
    [
        ("weight_packed", torch.zeros(8, 8), r"expected int32 \[8, 8\], found float32 \[8, 8\]"),
        ("weight_packed", torch.zeros(8, 7, dtype=torch.int32), r"found int32 \[8, 7\]"),
        ("weight_scale", torch.ones(8, 2), r"expected float16 \[8, 2\], found float32"),
        ("weight_scale", torch.ones(2, 8).half(), r"found float16 \[2, 8\]"),
        ("weight_scale", torch.full((8, 2), float("nan")).half(), "it holds NaN or infinity"),
        ("weight_shape", torch.tensor([8, 64, 1]), r"expected int64 \[2\], found int64 \[3\]"),
        ("weight_shape", torch.tensor([8, 0]), r"it says \[8, 0\]"),
        ("weight_shape", torch.tensor([8, 66]), "66 inputs, which groups of 32 do not divide"),
        ("weight_zero_point", torch.zeros(8, 2, dtype=torch.int8), r"expected int32 \[1, 2\], found int8 \[8, 2\]"),
        ("weight_g_idx", torch.zeros(64, dtype=torch.int32), "no such tensor"),
    ],
)
def test_wrong_tensor_is_refused(suffix: str, tensor: Tensor, why: str):
    grid = Grid(4, 32, False)
    stored = FORMAT.tensors(LAYER, random_quantized(8, 64, grid)) | {f"{LAYER}.{suffix}": tensor}
    with pytest.raises(FormatError, match=rf"tensor {LAYER}.{suffix} is refused\n.*{why}"):
        FORMAT.read(LAYER, stored, grid)


def test_zero_points_of_a_symmetric_layer_are_refused():
    stored = FORMAT.tensors(LAYER, random_quantized(8, 64, Grid(4, 32, False)))
    with pytest.raises(FormatError, match=r"weight_zero_point is refused\n.*no such tensor"):
        FORMAT.read(LAYER, stored, Grid(4, 32, True))


def test_weight_off_its_grid_is_refused():
    grid = Grid(3, 32, False)
    good = random_quantized(8, 64, grid)
    with pytest.raises(FormatError, match=rf"{LAYER}: code 8 is out of range\n.*3 bits hold 0 to 7"):
        FORMAT.tensors(LAYER, Quantized(torch.full_like(good.codes, 8), good.scale, good.zero, grid))
    with pytest.raises(FormatError, match=r"zero point 9 is out of range"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale, torch.full_like(good.zero, 9), grid))
    with pytest.raises(FormatError, match=r"zero points differ from 4\n.*all must be 4"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale, torch.zeros_like(good.zero), Grid(3, 32, True)))
    with pytest.raises(FormatError, match=r"scale is float32 \[8, 2\]\n.*float16 \[8, 2\]"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale.float(), good.zero, grid))
    with pytest.raises(FormatError, match=rf"{LAYER} cannot be written\n.*64 inputs.*groups of 48"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale, good.zero, Grid(3, 48, False)))


def test_holds():
    assert all(FORMAT.holds(Grid(bits, 64, False, torch.float32)) is None for bits in range(2, 9))
    assert FORMAT.holds(Grid(9, 64, False)) == "compressed-tensors holds 2 to 8 bits, not 9"
    assert "not float64" in str(FORMAT.holds(Grid(4, 64, False, torch.float64)))
    assert "group size of 0" in str(FORMAT.holds(Grid(4, 0, False)))


def test_holds_layer():
    grid = Grid(4, 128, False)
    assert FORMAT.holds_layer(LAYER, 100, 256, False, grid) is None
    assert FORMAT.holds_layer(LAYER, 100, 77, False, Grid(4, None, False)) is None
    assert FORMAT.holds_layer(LAYER, 8, 576, False, grid) == (
        f"{LAYER} has 576 inputs, which groups of 128 do not divide; groups of 16, 32, 64 do"
    )
    assert "only one group for each output channel does" in str(FORMAT.holds_layer(LAYER, 8, 77, False, grid))
    assert f"{LAYER} is stored transposed" in str(FORMAT.holds_layer(LAYER, 8, 128, True, grid))


def test_choose():
    chosen, why = choose({Grid(4, 64, True)})
    assert chosen is FORMATS["compressed-tensors"]
    assert why == "transformers with compressed-tensors 0.18 loads it, and vLLM serves it"
    assert choose({Grid(3, 64, False)})[1].endswith("vLLM should serve it on a GPU (not tried)")
    with pytest.raises(FormatError, match=r"no format holds this grid\n.*not 9"):
        choose({Grid(9, 64, False)})


def test_choose_another_where_this_one_does_not_hold_the_grids():
    mixed = {Grid(bits, 64, False, torch.float32) for bits in (2, 4)}
    chosen, why = choose(mixed)
    assert chosen is FORMATS["mlx"]
    assert why == "mlx-lm 0.32 loads it; transformers loads layers on several grids only where all are symmetric"
    with pytest.raises(FormatError, match=r"only where all are symmetric\n.*or --symmetric"):
        choose({replace(grid, scale_dtype=torch.float16) for grid in mixed})  # which moves zero points in MLX


@SIGNS
@pytest.mark.parametrize("group_size", [64, None])
def test_config_round_trip(group_size: int | None, symmetric: bool):
    grid = Grid(3, group_size, symmetric, torch.float32)
    config = FORMAT.quantization_config({LAYER: grid}, ["lm_head"])
    assert config["ignore"] == ["lm_head"]
    assert config.get("dequantize", False) is not symmetric
    assert FORMAT.grids_of(config, torch.float32)(LAYER) == grid


ANOTHER = {"group_1": {"targets": ["re:.*mlp.*"], "weights": {"type": "int", "dynamic": False}}}


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        ((), {"quant_method": "gptq"}, "quant_method is not read\n.*'gptq'; logitwise reads 'compressed-tensors'"),
        ((), {"format": "int-quantized"}, "format is not read"),
        ((), {"quantization_status": "frozen"}, "quantization_status is not read"),
        ((), {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is not read"),
        ((), {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is not read"),
        ((), {"surprise": 1}, "surprise is not read"),
        ((), {"moe_sparsity_config": {"sparsity": 0.5}}, "moe_sparsity_config is not read"),
        ((), {"config_groups": {}}, "config_groups is not read\n.*no groups"),
        ((), {"config_groups": None}, "config_groups is not read\n.*no groups"),
        (("config_groups",), ANOTHER, "num_bits is not read\n.*a whole number"),
        (("config_groups", "group_0"), {"weights": None}, "weights is not read"),
        (("config_groups", "group_0"), {"input_activations": {"num_bits": 8}}, "input_activations is not read"),
        (("config_groups", "group_0"), {"format": "marlin-24"}, "format is not read"),
        (("config_groups", "group_0", "weights"), {"type": "float"}, "type is not read"),
        (("config_groups", "group_0", "weights"), {"dynamic": True}, "dynamic is not read"),
        (("config_groups", "group_0", "weights"), {"actorder": "group"}, "actorder is not read"),
        (("config_groups", "group_0", "weights"), {"num_bits": "4"}, "num_bits is not read\n.*a whole number"),
        (("config_groups", "group_0", "weights"), {"num_bits": 16}, "quantization_config is not read\n.*not 16"),
        (("config_groups", "group_0", "weights"), {"symmetric": None}, "symmetric is not read"),
        (("config_groups", "group_0", "weights"), {"strategy": "block"}, "strategy is not read"),
        (("config_groups", "group_0", "weights"), {"group_size": None}, "group_size is not read"),
        (("config_groups", "group_0", "weights"), {"strategy": "channel"}, "group_size is not read\n.*64"),
    ],
)
def test_foreign_config_is_refused(place: tuple[str, ...], change: dict[str, Any], message: str):
    config = FORMAT.quantization_config({LAYER: Grid(4, 64, True)}, [])
    part = config
    for key in place:
        part = part[key]
    part.update(change)
    with pytest.raises(FormatError, match=message):
        FORMAT.grids_of(config, torch.float16)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
    )
    return LlamaForCausalLM(config).eval()


@SIGNS
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, None], ids=["group", "channel"])
@pytest.mark.parametrize(("scale_dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 1e-2)], ids=str)
def test_transformers_loads_it(
    tmp_path: Path, bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype, tolerance: float
):
    grid = Grid(bits, group_size, symmetric, scale_dtype)
    dense = tiny_llama()
    state = dense.state_dict()
    linears = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    layers = [name for name in linears if name != "lm_head"]
    assert len(layers) == 14
    for seed, name in enumerate(layers):
        quantized = random_quantized(*linears[name].weight.shape, grid, seed)
        linears[name].weight.data = quantized.dequantize()
        del state[f"{name}.weight"]
        state |= FORMAT.tensors(name, quantized)

    write_checkpoint(tmp_path, state.items())
    write_config(
        tmp_path, dense.config, FORMAT.quantization_config(dict.fromkeys(layers, grid), ["lm_head"]), torch.float32
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    ids = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = dense(ids).logits, loaded(ids).logits
    assert expected.std() > 0.1
    assert float((logits - expected).abs().max()) <= tolerance


@pytest.mark.parametrize("default", [False, True], ids=["each layer named", "a pattern and Linear"])
def test_transformers_loads_layers_on_several_grids(tmp_path: Path, default: bool):
    dense = tiny_llama()
    state = dense.state_dict()
    linears = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    bits = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "down_proj": 3}
    grids = {}
    for name in linears:
        if name != "lm_head":
            last = name.split(".")[-1]
            grids[name] = Grid(bits.get(last, 2), None if last == "down_proj" else 32, True, torch.float32)
    for seed, (name, grid) in enumerate(grids.items()):
        quantized = random_quantized(*linears[name].weight.shape, grid, seed)
        linears[name].weight.data = quantized.dequantize()
        del state[f"{name}.weight"]
        state |= FORMAT.tensors(name, quantized)
    assert FORMAT.holds_together(set(grids.values())) is None
    config = FORMAT.quantization_config(grids, ["lm_head"])
    if default:
        for scheme in config["config_groups"].values():
            of = scheme["weights"]["num_bits"]
            scheme["targets"] = {2: ["Linear"], 3: ["re:.*down_proj$"], 4: ["re:.*(q|k|v)_proj$"]}[of]
    grid_of = FORMAT.grids_of(config, torch.float32)
    assert {name: grid_of(name) for name in grids} == grids

    write_checkpoint(tmp_path, state.items())
    write_config(tmp_path, dense.config, config, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, dense(ids).logits)


def test_layers_that_no_scheme_names_are_refused():
    config = FORMAT.quantization_config({LAYER: Grid(4, 64, True), "other": Grid(2, 64, True)}, [])
    grid_of = FORMAT.grids_of(config, torch.float16)
    assert grid_of("other").bits == 2
    with pytest.raises(FormatError, match=r"third has no scheme\n.*names it"):
        grid_of("third")


def test_what_cannot_share_a_checkpoint():
    assert "only where all are symmetric" in str(FORMAT.holds_together({Grid(4, 64, False), Grid(2, 64, False)}))
    assert "one scale type" in str(FORMAT.holds_together({Grid(4, 64, True), Grid(4, 32, True, torch.float32)}))
    assert FORMAT.holds_together({Grid(4, 64, False)}) is None
