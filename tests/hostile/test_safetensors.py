"""Safetensors folders that must be refused, each with the file or tensor named."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from bounds import bounded
from safetensors.torch import load_file, save_file
from source_files import llama_config, random_model, save

from logitwise.errors import SourceError
from logitwise.source import open_source

NORM = "model.layers.1.input_layernorm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model(llama_config()), tmp_path / "tiny")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save(random_model(llama_config()), tmp_path / "tiny", "20KB")


def refusal(folder: Path) -> str:
    with bounded(), pytest.raises(SourceError) as refused:
        open_source(folder)
    return str(refused.value)


def point(folder: Path, file: str) -> None:
    """The index places one tensor in `file`."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = file
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated(folder: Path, kept: int):
    file = folder / "model.safetensors"
    content = file.read_bytes()[:kept]
    file.write_bytes(content)
    message = refusal(folder)
    assert "model.safetensors cannot be read" in message
    assert f"truncated or corrupt ({len(content)} bytes" in message


def test_truncated_after_it_was_opened(folder: Path):
    source = open_source(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(SourceError, match=rf"tensor {NORM} of model.safetensors cannot be read"):
        source.read(NORM)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 8) + b"not json",
        struct.pack("<Q", 56) + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1e9]}}',
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}     ',
        b"\x80\x04 a pickle in disguise",
    ],
)
def test_corrupt_header(folder: Path, header: bytes):
    (folder / "model.safetensors").write_bytes(header + bytes(16))
    assert "model.safetensors cannot be read" in refusal(folder)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)}, "invalid offset"),  # they overlap
        ({"a": entry("F32", [16], 0, 64), "b": entry("F32", [16], 0, 64)}, "invalid offset"),  # both in one place
        ({"a": entry("F32", [4], 16, 32)}, "invalid offset"),  # a hole before it
        ({"a": entry("F32", [4], 16, 0)}, "invalid offset"),  # it ends before it begins
        ({"a": entry("F32", [2**60], 0, 2**62)}, "overflow|not fully covered"),
        ({"a": entry("F32", [2**28], 0, 2**30)}, "not fully covered"),  # beyond the end of the file
        ({"a": entry("F32", [2**62, 4], 0, 0)}, "overflow"),
        ({"a": entry("F32", [5], 0, 64)}, "invalid shape"),  # a shape of another size
        ({"a": entry("F99", [16], 0, 64)}, "F99"),
        ({"a": entry("F32", [4], 0, 16)}, "not fully covered"),  # bytes that belong to no tensor
        ({"a": 5}, "invalid type"),
        ({"__metadata__": {"a": {"b": 1}}, "a": entry("F32", [16], 0, 64)}, "invalid type"),
    ],
)
def test_headers_that_lie(folder: Path, tensors: dict[str, object], why: str):
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    message = refusal(folder)
    assert "model.safetensors cannot be read" in message
    assert re.search(why, message), message


def test_a_name_that_comes_twice_in_a_header(folder: Path):
    """The last one counts, for every reader; the file then lacks all other tensors."""
    one = json.dumps(entry("F32", [16], 0, 64))
    header = f'{{"{NORM}": {one}, "{NORM}": {one}}}'.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert "the files hold 1 tensors" in refusal(folder)


@pytest.mark.parametrize("opening", [b'{"a":', b"["])
def test_a_header_nested_too_deeply(folder: Path, opening: bytes):
    header = opening * 100_000
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "model.safetensors cannot be read" in refusal(folder)


@pytest.mark.parametrize("length", [(1 << 24) + 1, 99_000_000, 2**63, 2**64 - 1])
def test_a_header_of_more_tensors_than_a_model_has(folder: Path, length: int):
    """Parsing 60 MB of names takes ten seconds and a gigabyte."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(min(length, 10**9))
    assert f"its header should have {length} bytes; at most 16777216 are read" in refusal(folder)


@pytest.mark.parametrize("content", [b'{"weight_map":' + b'{"a":' * 100_000, b"\xff", b"[" * 100_000])
def test_an_index_that_cannot_be_parsed(sharded: Path, content: bytes):
    (sharded / INDEX).write_bytes(content)
    assert f"{INDEX} cannot be read" in refusal(sharded)


@pytest.mark.parametrize("name", ["x" * 300, "x\0y", "\ud800", "a\nb", "x" * 10**6])
def test_names_of_shards_that_are_none(sharded: Path, name: str):
    point(sharded, f"{name}.safetensors")
    message = refusal(sharded)
    assert f"places tensor {NORM} in " in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "/outside.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "x.bin", ""],
)
def test_index_that_points_elsewhere(sharded: Path, place: str):
    save_file({NORM: torch.ones(32)}, sharded.parent / "outside.safetensors")
    target = str(sharded.parent / "outside.safetensors") if place.startswith("/") else place
    point(sharded, target)
    message = refusal(sharded)
    assert f"places tensor {NORM} in {target!r}" in message
    assert "only .safetensors files beside the index" in message


def test_missing_shard(sharded: Path):
    (sharded / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    point(sharded, "model-00009-of-00009.safetensors")
    message = refusal(sharded)
    assert "shard model-0000" in message
    assert "is missing" in message


def test_tensor_listed_but_absent(sharded: Path):
    files = sorted(file.name for file in sharded.glob("*.safetensors"))
    holder = json.loads((sharded / INDEX).read_text())["weight_map"][NORM]
    other = next(file for file in files if file != holder)
    point(sharded, other)
    message = refusal(sharded)
    assert f"tensor {NORM} is missing" in message
    assert other in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_index_that_is_none(sharded: Path, content: str):
    (sharded / INDEX).write_text(content)
    assert f"{INDEX} cannot be read" in refusal(sharded)


def test_shards_without_an_index(sharded: Path):
    (sharded / INDEX).unlink()
    assert f"safetensors files and no {INDEX}" in refusal(sharded)


def test_only_pickled_weights(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "has only pickled weights (pytorch_model.bin)" in message
    assert "convert it" in message


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)


def test_missing_tensor(folder: Path):
    stored = load_file(folder / "model.safetensors")
    del stored[NORM]
    save_file(stored, folder / "model.safetensors")
    assert f"1 tensors of the model are missing, the first is {NORM}" in refusal(folder)


def test_wrong_shape(folder: Path):
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {NORM: torch.ones(31)}, folder / "model.safetensors")
    message = refusal(folder)
    assert f"tensor {NORM} has the wrong shape" in message
    assert "[31]" in message
    assert "[32]" in message
