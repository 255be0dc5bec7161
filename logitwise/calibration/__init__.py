"""Calibration: from what the user asks for to rows of tokens.

documents_of   the model's own answers, a text file, JSON lines or a data set, as documents
set_aside      some of them held out (holdout.py)
pack           one after another, cut into rows (rows.py)
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from logitwise.calibration.batches import Keep, keep_nothing
from logitwise.calibration.datasets import check_installed, read_datasets
from logitwise.calibration.generate import write_answers
from logitwise.calibration.holdout import set_aside
from logitwise.calibration.jsonl import read_jsonl
from logitwise.calibration.prompts import prompts_of_file, shipped_prompts
from logitwise.calibration.rows import Document, Rows, pack
from logitwise.calibration.server import ask_answers, served_model
from logitwise.calibration.text import read_text, read_utf8
from logitwise.errors import CalibrationError

__all__ = ["Calibration", "check_spec", "documents_of", "fresh_rows", "prepare", "writes"]

KINDS = "self, self:FILE, server:URL, text:FILE, jsonl:FILE, hf:NAME"
ANSWER_TOKENS = 256  # the longest answer of the model's own text
ANSWER_BATCH = 96
PATIENCE = 10  # parts of fresh text in a row whose prompts are all held out, before there is taken to be no other
DOCUMENT_LEAST = 32  # tokens; a templated prompt and its answer are hardly ever shorter, so prompts do not run out


@dataclass(frozen=True, eq=False)
class Calibration:
    """Rows to fit on and rows to judge by.

    Args:
        rows: what blocks are fitted on.
        held_out: rows of other documents (none where none were asked for).
        first_row_text: the first row, decoded, for a user to look at.
        counts: documents, tokens, counted_tokens (predictions in `rows` that count), rows, held_out_rows.
    """

    rows: Rows
    held_out: Rows
    first_row_text: str
    counts: dict[str, int]


def check_spec(spec: str) -> None:
    """Refuse what can be refused before any work.

    Errors: CalibrationError for an unknown kind, a file that is missing, empty or not text, a package not installed.
    """
    match split(spec):
        case "self", "":
            pass
        case "self", file:
            prompts_of_file(Path(file))
        case "server", url:
            served_model(url)
        case "hf", _:
            check_installed()
        case _, file:
            read_utf8(Path(file))


def documents_of(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    model_loader: Callable[[], PreTrainedModel],
    *,
    tokens: int,
    seed: int,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = keep_nothing,
) -> list[Document]:
    """The documents that a spec (self, self:FILE, server:URL, text:FILE, jsonl:FILE, hf:NAME) stands for.

    Args:
        model_loader: loads the whole model; called for the model's own text only, and the model let go after.
        tokens: how many to write or to fetch; files are read whole.
        temperature: of the sampling, where text is written.
        progress: called with the tokens written and `tokens`.
        keep: where batches of answers are kept, where text is written.

    Errors: CalibrationError for an unknown kind, or text that cannot be read.
    """
    match split(spec):
        case "self", file:
            if file:
                prompts = prompts_of_file(Path(file))
                random.Random(seed).shuffle(prompts)  # a file may be sorted, and no more are answered than are needed
            else:
                prompts = shipped_prompts(max(1, tokens // DOCUMENT_LEAST), seed)
            return write_answers(
                model_loader(),
                tokenizer,
                prompts,
                tokens=tokens,
                answer_tokens=ANSWER_TOKENS,
                batch=ANSWER_BATCH,
                temperature=temperature,
                seed=seed,
                progress=progress,
                keep=keep,
            )
        case "server", url:
            return ask_answers(
                url,
                tokenizer,
                shipped_prompts(max(1, tokens // DOCUMENT_LEAST), seed),
                tokens=tokens,
                answer_tokens=ANSWER_TOKENS,
                temperature=temperature,
                seed=seed,
                progress=progress,
                keep=keep,
            )
        case "text", file:
            return read_text(Path(file), tokenizer)
        case "jsonl", file:
            return read_jsonl(Path(file), tokenizer)
        case _, name:
            return read_datasets(name, tokenizer, tokens)


def prepare(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    model_loader: Callable[[], PreTrainedModel],
    *,
    rows: int,
    held_out: int,
    row_tokens: int,
    seed: int,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    keep: Keep = keep_nothing,
) -> Calibration:
    """Rows to fit on and held-out rows; at most `rows` and `held_out` of `row_tokens` tokens.

    Where there is less text than asked for, both get their share of it.

    Errors: CalibrationError where the text does not fill one row of each, or none of its tokens count.
    """
    separator = separator_of(tokenizer)
    # A row more for each side: documents are set aside whole.
    tokens = (rows + held_out + 2) * row_tokens
    documents = documents_of(
        spec, tokenizer, model_loader, tokens=tokens, seed=seed, temperature=temperature, progress=progress, keep=keep
    )
    total = sum(len(document.ids) for document in documents)
    least = row_tokens + 1  # a row and the token that follows it
    if total < (2 * least if held_out else least):
        raise CalibrationError(
            f"{total} calibration tokens are too few",
            f"one row takes {row_tokens} and the one that follows" + (", and so does one held out" if held_out else ""),
            "give more text (or more prompts), or a smaller --row-tokens",
        )
    if held_out:
        kept, aside = set_aside(documents, share=held_out / (rows + held_out), least_tokens=least, seed=seed)
        fitted = pack(kept, separator, row_tokens)[:rows]
        judged = pack(aside, separator, row_tokens)[:held_out]
    else:
        fitted = pack(documents, separator, row_tokens)[:rows]
        judged = fitted[:0]
    for part, title in ((fitted, "calibration"), (judged, "held-out")):
        if len(part) and not part.counted():
            raise CalibrationError(
                f"no token of the {title} rows counts",
                "only answers and plain text count, not prompts",
                "give lines with longer answers, or more rows",
            )
    counts = {
        "documents": len(documents),
        "tokens": total,
        "counted_tokens": fitted.counted(),
        "rows": len(fitted),
        "held_out_rows": len(judged),
    }
    return Calibration(fitted, judged, str(tokenizer.decode(fitted.ids[0].tolist())), counts)


def fresh_rows(
    spec: str,
    tokenizer: PreTrainedTokenizerBase,
    model_loader: Callable[[], PreTrainedModel],
    held_out: Rows,
    *,
    rows: int,
    row_tokens: int,
    seed: int,
    temperature: float = 1.0,
    after: int = 0,
    every: int = 1,
    keep: Keep = keep_nothing,
) -> Iterator[Rows]:
    """New rows without end, `rows` at a time: the model, or the server, goes on answering prompts.

    The prompts of a file are answered again and again, in another order; those that ship are drawn anew each time.
    Answers to a prompt that stands in the held-out rows are left out: these rows say when to stop.

    Args: as of `prepare`; the loader is called each time, and may give the same model.
        held_out: the rows that choose.
        after: so many parts are left out, so that two who ask with one seed get other rows.
        every: only each so manieth part after those is given.

    Errors: CalibrationError for text that is read and not written, and where every prompt stands in the held-out rows.
    """
    if not writes(spec):
        raise CalibrationError(
            f"{spec} cannot give new rows without end",
            "its text is read, not written",
            "choose --calibration self, self:PROMPTS or server:URL, or leave out polish_fresh and fresh_last",
        )
    separator, pending, empty = separator_of(tokenizer), list[Document](), 0
    for part in count(after + 1, every):
        tokens = (rows + 1) * row_tokens
        own = ((seed + 1) * 1_000_003 + part) % 2**62
        written = documents_of(
            spec, tokenizer, model_loader, tokens=tokens, seed=own, temperature=temperature, keep=keep
        )
        others = [document for document in written if not held_out.hold(document.prompt)]
        empty = 0 if others else empty + 1
        if empty == PATIENCE:
            raise CalibrationError(
                "there is no new text", "every prompt that was answered is in held-out rows", "give more prompts"
            )
        pending += others
        if sum(len(document.ids) - 1 for document in pending) <= row_tokens:  # not a row yet, separators taken off
            continue
        packed = pack(pending, separator, row_tokens)
        if len(packed) >= rows:
            pending = []
            yield packed[:rows]


def writes(spec: str) -> bool:
    """Whether the text of a spec is written for the run, and so as long as is wanted."""
    return split(spec)[0] in ("self", "server")


def writes_own(spec: str) -> bool:
    """Whether it is the model itself that writes, and is whole in memory meanwhile."""
    return split(spec)[0] == "self"


def split(spec: str) -> tuple[str, str]:
    """The kind of a spec and what follows its colon.

    Errors: CalibrationError for an unknown kind, or one without what it needs.
    """
    kind, colon, rest = spec.partition(":")
    if kind not in ("self", "server", "text", "jsonl", "hf"):
        raise CalibrationError(f"calibration {spec!r} is unknown", f"known are {KINDS}", "choose one of them")
    if not rest and (colon or kind != "self"):
        what = {"hf": "a name", "server": "an address"}.get(kind, "a file")
        raise CalibrationError(f"calibration {spec!r} lacks {what}", f"known are {KINDS}", "add it after the colon")
    return kind, rest


def file_of(spec: str) -> Path:
    """The file that a spec names, where it names one."""
    return Path(spec.partition(":")[2])


def file_digest(spec: str) -> str | None:
    """A hash of what the file that a spec names holds; None where it names none."""
    file = file_of(spec)
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token between documents: the one that begins a text, or else the one that ends it.

    The end token of a chat model often ends a turn and not a text (<|im_end|>, <|eot_id|>); the beginning token is
    what the model has seen before a new text, and it is then the document's own.

    Errors: CalibrationError where the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise CalibrationError(
        "the tokenizer has no separator for documents",
        "it names neither a beginning nor an end of text",
        "set bos_token or eos_token in tokenizer_config.json",
    )
