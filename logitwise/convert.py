"""`export`: a quantized checkpoint in another format, without a weight changed, or a refusal that names what fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import FormatError, SourceError
from logitwise.formats import FORMATS, Described, Format, unfusable
from logitwise.formats.checkpoint import check_output, staged, write_json
from logitwise.grid import Grid, Quantized
from logitwise.machine import repeatable
from logitwise.modelcard import model_card
from logitwise.preflight import describe
from logitwise.runpage import run_page
from logitwise.skeleton import Skeleton, Slot
from logitwise.source import QuantizedSource, open_stored
from logitwise.watch import SILENT, Watcher
from logitwise.writing import (
    PAGE,
    REFIT_REPORT,
    REPORT,
    Written,
    read_back,
    read_report,
    write_model_files,
    write_tensors,
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        out: the checkpoint.
        format: what it is in.
        size_bytes: of its weight files.
        layers: how many are quantized.
    """

    out: Path
    format: str
    size_bytes: int
    layers: int


@repeatable()
def export(
    checkpoint: str | Path,
    out: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    watcher: Watcher = SILENT,
) -> Exported:
    """Writes a quantized checkpoint in another format: the same codes, scales and zero points.

    Args:
        checkpoint: a folder in any format that is read, or a .gguf file.
        out: the folder to write; it appears only when complete.
        format: compressed-tensors or another of `FORMATS`.
        overwrite: replace what OUT holds.
        verify: read OUT back and compare it, bit for bit, before it appears.
        watcher: hears how far it is.

    Errors: InputError, before anything is written: where the checkpoint is not quantized, or the format does not hold
    its grids or the model; then the formats that do are named.
    """
    out = Path(out)
    check_output(out, overwrite, checkpoint)
    if format not in FORMATS:
        raise FormatError(
            f"there is no format {format}", f"those there are: {', '.join(FORMATS)}", "choose one of them"
        )
    source = open_stored(checkpoint)
    if not isinstance(source, QuantizedSource):
        raise SourceError(
            f"{checkpoint} is not quantized", "its weights are in full precision", "quantize it, with --format"
        )
    skeleton = Skeleton(source, torch.device("cpu"), torch.float32)
    every = {slot.name: slot for block in range(len(skeleton)) for slot in skeleton.slots(block)}
    grids = {slot: grid for name, slot in every.items() if (grid := source.grid(name)) is not None}
    outside = [name for name in source.names() if source.grid(name) is not None and name not in every]
    if outside:
        raise FormatError(
            f"{outside[0]} is quantized", "layers outside of the blocks are not converted yet", "quantize it anew"
        )
    folder = Path(checkpoint)
    report, refitted = (read_report(folder, name) if folder.is_dir() else None for name in (REPORT, REFIT_REPORT))
    form, model = FORMATS[format], describe(source, skeleton)
    if report is not None:
        model = replace(model, name=report["model"]["name"])
    if (reason := _refusal(form, model, grids)) is not None:
        fits = [name for name, other in FORMATS.items() if _refusal(other, model, grids) is None]
        fitting = f"choose one that does: {', '.join(fits)}; or " if fits else ""
        remedy = f"{fitting}quantize the model again, on another grid"
        raise FormatError(f"{format} cannot hold {checkpoint}", reason, remedy)

    def contents() -> Iterator[tuple[str, Tensor | Quantized]]:
        for name in source.names():
            quantized = source.quantized(name)
            yield name, source.read(name) if quantized is None else quantized

    with staged(out, overwrite) as staging:
        own = {slot.module: grid for slot, grid in grids.items()}
        written = write_tensors(staging, contents(), form, model, own, len(source.names()), verify, watcher)
        write_model_files(staging, source)
        if report is not None:
            weights = sum(slot.out_features * slot.in_features for slot in grids)
            loading = form.loaders(set(own.values()), unfusable(own, model.linear))
            report = _report(report, loading, form.name, weights, written)
            write_json(staging / REPORT, report, sort_keys=False)
            (staging / "README.md").write_text(model_card(report), encoding="utf-8")
            (staging / PAGE).write_text(run_page(report), encoding="utf-8")
        if refitted is not None:
            write_json(staging / REFIT_REPORT, refitted)
        if verify:
            read_back(staging, form, written, watcher)
    return Exported(out, format, written.size, len(grids))


def _refusal(form: Format, model: Described, grids: dict[Slot, Grid]) -> str | None:
    """Why a format cannot hold these layers of this model; None where it can."""
    if reason := form.holds_grids(set(grids.values())) or form.holds_model(model):
        return reason
    for slot, grid in grids.items():
        reason = form.holds_layer(slot.module, slot.out_features, slot.in_features, slot.transposed, grid)
        if reason is not None:
            return reason
    return None


def _report(report: dict[str, Any], loading: str, form: str, weights: int, written: Written) -> dict[str, Any]:
    return {
        **report,
        "choices": {**report["choices"], "format": {"value": form, "why": "as asked, by export"}},
        "loading": loading,
        "bits_per_weight": written.bits / weights,
        "bits_per_parameter": 8 * written.size / report["parameters"],
        "size_bytes": written.size,
    }
