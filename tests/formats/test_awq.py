"""The AWQ layout: its bits against a decoder written here, its refusals, and a whole model written and read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_files import assert_same, random_quantized, write_model
from source_files import llama_config, random_model, save
from torch import Tensor

import logitwise
from logitwise.errors import FormatError, InputError
from logitwise.evaluation import evaluate, inspect
from logitwise.formats.awq import Awq
from logitwise.grid import Grid, Quantized
from logitwise.source import QuantizedFolder, open_source

FORMAT = Awq()
LAYER = "model.layers.0.mlp.up_proj"
PARTS = ("qweight", "qzeros", "scales")
SIGNS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
PLACES = [0, 2, 4, 6, 1, 3, 5, 7]


def nibbles(row: list[int], places: list[int]) -> list[int]:
    """The values of a row of words; nibble j of a word is that of output places[j]."""
    values = [0] * (8 * len(row))
    for k, word in enumerate(row):
        for j, place in enumerate(places):
            values[8 * k + place] = (word & 0xFFFFFFFF) >> (4 * j) & 15
    return values


def decoded(stored: dict[str, Tensor], group_size: int, places: list[int] = PLACES) -> Tensor:
    """The weight [out, in] of the three tensors, element by element."""
    codes = [nibbles(row, places) for row in stored[f"{LAYER}.qweight"].tolist()]
    zeros = [nibbles(row, places) for row in stored[f"{LAYER}.qzeros"].tolist()]
    scales = stored[f"{LAYER}.scales"].tolist()
    weight = []
    for output in range(len(codes[0])):
        row = []
        for i in range(len(codes)):
            group = i // group_size
            row.append((codes[i][output] - zeros[group][output]) * scales[group][output])
        weight.append(row)
    return torch.tensor(weight)


@SIGNS
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_layout_as_a_plain_decoder_reads_it(group_size: int, symmetric: bool):
    quantized = random_quantized(24, 64, Grid(4, group_size, symmetric))
    stored = FORMAT.tensors(LAYER, quantized)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        f"{LAYER}.qweight": (torch.int32, (64, 3)),
        f"{LAYER}.qzeros": (torch.int32, (64 // group_size, 3)),
        f"{LAYER}.scales": (torch.float16, (64 // group_size, 24)),
    }
    assert torch.equal(decoded(stored, group_size), quantized.dequantize())
    for wrong in ([*range(8)], [0, 4, 1, 5, 2, 6, 3, 7]):
        assert not torch.equal(decoded(stored, group_size, wrong), quantized.dequantize())


def test_golden_layer():
    # Two inputs of eight outputs: the codes 0 1 2 .. 7 lie, lowest nibble first, as 0 2 4 6 1 3 5 7.
    codes = torch.tensor([[i, 15 - i] for i in range(8)], dtype=torch.uint8)
    scale = torch.tensor([[1.0]] * 7 + [[-0.5]]).half()
    quantized = Quantized(codes, scale, torch.full((8, 1), 8, dtype=torch.uint8), Grid(4, 2, True))
    stored = FORMAT.tensors("p", quantized)
    assert [[word & 0xFFFFFFFF for word in row] for row in stored["p.qweight"].tolist()] == [[0x75316420], [0x8ACE9BDF]]
    assert [word & 0xFFFFFFFF for word in stored["p.qzeros"][0].tolist()] == [0x88888888]
    assert stored["p.scales"].tolist() == [[1.0] * 7 + [-0.5]]


@SIGNS
@pytest.mark.parametrize("group_size", [16, 32])
def test_round_trip(group_size: int, symmetric: bool):
    grid = Grid(4, group_size, symmetric)
    quantized = random_quantized(40, 96, grid)
    stored = FORMAT.tensors(LAYER, quantized)
    assert set(stored) == {f"{LAYER}.{part}" for part in PARTS}
    assert_same(FORMAT.read(LAYER, stored, grid), quantized)


@pytest.mark.parametrize("suffix", PARTS)
def test_missing_tensor_is_refused(suffix: str):
    grid = Grid(4, 32, False)
    stored = FORMAT.tensors(LAYER, random_quantized(8, 64, grid))
    del stored[f"{LAYER}.{suffix}"]
    with pytest.raises(FormatError, match=rf"{LAYER}.{suffix} is refused\n.*it is missing"):
        FORMAT.read(LAYER, stored, grid)


@pytest.mark.parametrize(
    ("suffix", "tensor", "why"),
    [
        ("qweight", torch.zeros(64, 1), r"expected int32 \[64, 1\], found float32 \[64, 1\]"),
        ("qweight", torch.zeros(64, dtype=torch.int32), r"its shape is \[64\]"),
        ("qweight", torch.zeros(66, 1, dtype=torch.int32), "66 inputs, which groups of 32 do not divide"),
        ("qzeros", torch.zeros(1, 2, dtype=torch.int32), r"expected int32 \[2, 1\], found int32 \[1, 2\]"),
        ("scales", torch.ones(2, 8), r"expected float16 \[2, 8\], found float32"),
        ("scales", torch.ones(8, 2).half(), r"found float16 \[8, 2\]"),
        ("scales", torch.full((2, 8), float("nan")).half(), "it holds NaN or infinity"),
        ("g_idx", torch.zeros(64, dtype=torch.int32), "has qweight, qzeros, scales and no other tensor"),
    ],
)
def test_wrong_tensor_is_refused(suffix: str, tensor: Tensor, why: str):
    grid = Grid(4, 32, False)
    stored = FORMAT.tensors(LAYER, random_quantized(8, 64, grid)) | {f"{LAYER}.{suffix}": tensor}
    with pytest.raises(FormatError, match=rf"tensor {LAYER}.{suffix} is refused\n.*{why}"):
        FORMAT.read(LAYER, stored, grid)


def test_zero_points_that_are_not_symmetric_are_refused():
    stored = FORMAT.tensors(LAYER, random_quantized(8, 64, Grid(4, 32, False)))
    with pytest.raises(FormatError, match=r"qzeros is refused\n.*8 everywhere, this has 0 to 15"):
        FORMAT.read(LAYER, stored, Grid(4, 32, True))


def test_weight_off_its_grid_is_refused():
    grid = Grid(4, 32, True)
    good = random_quantized(8, 64, grid)
    with pytest.raises(FormatError, match=rf"{LAYER}: code 16 is out of range"):
        FORMAT.tensors(LAYER, Quantized(torch.full_like(good.codes, 16), good.scale, good.zero, grid))
    with pytest.raises(FormatError, match=r"zero points differ from 8"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale, good.zero + 1, grid))
    with pytest.raises(FormatError, match=rf"{LAYER} cannot be written\n.*4 bits, not 3"):
        FORMAT.tensors(LAYER, Quantized(good.codes, good.scale, good.zero, Grid(3, 32, True)))


def test_holds():
    assert all(FORMAT.holds(Grid(4, size, symmetric)) is None for size in (32, 128) for symmetric in (True, False))
    assert "4 bits, not 3; gptq and compressed-tensors" in str(FORMAT.holds(Grid(3, 64, False)))
    assert "not one scale a channel; give a --group-size" in str(FORMAT.holds(Grid(4, None, False)))
    assert "group size of 0" in str(FORMAT.holds(Grid(4, 0, False)))
    assert FORMAT.holds(Grid(4, 64, True, torch.bfloat16)) == "awq stores scales as float16, not bfloat16"
    assert "one grid for all layers" in str(FORMAT.holds_together({Grid(4, 64, True), Grid(4, 32, True)}))


def test_holds_layer():
    grid = Grid(4, 64, False)
    assert FORMAT.holds_layer(LAYER, 8, 576, False, grid) is None
    assert FORMAT.holds_layer(LAYER, 12, 576, False, grid) == f"{LAYER} has 12 outputs; awq needs a multiple of 8"
    assert "96 inputs, which groups of 64" in str(FORMAT.holds_layer(LAYER, 8, 96, False, grid))
    assert "stored transposed" in str(FORMAT.holds_layer(LAYER, 8, 64, True, grid))


def test_config():
    config = FORMAT.quantization_config({LAYER: Grid(4, 32, True)}, ["lm_head", "model.layers.0.mlp.down_proj"])
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj"],
    }
    assert FORMAT.files(config) == {}
    # The file does not tell that all zero points are 8.
    assert FORMAT.grids_of(config | {"version": "GEMM"}, torch.float16)(LAYER) == Grid(4, 32, False)
    assert FORMAT.described_by(config) is FORMAT
    # AutoRound's, of symmetric grids.
    even = {
        "zero_point": False,
        "sym": True,
        "data_type": "int",
        "provider": "auto-round",
        "autoround_version": "0.16.1",
    }
    assert FORMAT.grids_of(config | even, torch.float16)(LAYER) == Grid(4, 32, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is not read"),
        ({"version": "gemv"}, "version is not read\n.*'gemv'; logitwise reads 'gemm'"),
        ({"version": None}, "version is not read"),
        ({"zero_point": None}, "zero_point is not read"),
        ({"zero_point": False, "sym": False}, "sym is not read"),
        ({"data_type": "fp"}, "data_type is not read"),
        ({"surprise": 1}, "surprise is not read"),
        ({"bits": "4"}, "bits is not read"),
        ({"bits": 8}, "not read\n.*4 bits, not 8"),
        ({"group_size": None}, "group_size is not read"),
        ({"group_size": -1}, "not read\n.*not one scale a channel"),
    ],
)
def test_foreign_config_is_refused(change: dict[str, Any], message: str):
    config = FORMAT.quantization_config({LAYER: Grid(4, 64, True)}, [])
    with pytest.raises(FormatError, match=message):
        FORMAT.grids_of(config | change, torch.float16)
    with pytest.raises(FormatError, match="float16, not bfloat16"):
        FORMAT.grids_of(config, torch.bfloat16)


@SIGNS
def test_whole_model(tmp_path: Path, symmetric: bool):
    model, written = write_model(FORMAT, Grid(4, 16, symmetric), tmp_path)
    source = open_source(tmp_path)
    assert isinstance(source, QuantizedFolder)
    assert sorted(source.names()) == sorted(model.state_dict())
    assert source.unused == []
    for name, one in written.items():
        read = source.quantized(name)
        assert read is not None
        assert torch.equal(read.codes, one.codes) and torch.equal(read.zero, one.zero)
        assert torch.equal(read.scale, one.scale) and torch.equal(source.read(name), one.dequantize())


def test_quantize_writes_it(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("the hen met a man. " * 200)
    folder = save(random_model(llama_config(hidden_size=64)), tmp_path / "model")
    run = {"method": "rtn", "bits": 4, "group_size": 32, "rows": 8, "held_out": 4, "row_tokens": 16, "steps": 1}
    run |= {"batch": 4, "format": "awq", "calibration": f"text:{text}", "keep": ["layers.1.mlp.down_proj"]}
    result = logitwise.quantize(folder, tmp_path / "out", logitwise.Recipe(**run))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert "with gptqmodel, and vLLM serves it" in result.report["loading"]
    assert inspect(tmp_path / "out").grid == "4 bits, groups of 32, asymmetric, float16 scales"
    found = evaluate(tmp_path / "out", text=f"text:{text}", reference=folder, rows=2, row_tokens=16)
    assert found.likelihood.kl.mean < 0.1
    with pytest.raises(InputError, match=r"awq cannot hold this grid\n.*not one scale a channel"):
        logitwise.quantize(folder, tmp_path / "channel", logitwise.Recipe(**{**run, "group_size": None}))
