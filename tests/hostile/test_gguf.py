"""GGUF files that must be refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from source_files import llama_config, random_model, write_gguf

from logitwise.errors import SourceError
from logitwise.source import open_source


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(random_model(llama_config(vocab_size=300)), tmp_path / "tiny.gguf")


def refusal(file: Path) -> str:
    with pytest.raises(SourceError) as refused:
        open_source(file)
    return str(refused.value)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 0.999])
def test_truncated(file: Path, share: float):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    message = refusal(file)
    assert "tiny.gguf cannot be read" in message
    assert "truncated or corrupt" in message


def test_truncated_anywhere_in_the_header(file: Path):
    content = file.read_bytes()
    start = content.index(b"blk.0")
    for length in range(0, start, 97):
        file.write_bytes(content[:length])
        assert "truncated or corrupt" in refusal(file)


@pytest.mark.parametrize("offset", [8, 16])
def test_impossible_counts(file: Path, offset: int):
    """More tensors, or more keys, than the file could hold."""
    content = bytearray(file.read_bytes())
    content[offset : offset + 8] = struct.pack("<Q", 2**61)
    file.write_bytes(content)
    assert "truncated or corrupt" in refusal(file)


def test_not_gguf(file: Path):
    file.write_bytes(b"PK\x03\x04" + bytes(1000))
    assert "not a GGUF file" in refusal(file)


def test_unknown_architecture(tmp_path: Path):
    model = random_model(llama_config(vocab_size=300))
    message = refusal(write_gguf(model, tmp_path / "tiny.gguf", architecture="unheard-of"))
    assert "architecture or keys that are not supported: unheard-of" in message


def test_type_that_is_no_number(tmp_path: Path):
    extra = {"blk.0.odd": np.ones(4, np.int32)}
    message = refusal(write_gguf(random_model(llama_config(vocab_size=300)), tmp_path / "t.gguf", extra=extra))
    assert "tensor blk.0.odd of t.gguf has type I32" in message


def test_type_of_tomorrow(file: Path):
    content = bytearray(file.read_bytes())
    place = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert struct.unpack_from("<I", content, place)[0] == GGMLQuantizationType.F32
    content[place : place + 4] = struct.pack("<I", 250)
    file.write_bytes(content)
    assert "250" in refusal(file)


def test_missing_tensor(file: Path):
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    assert "missing, the first is model.layers.1.mlp.up_proj.weight" in refusal(file)
