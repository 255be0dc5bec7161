"""Safetensors folders that must be refused, each with the file or tensor named."""

import json
import struct
from pathlib import Path

import pytest
import torch
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
    with pytest.raises(SourceError) as refused:
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
