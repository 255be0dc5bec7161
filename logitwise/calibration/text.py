"""Calibration from a plain text file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.chat import check_length, text_ids
from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError

DOCUMENT_TOKENS = 300  # passages are merged up to this length, so that some documents can be held out


MOST_BYTES = 1 << 28  # of a file, which is read whole; a calibration needs some megabytes of text


def read_utf8(path: Path) -> str:
    """The text of a file.

    Errors: CalibrationError where it is missing, empty, too large, binary or not UTF-8.
    """
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "there is no such file"
        raise CalibrationError(f"the file {path} cannot be read", why, "check the path")
    if (size := path.stat().st_size) > MOST_BYTES:
        why = f"it has {size} bytes; at most {MOST_BYTES} are read, and some megabytes are enough"
        raise CalibrationError(f"the file {path} is too large", why, "give a part of it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"the file {path} cannot be read", str(error.strerror), "check its permissions"
        ) from error
    if b"\0" in content:
        raise CalibrationError(
            f"the file {path} is binary", "it holds zero bytes", "give plain UTF-8 text or JSON lines"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise CalibrationError(
            f"the file {path} is not UTF-8",
            f"byte {content[error.start]:#04x} in line {line} does not decode",
            "convert it to UTF-8",
        ) from error
    if not text.strip():
        raise CalibrationError(f"the file {path} is empty", "it holds no text", "give a file with text in it")
    return text


def lines_of_file(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a file that is not empty, after the place it has: "FILE, line 3".

    A line feed alone ends a line: a JSON string may hold the other characters that do.

    Errors: CalibrationError where the file cannot be read, or a line is too long.
    """
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            check_length(line, place)
            yield place, line


def parse(line: str) -> object:
    """The JSON value in a line.

    Errors: ValueError with the reason, where it is none, nested too deeply, or holds text that is no Unicode.
    """
    try:
        value = json.loads(line)
        if "\\ud" in line.lower():  # half of a pair, written as an escape, is no character
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Passages (blank lines between them) in order, merged into documents of some hundred tokens; every token counts.

    Errors: CalibrationError where the file cannot be read.
    """
    documents: list[Document] = []
    merged: list[str] = []
    length = 0
    for passage in re.split(r"\n[^\S\n]*\n\s*", read_utf8(path).strip()):
        check_length(passage, f"a passage of {path} (up to a blank line)")
        merged.append(passage)
        length += len(text_ids(tokenizer, passage, special=False))
        if length >= DOCUMENT_TOKENS:
            documents.append(whole("\n\n".join(merged), tokenizer))
            merged, length = [], 0
    if merged:
        documents.append(whole("\n\n".join(merged), tokenizer))
    return documents


def whole(text: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A document of which every token counts."""
    ids = text_ids(tokenizer, text, special=False)
    return Document(ids, [True] * len(ids))
