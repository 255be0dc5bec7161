"""GGUF: blocks against a decoder of their own and the gguf package, models written and read back, refusals."""

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import source_files
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from quantized_files import random_quantized
from source_files import (
    HEADS,
    KEY_HEADS,
    interleave,
    llama_config,
    random_model,
    save,
    stored_name,
    tokenizer,
    write_gguf,
)
from test_pipeline import recipe, text  # noqa: F401
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import logitwise
from logitwise.errors import FormatError, MachineError, SourceError
from logitwise.evaluation import evaluate, inspect
from logitwise.formats import Described
from logitwise.formats.gguf import TYPES, Gguf
from logitwise.formats.gguf_tokenizer import RULES
from logitwise.grid import Grid, Quantized
from logitwise.measure.likelihood import as_json
from logitwise.source import GgufSource, QuantizedGguf, open_source, open_stored

FORMAT = Gguf()
LAYER = "model.layers.0.mlp.up_proj"
MINIMA = [Grid(bits, size, False, torch.float16, minimum=True) for bits in (2, 3, 4, 5) for size in (32, 64)]
GRIDS = [
    *(Grid(bits, 32, True) for bits in range(2, 9)),
    *(Grid(bits, 64, False) for bits in range(2, 8)),
    *(Grid(bits, None, bits == 8) for bits in (3, 4, 8)),
    *MINIMA,
]
HOLDS = {
    "Q4_0": {(2, True), (3, True), (4, True), (2, False), (3, False)},
    "Q5_0": {(5, True), (4, False)},
    "Q8_0": {(6, True), (7, True), (8, True), (5, False), (6, False), (7, False)},
}


def random_layer(grid: Grid, seed: int = 0, shape: tuple[int, int] = (5, 192)) -> Quantized:
    made = random_quantized(*shape, replace(grid, minimum=False), seed)
    if not grid.minimum:
        return made
    minimum = torch.randn(made.scale.shape, generator=torch.Generator().manual_seed(seed)).half()
    return replace(made, grid=grid, zero=torch.zeros_like(made.zero), minimum=minimum)


def decoded(row: bytes, kind: str) -> list[float]:
    """The weights of a row of blocks as ggml defines them, in plain Python."""
    weights = []
    size = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34, "Q4_1": 20, "Q5_1": 24}[kind]
    for start in range(0, len(row), size):
        block = row[start : start + size]
        if kind == "Q8_0":
            scale, *whole = struct.unpack("<e32b", block)
            weights += [scale * one for one in whole]
            continue
        low = [byte & 15 for byte in block[-16:]] + [byte >> 4 for byte in block[-16:]]
        fifth = int.from_bytes(block[-20:-16], "little") if kind.startswith("Q5") else 0
        codes = [code + 16 * (fifth >> place & 1) for place, code in enumerate(low)]
        if kind.endswith("1"):
            scale, minimum = struct.unpack("<ee", block[:4])
            weights += [scale * code + minimum for code in codes]
        else:
            (scale,) = struct.unpack("<e", block[:2])
            weights += [scale * (code - (8 if kind == "Q4_0" else 16)) for code in codes]
    return weights


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_layer_against_two_decoders(grid: Grid) -> None:
    assert FORMAT.holds(grid) is None
    written = random_layer(grid)
    ((name, blocks),) = FORMAT.tensors(LAYER, written).items()
    kind = name.removeprefix(f"{LAYER}.")
    expected = {True: "Q5_1" if grid.bits == 5 else "Q4_1"}.get(grid.minimum)
    assert kind == (expected or next(one for one, held in HOLDS.items() if (grid.bits, grid.symmetric) in held))
    assert blocks.dtype == torch.uint8
    # Every product of 11 bits and 8 is exact in float64, and in float32 too.
    exact = written.scale.double().repeat_interleave(192 // written.scale.shape[1], 1) * (
        written.codes.double() - written.zero.double().repeat_interleave(192 // written.zero.shape[1], 1)
    )
    if written.minimum is not None:
        exact += written.minimum.double().repeat_interleave(192 // written.scale.shape[1], 1)
    own = torch.tensor([decoded(bytes(row.tolist()), kind) for row in blocks], dtype=torch.float64)
    assert torch.equal(own, exact)
    by_gguf = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType[kind]))
    assert torch.equal(by_gguf, written.dequantize())
    read = FORMAT.read(LAYER, {name: blocks}, TYPES[kind].grid)
    assert read.grid == TYPES[kind].grid
    assert torch.equal(read.dequantize(), written.dequantize())
    assert FORMAT.bits_stored(grid, 5, 192) == 8 * blocks.numel() == FORMAT.bits_stored(read.grid, 5, 192)
    again = FORMAT.tensors(LAYER, read)
    assert torch.equal(again[name], blocks)


def test_golden_blocks() -> None:
    # Scale 1/2 is 0x3800, minimum -3/2 is 0xBE00; bytes are little-endian.
    codes = torch.tensor([list(range(16)) * 2], dtype=torch.uint8)
    half, zero = torch.tensor([[0.5]]).half(), torch.tensor([[3]], dtype=torch.uint8)

    def bytes_of(quantized: Quantized) -> dict[str, str]:
        stored = FORMAT.tensors("p", quantized).items()
        return {name: bytes(tensor[0].tolist()).hex() for name, tensor in stored}

    nibbles = "".join(f"{i:x}{i:x}" for i in range(16))
    assert bytes_of(Quantized(codes, half, torch.full_like(zero, 8), Grid(4, 32, True))) == {"p.Q4_0": "0038" + nibbles}
    minimum = torch.tensor([[-1.5]]).half()
    with_minimum = Quantized(codes, half, torch.zeros_like(zero), MINIMA[4], minimum)
    assert bytes_of(with_minimum) == {"p.Q4_1": "003800be" + nibbles}
    # q - 3 + 16 is 13 .. 28: the fifth bit is there from q = 3 on, and the low four go on from 13.
    moved = "".join(f"{(i + 13) % 16:x}" * 2 for i in range(16))
    assert bytes_of(Quantized(codes, half, zero, Grid(4, 32, False))) == {"p.Q5_0": "0038" + "f8ff" * 2 + moved}
    up = codes + torch.arange(32) // 16 * 16
    fifth = Quantized(up.to(torch.uint8), half, torch.zeros_like(zero), MINIMA[6], minimum)
    assert bytes_of(fifth) == {"p.Q5_1": "003800be" + "0000ffff" + nibbles}
    signed = "".join(f"{i % 256:02x}" for i in range(-3, 13))
    assert bytes_of(Quantized(codes, half, zero, Grid(7, 32, False))) == {"p.Q8_0": "0038" + signed * 2}


@pytest.mark.parametrize("scale", [2.0**-24, 3 * 2.0**-24, 6.0e-5, 65504.0, 0.0, -0.0])
def test_scales_from_end_to_end(scale: float) -> None:
    """Subnormal ones too: nothing of them is lost."""
    written = random_layer(Grid(4, 32, False))
    written.scale[0, 0] = scale
    ((name, blocks),) = FORMAT.tensors(LAYER, written).items()
    by_gguf = torch.from_numpy(dequantize(blocks.numpy(), GGMLQuantizationType.Q5_0))
    assert torch.equal(by_gguf, written.dequantize())
    assert torch.equal(FORMAT.read(LAYER, {name: blocks}, TYPES["Q5_0"].grid).dequantize(), written.dequantize())


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        (Grid(8, 32, False), "-128 to 127 around a zero point; 8 bits reach from -255 to 255, with --symmetric"),
        (Grid(4, 32, True, torch.bfloat16), "stores scales as float16, not bfloat16"),
        (Grid(4, 32, True, torch.float32), "stores scales as float16, not float32"),
        (Grid(4, 16, True), "a scale for every 32 weights; groups of 16 are not whole blocks"),
        (Grid(4, 48, True), "a scale for every 32 weights; groups of 48 are not whole blocks"),
        (Grid(6, 32, False, torch.float16, minimum=True), "float minima with 2 to 5 bits, not 6"),
    ],
    ids=str,
)
def test_grids_that_are_not_held(grid: Grid, why: str) -> None:
    with pytest.raises(FormatError, match=rf"{LAYER} cannot be written\n.*{why}"):
        FORMAT.tensors(LAYER, random_layer(grid))


def test_layers_that_are_not_held() -> None:
    assert FORMAT.holds_layer(LAYER, 7, 96, False, Grid(4, None, True)) is None
    assert str(FORMAT.holds_layer(LAYER, 7, 80, False, Grid(4, None, True))).endswith(
        "not whole blocks of 32, as gguf needs"
    )
    assert str(FORMAT.holds_layer(LAYER, 7, 96, False, Grid(4, 64, True))).endswith("do not divide; groups of 32 do")
    assert "stored transposed" in str(FORMAT.holds_layer(LAYER, 7, 64, True, Grid(4, 64, True)))
    assert FORMAT.holds_together(set(GRIDS)) is None


def test_weight_off_its_grid_is_refused() -> None:
    good = random_layer(Grid(3, 32, False))
    with pytest.raises(FormatError, match=r"code 8 is out of range\n.*3 bits hold 0 to 7"):
        FORMAT.tensors(LAYER, replace(good, codes=torch.full_like(good.codes, 8)))
    with pytest.raises(FormatError, match="zero point 8 is out of range"):
        FORMAT.tensors(LAYER, replace(good, zero=torch.full_like(good.zero, 8)))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda stored: stored.clear(), r"\.Q4_0 is refused\n.*it is missing"),
        (lambda stored: stored.update({f"{LAYER}.Q5_0": torch.zeros(1)}), r"\.Q5_0 is refused\n.*no other tensor"),
        (lambda stored: stored.update({KEY: stored[KEY][:, :-1]}), r"\.Q4_0 is refused\n.*rows of 107 bytes.*of 18"),
        (lambda stored: stored.update({KEY: stored[KEY].int()}), r"\.Q4_0 is refused\n.*uint8 .* found int32"),
        (lambda stored: stored.update({KEY: stored[KEY][0]}), r"\.Q4_0 is refused\n.*expected uint8"),
        (lambda stored: stored[KEY][1, 18:20].copy_(torch.tensor([0, 0x7C])), r"\.Q4_0 is refused\n.*NaN or infinity"),
    ],
)
def test_tensors_that_are_refused(broken: Callable[[dict[str, Tensor]], None], message: str) -> None:
    stored = FORMAT.tensors(LAYER, random_layer(Grid(4, 32, True)))
    broken(stored)
    with pytest.raises(FormatError, match=message):
        FORMAT.read(LAYER, stored, TYPES["Q4_0"].grid)


KEY = f"{LAYER}.Q4_0"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 320,
    "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
    "rms_norm_eps": 3e-5,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": llama_config(**SHAPE),
    "llama, tied": llama_config(**SHAPE, tie_word_embeddings=True),
    "llama, biases": llama_config(**SHAPE, attention_bias=True),
    "llama, wide heads": llama_config(**SHAPE, head_dim=32),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
}


def described(model: PreTrainedModel, own: PreTrainedTokenizerFast | None = None) -> Described:
    return Described("org/tiny", model.config, model.dtype, own or tokenizer(), [])


def write(model: PreTrainedModel, out: Path, own: PreTrainedTokenizerFast | None = None) -> dict[str, Tensor]:
    """A model in OUT/tiny.gguf, its projections on grids in turn; the tensors that it stands for."""
    told = described(model, own)
    assert FORMAT.holds_model(told) is None
    expected: dict[str, Tensor] = {}

    def tensors():
        for place, (name, tensor) in enumerate(model.state_dict().items()):
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            if name.endswith("_proj.weight"):
                quantized = random_layer(
                    GRIDS[5 * place % len(GRIDS)], place, (tensor.shape[0], tensor.shape[1] // 32 * 32)
                )
                if tensor.shape[1] % (quantized.grid.group_size or 32):
                    quantized = random_layer(Grid(4, 32, False), place, tuple(tensor.shape))
                expected[name] = quantized.dequantize()
                yield from FORMAT.tensors(name.removesuffix(".weight"), quantized).items()
            else:
                expected[name] = FORMAT.kept(tensor)
                yield name, expected[name]

    out.mkdir(exist_ok=True)
    assert FORMAT.write(out, tensors(), told, {}) == (out / "tiny.gguf").stat().st_size
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_model_written_and_read(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name]).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # biases and norms too
    expected = write(model, tmp_path)
    source = open_stored(tmp_path)
    assert isinstance(source, QuantizedGguf)
    assert source.name == "tiny" and source.dtype == dtype
    assert set(source.names()) == set(expected)
    for tensor, value in expected.items():
        read, quantized = source.read(tensor), source.quantized(tensor)
        assert read.dtype == value.dtype and torch.equal(read, value), tensor
        assert (quantized is not None) == tensor.endswith("_proj.weight") == (source.grid(tensor) is not None)
        if quantized is not None:
            assert torch.equal(quantized.dequantize(), value), tensor
    for key in SHAPE.keys() - {"rms_norm_eps"} | {"tie_word_embeddings"}:
        assert getattr(source.config, key) == getattr(model.config, key), key
    assert source.config.rms_norm_eps == pytest.approx(3e-5)
    if name in ("llama, biases", "qwen3"):
        return  # transformers reads neither the biases nor the size of heads
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    for tensor, value in expected.items():
        assert torch.equal(other.get_parameter(tensor), value.float()), tensor


def test_model_called_mistral_is_read(tmp_path: Path) -> None:
    """transformers takes such a file for a Mistral's, of which it has no table of names."""
    model = random_model(CONFIGS["mistral"])
    told = Described("mistral", model.config, model.dtype, tokenizer(), [])
    FORMAT.write(tmp_path, ((name, FORMAT.kept(one)) for name, one in model.state_dict().items()), told, {})
    source = open_stored(tmp_path / "mistral.gguf")
    assert source.config.model_type == "mistral"
    for name, one in model.state_dict().items():
        assert torch.equal(source.read(name), one.to(source.dtype)), name


def test_rows_and_names_as_llama_cpp_has_them(tmp_path: Path) -> None:
    """By lists of their own: queries and keys interleaved, biases too; names as in llama.cpp."""
    model = random_model(CONFIGS["llama, biases"])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    expected = write(model, tmp_path)
    stored = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert len(stored) == len(expected)
    for name, value in expected.items():
        tensor, weight = stored[stored_name(name)], value.numpy()
        if ".q_proj" in name or ".k_proj" in name:
            weight = interleave(weight, HEADS if ".q_proj" in name else KEY_HEADS)
        assert np.array_equal(dequantize(tensor.data, tensor.tensor_type), weight), name
        assert weight.ndim > 1 or tensor.tensor_type == GGMLQuantizationType.F32


def trained(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits text by a rule, with merges of all that the rule leaves together."""
    rule, whole_words = RULES[name]
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer, backend.decoder = rule, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TEXT = "  12 345  6789 we've WE'LL  don't\n\n   x  =  'a' + \"b\"  </s> \u4f60\u597d caf\u00e9\t\t12"


@pytest.mark.parametrize("name", RULES)
def test_tokens_are_those_of_the_tokenizer(name: str, tmp_path: Path) -> None:
    own = trained(name)
    own.chat_template = "{{ messages[0]['content'] }}"
    own.add_tokens(["<think>"])
    write(random_model(CONFIGS["llama"]), tmp_path, own)
    fields = GGUFReader(tmp_path / "tiny.gguf").fields
    told = {
        key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("model", "pre", "add_bos_token", "eos_token_id")
    }
    assert told == {"model": "gpt2", "pre": name, "add_bos_token": False, "eos_token_id": 1}
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:3] == [3, 3, 1] and types[len(own) - 1 :] == [4] + [5] * (320 - len(own))
    read = open_stored(tmp_path).tokenizer()
    for text in (TEXT, f"{TEXT}<think>{TEXT}"):  # noqa: F402
        assert read(text).input_ids == own(text).input_ids
    assert read.chat_template == own.chat_template
    assert (read.bos_token, read.eos_token) == ("<s>", "</s>")


def test_a_token_at_the_start_is_told(tmp_path: Path) -> None:
    own = tokenizer()
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    assert own("a").input_ids[0] == 0
    write(random_model(CONFIGS["llama"]), tmp_path, own)
    assert GGUFReader(tmp_path / "tiny.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert open_stored(tmp_path).tokenizer()("the").input_ids == own("the").input_ids


def changed(change: Callable[[Tokenizer], object]) -> PreTrainedTokenizerFast:
    own = tokenizer()
    change(own.backend_tokenizer)
    return own


def test_a_token_without_a_row_is_refused() -> None:
    own = tokenizer()
    model, rows = random_model(CONFIGS["llama"]), CONFIGS["llama"].vocab_size
    own.add_tokens([f"token {index}" for index in range(len(own), rows)])
    assert FORMAT.holds_model(described(model, own)) is None
    own.add_tokens(["one more"])
    reason = FORMAT.holds_model(described(model, own))
    assert reason == f"its tokenizer has a token {rows}, for which its embedding of {rows} rows has none"


def set_rule(backend: Tokenizer, rule: pre_tokenizers.PreTokenizer) -> None:
    backend.pre_tokenizer = rule


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a"),
            "its tokenizer is WordLevel; written are those of byte-level BPE",
        ),
        (
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [], byte_fallback=True))),
            "its tokenizer is BPE with fallback to bytes",
        ),
        (
            changed(lambda b: set_rule(b, pre_tokenizers.Whitespace())),
            "rule that is none of those known .*gpt-2, smoll",
        ),
        (changed(lambda b: set_rule(b, pre_tokenizers.ByteLevel(add_prefix_space=True))), "rule that is none of those"),
        (changed(lambda b: setattr(b, "normalizer", normalizers.Lowercase())), r"normalizes text \(Lowercase\)"),
        (changed(lambda b: setattr(b.model, "ignore_merges", True)), "rule that is none of those known"),
        (
            changed(lambda b: setattr(b.model, "dropout", 0.5)),
            "BPE has dropout",
        ),
    ],
)
def test_tokenizers_that_are_not_known(own: PreTrainedTokenizerFast, why: str) -> None:
    model = random_model(llama_config())
    assert re.search(why, str(FORMAT.holds_model(described(model, own))))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Gemma2Config(**SHAPE), "architecture is gemma2; written are llama, mistral, qwen2, qwen3"),
        (llama_config(hidden_act="gelu"), "hidden_act 'gelu', which a file of the architecture llama does not tell"),
        (llama_config(mlp_bias=True), "mlp_bias True"),
        (
            llama_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
            "rope_parameters .*linear.* would be read as .*default",
        ),
        (MistralConfig(**SHAPE, sliding_window=16), "sliding_window 16"),
        (
            Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=16, max_window_layers=1),
            "layer_types .*sliding_att",
        ),
        (Qwen3Config(**SHAPE, attention_bias=True), "attention_bias True"),
    ],
)
def test_models_that_a_file_does_not_describe(config: PretrainedConfig, why: str) -> None:
    told = Described("tiny", config, torch.float32, tokenizer(), [])
    assert re.search(why, str(FORMAT.holds_model(told)))


def rewrite(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    file.write_bytes(content.replace(old, new))


def number(file: Path, name: str, place: int, value: int) -> None:
    """Another number in the table of tensors, `place` bytes after a name; 20 is where a matrix has its type."""
    content = bytearray(file.read_bytes())
    start = content.index(name.encode()) + len(name) + place
    content[start : start + 4] = struct.pack("<I", value)
    file.write_bytes(content)


def test_files_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write(random_model(CONFIGS["llama"]), tmp_path)
    whole = file.read_bytes()
    rewrite(file, b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    with pytest.raises(SourceError, match=r"missing, the first is model.layers.1.mlp.up_proj.weight"):
        open_stored(file)
    file.write_bytes(whole)
    number(file, "blk.0.attn_v.weight", 4, 32)
    with pytest.raises(SourceError, match=r"v_proj.weight has the wrong shape\n.*\[32, 32\].*\[32, 64\]"):
        open_stored(file)
    file.write_bytes(whole)
    stored = next(one.name for one in GGUFReader(file).tensors if one.tensor_type.name == "Q4_0" and "ffn" in one.name)
    number(file, stored, 20, GGMLQuantizationType.IQ4_NL)  # as many bytes a block
    source = open_stored(file)
    assert isinstance(source, QuantizedGguf)
    name = next(one for one in source.names() if stored_name(one) == stored)
    assert source.bits_stored(name) == 4.5 * source.read(name).numel()
    message = rf"tensor {stored} is refused\n.*IQ4_NL, lie on no grid that is read; those of Q4_0, Q5_0, Q8_0, Q4_1"
    for ask in (source.quantized, source.grid):
        with pytest.raises(FormatError, match=message):
            ask(name)
    with pytest.raises(FormatError, match=message):
        logitwise.export(file, tmp_path / "out", "compressed-tensors")


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    model = random_model(llama_config())
    with pytest.raises(FormatError, match=r"tensor model.odd.weight cannot be written\n.*llama has no place for it"):
        FORMAT.write(tmp_path, [("model.odd.weight", torch.ones(2))], described(model), {})
    extra = {"rope_freqs.weight": np.ones(4, np.float32)}  # llama.cpp's way of a longer context
    file = write_gguf(model, tmp_path / "t.gguf", GGMLQuantizationType.Q4_0, extra=extra)
    with pytest.raises(FormatError, match=r"rope_freqs.weight is refused\n.*t.gguf is a llama, which has no place"):
        open_stored(file)
    assert open_source(file).unused == ["rope_freqs.weight"]


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"])
def test_files_of_other_writers(kind: str, tmp_path: Path) -> None:
    """As gguf's own quantizer makes them, embedding and head too: exact, where a model to quantize is rounded."""
    model = random_model(llama_config())
    file = write_gguf(model, tmp_path / "t.gguf", GGMLQuantizationType[kind])
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="t.gguf", dtype=torch.float32)
    source = open_stored(file)
    assert isinstance(source, QuantizedGguf)
    for name in source.names():
        quantized = source.quantized(name)
        assert torch.equal(source.read(name), other.get_parameter(name))
        assert (quantized is None) == ("norm" in name)
        if quantized is not None:
            assert quantized.grid == TYPES[kind].grid
            assert torch.equal(quantized.dequantize(), source.read(name))
    dense = open_source(file)
    assert type(dense) is GgufSource
    assert dense.read("model.embed_tokens.weight").dtype == torch.float16
    plain = write_gguf(model, tmp_path / "plain.gguf")
    assert type(open_stored(plain)) is GgufSource


def test_contents_of_types_whose_codes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Super-blocks of 256 weights in 144 bytes lie on no grid of ours; norms are stored in float32."""
    monkeypatch.setattr(source_files, "quantize", lambda w, kind: np.zeros((len(w), w.shape[1] // 256 * 144), np.uint8))
    model = random_model(llama_config(hidden_size=256, intermediate_size=256))
    file = write_gguf(model, tmp_path / "t.gguf", GGMLQuantizationType.Q4_K)
    found = inspect(file)
    assert found.grid == "Q4_K, whose codes lie on no grid that is read"
    assert found.size.bits_per_weight == 4.5
    kinds = {name: kind for name, _, kind in found.tensors}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "Q4_K"
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"float32"}


RTN = {
    "method": "rtn",
    "objective": "mse",
    "bits": 4,
    "group_size": 32,
    "scale_dtype": "float16",
    "format": "gguf",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(llama_config(hidden_size=64)), tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def checkpoints(
    folder: Path,
    text: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A model on one grid, in compressed-tensors and in GGUF."""
    out = tmp_path_factory.mktemp("checkpoints")
    for form in ("compressed-tensors", "gguf"):
        asked = recipe(text, **{**RTN, "format": form, "keep": ("0.mlp.down_proj",)})
        logitwise.quantize(folder, out / form, asked)
    return out


def test_a_run(checkpoints: Path, folder: Path, text: Path) -> None:  # noqa: F811
    out = checkpoints / "gguf"
    name = folder.name
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "report.html",
        "logitwise.json",
        "generation_config.json",
        f"{name}.gguf",
    }
    card = (out / "README.md").read_text()
    assert "library_name: llama-cpp-python" in card and "from llama_cpp import Llama" in card
    found = inspect(out)
    assert found.grid == "5 bits, groups of 32, symmetric, float16 scales"
    assert found.size.bits_per_weight == 5.5
    assert found.report is not None and found.report["grids"] == {
        "4 bits, groups of 32, asymmetric, float16 scales": 13
    }
    assert found.report["bits_per_weight"] == 5.5
    assert inspect(out / f"{name}.gguf").tensors == found.tensors
    # The figures are those of the same grid elsewhere, to the last bit.
    figures = [
        as_json(evaluate(one, text=f"text:{text}", reference=folder, rows=2, row_tokens=32).likelihood)
        for one in (out, checkpoints / "compressed-tensors")
    ]
    assert figures[0] == figures[1]
    with pytest.raises(SourceError, match="is quantized already"):
        logitwise.quantize(out, checkpoints / "again", recipe(text, method="rtn", objective="mse"))


def test_exported(checkpoints: Path, tmp_path: Path) -> None:
    first = open_source(checkpoints / "compressed-tensors")
    logitwise.export(checkpoints / "compressed-tensors", tmp_path / "gguf", "gguf")
    (made,) = (tmp_path / "gguf").glob("*.gguf")
    (run,) = (checkpoints / "gguf").glob("*.gguf")
    assert sorted(t.name for t in GGUFReader(made).tensors) == sorted(t.name for t in GGUFReader(run).tensors)
    logitwise.export(made, tmp_path / "back", "compressed-tensors")
    last = open_source(tmp_path / "back")
    for name in first.names():
        values = first.read(name)
        for other in (open_stored(made), last):
            assert torch.equal(other.read(name).float(), values.float()), name
    ids = first.tokenizer()(TEXT).input_ids
    assert last.tokenizer()(TEXT).input_ids == ids


def test_refused_before_any_work(
    folder: Path,
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    for changes, message in (
        ({"bits": 8, "symmetric": False}, r"gguf cannot hold this grid\n.*-255 to 255"),
        ({"scale_dtype": "bfloat16"}, r"gguf cannot hold this grid\n.*float16, not bfloat16"),
        ({"group_size": 16}, r"gguf cannot hold this grid\n.*groups of 16 are not whole blocks"),
    ):
        asked = recipe(text, **{**RTN, **changes})
        with pytest.raises(FormatError, match=message):
            logitwise.quantize(folder, tmp_path / "out", asked)
    gelu = save(random_model(llama_config(hidden_act="gelu")), tmp_path / "gelu")
    asked = recipe(text, **RTN)
    with pytest.raises(FormatError, match=r"gguf cannot hold gelu\n.*hidden_act 'gelu'.*\n.*another --format"):
        logitwise.quantize(gelu, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_what_is_not_read_back_as_it_was_written_does_not_appear(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Gguf.read

    def off_by_one(self: Gguf, prefix: str, tensors: dict[str, Tensor], grid: Grid) -> Quantized:
        found = read(self, prefix, tensors, grid)
        return replace(found, zero=found.zero + 1) if prefix.endswith("1.mlp.up_proj") else found

    monkeypatch.setattr(Gguf, "read", off_by_one)
    with pytest.raises(MachineError, match=r"layers.1.mlp.up_proj.weight is not read back as it was written"):
        logitwise.export(checkpoints / "compressed-tensors", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
