"""Checks of a source before any work: its numbers and its tokenizer."""

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedTokenizerBase

from logitwise.errors import SourceError
from logitwise.source.base import Source


def check_weights(
    source: Source, progress: Callable[[int, int], None] | None = None, only: Iterable[str] | None = None
) -> str:
    """One pass over every tensor; returns the fingerprint of the model.

    Args:
        source: the model.
        progress: called with (tensors done, tensors in all) after each.
        only: names of some of its tensors; all by default.

    Returns:
        SHA-256 over the name, shape, type and bytes of every tensor, as hex digits.

    Errors: SourceError, naming the tensor, where one holds NaN or infinity.
    """
    digest = hashlib.sha256()
    names = sorted(source.names() if only is None else only)
    for done, name in enumerate(names, start=1):
        tensor = source.read(name)
        if tensor.is_complex() or tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
            why = f"it is stored as {str(tensor.dtype).removeprefix('torch.')}"
            raise SourceError(f"tensor {name} cannot be used", why, "fetch the model again, or use another one")
        # NaN and infinity survive in the extremes, which are found many times faster than isfinite looks at them all.
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise SourceError(
                f"tensor {name} is not finite",
                f"{bad} of its {tensor.numel()} values are NaN or infinity (read as {tensor.dtype})",
                "the checkpoint is damaged, or overflows that type: fetch the model again, or use another one",
            )
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        del tensor  # before the next is there: embedding and head are neighbours
        if progress is not None:
            progress(done, len(names))
    return digest.hexdigest()


def fingerprint(source: Source, weights: str) -> str:
    """A hash of everything of a model that decides a result.

    Args:
        source: the model.
        weights: `check_weights` of it.
    """
    config = source.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    ends = [file.read_text("utf-8") for file in source.extra_files() if file.name == "generation_config.json"]
    found = [weights, config, _content(source.tokenizer()), ends]
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()


def _content(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    splits = fast.to_str() if fast else sorted(tokenizer.get_vocab().items())
    return [splits, tokenizer.special_tokens_map, tokenizer.chat_template]


def check_tokenizer(source: Source) -> None:
    """Refuses a tokenizer that is missing, empty, or has ids beyond the embedding's rows.

    Errors: SourceError, with the largest id and the number of rows.
    """
    vocabulary = source.tokenizer().get_vocab()
    rows = source.config.get_text_config().vocab_size
    largest = max(vocabulary.values(), default=-1)
    if largest < 0:
        raise SourceError(
            f"the tokenizer of {source.name} is empty", "it has no tokens", "put the model's tokenizer.json beside it"
        )
    if largest >= rows:
        raise SourceError(
            f"the tokenizer of {source.name} does not fit the model",
            f"its largest id is {largest}, but the embedding has {rows} rows (ids 0 to {rows - 1})",
            "use the tokenizer that came with these weights",
        )
