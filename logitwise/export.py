"""Writes what a run made: the checkpoint, its report and its card, under their names only when complete."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from logitwise.formats.checkpoint import staged, write_checkpoint, write_config, write_json
from logitwise.grid import Grid, Quantized
from logitwise.modelcard import model_card
from logitwise.polish import Polished
from logitwise.preflight import Job
from logitwise.skeleton import Slot
from logitwise.watch import Watcher


def export(
    job: Job,
    out: Path,
    grid_of: Callable[[str], Grid],
    codes: Callable[[Slot], Quantized],
    polished: Polished | None,
    report: dict[str, Any],
    overwrite: bool,
    watcher: Watcher,
) -> dict[str, Any]:
    """Writes OUT.

    Args:
        job: the model and the format.
        out: the folder.
        grid_of: the grid of a layer, by the name of its module.
        codes: what is stored for a slot.
        polished: scales and vectors in place of those of `codes` and of the source.
        report: what is known of the run; sizes and the audit are added.
        overwrite: replace what OUT holds.
        watcher: hears how far it is.

    Returns: the report as it is in OUT/logitwise.json.
    """
    source, rewritten = job.source, job.skeleton.source
    slots = {slot.name: slot for slot in job.slots}
    stored_bits = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal stored_bits
        with watcher.stage("Writing the checkpoint", len(job.fates)) as stage:
            for fate in job.fates:
                if fate.tensor in slots:
                    slot = slots[fate.tensor]
                    quantized = codes(slot)
                    if polished:
                        quantized = replace(quantized, scale=polished.scales[slot.name])
                    stored_bits += job.format.bits_stored(quantized.grid, *quantized.codes.shape)
                    yield from job.format.tensors(slot.module, quantized).items()
                elif fate.fate == "kept":
                    tuned = polished.vectors if polished else {}
                    yield fate.tensor, tuned[fate.tensor] if fate.tensor in tuned else rewritten.read(fate.tensor)
                stage.advance()

    with staged(out, overwrite) as staging:
        size = write_checkpoint(staging, tensors(), written_for=job.format.written_for)
        quantized_weights = sum(slot.out_features * slot.in_features for slot in job.slots)
        parameters = sum(_count(source.shape(name)) for name in source.names())
        report = {
            **report,
            "grids": dict(Counter(str(grid_of(slot.module)) for slot in job.slots)),
            "bits_per_weight": stored_bits / quantized_weights,
            "bits_per_parameter": 8 * size / parameters,
            "size_bytes": size,
            "parameters": parameters,
            "audit": [asdict(fate) for fate in job.fates],
        }
        write_json(staging / "logitwise.json", report)
        (staging / "README.md").write_text(model_card(report), encoding="utf-8")
        _write_model_files(job, grid_of, staging)
    return report


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _write_model_files(job: Job, grid_of: Callable[[str], Grid], staging: Path) -> None:
    """config.json, tokenizer, chat template, generation config, licence."""
    grids = {module: grid_of(module) for module in sorted(slot.module for slot in job.slots)}
    ignored = [name for name in job.skeleton.linear_modules() if name not in grids]
    config = job.source.config
    config.architectures = [type(job.skeleton.model).__name__]
    quantization = job.format.quantization_config(grids, ignored)
    write_config(staging, config, quantization, job.source.dtype, job.format.config_keys)
    job.source.tokenizer().save_pretrained(staging)
    files = job.source.extra_files()
    for file in files:
        shutil.copyfile(file, staging / file.name)
    if not any(file.name == "generation_config.json" for file in files):
        job.skeleton.model.generation_config.save_pretrained(staging)


def read_report(folder: Path) -> dict[str, Any] | None:
    """What logitwise wrote about a checkpoint; None where it did not make it."""
    path = folder / "logitwise.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
