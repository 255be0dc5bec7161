"""Writes a checkpoint: of what a run made, or of another checkpoint in another format. Read back before it appears."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from logitwise.errors import MachineError, SourceError
from logitwise.formats import Described, Format, unfusable
from logitwise.formats.checkpoint import staged, write_json
from logitwise.grid import Grid, Quantized
from logitwise.modelcard import model_card
from logitwise.polish import Polished
from logitwise.preflight import Job
from logitwise.runpage import run_page
from logitwise.skeleton import Slot
from logitwise.source import QuantizedSource, Source
from logitwise.source.outside import read_json
from logitwise.source.quantized import open_folder
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
        written = write_tensors(staging, contents(), job.format, job.model, grids, len(job.fates), verify, watcher)
        write_model_files(staging, source)
        report = {
            **report,
            "grids": dict(Counter(map(str, grids.values()))),
            "loading": job.format.loaders(set(grids.values()), unfusable(grids, job.model.linear)),
            "bits_per_weight": written.bits / sum(slot.out_features * slot.in_features for slot in job.slots),
            "bits_per_parameter": 8 * written.size / parameters,
            "size_bytes": written.size,
            "parameters": parameters,
            "audit": [asdict(fate) for fate in job.fates],
        }
        write_json(staging / REPORT, report, sort_keys=False)
        (staging / "README.md").write_text(model_card(report), encoding="utf-8")
        (staging / PAGE).write_text(run_page(report), encoding="utf-8")
        if verify:
            read_back(staging, job.format, written, watcher)
    return report


REPORT, REFIT_REPORT = "logitwise.json", "refit.json"
"""What was made, and what a refit changed, beside the checkpoint."""

PAGE = "report.html"
"""The page of the run."""


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
    model: Described,
    grids: Mapping[str, Grid],
    count: int,
    verify: bool,
    watcher: Watcher,
) -> Written:
    """Writes a checkpoint, its parameters, `count` of them, as they come: quantized weights or others.

    Their digests are taken where they are to be compared.
    """
    digests: dict[str, str] = {}
    bits = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal bits
        with watcher.stage("Writing the checkpoint", count) as stage:
            for name, content in contents:
                stored = content if isinstance(content, Quantized) else form.kept(content)
                if verify:
                    digests[name] = digest_of(stored, form)
                if isinstance(stored, Quantized):
                    bits += form.bits_stored(stored.grid, *stored.codes.shape)
                    yield from form.tensors(name.removesuffix(".weight"), stored).items()
                else:
                    yield name, stored
                del content, stored  # before the next is there
                stage.advance()

    size = form.write(staging, tensors(), model, dict(sorted(grids.items())))
    return Written(size, bits, digests)


def write_changed(
    staging: Path, source: QuantizedSource, changed: Mapping[str, Tensor | Quantized], verify: bool, watcher: Watcher
) -> Written:
    """Writes a checkpoint once more with the content of some parameters changed; every other byte is as it was.

    Errors: FormatError, naming the tensor, where what is to be written is of another type or shape than what is there.
    """
    with watcher.stage("Writing the checkpoint", 1) as stage:
        size = source.write_changed(staging, changed)
        stage.advance()
    bits = sum(source.bits_stored(name) or 0 for name in changed)
    digests = {name: digest_of(content, source.format) for name, content in changed.items()} if verify else {}
    return Written(size, bits, digests)


def read_back(staging: Path, form: Format, written: Written, watcher: Watcher) -> None:
    """Compares every tensor of a checkpoint, as its own reader gives it, with what was to be written, bit for bit.

    Errors: MachineError, naming the tensor.
    """
    source = open_folder(staging)
    with watcher.stage("Reading it back", len(written.digests)) as stage:
        for name, digest in written.digests.items():
            quantized = source.quantized(name) if isinstance(source, QuantizedSource) else None
            if digest_of(source.read(name) if quantized is None else quantized, form) != digest:
                raise MachineError(
                    f"{name} is not read back as it was written",
                    "the disk or memory changed it, or the format has a fault",
                    "run the same command again: finished blocks are kept; if it comes again, report it as a bug",
                )
            stage.advance()


def digest_of(content: Tensor | Quantized, form: Format) -> str:
    """A hash of what a tensor, or a weight's codes, scales and zero points, hold; or of the weight they stand for."""
    if isinstance(content, Quantized):
        parts = content.parts() if form.keeps_codes else [content.dequantize()]
    else:
        parts = [content]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_model_files(staging: Path, source: Source) -> None:
    """Generation config and licence, as they are or as transformers has them."""
    files = source.extra_files()
    for file in files:
        shutil.copyfile(file, staging / file.name)
    if not any(file.name == "generation_config.json" for file in files):
        GenerationConfig.from_model_config(deepcopy(source.config)).save_pretrained(staging)


def read_report(folder: Path, name: str = REPORT) -> dict[str, Any] | None:
    """What logitwise wrote about a checkpoint, or about its refit; None where it did neither.

    Errors: SourceError where the file is not what logitwise writes.
    """
    path = folder / name
    if not path.is_file():
        return None
    report = read_json(path)
    try:
        if name == REPORT:
            model_card(report), run_page(report)
        else:
            [float(report[which]["kl"]["mean"]) for which in ("before", "after")]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        remedy = "remove it: the weights are read all the same"
        raise SourceError(f"{path} is not as logitwise writes it", why, remedy) from error
    return report
