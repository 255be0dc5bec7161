"""GGUF files: the same tensors, config and tokens as transformers' own loader gives, and as were written."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from source_files import llama_config, random_model, tokenizer, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from logitwise.errors import SourceError
from logitwise.source import GgufSource, open_source

VOCABULARY = 300  # more than the reader reads element by element


@pytest.mark.parametrize("tied", [False, True])
def test_float_file_gives_back_what_was_written(tmp_path: Path, tied: bool):
    model = random_model(llama_config(vocab_size=VOCABULARY, tie_word_embeddings=tied))
    source = open_source(write_gguf(model, tmp_path / "tiny.gguf"))
    assert isinstance(source, GgufSource)
    assert source.name == "tiny"
    assert source.dtype == torch.float16
    expected = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.read(name).dtype == torch.float16
        assert torch.equal(source.read(name), tensor), name
    assert source.unused == []
    assert source.size_bytes == (tmp_path / "tiny.gguf").stat().st_size


def test_quantized_file_as_transformers_reads_it(tmp_path: Path):
    model = random_model(llama_config(vocab_size=VOCABULARY))
    file = write_gguf(model, tmp_path / "tiny.gguf", GGMLQuantizationType.Q4_1)
    source = open_source(file)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    read = {name: source.read(name) for name in source.names()}
    for name, tensor in other.state_dict().items():
        assert torch.equal(read[name], tensor.half()), name
    ours = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).eval()
    ours.load_state_dict({name: tensor.float() for name, tensor in read.items()})
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        ours_logits, other_logits, first = ours(ids).logits, other(ids).logits, model(ids).logits
    assert torch.allclose(ours_logits, other_logits, atol=1e-3)  # float16 weights against float32 ones
    assert not torch.allclose(ours_logits, first, atol=1e-3)  # the file is not the model before quantization


def test_config_and_tokenizer_as_transformers_reads_them(tmp_path: Path):
    file = write_gguf(random_model(llama_config(vocab_size=VOCABULARY)), tmp_path / "tiny.gguf")
    source = open_source(file)
    expected = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name).to_dict()
    found = source.config.to_dict()
    different = {key for key in expected | found if expected.get(key) != found.get(key)}
    assert different <= {"dtype", "_name_or_path", "name_or_path"}
    assert found["vocab_size"] == VOCABULARY
    text = "the man 12 and </s> another\n"
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert source.tokenizer()(text).input_ids == reference(text).input_ids == tokenizer()(text).input_ids
    assert source.tokenizer().special_tokens_map == reference.special_tokens_map
    assert source.tokenizer() is source.tokenizer()


def test_what_the_model_has_no_place_for_is_listed(tmp_path: Path):
    model = random_model(llama_config(vocab_size=VOCABULARY))
    extra = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert open_source(write_gguf(model, tmp_path / "t.gguf", extra=extra)).unused == ["rope_freqs.weight"]


@pytest.mark.parametrize(
    ("keys", "extra", "why"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}, "its rotary embeddings are scaled"),
        ({}, {"rope_freqs.weight": np.array([1, 1, 2, 8], np.float32)}, "its rotary embeddings are scaled"),
        ({"attention.sliding_window": 8}, {}, "its attention has windows of 8 tokens"),
    ],
    ids=["linear", "factors", "window"],
)
def test_what_transformers_would_read_as_another_model_is_refused(
    keys: dict[str, Any], extra: dict[str, np.ndarray], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = GGUFWriter.add_rope_dimension_count

    def more(writer: GGUFWriter, size: int) -> None:
        add(writer, size)
        for key, value in keys.items():
            kind = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}[type(value)]
            writer.add_key_value(f"llama.{key}", value, kind)

    monkeypatch.setattr(GGUFWriter, "add_rope_dimension_count", more)
    file = write_gguf(random_model(llama_config(vocab_size=VOCABULARY)), tmp_path / "t.gguf", extra=extra)
    with pytest.raises(SourceError, match=why):
        open_source(file)


def test_read_is_a_copy(tmp_path: Path):
    source = open_source(write_gguf(random_model(llama_config(vocab_size=VOCABULARY)), tmp_path / "t.gguf"))
    first = source.read("model.norm.weight")
    first.zero_()
    assert bool((source.read("model.norm.weight") == 1).all())
