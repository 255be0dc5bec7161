"""Where a model comes from."""

from pathlib import Path

from logitwise.errors import SourceError
from logitwise.source.base import QuantizedSource, Source
from logitwise.source.check import check_tokenizer, check_weights, fingerprint
from logitwise.source.folder import FolderSource
from logitwise.source.gguf import GgufSource
from logitwise.source.hub import fetch
from logitwise.source.quantized import QuantizedFolder, QuantizedGguf, open_folder, open_gguf

__all__ = [
    "FolderSource",
    "GgufSource",
    "QuantizedFolder",
    "QuantizedGguf",
    "QuantizedSource",
    "Source",
    "check_tokenizer",
    "check_weights",
    "fingerprint",
    "open_source",
    "open_stored",
]


def open_source(model: str | Path, revision: str | None = None, endpoint: str | None = None) -> Source:
    """The model at `model`: a folder, a .gguf file, or a hub id (`org/name` or `name`), looked for in that order.

    Args:
        model: what to open.
        revision: branch, tag or commit; hub ids only.
        endpoint: the hub's address; the public one by default.

    Errors: SourceError, saying what was looked for.
    """
    path = Path(model).expanduser()
    if path.exists() and revision is not None:
        what, why = (
            f"{path} has no revision {revision}",
            "it is on this disk; only models of the hub have some",
        )
        raise SourceError(what, why, "leave it out")
    if path.is_dir():
        return open_folder(path)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return GgufSource(path)
        raise SourceError(f"{path} is not a model", "a file is read only if it is .gguf", "give the folder it lies in")
    text = str(model)
    if path.is_absolute() or path.suffix == ".gguf" or text.startswith((".", "~")) or text.count("/") > 1:
        raise SourceError(
            f"{text} does not exist",
            "there is no such folder and no such .gguf file, and it is no hub id (org/name)",
            "check the path",
        )
    try:
        folder = fetch(text, revision, endpoint)
    except SourceError as error:
        why = f"there is no such folder here, so it was taken as a hub id; {error.why}"
        raise SourceError(error.what, why, error.remedy) from error
    return open_folder(folder, name=text)


def open_stored(model: str | Path) -> Source:
    """As `open_source`, but a .gguf file as it is stored.

    There it is a model to be quantized, in float16; here it is what was made of one, and nothing is rounded.
    """
    path = Path(model).expanduser()
    return open_gguf(path) if path.is_file() and path.suffix.lower() == ".gguf" else open_source(model)
