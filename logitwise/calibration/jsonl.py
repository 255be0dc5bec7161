"""Calibration from JSON lines: plain text, prompt and completion, or chat messages."""

from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from logitwise.calibration.chat import Message, completed, conversation
from logitwise.calibration.rows import Document
from logitwise.calibration.text import lines_of_file, parse, whole
from logitwise.errors import CalibrationError

PROMPT_KEYS = ("prompt", "question")
COMPLETION_KEYS = ("completion", "answer", "text")
KNOWN = "text; prompt (or question) and completion (or answer or text); messages"


def read_jsonl(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """One document a line; empty lines are passed over.

    Errors: CalibrationError, with file and line, where a line cannot be read or has no known keys.
    """
    documents = []
    for place, line in lines_of_file(path):
        try:
            record = parse(line)
        except ValueError as error:
            raise CalibrationError(f"{place} is not JSON", str(error), "write one JSON object a line") from error
        if not isinstance(record, dict):
            raise CalibrationError(
                f"{place} is not a JSON object", f"it is of type {type(record).__name__}", f"use the keys {KNOWN}"
            )
        documents.append(document_of(record, place, tokenizer))
    return documents


def document_of(record: Mapping[str, object], place: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """The document in one record: a completion or the assistant's turns count, or all of a plain text.

    Errors: CalibrationError, naming `place` and the keys found.
    """
    prompt = next((key for key in PROMPT_KEYS if key in record), None)
    completion = next((key for key in COMPLETION_KEYS if key in record), None)
    if "messages" in record:
        return in_place(place, lambda: conversation(tokenizer, messages_of(record["messages"], place)))
    if prompt is not None and completion is not None:
        before, after = text_of(record, prompt, place), text_of(record, completion, place)
        return in_place(place, lambda: completed(tokenizer, before, after))
    if prompt is None and "text" in record:
        return whole(text_of(record, "text", place), tokenizer)
    raise CalibrationError(
        f"{place} has no known keys", f"it has {', '.join(record) or 'none'}", f"use the keys {KNOWN}"
    )


def in_place(place: str, read: Callable[[], Document]) -> Document:
    """What `read` returns; what it refuses, with the place named."""
    try:
        return read()
    except CalibrationError as error:
        raise CalibrationError(f"{place}: {error.what}", error.why, error.remedy) from error


def text_of(record: Mapping[str, object], key: str, place: str) -> str:
    """The text under a key."""
    value = record[key]
    if not isinstance(value, str):
        raise CalibrationError(
            f"{place}: {key} is not a text", f"it is of type {type(value).__name__}", "give a string"
        )
    return value


def messages_of(value: object, place: str) -> list[Message]:
    """Chat messages, each with a role and a text, one of them the assistant's at least."""
    messages = value if isinstance(value, list) else []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise CalibrationError(
                f"{place}: message {number} cannot be read", "it needs a role and a content, both texts", "add them"
            )
    if not any(message["role"] == "assistant" for message in messages):
        raise CalibrationError(
            f"{place}: nothing in messages counts",
            "no message has the role assistant",
            "give conversations with answers",
        )
    return messages
