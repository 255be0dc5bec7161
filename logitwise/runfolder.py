"""What is finished and what it depended on: one file of codes and one of figures for each window.

A window's key is a hash of the key before it and of everything that decides its own result, so that a run finds the
longest prefix that is still valid. Resuming, changing the last window and making a variant are one thing.

What there is of an unfinished part (unfinished.py) has keys that begin with the part's, and goes when that is finished.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from logitwise.calibration.rows import Rows
from logitwise.errors import MachineError, OutputError
from logitwise.grid import Grid, Quantized
from logitwise.polish import Polished
from logitwise.ranks import ALONE, Ranks
from logitwise.source.rewritten import Changes
from logitwise.watch import SILENT, Watcher

PARTS = ("codes", "scale", "zero", "minimum")
"""What is stored of a quantized weight, the last where its grid has it."""

POLISH_FIGURES = ("losses", "held_out", "kept", "tokens", "flat")
"""What the record of a polish holds."""

LOCK = "lock"
FIRST_ROW = "first_row.txt"

OWN = re.compile(rf"[0-9a-f]{{32}}(-[a-z]+-\w+)?\.(json|safetensors|partial)|.+\.stream|{re.escape(FIRST_ROW)}")
"""Files of a run by their names: no other is ever removed."""


def chain(previous: str, **settings: Any) -> str:
    """The key of what follows `previous` under `settings` (JSON values)."""
    text = json.dumps([previous, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def run_folder_of(out: Path) -> Path:
    """Where the run folder of an OUT is: the same whichever link OUT is named by, so that its lock is the same."""
    out = out.resolve()
    return out.with_name(f"{out.name}.run")


class RunFolder:
    """Finished parts of a run, by key.

    Where ranks share a run the first alone writes, and all go by what it finds: they ask and save together.

    Args:
        path: the folder, made when something is first saved.
        watcher: hears of what is damaged.
        ranks: who uses it.
    """

    def __init__(self, path: Path, watcher: Watcher = SILENT, ranks: Ranks = ALONE) -> None:
        self.path, self.watcher, self.ranks = path, watcher, ranks
        self._whole: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the part is finished, and what is stored of it is what was written; if not, that is said."""
        return self.ranks.agree(self.ranks.first and self._has(key))

    def _has(self, key: str) -> bool:
        if key not in self._whole and (self.path / f"{key}.json").is_file():
            try:
                whole = self._stored(key)["sha256"] == self._digest(key, self.record(key))
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                whole = False
            if whole:
                self._whole.add(key)
            else:
                self.watcher.say(f"{self.path / key}.* is damaged or incomplete: that part is made again")
        return key in self._whole

    def save(
        self,
        key: str,
        quantized: dict[str, Quantized],
        record: dict[str, Any],
        state: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """A finished window: its slots by name, its figures, and what was learned where a later fit starts from it."""
        tensors: dict[str, Tensor] = {}
        for name, q in quantized.items():
            tensors |= {f"{name}:{part}": tensor for part, tensor in zip(PARTS, q.parts(), strict=False)}
        for name, parts in (state or {}).items():
            # Copies, since a scale that nothing was learned of is the one that is stored.
            tensors |= {f"{name}:state:{part}": tensor.clone() for part, tensor in parts.items()}
        self._finish(key, tensors, record)

    def load_state(self, key: str, name: str, quantizer: nn.Module) -> None:
        """Puts what was learned for a slot into its quantizer; what was not stored stays as it is."""
        state = {}
        with safe_open(self.path / f"{key}.safetensors", framework="pt") as file:
            stored = set(file.keys())
            for part, tensor in quantizer.state_dict().items():
                if (stored_as := f"{name}:state:{part}") in stored:
                    state[part] = file.get_tensor(stored_as).clone().to(tensor.device)
        # New tensors, since a quantizer may share its weight with the window.
        quantizer.load_state_dict(state, strict=False, assign=True)

    def record(self, key: str) -> dict[str, Any]:
        """The figures of a finished window."""
        record: dict[str, Any] = self._stored(key)["record"]
        return record

    def load(self, key: str, grid: Grid, name: str) -> Quantized:
        """One slot of a finished window."""
        with safe_open(self.path / f"{key}.safetensors", framework="pt") as file:
            stored = PARTS if grid.minimum else PARTS[:-1]
            # Copies: a tensor that is kept would keep the whole file mapped.
            codes, scale, zero, *minimum = (file.get_tensor(f"{name}:{part}").clone() for part in stored)
        return Quantized(codes, scale, zero, grid, *minimum)

    def save_polished(self, key: str, polished: Polished) -> None:
        """A finished polish."""
        kinds = {"scale": polished.scales, "minimum": polished.minima, "vector": polished.vectors}
        tensors = {f"{kind}:{name}": tensor for kind, found in kinds.items() for name, tensor in found.items()}
        self._finish(key, tensors, {name: getattr(polished, name) for name in POLISH_FIGURES})

    def load_polished(self, key: str) -> Polished:
        """A finished polish."""
        parts: dict[str, dict[str, Tensor]] = {"scale": {}, "minimum": {}, "vector": {}}
        for name, tensor in load_file(self.path / f"{key}.safetensors").items():
            kind, _, rest = name.partition(":")
            parts[kind][rest] = tensor
        record = self.record(key)
        held_out = [(step, kl) for step, kl in record["held_out"]]
        figures = {name: record[name] for name in POLISH_FIGURES} | {"held_out": held_out}
        return Polished(parts["scale"], parts["minimum"], parts["vector"], **figures)

    def save_changes(self, key: str, changes: Changes, record: dict[str, Any]) -> None:
        """What finished rewrites changed."""
        parts = vars(changes).items()
        self._finish(key, {f"{part}:{name}": x for part, found in parts for name, x in found.items()}, record)

    def load_changes(self, key: str) -> Changes:
        """What finished rewrites changed."""
        changes = Changes()
        for name, tensor in load_file(self.path / f"{key}.safetensors").items():
            part, _, rest = name.partition(":")
            getattr(changes, part)[rest] = tensor
        return changes

    def save_rows(self, key: str, rows: Rows, held_out: Rows, record: dict[str, Any]) -> None:
        """The calibration rows of a run."""
        tensors = {
            f"{part}:{name}": tensor
            for part, found in (("rows", rows), ("held_out", held_out))
            for name, tensor in vars(found).items()
        }
        self._finish(key, tensors, record)

    def load_rows(self, key: str) -> tuple[Rows, Rows]:
        """Calibration and held-out rows."""
        tensors = load_file(self.path / f"{key}.safetensors")
        rows, held_out = (
            Rows(*(tensors[f"{part}:{name}"] for name in ("ids", "following", "weights")))
            for part in ("rows", "held_out")
        )
        return rows, held_out

    def save_tensors(self, key: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Any other finished part: tensors by name, and a record of JSON values."""
        self._finish(key, dict(tensors), record)

    def load_tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        return load_file(self.path / f"{key}.safetensors")

    def write(self, key: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Both files of a part, each whole or not there, whatever happens to process or machine; the JSON is last."""
        if self.ranks.first:
            self._write_files(key, tensors, record)
        self.ranks.wait()

    def _write_files(self, key: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        self._make()
        partial = self.path / f"{key}.partial"
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
            self._settle(partial, f"{key}.safetensors")
            record = json.loads(json.dumps(record))
            content = {"sha256": self._digest(key, record), "record": record}
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
            self._settle(partial, f"{key}.json")
        except (OSError, SafetensorError) as error:  # the second where safetensors itself cannot write
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise self._not_written(error) from error
        self._whole.add(key)

    def discard(self, keys: str, but: str = "") -> None:
        """The files of parts whose keys this pattern describes go, but those of one; one that stays does no harm."""
        for file in self.path.glob(keys):
            if file.stem != but:
                self._whole.discard(file.stem)
                with suppress(OSError):
                    file.unlink()

    def note(self, name: str, text: str) -> None:
        """A file for people."""
        if not self.ranks.first:
            return
        self._make()
        try:
            (self.path / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._not_written(error) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other runs out of the folder; a process that dies lets them in.

        Errors: OutputError where another run is at work in it; MachineError where a rank does not see it.
        """
        with self._locked() if self.ranks.first else nullcontext():
            self.ranks.wait()
            (seen,) = self.ranks.total((self.path / LOCK).is_file())
            if seen < self.ranks.world:
                raise MachineError(
                    f"the run folder {self.path} is not seen by all processes",
                    f"{self.ranks.world - int(seen)} of {self.ranks.world} do not have what the first writes there",
                    "choose an OUT, or a run folder, on a file system that all machines share",
                )
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._make()
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise OutputError(
                f"another run is at work in {self.path}",
                "both would write the same files",
                "wait until it has ended, or write to another place",
            ) from error
        try:
            for file in self.path.glob("*.stream"):  # of a process that was killed while it took their place
                file.unlink()
            yield
        finally:
            if [file.name for file in self.path.glob("*")] == [LOCK]:
                self.remove()
            lock.release()

    def empty(self) -> None:
        """Removes everything that is finished."""
        self._whole.clear()
        with self.ranks.first_alone() as mine:
            for file in self._own() if mine else ():
                file.unlink()

    def remove(self) -> None:
        """Everything of the run, and the folder, where nothing else is in it."""
        self._whole.clear()
        if self.ranks.first:
            with suppress(OSError):
                for file in [*self._own(), self.path / LOCK]:
                    file.unlink(missing_ok=True)
                self.path.rmdir()

    def _own(self) -> list[Path]:
        return [file for file in self.path.glob("*") if OWN.fullmatch(file.name)]

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                f"the run folder {self.path} cannot be made", str(error), "free the place or choose another OUT"
            ) from error

    def _stored(self, key: str) -> dict[str, Any]:
        stored: dict[str, Any] = json.loads((self.path / f"{key}.json").read_text("utf-8"))
        return stored

    def _digest(self, key: str, record: dict[str, Any]) -> str:
        """A hash of what is stored of a part: its tensors' file and its record."""
        with (self.path / f"{key}.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(json.dumps(record, sort_keys=True).encode())
        return digest.hexdigest()

    def _finish(self, key: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """A finished part; what there was of it unfinished goes."""
        self.write(key, tensors, record)
        if self.ranks.first:
            self.discard(f"{key}-*")

    def _settle(self, partial: Path, name: str) -> None:
        """Gives a file its name once its content is on the disk."""
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self.path / name)

    def _not_written(self, error: Exception) -> MachineError:
        return MachineError(
            f"{self.path} cannot be written",
            str(error),
            "free some disk and run the same command again: finished blocks are kept",
        )
