"""The safetensors files of a folder: one, or several with an index. Reads one tensor at a time."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from logitwise.errors import SourceError
from logitwise.memory import ran_out

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MOST_HEADER = 1 << 24
"""Bytes: some 100,000 tensors in one file."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored: its file, its type as safetensors spells it, its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """Every tensor of the safetensors files of a folder, by its name in the files.

    Headers are read once; a file is mapped only while one of its tensors is copied out, so that pages already read
    do not stay with the process.

    Errors: SourceError, naming the file (and tensor) that is missing, truncated, corrupt or outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        listed = _listed(folder)
        files = sorted(set(listed.values())) if listed else [_single(folder)]
        self.entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _header(file).items():
                if listed.get(name, file) == file:
                    self.entries[name] = entry
        for name, file in listed.items():
            if name not in self.entries:
                raise SourceError(
                    f"tensor {name} is missing",
                    f"{INDEX} places it in {file.name}, which does not hold it",
                    "fetch the model again",
                )
        self.size_bytes = sum(file.stat().st_size for file in files)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored (a copy, on the CPU)."""
        file = self.entries[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name).clone()
        except (SafetensorError, OSError, RuntimeError) as error:  # the last of torch, where a file became shorter
            if ran_out(error):
                raise
            raise _unreadable(file, error, f"tensor {name} of {file.name}") from error
        return tensor


def _listed(folder: Path) -> dict[str, Path]:
    """The file of each tensor as the index says; empty without an index."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return {}
    try:
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        listed = {str(tensor): str(file) for tensor, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{INDEX} cannot be read",
            f"it should be a JSON object whose weight_map gives the file of each tensor ({error!r})",
            "fetch the model again",
        ) from error
    for tensor, file in listed.items():
        if not _is_plain(file):
            raise SourceError(
                f"{INDEX} places tensor {tensor} in {file[:200]!r}",
                "only .safetensors files beside the index itself are read",
                "do not use this model before you know who changed its index",
            )
        if not (folder / file).is_file():
            raise SourceError(
                f"shard {file} is missing", f"{INDEX} places tensor {tensor} in it", "fetch the model again"
            )
    return {tensor: folder / file for tensor, file in listed.items()}


def _is_plain(file: str) -> bool:
    """Whether a name can only be that of a file beside the index."""
    plain = file == Path(file).name and "\\" not in file and file.isprintable() and len(file) < 256
    return plain and file.endswith(".safetensors")


def _single(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise SourceError(
            f"{folder} has {len(found)} safetensors files and no {INDEX}",
            "without the index it is not known which of them belong to the model",
            "fetch the model again, with its index",
        )
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise SourceError(
            f"{folder} has only pickled weights ({pickles[0]})",
            "loading a pickle can run any code in it, so logitwise reads safetensors only",
            "convert it: load it where you trust it and call save_pretrained, which writes safetensors",
        )
    raise SourceError(
        f"{folder} has no weights",
        f"neither {SINGLE} nor {INDEX} is there",
        "give the folder that holds config.json and safetensors files; pickled weights (.bin) must be converted first",
    )


def _header(file: Path) -> dict[str, Entry]:
    try:
        with file.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > MOST_HEADER:
            raise SafetensorError(f"its header should have {length} bytes; at most {MOST_HEADER} are read")
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            return {name: Entry(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error, f"{file.name}") from error


def _unreadable(file: Path, error: Exception, what: str) -> SourceError:
    size = file.stat().st_size if file.exists() else 0
    return SourceError(
        f"{what} cannot be read",
        f"the file is truncated or corrupt ({size} bytes; {error})",
        "fetch the file again",
    )
