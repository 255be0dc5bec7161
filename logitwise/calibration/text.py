"""Calibration from a plain text file."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.chat import text_ids
from logitwise.calibration.rows import Document
from logitwise.errors import CalibrationError

DOCUMENT_TOKENS = 300  # passages are merged up to this length, so that some documents can be held out


def read_utf8(path: Path) -> str:
    """The text of a file.

    Errors: CalibrationError where it is missing, empty, binary or not UTF-8.
    """
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "there is no such file"
        raise CalibrationError(f"the file {path} cannot be read", why, "check the path")
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


def read_text(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Passages (blank lines between them) in order, merged into documents of some hundred tokens; every token counts.

    Errors: CalibrationError where the file cannot be read.
    """
    documents: list[Document] = []
    merged: list[str] = []
    length = 0
    for passage in re.split(r"\n[^\S\n]*\n\s*", read_utf8(path).strip()):
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
