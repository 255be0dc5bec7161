"""The GPTQ layout: its bits against a decoder written here, its refusals, and a whole model written and read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import assert_same, random_quantized, write_model
from source_files import llama_config, random_model, save
from torch import Tensor

import logitwise
from logitwise.errors import FormatError, InputError, SourceError
from logitwise.evaluation import evaluate, inspect
from logitwise.formats import FORMATS, Format, choose
from logitwise.formats.checkpoint import write_checkpoint, write_config
from logitwise.formats.gptq import BITS, V1, V2, Gptq
from logitwise.grid import Grid, Quantized
from logitwise.source import QuantizedFolder, open_source

FORMAT = Gptq()
LAYER = "model.layers.0.mlp.up_proj"
SIGNS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
GROUPS = pytest.mark.parametrize("group_size", [16, None], ids=["groups", "channels"])
ALL_BITS = pytest.mark.parametrize("bits", BITS)
RUN = {"method": "rtn", "group_size": 16, "rows": 8, "held_out": 4, "row_tokens": 16, "steps": 1, "batch": 4}


def stream(words: list[int], bits: int) -> list[int]:
    """The codes of a dense little-endian bit stream, bit by bit."""
    stored = [(word & 0xFFFFFFFF) >> bit & 1 for word in words for bit in range(32)]
    return [sum(stored[i + bit] << bit for bit in range(bits)) for i in range(0, len(stored), bits)]


def decoded(stored: dict[str, Tensor], bits: int, label: str) -> list[list[float]]:
    """The weight [out, in] of the four tensors, element by element."""
    qweight, qzeros = stored[f"{LAYER}.qweight"].tolist(), stored[f"{LAYER}.qzeros"].tolist()
    scales, g_idx = stored[f"{LAYER}.scales"].tolist(), stored[f"{LAYER}.g_idx"].tolist()
    zeros = [stream(row, bits) for row in qzeros]
    weight = []
    for output in range(len(qweight[0])):
        codes = stream([row[output] for row in qweight], bits)
        row = []
        for i, group in enumerate(g_idx):
            zero = zeros[group][output] + (1 if label == "gptq" else 0)
            row.append((codes[i] - zero) * scales[group][output])
        weight.append(row)
    return weight


@ALL_BITS
@GROUPS
@SIGNS
def test_layout_as_a_plain_decoder_reads_it(bits: int, group_size: int | None, symmetric: bool):
    grid = Grid(bits, group_size, symmetric)
    quantized = random_quantized(32, 64, grid)
    label = FORMAT.quantization_config({LAYER: grid}, ["lm_head"])["checkpoint_format"]
    stored = FORMAT.tensors(LAYER, quantized)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        f"{LAYER}.qweight": (torch.int32, (64 * bits // 32, 32)),
        f"{LAYER}.qzeros": (torch.int32, (grid.groups(64), bits)),
        f"{LAYER}.scales": (torch.float16, (grid.groups(64), 32)),
        f"{LAYER}.g_idx": (torch.int32, (64,)),
    }
    assert torch.equal(torch.tensor(decoded(stored, bits, label)), quantized.dequantize())
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[label]
    assert not torch.equal(torch.tensor(decoded(stored, bits, other)), quantized.dequantize())


def test_golden_layer():
    # 8 inputs and 8 outputs, 4 bits, one hex digit each, low digit first. Every output has the codes 0 1 2 .. 7 but the
    # last, which has 15 in front: down its column 0x7654321f. Zero points 8 8 .. 8 in v1 are 7 7 .. 7.
    codes = torch.arange(8, dtype=torch.uint8).repeat(8, 1)
    codes[7, 0] = 15
    scale = torch.tensor([[1.0]] * 7 + [[-0.5]]).half()
    quantized = Quantized(codes, scale, torch.full((8, 1), 8, dtype=torch.uint8), Grid(4, None, True))
    stored = FORMAT.tensors("p", quantized)
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        "p.qweight": [[0x76543210] * 7 + [0x7654321F]],
        "p.qzeros": [[0x77777777]],
        "p.scales": [[1.0] * 7 + [-0.5]],
        "p.g_idx": [0] * 8,
    }
    zero = torch.arange(8, dtype=torch.uint8).unsqueeze(1)
    stored = FORMAT.tensors("p", Quantized(codes, scale, zero, Grid(4, 8, False)))
    assert stored["p.qzeros"].tolist() == [[0x76543210]]


def test_golden_three_bits():
    # 32 codes of 3 bits in three words, across their borders: code 10 has two bits in word 0 and one in word 1.
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[1, 11] = 7, 1
    quantized = Quantized(codes, torch.ones(32, 1).half(), torch.full((32, 1), 4, dtype=torch.uint8), Grid(3, 32, True))
    stored = FORMAT.tensors("p", quantized)
    words = stored["p.qweight"]
    assert words[:, 0].tolist() == [-(1 << 30), 1, 0]
    assert words[:, 1].tolist() == [0, 2, 0]
    assert int(words[:, 2:].abs().max()) == 0
    assert [word & 0xFFFFFFFF for word in stored["p.qzeros"][0].tolist()] == [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]


@ALL_BITS
@GROUPS
@SIGNS
def test_round_trip(bits: int, group_size: int | None, symmetric: bool):
    grid = Grid(bits, group_size, symmetric)
    quantized = random_quantized(32, 96, grid)
    config = FORMAT.quantization_config({LAYER: grid}, ["lm_head"])
    assert FORMAT.grids_of(config, torch.float16)(LAYER) == grid
    stored = FORMAT.tensors(LAYER, quantized)
    assert set(stored) == {f"{LAYER}.{suffix}" for suffix in FORMAT.suffixes}
    assert_same(FORMAT.described_by(config).read(LAYER, stored, grid), quantized)


def test_each_label_is_read_as_it_says():
    grid = Grid(4, 16, False)
    quantized = random_quantized(32, 64, grid)
    stored = FORMAT.tensors(LAYER, quantized)
    assert_same(Gptq(V2).read(LAYER, stored, grid), quantized)
    low = stored | {f"{LAYER}.qzeros": torch.full_like(stored[f"{LAYER}.qzeros"], 0x33333333)}
    assert int(Gptq(V1).read(LAYER, low, grid).zero.unique()) == 4
    assert int(Gptq(V2).read(LAYER, low, grid).zero.unique()) == 3
    even = Grid(4, 16, True)
    stored = FORMAT.tensors(LAYER, random_quantized(32, 64, even))
    stored[f"{LAYER}.qzeros"] += 0x11111111
    assert int(Gptq(V2).read(LAYER, stored, even).zero.unique()) == 8


@pytest.mark.parametrize(
    ("keys", "label"),
    [({}, V1), ({"checkpoint_format": V1}, V1), ({"checkpoint_format": V2}, V2), ({"format": V2}, V2)],
)
def test_label(keys: dict[str, Any], label: str):
    assert FORMAT.described_by(keys).checkpoint_format == label


def test_zero_points_that_v1_cannot_tell_are_refused():
    grid = Grid(4, 16, False)
    stored = FORMAT.tensors(LAYER, random_quantized(32, 64, grid))
    with pytest.raises(
        FormatError, match=rf"{LAYER}.qzeros is refused\n.*out of range: .*15 readers disagree.*0 or 16"
    ):
        Gptq(V1).read(LAYER, stored, grid)


@ALL_BITS
def test_zero_points_of_0_as_gptqmodel_stores_them(bits: int):
    """It takes 1 from every field of a word at once; at 3 bits, which cross words, from each modulo 8."""
    grid = Grid(bits, 16, False)
    quantized = random_quantized(32, 64, grid)
    assert bool((quantized.zero == 0).any())
    form = FORMAT.described_by({"checkpoint_format": V1, "meta": {"quantizer": ["gptqmodel:7.7.0"]}})
    stored = form.tensors(LAYER, quantized)
    words = Gptq(V2).tensors(LAYER, quantized)[f"{LAYER}.qzeros"].tolist()
    for zero, row, there in zip(quantized.zero.T.tolist(), words, stored[f"{LAYER}.qzeros"].tolist(), strict=True):
        if bits == 3:
            assert stream(there, bits) == [(z - 1) % 8 for z in zero]
        else:
            ones = sum(1 << place for place in range(0, 32, bits))
            assert [word & 0xFFFFFFFF for word in there] == [(word - ones) & 0xFFFFFFFF for word in row]
    assert_same(form.read(LAYER, stored, grid), quantized)
    with pytest.raises(FormatError, match=r"qzeros is refused\n.*out of range"):
        Gptq(V1).read(LAYER, stored, grid)


def test_dynamic_settings_of_single_layers():
    """The first pattern that a name begins with decides, as gptqmodel has it, and AutoRound writes it."""
    config = FORMAT.quantization_config({LAYER: Grid(4, 64, True)}, []) | {
        "lm_head": True,
        "dynamic": {
            r"-:.*model\.layers\.0\.mlp\.down_proj.*": {},
            r"+:.*model\.layers\.1\.": {"bits": 8, "group_size": 32, "desc_act": False},
            r".*\.1\.mlp": {"bits": 2},
            "lm_head": {"bits": 8, "sym": False},
        },
    }
    grid_of = FORMAT.grids_of(config, torch.float16)
    assert grid_of("model.layers.0.mlp.up_proj") == Grid(4, 64, True)
    assert grid_of("model.layers.1.mlp.up_proj") == Grid(8, 32, True)
    assert grid_of("lm_head") == Grid(8, 64, False)
    with pytest.raises(FormatError, match=r"down_proj has no grid\n.*full precision"):
        grid_of("model.layers.0.mlp.down_proj")


def test_what_autoround_tells_of_its_tuning_is_passed_over():
    config = {"quant_method": "gptq", "bits": 2, "group_size": 64, "sym": False, "desc_act": False, "lm_head": False}
    config |= {"amp": False, "autoround_version": "0.16.1", "damp_percent": 0.01, "data_type": "int", "iters": 1}
    config |= {"enable_quanted_input": False, "provider": "auto-round", "true_sequential": False}
    assert FORMAT.grids_of(config, torch.float16)(LAYER) == Grid(2, 64, False)


def test_symmetric_zero_points_under_the_wrong_label_are_refused():
    grid = Grid(4, 16, True)
    stored = FORMAT.tensors(LAYER, random_quantized(32, 64, grid))
    with pytest.raises(FormatError, match=rf"{LAYER}.qzeros is refused\n.*8 everywhere.*'gptq_v2' this has 7 to 7"):
        Gptq(V2).read(LAYER, stored, grid)


@pytest.mark.parametrize("suffix", FORMAT.suffixes)
def test_missing_tensor_is_refused(suffix: str):
    grid = Grid(3, 32, False)
    stored = FORMAT.tensors(LAYER, random_quantized(32, 64, grid))
    del stored[f"{LAYER}.{suffix}"]
    with pytest.raises(FormatError, match=rf"{LAYER}.{suffix} is refused\n.*it is missing"):
        FORMAT.read(LAYER, stored, grid)


SHUFFLED = (torch.arange(64) // 32).int()[torch.randperm(64, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("suffix", "tensor", "why"),
    [
        ("qweight", torch.zeros(8, 32), r"expected int32 \[8, 32\], found float32 \[8, 32\]"),
        ("qweight", torch.zeros(8, dtype=torch.int32), r"its shape is \[8\]"),
        ("qweight", torch.zeros(5, 32, dtype=torch.int32), "40 inputs, which groups of 32 do not divide"),
        ("qzeros", torch.zeros(4, 2, dtype=torch.int32), r"expected int32 \[2, 4\], found int32 \[4, 2\]"),
        ("qzeros", torch.zeros(2, 4, dtype=torch.int64), r"expected int32 \[2, 4\], found int64"),
        ("scales", torch.ones(2, 32), r"expected float16 \[2, 32\], found float32"),
        ("scales", torch.ones(32, 2).half(), r"found float16 \[32, 2\]"),
        ("scales", torch.full((2, 32), float("inf")).half(), "it holds NaN or infinity"),
        ("g_idx", torch.zeros(63, dtype=torch.int32), r"expected int32 \[64\], found int32 \[63\]"),
        ("g_idx", SHUFFLED, "natural order .activation order, desc_act.; read is input // group_size"),
        ("bias_scale", torch.zeros(1), "has qweight, qzeros, scales, g_idx and no other tensor"),
    ],
)
def test_wrong_tensor_is_refused(suffix: str, tensor: Tensor, why: str):
    grid = Grid(4, 32, False)
    stored = FORMAT.tensors(LAYER, random_quantized(32, 64, grid)) | {f"{LAYER}.{suffix}": tensor}
    with pytest.raises(FormatError, match=rf"tensor {LAYER}.{suffix} is refused\n.*{why}"):
        FORMAT.read(LAYER, stored, grid)


def test_weight_off_its_grid_is_refused():
    grid = Grid(4, 32, True)
    good = random_quantized(32, 64, grid)
    with pytest.raises(FormatError, match=rf"{LAYER}: code 16 is out of range"):
        FORMAT.tensors(LAYER, Quantized(torch.full_like(good.codes, 16), good.scale, good.zero, grid))
    with pytest.raises(FormatError, match=r"zero points differ from 8\n.*all must be 8"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale, good.zero + 1, grid))
    with pytest.raises(FormatError, match=rf"{LAYER} cannot be written\n.*float16, not bfloat16"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale, good.zero, Grid(4, 32, True, torch.bfloat16)))


def test_holds():
    assert all(FORMAT.holds(Grid(bits, size, False)) is None for bits in BITS for size in (16, 128, None))
    assert FORMAT.holds(Grid(5, 64, False)) == "gptq holds 2, 3, 4 or 8 bits, not 5"
    assert FORMAT.holds(Grid(4, 64, True, torch.float32)) == "gptq stores scales as float16, not float32"
    assert "group size of 0" in str(FORMAT.holds(Grid(4, 0, False)))
    assert FORMAT.holds_together({Grid(4, 64, True)}) is None
    assert "one grid for all layers" in str(FORMAT.holds_together({Grid(4, 64, True), Grid(3, 64, True)}))


def test_holds_layer():
    assert FORMAT.holds_layer(LAYER, 32, 64, False, Grid(3, 32, False)) is None
    assert FORMAT.holds_layer(LAYER, 8, 576, False, Grid(4, 64, False)) is None
    assert "576 inputs, which groups of 128" in str(FORMAT.holds_layer(LAYER, 8, 576, False, Grid(4, 128, False)))
    assert "stored transposed" in str(FORMAT.holds_layer(LAYER, 8, 128, True, Grid(4, 128, False)))
    assert FORMAT.holds_layer(LAYER, 12, 64, False, Grid(4, 32, False)) == (
        f"{LAYER} has 12 outputs, which at 4 bits do not fill words of 32 bits; gptq needs a multiple of 8"
    )
    assert "48 inputs, which at 3 bits" in str(FORMAT.holds_layer(LAYER, 32, 48, False, Grid(3, 16, False)))
    assert "multiple of 32" in str(FORMAT.holds_layer(LAYER, 48, 64, False, Grid(3, 16, False)))


@pytest.mark.parametrize(
    ("grid", "ends"),
    [
        (Grid(4, 64, True), "gptqmodel and optimum, and vLLM serves it"),
        (Grid(4, None, True), "more than 256 inputs), and vLLM serves it"),
        (Grid(4, 64, False), "; vLLM does not"),
        (Grid(3, 64, True), "; vLLM does not"),
        (Grid(8, 64, True), "; vLLM should on a GPU (not tried)"),
    ],
)
def test_loaders(grid: Grid, ends: str):
    assert FORMAT.loaders({grid}).endswith(ends)
    assert choose({grid})[0] is FORMATS["compressed-tensors"]


def test_config():
    grid = Grid(4, None, False)
    config = FORMAT.quantization_config({LAYER: grid}, ["lm_head"])
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1,
        "sym": False,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq_v2",
    }
    assert FORMAT.files(config) == {"quantize_config.json": config}
    kept = FORMAT.quantization_config({LAYER: grid}, ["lm_head", "model.layers.0.mlp.down_proj"])
    assert kept == config | {"modules_in_block_to_quantize": [[LAYER]]}
    assert FORMAT.grids_of(kept, torch.float16)("any") == grid


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "quant_method is not read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is not read\n.*'marlin'"),
        ({"checkpoint_format": V1, "format": V2}, "checkpoint_format is not read\n.*two that are the same"),
        ({"lm_head": "yes"}, "lm_head is not read"),
        ({"data_type": "fp"}, "data_type is not read"),
        ({"is_marlin_format": True}, "is_marlin_format is not read"),
        ({"pack_dtype": "int16"}, "pack_dtype is not read"),
        ({"dynamic": ["a"]}, "dynamic is not read"),
        ({"dynamic": {"+:.*": 8}}, "dynamic: \\+:.* is not read"),
        ({"dynamic": {"+:.*": {"bits": 5}}}, "not read\n.*8 bits, not 5"),
        ({"dynamic": {"+:.*": {"format": "marlin"}}}, "dynamic: .*format is not read"),
        ({"dynamic": {"-:*": {}}}, "dynamic: -:\\* is not read\n.*no regular expression"),
        ({"surprise": 1}, "surprise is not read"),
        ({"bits": "4"}, "bits is not read"),
        ({"bits": 5}, "not read\n.*2, 3, 4 or 8 bits, not 5"),
        ({"group_size": None}, "group_size is not read"),
        ({"group_size": 0}, "not read\n.*group size of 0"),
        ({"sym": None}, "sym is not read"),
        ({"desc_act": None}, "desc_act is not read"),
    ],
)
def test_foreign_config_is_refused(change: dict[str, Any], message: str):
    config = FORMAT.quantization_config({LAYER: Grid(4, 64, True)}, [])
    with pytest.raises(FormatError, match=message):
        FORMAT.grids_of(config | change, torch.float16)
    with pytest.raises(FormatError, match="float16, not bfloat16"):
        FORMAT.grids_of(config, torch.bfloat16)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 16, True), (4, 16, False), (3, None, False)])
def test_whole_model(tmp_path: Path, bits: int, group_size: int | None, symmetric: bool):
    model, written = write_model(FORMAT, Grid(bits, group_size, symmetric), tmp_path)
    source = open_source(tmp_path)
    assert isinstance(source, QuantizedFolder)
    assert sorted(source.names()) == sorted(model.state_dict())
    assert source.unused == []
    for name, one in written.items():
        read = source.quantized(name)
        assert read is not None
        assert_same(read, one)
        assert torch.equal(source.read(name), one.dequantize())


def test_model_without_its_label_is_v1(tmp_path: Path):
    _, written = write_model(FORMAT, Grid(4, 16, False), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["quantization_config"]["checkpoint_format"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(FormatError, match=r"qzeros is refused\n.*out of range"):
        open_source(tmp_path).read(next(iter(written)))


def test_layer_that_is_stored_twice_is_refused(tmp_path: Path):
    model = random_model(llama_config(hidden_size=64))
    grid, state = Grid(4, 16, True), model.state_dict()
    state |= FORMAT.tensors(LAYER, random_quantized(*state[f"{LAYER}.weight"].shape, grid))
    write_checkpoint(tmp_path, state.items())
    write_config(tmp_path, model.config, FORMAT.quantization_config({LAYER: grid}, ["lm_head"]), torch.float32)
    with pytest.raises(SourceError, match=f"{LAYER} is stored twice"):
        open_source(tmp_path)


@SIGNS
def test_quantize_writes_it(tmp_path: Path, symmetric: bool):
    text = tmp_path / "text.txt"
    text.write_text("the hen met a man. " * 200)
    folder = save(random_model(llama_config(hidden_size=64)), tmp_path / "model")
    run = {
        **RUN,
        "bits": 4,
        "symmetric": symmetric,
        "format": "gptq",
        "calibration": f"text:{text}",
        "keep": ["o_proj"],
    }
    result = logitwise.quantize(folder, tmp_path / "out", logitwise.Recipe(**run))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    assert len(config["modules_in_block_to_quantize"][0]) == 12
    loading = "vLLM serves it" if symmetric else "vLLM does not"
    assert loading in result.report["loading"]
    assert loading in (tmp_path / "out" / "README.md").read_text()
    kind = "symmetric" if symmetric else "asymmetric"
    assert inspect(tmp_path / "out").grid == f"4 bits, groups of 16, {kind}, float16 scales"
    found = evaluate(tmp_path / "out", text=f"text:{text}", reference=folder, rows=2, row_tokens=16)
    assert found.likelihood.kl.mean < 0.1
    with pytest.raises(InputError, match="gptq cannot hold this grid"):
        logitwise.quantize(folder, tmp_path / "five", logitwise.Recipe(**{**run, "bits": 5}))


@pytest.mark.parametrize("form", [FORMATS["gptq"], FORMATS["awq"]], ids=lambda form: form.name)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_bits_stored_are_those_of_the_files(form: Format, symmetric: bool):
    grid = Grid(4, 32, symmetric, torch.float16)
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    zero = torch.full((16, 2), 8, dtype=torch.uint8)
    stored = form.tensors("layer", Quantized(codes, torch.ones(16, 2, dtype=torch.float16), zero, grid))
    stored.pop("layer.g_idx", None)  # the same for all layers of so many inputs, and not counted
    assert form.bits_stored(grid, 16, 64) == sum(8 * tensor.nbytes for tensor in stored.values())
