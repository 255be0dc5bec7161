"""`evaluate` and `inspect`: what a checkpoint does to token probabilities, and what is in it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from logitwise.calibration import documents_of, separator_of
from logitwise.calibration.rows import Rows, pack
from logitwise.errors import CalibrationError, RecipeError
from logitwise.machine import choose_machine, repeatable, versions
from logitwise.measure.likelihood import VERSION, Likelihood, as_json, likelihood, outputs
from logitwise.pair import check_shapes
from logitwise.recipe import Recipe
from logitwise.skeleton import Skeleton
from logitwise.source import QuantizedSource, check_tokenizer, open_source, open_stored
from logitwise.source.base import Source
from logitwise.watch import SILENT, Watcher
from logitwise.writing import REFIT_REPORT, REPORT, read_report


@dataclass(frozen=True)
class Size:
    """What a model takes on disk.

    Args:
        size_bytes: its weight files.
        bits_per_weight: of the quantized layers, scales and zero points included; None where nothing is quantized.
        bits_per_parameter: of the whole file.
    """

    size_bytes: int
    bits_per_weight: float | None
    bits_per_parameter: float


@dataclass(frozen=True)
class Evaluation:
    """A model's figures on a text.

    Args:
        likelihood: perplexity, KL and agreement, each with its standard error.
        size: on disk.
        reference, reference_size: the same of the model that it is compared with; None where there is none.
        conditions: all that the figures depend on: text, rows, tokens, separator, reference, versions.
    """

    likelihood: Likelihood
    size: Size
    reference: Likelihood | None
    reference_size: Size | None
    conditions: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        reference = self.reference and as_json(self.reference)["perplexity"]
        own = {**as_json(self.likelihood), **vars(self.size)}
        return {**own, "reference_perplexity": reference, "conditions": self.conditions}


@repeatable()
def evaluate(
    model: str | Path,
    *,
    text: str,
    reference: str | Path | None = None,
    rows: int = 64,
    row_tokens: int = 512,
    device: str = "auto",
    watcher: Watcher = SILENT,
) -> Evaluation:
    """Perplexity, KL to a reference and top-1 agreement, teacher-forced, one block in memory at a time.

    Args:
        model: a checkpoint, quantized or not.
        text: `text:FILE`, `jsonl:FILE` or `hf:NAME`.
        reference: the full-precision model; without one KL is 0 and agreement 1 against the model itself.
        rows: at most this many non-overlapping rows.
        row_tokens: tokens a row, 8 at least.
        device: where to compute.
        watcher: hears how far it is.

    Errors: InputError.
    """
    for name, value, least in (("rows", rows, 1), ("row_tokens", row_tokens, 8)):
        if value < least:
            raise RecipeError(f"{name} is {value}", f"it is at least {least}", "give another number")
    device = choose_machine(Recipe.load(None, device=device))["device"].value
    source = open_stored(model)
    against = source if reference is None else open_source(reference)
    check_tokenizer(against)
    check_shapes(source, against)
    tokenizer = against.tokenizer()
    if text.partition(":")[0] == "self":
        raise CalibrationError("a model is not evaluated on its own text", "it was asked for", "give --text or --jsonl")
    documents = documents_of(text, tokenizer, _no_model, tokens=(rows + 1) * row_tokens, seed=0)
    packed = pack(documents, separator_of(tokenizer), row_tokens)[:rows]
    if not bool((packed.weights > 0).any()):
        why = f"nothing that counts is in the first {len(packed)} rows of {row_tokens} tokens"
        raise CalibrationError(f"{text} has nothing to predict", why, "give more rows, or longer ones")
    alone = against is source
    measured = measure_models([source] if alone else [source, against], against, packed, device, watcher)
    conditions = {
        "metric": VERSION,
        "model": source.name,
        "reference": against.name,
        "text": text,
        "rows": len(packed),
        "row_tokens": row_tokens,
        "separator": tokenizer.convert_ids_to_tokens(separator_of(tokenizer)),
        "compute_dtype": "float32",
        "device": device,
        "versions": versions(),
    }
    if alone:
        return Evaluation(measured[0], size_of(source), None, None, conditions)
    return Evaluation(measured[0], size_of(source), measured[1], size_of(against), conditions)


def measure_models(
    sources: Sequence[Source], reference: Source, rows: Rows, device: str, watcher: Watcher = SILENT
) -> list[Likelihood]:
    """Figures of several models beside one reference, whose forward runs once, in float32."""
    skeleton = Skeleton(reference, torch.device(device), torch.float32)
    base = outputs(skeleton, reference, rows, watcher=watcher, title="Measuring the original")
    found = []
    for source in sources:
        same = source is reference
        model = base if same else outputs(skeleton, source, rows, watcher=watcher, title=f"Measuring {source.name}")
        found.append(likelihood(model, base, rows))
    return found


def size_of(source: Source) -> Size:
    """What a model takes on disk."""
    parameters = bits = weights = 0
    for name in source.names():
        parameters += torch.Size(source.shape(name)).numel()
        if isinstance(source, QuantizedSource) and (stored := source.bits_stored(name)) is not None:
            bits += stored
            weights += torch.Size(source.shape(name)).numel()
    return Size(source.size_bytes, bits / weights if weights else None, 8 * source.size_bytes / parameters)


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint.

    Args:
        size: on disk.
        grid: of the quantized layers, in words; a line for each where there are several.
        tensors: (name, shape, how it is stored) of every tensor.
        report: what logitwise wrote about it, or None.
        refit: what logitwise wrote about its refit, or None.
    """

    size: Size
    grid: str
    tensors: list[tuple[str, tuple[int, ...], str]]
    report: dict[str, Any] | None
    refit: dict[str, Any] | None


def inspect(model: str | Path) -> Contents:
    """What is in a checkpoint: grids, sizes, what is quantized and what not.

    Errors: InputError.
    """
    source = open_stored(model)
    tensors: list[tuple[str, tuple[int, ...], str]] = []
    grids: Counter[str] = Counter()
    for name in source.names():
        grid = source.grid_in_words(name) if isinstance(source, QuantizedSource) else None
        grids += Counter([grid] if grid else [])
        tensors.append((name, source.shape(name), source.stored_as(name)))
    several = len(grids) > 1
    in_words = "\n".join(f"{count} layers: {grid}" if several else grid for grid, count in sorted(grids.items()))
    tensors.sort(key=lambda entry: [int(part) if part.isdigit() else part for part in entry[0].split(".")])
    folder = Path(model)
    reports = [read_report(folder, name) if folder.is_dir() else None for name in (REPORT, REFIT_REPORT)]
    return Contents(size_of(source), in_words or "full precision", tensors, *reports)


def _no_model() -> Any:
    raise AssertionError("text that is read needs no model")
