"""Tokenizers that must be refused before they fill the memory."""

import base64
import json
import struct
from pathlib import Path

import pytest
from bounds import bounded
from source_files import llama_config, random_model, save
from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from logitwise.errors import SourceError
from logitwise.source import check_tokenizer, open_source
from logitwise.source.growth import growth


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model(llama_config()), tmp_path / "tiny")


def refusal(folder: Path) -> str:
    source = open_source(folder)
    with bounded(), pytest.raises(SourceError) as refused:
        check_tokenizer(source)
    return str(refused.value)


def change(folder: Path, **parts: object) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | parts))


def replace(content: str, **pattern: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def charsmap(longest: int) -> dict[str, object]:
    """A table of characters as sentencepiece has it: an empty search tree, and a text of this length."""
    table = struct.pack("<I", 4) + bytes(4) + b"a" * longest + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


TWICE = replace("aa")
BYTES = json.loads(pre_tokenizers.ByteLevel().__getstate__())
BOMBS: dict[str, dict[str, object]] = {
    "one long text": {"normalizer": replace("a" * 2000)},
    "each step a hundred times": {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 100)] * 8}},
    "each step twice": {"normalizer": {"type": "Sequence", "normalizers": [TWICE] * 40}},
    "lists in lists": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [TWICE] * 6}] * 6}
    },
    "between any two characters": {
        "normalizer": {"type": "Sequence", "normalizers": [replace("b", Regex="x*")] * 40},
    },
    "put before": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "bytes as characters, again and again": {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30},
    },
    "a table of characters": {"normalizer": charsmap(10**6)},
    "when tokens become text": {"decoder": {"type": "Sequence", "decoders": [replace("a" * 100)] * 8}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_tokenizer_that_blows_a_text_up(folder: Path, name: str):
    change(folder, **BOMBS[name])
    message = refusal(folder)
    assert "tokenizer.json blows a text up" in message
    assert "at most 1000 are let through" in message


def test_what_well_known_tokenizers_do_is_let_through():
    usual = [
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "\u2581"), normalizers.Strip()]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("a+"), "isolated"), pre_tokenizers.ByteLevel()]),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.ByteLevel(),
    ]
    assert [growth(json.loads(step.__getstate__())) for step in usual] == [2, 2, 4, 1, 4]
    assert growth(charsmap(33)) == 33


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"[1]", b'{"normalizer": 5}', b'{"normalizer": {"type": 5}}'],
)
def test_a_tokenizer_that_cannot_be_parsed(folder: Path, content: bytes):
    (folder / "tokenizer.json").write_bytes(content)
    message = refusal(folder)
    assert "has no tokenizer that can be loaded" in message or "tokenizer.json is not" in message


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [b"\xff", b'{"a":' * 100_000, b"[1]"])
def test_files_beside_it_that_cannot_be_parsed(folder: Path, name: str, content: bytes):
    (folder / name).write_bytes(content)
    assert "has no tokenizer that can be loaded" in refusal(folder)
