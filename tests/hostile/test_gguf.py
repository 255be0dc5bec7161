"""GGUF files that must be refused."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from bounds import bounded
from gguf import GGMLQuantizationType, GGUFValueType
from source_files import llama_config, random_model, write_gguf

from logitwise.errors import SourceError
from logitwise.skeleton import Skeleton
from logitwise.source import open_source


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(random_model(llama_config(vocab_size=300)), tmp_path / "tiny.gguf")


def refusal(file: Path) -> str:
    with bounded(), pytest.raises(SourceError) as refused:
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


U32, U64, ARRAY, STRING = (struct.pack("<I", kind) for kind in (4, 10, GGUFValueType.ARRAY, GGUFValueType.STRING))


def lying(*entries: bytes, tensors: bytes = b"", count: int = 0) -> bytes:
    """A file of these keys and tensors."""
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(entries)) + b"".join(entries) + tensors + bytes(64)


def key(name: str, kind: bytes, value: bytes) -> bytes:
    return text(name) + kind + value


def text(value: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value.encode()


def tensor(name: str, shape: list[int], offset: int = 0, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LLAMA = key("general.architecture", STRING, text("llama"))
NESTED = ARRAY + (ARRAY + struct.pack("<Q", 1)) * 50_000


@pytest.mark.parametrize(
    "content",
    {
        "a string longer than the file": lying(key("general.architecture", STRING, text("llama", 2**40))),
        "a string of a length below zero": lying(key("general.architecture", STRING, text("llama", 2**64 - 8))),
        "a name longer than the file": lying(text("general", 2**62)),
        "strings without end": lying(LLAMA, key("a", ARRAY, STRING + struct.pack("<Q", 2**60) + bytes(4096))),
        "numbers without end": lying(LLAMA, key("a", ARRAY, U32 + struct.pack("<Q", 2**62))),
        "arrays in arrays": lying(LLAMA, text("a") + NESTED + U32 + bytes(8)),
        "a long array of arrays": lying(LLAMA, key("a", ARRAY, ARRAY + struct.pack("<Q", 1000) + bytes(4096))),
        "a kind of value that there is not": lying(LLAMA, key("a", struct.pack("<I", 77), bytes(64))),
        "an architecture that is a number": lying(key("general.architecture", U32, bytes(4))),
        "no architecture": lying(key("a", U32, bytes(4))),
        "tensors beside nothing": lying(
            LLAMA, key("general.alignment", U32, bytes(4)), tensors=tensor("a", [4]), count=1
        ),
        "a key that comes twice": lying(LLAMA, LLAMA, LLAMA),
        "a tensor that comes twice": lying(LLAMA, tensors=tensor("a", [4]) * 2, count=2),
        "a tensor beyond the end": lying(LLAMA, tensors=tensor("a", [4], 2**40), count=1),
        "a tensor before the start": lying(LLAMA, tensors=tensor("a", [4], 2**64 - 32), count=1),
        "a tensor longer than the file": lying(LLAMA, tensors=tensor("a", [2**34]), count=1),
        "sizes whose product is 0": lying(LLAMA, tensors=tensor("a", [2**32, 2**32]), count=1),
        "sizes whose product is small": lying(LLAMA, tensors=tensor("a", [2**63 + 2, 2]), count=1),
        "more dimensions than the file has bytes": lying(LLAMA, tensors=text("a") + struct.pack("<I", 2**31), count=1),
        "half a block": lying(LLAMA, tensors=tensor("a", [17], kind=2), count=1),
        "no Unicode": lying(key("general.architecture", STRING, struct.pack("<Q", 2) + b"\xff\xfe")),
        "a version of tomorrow": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    }.items(),
    ids=lambda case: case[0],
)
def test_tables_that_lie(tmp_path: Path, content: tuple[str, bytes]):
    file = tmp_path / "lies.gguf"
    file.write_bytes(content[1])
    message = refusal(file)
    expected = "is incomplete" if content[0] == "a tensor before the start" else "cannot be read"
    assert f"lies.gguf {expected}" in message


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_more_blocks_than_there_are_tensors(tmp_path: Path, architecture: str):
    """Some configs have a list with an entry for each block."""
    model = random_model(llama_config(vocab_size=300))
    model.config.num_hidden_layers = 10**9
    message = refusal(write_gguf(model, tmp_path / "tiny.gguf", architecture=architecture))
    assert "it has 1000000000 blocks, but 21 tensors" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("embedding_length", 2**32 - 1), ("feed_forward_length", 2**31), ("attention.head_count", 0), ("block_count", 0)],
)
def test_sizes_that_no_model_has(file: Path, name: str, value: int):
    content = bytearray(file.read_bytes())
    place = content.index(f"llama.{name}".encode()) + len(f"llama.{name}") + 4
    content[place : place + 4] = struct.pack("<I", value)
    file.write_bytes(content)
    with bounded(), pytest.raises(SourceError) as refused:
        Skeleton(open_source(file), torch.device("cpu"), torch.float32).prove()
    assert refused.value.remedy
