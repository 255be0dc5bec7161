"""Writing a complete checkpoint folder: the weight files, config.json, and the folder that appears only when whole."""

import errno
import glob
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from logitwise.errors import FormatError, MachineError, OutputError

SHARD_BYTES = 1 << 29
"""A weight file is closed before it would grow beyond so much, but for a single tensor that is larger."""


def write_checkpoint(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES, written_for: str = "pt"
) -> int:
    """Writes tensors as they come, holding one shard in memory, under the names that transformers looks for.

    Args:
        folder: where the files go.
        tensors: names and tensors, each name once; strided tensors are made contiguous.
        shard_bytes: a file is closed before it would grow beyond this many bytes of tensors; a larger one is alone.
        written_for: the framework that the files' metadata name.

    Returns: the size of the weight files on disk, in bytes.
    Errors: MachineError where a file cannot be written; ValueError where a name comes twice.
    """
    shards: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    size = total = 0

    def close_shard() -> None:
        nonlocal size
        path = folder / f"shard-{len(shards)}.safetensors"
        with writing(path):
            save_tensors(held, path, {"format": written_for})
        shards.append(path)
        held.clear()
        size = 0

    for name, tensor in tensors:
        if name in places:
            raise ValueError(f"tensor {name} was given twice")
        if held and size + tensor.nbytes > shard_bytes:
            close_shard()
        held[name] = tensor.detach().contiguous()
        places[name] = len(shards)
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= shard_bytes:  # a large tensor does not wait while the next is read
            close_shard()
        del tensor
    if held or not shards:
        close_shard()
    return _name_shards(folder, shards, places, total)


def replace_tensors(file: Path, out: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copies a file; if it is one of safetensors that holds some of these, with these in their place.

    Errors: FormatError, naming the tensor, where it has another type or shape than what it replaces. MachineError where
    the file cannot be written.
    """
    with writing(out):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out)
            return
        with safe_open(file, framework="pt") as opened:
            names, metadata = set(opened.keys()), opened.metadata()
        if not names & tensors.keys():
            shutil.copyfile(file, out)
            return
        held = load_file(file)
        for name in names & tensors.keys():
            new, old = tensors[name].detach().cpu().contiguous(), held[name]
            if new.dtype != old.dtype or new.shape != old.shape:
                raise FormatError(
                    f"{name} would change its kind",
                    f"it is {old.dtype} {list(old.shape)} and would be {new.dtype} {list(new.shape)}",
                    "report it as a bug",
                )
            held[name] = new
        save_tensors(held, out, metadata)


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None) -> None:
    """A file of safetensors that whoever reads its folder may read: safetensors leaves it to its owner alone."""
    save_file(tensors, file, metadata)
    file.chmod(file.parent.stat().st_mode & 0o666)


def _name_shards(folder: Path, shards: list[Path], places: dict[str, int], total: int) -> int:
    """Gives shards their final names, which tell how many there are, and writes the index. Returns their size."""
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {tensor: names[place] for tensor, place in places.items()}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return sum(shard.rename(folder / name).stat().st_size for shard, name in zip(shards, names, strict=True))


def write_json(path: Path, value: object, sort_keys: bool = True) -> None:
    """Writes a value as indented JSON, its keys in the order of the alphabet or in their own.

    Errors: MachineError where the file cannot be written.
    """
    with writing(path):
        path.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while a file is written into a MachineError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"{path} could not be written", str(error), "free some disk space and run the same command again"
        ) from error


def write_config(
    folder: Path,
    config: PretrainedConfig,
    quantization_config: dict[str, Any],
    dtype: torch.dtype,
    keys: Iterable[str] = ("quantization_config",),
) -> None:
    """Writes config.json.

    Args:
        folder: where it goes.
        config: the model's own config; it is not changed, and its architectures are kept.
        quantization_config: what a format says of its weights.
        dtype: the type of the tensors that are not quantized, and the one that `dtype="auto"` loads the model in.
        keys: where loaders look for what the format says.
    """
    content = json.loads(config.to_json_string())
    # What a checkpoint said that is exported in another format, and code that is not carried, since it is never run.
    for key in ("quantization_config", "quantization", "auto_map"):
        content.pop(key, None)
    dtype_name = str(dtype).removeprefix("torch.")
    content |= {"dtype": dtype_name, "torch_dtype": dtype_name, **dict.fromkeys(keys, quantization_config)}
    content |= legacy_rope(content.get("rope_parameters") or {})
    write_json(folder / "config.json", content)


def legacy_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The top-level keys that stood for `rope_parameters` before transformers 5.

    Other readers still look for them and, where they find none, fall back to a base of 10000 without a word.

    Args:
        rope: `rope_parameters`, of the whole model or (Gemma 3) one for each type of layer; empty for none.
    """
    if "rope_theta" in rope:
        legacy: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        # transformers 5 takes `rope_scaling` in place of `rope_parameters` where it finds both, so it must be the same.
        return legacy if rope.get("rope_type", "default") == "default" else legacy | {"rope_scaling": rope}
    spellings = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    return {
        old: rope[layer_type]["rope_theta"]
        for layer_type, old in spellings.items()
        if "rope_theta" in (rope.get(layer_type) or {})
    }


def check_output(out: Path, overwrite: bool, *read: str | Path) -> None:
    """Refuses a place where a result cannot go, before any work; writes nothing.

    Args:
        out: the place.
        overwrite: whether it may hold something.
        read: what the work reads, hub ids among it: OUT would take the place of what is inside it.

    Errors: OutputError where OUT is a file, holds something (without `overwrite`), is or contains the working
    directory or what is read, or where it could not be created.
    """
    out = out.resolve()
    try:
        _refuse_unusable(out, overwrite)
        for each in map(Path, read):
            if each.exists() and each.resolve().is_relative_to(out):
                why = f"{each} is read, and would be removed with what OUT holds"
                raise OutputError(f"{out} cannot be the output", why, "give another OUT")
    except OSError as error:
        raise OutputError(f"{out} cannot be used", str(error), "give another OUT") from error


def _refuse_unusable(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is not a folder", "the result is a folder of several files", "give another OUT")
    if Path.cwd().is_relative_to(out):
        why = "it is or contains the working directory"
        raise OutputError(f"{out} cannot be the output", why, "give a new folder inside it as OUT")
    if out.exists() and not overwrite and any(out.iterdir()):
        raise OutputError(f"{out} already exists", "it is not empty", "give another OUT, or --overwrite to replace it")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = f"{parent} is not writable" if parent.is_dir() else f"{parent} is a file"
        raise OutputError(f"{out} cannot be created", why, "give an OUT in a folder that you may write to")


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside OUT that becomes OUT when the body ends, and is removed when it fails or is interrupted.

    A folder that is replaced stays under its name until the new one is complete.

    Errors: OutputError as `check_output`, at the start and again before OUT is taken.
    """
    check_output(out, overwrite)
    out = out.resolve()
    staging = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    lock = _lock(staging)
    _sweep(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)  # before the folder is there: who finds the folder unlocked finds it abandoned
        staging.mkdir()
    except OSError as error:
        _release(lock)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room, and run the same command again: finished blocks are kept"
            raise MachineError(f"{staging} cannot be created", str(error), remedy) from error
        raise OutputError(f"{staging} cannot be created", str(error), "give another OUT") from error
    try:
        with writing(out):
            yield staging
            check_output(out, overwrite)
            _take_place(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _release(lock)


def _lock(staging: Path) -> FileLock:
    """What the process that writes a staging folder holds: by its number it may be another's in another container."""
    return FileLock(staging.with_name(f"{staging.name}.lock"))


def _release(lock: FileLock) -> None:
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _sweep(out: Path) -> None:
    """Removes what processes that were killed have left beside OUT, but not the only whole checkpoint there is."""
    ours = re.compile(re.escape(out.name) + r"\.(tmp|old)-[0-9a-f]{8}")  # and no folder that someone has named
    names = {file.name.removesuffix(".lock") for file in out.parent.glob(f"{glob.escape(out.name)}.*")}
    for found in filter(None, map(ours.fullmatch, names)):
        left = out.with_name(found[0])
        if found[1] == "old":
            if out.exists():
                shutil.rmtree(left, ignore_errors=True)
            continue
        lock = _lock(left)
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            shutil.rmtree(left, ignore_errors=True)
            _release(lock)


def _take_place(staging: Path, out: Path) -> None:
    """Renames a complete folder to OUT; what was there is moved aside first and removed last."""
    former = staging.with_name(f"{out.name}.old-{staging.name[-8:]}")
    if not out.exists():
        staging.rename(out)
        _sweep(out)
        return
    out.rename(former)
    try:
        staging.rename(out)
    except BaseException:
        if not out.exists():
            former.rename(out)
        raise
    shutil.rmtree(former)
