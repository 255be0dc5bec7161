"""Writes a checkpoint: of what a run made, or of another checkpoint in another format. Read back before it appears."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import MachineError
from logitwise.formats import Format
from logitwise.formats.checkpoint import replace_tensors, staged, write_checkpoint, write_config, write_json
from logitwise.grid import Grid, Quantized
from logitwise.modelcard import model_card
from logitwise.polish import Polished
from logitwise.preflight import Job
from logitwise.skeleton import Skeleton, Slot
from logitwise.source import Source
from logitwise.source.quantized import QuantizedFolder, open_folder
from logitwise.watch import Watcher


def write(
    job: Job,
    out: Path,
    grid_of: Callable[[str], Grid],
    codes: Callable[[Slot], Quantized],
    polished: Polished | None,
    report: dict[str, Any],
    overwrite: bool,
    verify: bool,
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
        verify: read every tensor back and compare.
        watcher: hears how far it is.

    Returns: the report as it is in OUT/logitwise.json.
    """
    source, rewritten = job.source, job.skeleton.source
    slots = {slot.name: slot for slot in job.slots}

    def contents() -> Iterator[tuple[str, Tensor | Quantized]]:
        for fate in job.fates:
            if fate.tensor in slots:
                quantized = codes(slots[fate.tensor])
                yield fate.tensor, polished.of(fate.tensor, quantized) if polished else quantized
            elif fate.fate == "kept":
                tuned = polished.vectors if polished else {}
                yield fate.tensor, tuned[fate.tensor] if fate.tensor in tuned else rewritten.read(fate.tensor)

    grids = {slot.module: grid_of(slot.module) for slot in job.slots}
    parameters = sum(torch.Size(source.shape(name)).numel() for name in source.names())
    with staged(out, overwrite) as staging:
        written = write_tensors(staging, contents(), job.format, len(job.fates), verify, watcher)
        report = {
            **report,
            "grids": dict(Counter(map(str, grids.values()))),
            "loading": job.format.loaders(set(grids.values())),
            "bits_per_weight": written.bits / sum(slot.out_features * slot.in_features for slot in job.slots),
            "bits_per_parameter": 8 * written.size / parameters,
            "size_bytes": written.size,
            "parameters": parameters,
            "audit": [asdict(fate) for fate in job.fates],
        }
        write_json(staging / "logitwise.json", report)
        (staging / "README.md").write_text(model_card(report), encoding="utf-8")
        write_model_files(staging, source, job.skeleton, job.format, grids)
        if verify:
            read_back(staging, written, watcher)
    return report


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        size: of the weight files, in bytes.
        bits: of codes, scales and zero points.
        digests: of each tensor, by the name of its parameter.
    """

    size: int
    bits: int
    digests: dict[str, str]


def write_tensors(
    staging: Path,
    contents: Iterable[tuple[str, Tensor | Quantized]],
    form: Format,
    count: int,
    verify: bool,
    watcher: Watcher,
) -> Written:
    """Writes parameters, `count` of them, as they come: quantized weights in the format, others as they are.

    Their digests are taken where they are to be compared.
    """
    digests: dict[str, str] = {}
    bits = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal bits
        with watcher.stage("Writing the checkpoint", count) as stage:
            for name, content in contents:
                if verify:
                    digests[name] = _digest(content)
                if isinstance(content, Quantized):
                    bits += form.bits_stored(content.grid, *content.codes.shape)
                    yield from form.tensors(name.removesuffix(".weight"), content).items()
                else:
                    yield name, content
                stage.advance()

    size = write_checkpoint(staging, tensors(), written_for=form.written_for)
    return Written(size, bits, digests)


def write_changed(
    staging: Path, source: QuantizedFolder, changed: Mapping[str, Tensor | Quantized], verify: bool, watcher: Watcher
) -> Written:
    """Writes a checkpoint once more with the content of some parameters changed; every other byte is as it was.

    Errors: FormatError, naming the tensor, where what is to be written is of another type or shape than what is there.
    """
    tensors: dict[str, Tensor] = {}
    bits = 0
    for name, content in changed.items():
        stored = source.place(name)
        if isinstance(content, Quantized):
            tensors |= source.format.tensors(stored.removesuffix(".weight"), content)
            bits += source.format.bits_stored(content.grid, *content.codes.shape)
        else:
            tensors[stored] = content
    files = sorted(file for file in source.folder.iterdir() if file.is_file())
    with watcher.stage("Writing the checkpoint", len(files)) as stage:
        for file in files:
            replace_tensors(file, staging / file.name, tensors)
            stage.advance()
    size = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
    return Written(size, bits, {name: _digest(content) for name, content in changed.items()} if verify else {})


def read_back(staging: Path, written: Written, watcher: Watcher) -> None:
    """Compares every tensor of a checkpoint, as its own reader gives it, with what was to be written, bit for bit.

    Errors: MachineError, naming the tensor.
    """
    source = open_folder(staging)
    with watcher.stage("Reading it back", len(written.digests)) as stage:
        for name, digest in written.digests.items():
            quantized = source.quantized(name) if isinstance(source, QuantizedFolder) else None
            if _digest(source.read(name) if quantized is None else quantized) != digest:
                raise MachineError(
                    f"{name} is not read back as it was written",
                    "the disk or memory changed it, or the format has a fault",
                    "run the same command again: finished blocks are kept; if it comes again, report it as a bug",
                )
            stage.advance()


def _digest(content: Tensor | Quantized) -> str:
    """A hash of what a tensor, or a weight's codes, scales and zero points, hold."""
    parts = content.parts() if isinstance(content, Quantized) else [content]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_model_files(staging: Path, source: Source, skeleton: Skeleton, form: Format, grids: dict[str, Grid]) -> None:
    """config.json and what a format has beside it, tokenizer, chat template, generation config, licence."""
    grids = dict(sorted(grids.items()))
    ignored = [name for name in skeleton.linear_modules() if name not in grids]
    config = source.config
    config.architectures = [type(skeleton.model).__name__]
    described = form.quantization_config(grids, ignored)
    write_config(staging, config, described, source.dtype, form.config_keys)
    for name, content in form.files(described).items():
        write_json(staging / name, content)
    source.tokenizer().save_pretrained(staging)
    files = source.extra_files()
    for file in files:
        shutil.copyfile(file, staging / file.name)
    if not any(file.name == "generation_config.json" for file in files):
        skeleton.model.generation_config.save_pretrained(staging)


def read_report(folder: Path) -> dict[str, Any] | None:
    """What logitwise wrote about a checkpoint; None where it did not make it."""
    path = folder / "logitwise.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
