"""MLX's affine layout: its tensors against a decoder of their own, its refusals, a model written and read back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from source_files import llama_config, random_model, save
from torch import Tensor
from transformers import AutoModelForCausalLM

import logitwise
from logitwise.errors import FormatError, SourceError
from logitwise.evaluation import evaluate, inspect
from logitwise.formats import FORMATS
from logitwise.formats.checkpoint import write_checkpoint, write_config
from logitwise.formats.mlx import BITS, Mlx
from logitwise.grid import Grid, Quantized
from logitwise.measure.likelihood import as_json
from logitwise.source import QuantizedFolder, open_source

FORMAT = Mlx()
LAYER = "model.layers.0.mlp.up_proj"
SYMMETRIC = [Grid(bits, 32, True, dtype) for bits in BITS for dtype in (torch.float16, torch.bfloat16, torch.float32)]
ASYMMETRIC = [Grid(bits, group, False, torch.float32) for bits in BITS for group in (32, 64, 128)]


def random_quantized(out_features: int, in_features: int, grid: Grid, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, grid.groups(in_features))
    codes = torch.randint(0, grid.levels + 1, (out_features, in_features), generator=generator)
    zero = torch.randint(0, grid.levels + 1, shape, generator=generator)
    scale = (0.5 + torch.rand(shape, generator=generator)) / (2**grid.bits * in_features**0.5)
    scale[0, 0] *= -1  # scales may be negative
    minimum = torch.randn(shape, generator=generator).to(grid.scale_dtype) if grid.minimum else None
    if grid.symmetric or grid.minimum:
        zero = torch.full_like(zero, grid.middle if grid.symmetric else 0)
    return Quantized(codes.to(torch.uint8), scale.to(grid.scale_dtype), zero.to(torch.uint8), grid, minimum)


def decoded(stored: dict[str, Tensor], prefix: str, bits: int, group_size: int) -> list[list[float]]:
    """The weights of a layer as MLX defines them, bit by bit in plain Python: code * scale + bias."""
    words, scales, biases = (stored[f"{prefix}.{part}"].tolist() for part in ("weight", "scales", "biases"))
    weights = []
    for row, scale, bias in zip(words, scales, biases, strict=True):
        stream = sum(word << (32 * place) for place, word in enumerate(row))
        codes = [(stream >> (bits * i)) % 2**bits for i in range(len(row) * 32 // bits)]
        weights.append([code * scale[i // group_size] + bias[i // group_size] for i, code in enumerate(codes)])
    return weights


def assert_same(read: Quantized, written: Quantized) -> None:
    assert torch.equal(read.codes, written.codes)
    assert torch.equal(read.scale, written.scale) and read.scale.dtype == written.scale.dtype
    assert torch.equal(read.zero, written.zero)
    assert read.grid == written.grid
    assert torch.equal(read.dequantize(), written.dequantize())


@pytest.mark.parametrize("grid", SYMMETRIC + ASYMMETRIC, ids=str)
def test_layer_against_a_decoder_of_its_own(grid: Grid) -> None:
    assert FORMAT.holds(grid) is None
    written = random_quantized(5, 256, grid)
    stored = FORMAT.tensors(LAYER, written)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        f"{LAYER}.weight": (torch.uint32, (5, 8 * grid.bits)),
        f"{LAYER}.scales": (grid.scale_dtype, (5, grid.groups(256))),
        f"{LAYER}.biases": (grid.scale_dtype, (5, grid.groups(256))),
    }
    assert grid.group_size is not None
    weights = torch.tensor(decoded(stored, LAYER, grid.bits, grid.group_size), dtype=torch.float64)
    exact = written.scale.double().repeat_interleave(grid.group_size, 1) * (
        written.codes.double() - written.zero.double().repeat_interleave(grid.group_size, 1)
    )
    # Biases of 16-bit scales are exact; float32 rounds them, by half a unit in the last place of the largest.
    largest = float(written.scale.abs().max()) * grid.levels
    assert float((weights - exact).abs().max()) <= (largest * 2**-24 if grid.scale_dtype == torch.float32 else 0)
    assert_same(FORMAT.read(LAYER, stored, grid_read(grid)), written)


def grid_read(grid: Grid) -> Grid:
    """The grid by which a layer on `grid` is read: config.json does not say that it is symmetric."""
    return FORMAT.grids_of(FORMAT.quantization_config({LAYER: grid}, []), grid.scale_dtype)(LAYER)


def test_golden_layer() -> None:
    # 32 codes of 4 bits, a hex digit each, low digit first; scale 1/2 and zero point 3, so that the bias is -3/2.
    codes = torch.tensor([list(range(16)) * 2], dtype=torch.uint8)
    grid = Grid(4, 32, False, torch.float32)
    quantized = Quantized(codes, torch.tensor([[0.5]]), torch.tensor([[3]], dtype=torch.uint8), grid)
    stored = FORMAT.tensors("p", quantized)
    assert {name: tensor.tolist() for name, tensor in stored.items()} == {
        "p.weight": [[0x76543210, 0xFEDCBA98] * 2],
        "p.scales": [[0.5]],
        "p.biases": [[-1.5]],
    }


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        (Grid(7, 32, True), "holds 2, 3, 4, 5, 6 and 8 bits, not 7"),
        (Grid(4, 16, True), "groups of 32, 64 and 128, not groups of 16"),
        (Grid(4, None, True), "not one scale a channel"),
        (Grid(4, 32, True, torch.float64), "not float64"),
        (Grid(4, 32, False), "float16 would round it, which moves zero points; --scale-dtype float32 or --symmetric"),
        (Grid(4, 32, False, torch.bfloat16), "bfloat16 would round it.*--scale-dtype float32"),
    ],
    ids=str,
)
def test_grids_that_are_not_held(grid: Grid, why: str) -> None:
    with pytest.raises(FormatError, match=rf"{LAYER} cannot be written\n.*{why}"):
        FORMAT.tensors(LAYER, random_quantized(4, 128, grid))


def test_float16_would_move_a_zero_point() -> None:
    # 1365 takes float16's 11 bits; 11 times it, 15015, takes 14 and rounds to 15016: the zero point would be 11.0007.
    scale = torch.tensor(1365.0).half()
    assert float((scale * 11).double() / scale.double()) == 15016 / 1365


def test_product_that_does_not_fit_is_refused() -> None:
    quantized = random_quantized(4, 64, Grid(8, 32, True))
    quantized.scale[2, 1] = 600.0  # 128 times it is beyond float16
    message = rf"{LAYER}: zero points cannot be stored\n.*does not fit float16\n.*--scale-dtype float32"
    with pytest.raises(FormatError, match=message):
        FORMAT.tensors(LAYER, quantized)


def test_scale_of_zero_is_a_group_of_zeros() -> None:
    quantized = random_quantized(4, 64, Grid(3, 32, False, torch.float32))
    quantized.scale[1, 1] = 0.0
    read = FORMAT.read(LAYER, FORMAT.tensors(LAYER, quantized), quantized.grid)
    assert int(read.zero[1, 1]) == 4
    assert torch.equal(read.dequantize(), quantized.dequantize())


def test_holds_together() -> None:
    assert FORMAT.holds_together({Grid(2, 32, False, torch.float32), Grid(4, 64, True, torch.float32)}) is None
    assert "one scale type for all layers" in str(FORMAT.holds_together({*SYMMETRIC[:2]}))


def test_holds_layer() -> None:
    grid = Grid(4, 64, True)
    assert FORMAT.holds_layer(LAYER, 7, 576, False, grid) is None
    assert str(FORMAT.holds_layer(LAYER, 7, 96, False, grid)).endswith("do not divide; groups of 32 do")
    assert str(FORMAT.holds_layer(LAYER, 7, 80, False, grid)).endswith("do not divide; none that it holds do")
    assert "stored transposed" in str(FORMAT.holds_layer(LAYER, 7, 64, True, grid))


def test_weight_off_its_grid_is_refused() -> None:
    good = random_quantized(4, 64, Grid(3, 32, False, torch.float32))
    with pytest.raises(FormatError, match=r"code 8 is out of range\n.*3 bits hold 0 to 7"):
        FORMAT.tensors(LAYER, replace(good, codes=torch.full_like(good.codes, 8)))
    with pytest.raises(FormatError, match="zero point 8 is out of range"):
        FORMAT.tensors(LAYER, replace(good, zero=torch.full_like(good.zero, 8)))


def change(suffix: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(stored: dict[str, Tensor]) -> None:
        stored[f"{LAYER}.{suffix}"] = make(stored[f"{LAYER}.{suffix}"])

    return apply


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda stored: stored.pop(f"{LAYER}.weight"), r"\.weight is refused\n.*it is missing"),
        (lambda stored: stored.pop(f"{LAYER}.scales"), r"\.scales is refused\n.*it is missing"),
        (lambda stored: stored.pop(f"{LAYER}.biases"), r"\.biases is refused\n.*it is missing"),
        (
            lambda stored: stored.update({f"{LAYER}.g_idx": torch.zeros(1)}),
            r"\.g_idx is refused\n.*and no other tensor",
        ),
        (
            change("weight", lambda t: t.view(torch.int32)),
            r"\.weight is refused\n.*expected uint32 \[4, 6\], found int32 \[4, 6\]",
        ),
        (change("weight", lambda t: t[:, :5]), r"\.weight is refused\n.*\[4, 5\] words are not the codes"),
        (
            change("weight", lambda t: t[:, :3]),
            r"\.scales is refused\n.*expected float32 \[4, 1\], found float32 \[4, 2\]",
        ),
        (change("weight", lambda t: t[0]), r"\.weight is refused\n.*\[6\] words are not"),
        (change("scales", lambda t: t.half()), r"\.scales is refused\n.*expected float32 \[4, 2\], found float16"),
        (change("scales", lambda t: t * float("nan")), r"\.scales is refused\n.*NaN or infinity"),
        (change("biases", lambda t: t[:3]), r"\.biases is refused\n.*found float32 \[3, 2\]"),
        (change("biases", lambda t: t * float("inf")), r"\.biases is refused\n.*NaN or infinity"),
    ],
)
def test_wrong_tensors_are_refused(broken: Callable[[dict[str, Tensor]], None], message: str) -> None:
    grid = Grid(3, 32, False, torch.float32)
    stored = FORMAT.tensors(LAYER, random_quantized(4, 64, grid))
    broken(stored)
    with pytest.raises(FormatError, match=rf"tensor {LAYER}.*{message}"):
        FORMAT.read(LAYER, stored, grid)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_minima_are_written_and_read(dtype: torch.dtype) -> None:
    grid = Grid(3, 32, False, dtype, minimum=True)
    quantized = random_quantized(4, 64, grid)
    stored = FORMAT.tensors(LAYER, quantized)
    assert stored[f"{LAYER}.biases"].dtype == dtype
    read = FORMAT.read(LAYER, stored, replace(grid, minimum=False))
    assert_same(read, quantized)
    expected = [
        [
            float(quantized.scale[row, column // 32]) * code + float(quantized.minimum[row, column // 32])
            for column, code in enumerate(codes)
        ]
        for row, codes in enumerate(quantized.codes.tolist())
    ]
    torch.testing.assert_close(read.dequantize().double(), torch.tensor(expected, dtype=torch.float64))


def test_rounded_zero_points_are_minima() -> None:
    # As converters with float16 scales store them: the reader must not take 11 for 11.0007.
    scale = torch.full((4, 2), 1365 / 32768).half()
    stored = FORMAT.tensors(LAYER, random_quantized(4, 64, Grid(4, 32, True)))
    stored |= {f"{LAYER}.scales": scale, f"{LAYER}.biases": -(11 * scale)}
    read = FORMAT.read(LAYER, stored, Grid(4, 32, False))
    assert read.grid.minimum and torch.equal(read.minimum, -(11 * scale))


def test_a_zero_point_beyond_the_codes_is_a_minimum() -> None:
    grid = Grid(3, 32, False, torch.float32)
    stored = FORMAT.tensors(LAYER, random_quantized(4, 64, grid))
    stored[f"{LAYER}.biases"] = -9 * stored[f"{LAYER}.scales"]
    assert FORMAT.read(LAYER, stored, grid).grid.minimum


def test_other_formats_refuse_minima() -> None:
    grid = Grid(4, 32, False, torch.float16, minimum=True)
    for name in set(FORMATS) - {"mlx", "gguf"}:
        assert FORMATS[name].holds(grid) == f"{name} holds whole zero points, not float minima"


def test_minima_and_grid_go_together() -> None:
    grid = Grid(4, 32, False, minimum=True)
    quantized = random_quantized(4, 64, grid)
    with pytest.raises(FormatError, match="minima are missing"):
        FORMAT.tensors(LAYER, replace(quantized, minimum=None))
    with pytest.raises(FormatError, match="minima are there"):
        FORMAT.tensors(LAYER, replace(quantized, grid=Grid(4, 32, True), zero=torch.full_like(quantized.zero, 8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "mxfp4"}, "quantization: mode is not read\n.*'mxfp4'; logitwise reads 'affine'"),
        ({"bits": 7}, "quantization is not read\n.*not 7"),
        ({"bits": "4"}, "quantization: bits is not read\n.*'4'; logitwise reads a whole number"),
        ({"group_size": None}, "quantization: group_size is not read"),
        ({"group_size": 16}, "quantization is not read\n.*not groups of 16"),
        ({"quant_method": "mlx"}, "quantization: quant_method is not read"),
        ({LAYER: True}, f"quantization: {LAYER} is not read"),
        ({LAYER: {"group_size": 32}}, f"quantization: {LAYER}: bits is not read"),
        ({LAYER: {"bits": 4, "group_size": 32, "global_scale": True}}, f"{LAYER}: global_scale is not read"),
        ({LAYER: {"bits": 4, "group_size": 32, "mode": "nvfp4"}}, f"{LAYER}: mode is not read"),
    ],
)
def test_foreign_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FORMAT.grids_of({"group_size": 64, "bits": 4, "mode": "affine"} | changes, torch.float16)


def test_config_of_several_grids() -> None:
    grids = {f"layers.{i}": Grid(4, 64, False, torch.float32) for i in range(3)}
    grids["layers.3"] = Grid(2, 32, False, torch.float32)
    config = FORMAT.quantization_config(grids, ["lm_head"])
    assert config == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "layers.3": {"group_size": 32, "bits": 2, "mode": "affine"},
    }
    grid_of = FORMAT.grids_of(config, torch.float32)
    assert {module: grid_of(module) for module in grids} == grids
    with pytest.raises(FormatError, match=r"layers.0 has no grid\n.*in full precision"):
        FORMAT.grids_of(config | {"layers.0": False}, torch.float32)("layers.0")


def write(folder: Path, grids: list[Grid]) -> dict[str, Quantized]:
    """A Llama whose projections lie on the grids in turn, all but one; returns what was written."""
    model = random_model(llama_config())
    state, written = dict(model.state_dict()), {}
    for place, name in enumerate([name for name in state if "_proj" in name and name != f"{LAYER}.weight"]):
        module, grid = name.removesuffix(".weight"), grids[place % len(grids)]
        written[module] = random_quantized(*state.pop(name).shape, grid, place)
        state |= FORMAT.tensors(module, written[module])
    save(model, folder)
    write_checkpoint(folder, state.items(), written_for=FORMAT.written_for)
    config = FORMAT.quantization_config({module: one.grid for module, one in written.items()}, ["lm_head", LAYER])
    write_config(folder, model.config, config, torch.float32, FORMAT.config_keys)
    return written


@pytest.mark.parametrize(
    "grids",
    [[Grid(3, 32, True)], [Grid(bits, 32, False, torch.float32) for bits in (4, 2, 8)]],
    ids=["symmetric", "several"],
)
def test_model_is_read_back(tmp_path: Path, grids: list[Grid]) -> None:
    written = write(tmp_path, grids)
    source = open_source(tmp_path)
    assert isinstance(source, QuantizedFolder)
    assert source.unused == []
    for name in source.names():
        one, read = written.get(name.removesuffix(".weight")), source.quantized(name)
        assert (one is None) == (read is None) == (source.grid(name) is None)
        if one is not None and read is not None:
            assert_same(read, one)
            assert source.grid(name) == read.grid
            assert torch.equal(source.read(name), one.dequantize())
    assert source.quantized(f"{LAYER}.weight") is None
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}


def test_wrong_file_gives_other_weights(tmp_path: Path) -> None:
    """Zero points off by one are a valid file, and must not come back as what was meant."""
    written = write(tmp_path, [Grid(4, 32, True, torch.float32)])
    stored = load_file(tmp_path / "model.safetensors")
    name = next(iter(written))
    stored[f"{name}.biases"] = -7 * stored[f"{name}.scales"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "mlx"})
    difference = open_source(tmp_path).read(f"{name}.weight") - written[name].dequantize()
    assert torch.allclose(difference, written[name].scale.repeat_interleave(32, 1), atol=1e-6)


def test_transformers_says_that_it_does_not_load_it(tmp_path: Path) -> None:
    write(tmp_path, [Grid(4, 32, True)])
    with pytest.raises(ValueError, match="quant_method"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_keys_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [Grid(4, 32, True)])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        SourceError, match=r"contradicts itself\n.*quantization and quantization_config, and here they differ"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("key", "said"), [*((key, 4) for key in FORMAT.config_keys), (FORMAT.config_keys[1], {"quant_method": "mlx"})]
)
def test_keys_that_loaders_would_not_read_are_refused(tmp_path: Path, key: str, said: object) -> None:
    write(tmp_path, [Grid(4, 32, True)])
    config = json.loads((tmp_path / "config.json").read_text())
    for each in FORMAT.config_keys:
        del config[each]
    (tmp_path / "config.json").write_text(json.dumps(config | {key: said}))
    with pytest.raises(SourceError):
        open_source(tmp_path)


@pytest.mark.parametrize("left", [("scales",), ("biases",), ()], ids=["scales", "biases", "neither"])
def test_layer_without_its_parts_is_refused(tmp_path: Path, left: tuple[str, ...]) -> None:
    name = next(iter(write(tmp_path, [Grid(4, 32, True)])))
    stored = load_file(tmp_path / "model.safetensors")
    for suffix in {"scales", "biases"} - set(left):
        del stored[f"{name}.{suffix}"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "mlx"})
    with pytest.raises((FormatError, SourceError), match=name):
        open_source(tmp_path).read(f"{name}.weight")


def test_it_is_registered() -> None:
    assert isinstance(FORMATS["mlx"], Mlx)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_run_writes_it_and_its_figures_are_those_of_compressed_tensors(tmp_path: Path, symmetric: bool) -> None:
    model, text = save(random_model(llama_config()), tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("The hen met the man. The ant saw a net.\n\n" * 60, encoding="utf-8")
    asked = {
        "bits": 3,
        "group_size": 32,
        "symmetric": symmetric,
        "scale_dtype": "float32",
        "method": "rtn",
        "calibration": f"text:{text}",
        "rows": 6,
        "held_out": 2,
        "row_tokens": 24,
    }
    figures = {}
    for name in ("mlx", "compressed-tensors"):
        result = logitwise.quantize(model, tmp_path / name, logitwise.Recipe.load(None, format=name, **asked))
        found = evaluate(tmp_path / name, text=f"text:{text}", reference=model, rows=4, row_tokens=24, device="cpu")
        assert found.size.bits_per_weight == result.report["bits_per_weight"]
        figures[name] = found
    assert as_json(figures["mlx"].likelihood) == as_json(figures["compressed-tensors"].likelihood)
    assert figures["mlx"].size.bits_per_weight == 3 + 2 * 32 / 32
    contents = inspect(tmp_path / "mlx")
    assert contents.grid == f"3 bits, groups of 32, {'' if symmetric else 'a'}symmetric, float32 scales"
    assert ("model.layers.0.mlp.up_proj.weight", (96, 32), "3 bits") in contents.tensors
    card = (tmp_path / "mlx" / "README.md").read_text("utf-8")
    assert "library_name: mlx" in card and "from mlx_lm import load" in card and "transformers" not in card


def test_a_run_refuses_before_its_work_what_would_be_rounded(tmp_path: Path) -> None:
    model = save(random_model(llama_config()), tmp_path / "model")
    asked = logitwise.Recipe.load(None, format="mlx", group_size=32, device="cpu")
    with pytest.raises(
        FormatError, match=r"mlx cannot hold this grid\n.*float16.*--scale-dtype float32 or --symmetric"
    ):
        logitwise.quantize(model, tmp_path / "out", asked)
