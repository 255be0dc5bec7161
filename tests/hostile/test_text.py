"""Calibration text that must be refused, with file and line, before it fills the memory."""

import json
from pathlib import Path

import pytest
from bounds import bounded
from source_files import tokenizer

from logitwise.calibration.jsonl import read_jsonl
from logitwise.calibration.prompts import prompts_of_file
from logitwise.calibration.text import read_text
from logitwise.errors import CalibrationError

READERS = {
    "text": lambda file: read_text(file, tokenizer()),
    "jsonl": lambda file: read_jsonl(file, tokenizer()),
    "prompts": prompts_of_file,
}


def refusal(kind: str, file: Path, megabytes: int = 50) -> str:
    with bounded(megabytes), pytest.raises(CalibrationError) as refused:
        READERS[kind](file)
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.mark.parametrize("kind", READERS)
def test_a_line_of_100_megabytes(tmp_path: Path, kind: str):
    """Its tokens would take some ten gigabytes."""
    file = tmp_path / "long.jsonl"
    line = b'{"prompt": "' + b"a" * 10**8 + b'", "text": ""}'
    file.write_bytes(b'{"prompt": "b", "text": "c"}\n\n' + line)
    message = refusal(kind, file, megabytes=600)
    assert ("long.jsonl" in message and "line 3" in message) or kind == "text"
    assert f"is too long\n  why:  it has {len(line)} characters; at most 4194304 make one document" in message


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_does_not_fit_in_memory(tmp_path: Path, kind: str):
    file = tmp_path / "huge.jsonl"
    with file.open("wb") as opened:
        opened.truncate(10**12)
    assert "huge.jsonl is too large\n  why:  it has 1000000000000 bytes" in refusal(kind, file)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "/proc/self", "/"])
def test_what_is_no_file(kind: str, path: str):
    assert f"the file {path} cannot be read" in refusal(kind, Path(path))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}', "is not UTF-8\n  why:  byte 0xff in line 2"),
        ('{"text": "a"}'.encode("utf-16"), "is not UTF-8|is binary"),
        (b"PK\x03\x04" + bytes(100), "is binary"),
        (b'{"text": "\xed\xa0\x80"}', "is not UTF-8"),  # half of a pair
        (b"\xf0\x9f\x98", "is not UTF-8"),  # a character cut off
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, kind: str, content: bytes, why: str):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(content)
    message = refusal(kind, file)
    assert any(f"lines.jsonl {one}" in message for one in why.split("|"))


@pytest.mark.parametrize("kind", ["jsonl", "prompts"])
@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"a":' * 100_000, "it is nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"text": "\\ud83d", "prompt": "\\ud83d"}', "surrogates not allowed"),
        ('{"text": "a" "prompt"}', "Expecting ',' delimiter at column 14"),
    ],
)
def test_lines_that_are_no_json(tmp_path: Path, kind: str, line: str, why: str):
    file = tmp_path / "lines.jsonl"
    file.write_text(f"\n{line}\n")
    message = refusal(kind, file)
    assert "lines.jsonl, line 2 is not JSON" in message
    assert why in message


def test_text_beyond_ascii_is_read_as_it_is(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"prompt": "\U0001f600"}) + "\n")  # written as a pair of escapes
    assert prompts_of_file(file) == ["\U0001f600"]
