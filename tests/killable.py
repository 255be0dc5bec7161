"""The command line in processes that can be killed or starved, forked from one that has imported everything."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401 (transformers loads it late)
from rank_environment import as_rank, free_port
from source_files import llama_config, random_model, save

from logitwise import cli, evaluation, pipeline, refitting, unfinished  # noqa: F401 (the command line loads them late)

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
HEARD, COUNTED = "heard.txt", "changes.json"
"""What the last process said, and what it changed on the disk, in order, where it ended by itself."""
SETTINGS = (
    *("bits=3", "group_size=16", "rows=6", "held_out=4", "row_tokens=32", "steps=6", "batch=2", "checks=2"),
    *("polish=true", "polish_steps=6"),
)
QUANTIZE = ("quantize", "model", "out", *(word for setting in SETTINGS for word in ("--set", setting)))
"""Own text, an MSE fit of each block, the LFQ of the last and the polish."""
AT_REST = {"model", HEARD, COUNTED}
REPORTS = ("logitwise.json", "README.md", "report.html")


def start(
    place: Path,
    words: tuple[str, ...],
    last_change: int | None = None,
    fault: int | None = None,
    largest_file: int | None = None,
    environment: dict[str, str] | None = None,
) -> ForkServerProcess:
    """Starts a command in a folder.

    Args:
        place: the folder.
        words: the command.
        last_change: before the so manyth file or folder in the folder is opened for writing, made, renamed or removed,
            the process is killed; never where None.
        fault: it is not killed, but from then on each of these but a removal fails with this error.
        largest_file: bytes; writing more into a file fails, as it does on a full disk, also outside Python.
        environment: variables for the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    process = context.Process(target=_run, args=(place, words, last_change, fault, largest_file, environment or {}))
    process.start()
    return process


def start_ranks(place: Path, words: tuple[str, ...], world: int) -> list[ForkServerProcess]:
    """Starts a command as torchrun does, in so many processes; what each of them says is in HEARD and its rank."""
    port = free_port()
    return [start(place, words, environment=as_rank(rank, world, port)) for rank in range(world)]


def heard_by(rank: int) -> str:
    """The file of what a process says."""
    return f"{HEARD}.{rank}"


def _run(
    place: Path,
    words: tuple[str, ...],
    last_change: int | None,
    fault: int | None,
    largest_file: int | None,
    environment: dict[str, str],
) -> None:
    os.chdir(place)
    here = os.getcwd() + os.sep
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    heard = os.open(heard_by(int(environment["RANK"])) if environment else HEARD, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(heard, 1), os.dup2(heard, 2)
    unfinished.SECONDS = 0.0  # here nothing takes long
    changes: list[str] = []

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event in CHANGES or (event == "open" and set(str(arguments[1])) & set("wax+")):
            if isinstance(arguments[0], int) or not os.path.abspath(os.fsdecode(arguments[0])).startswith(here):
                return  # elsewhere compilers keep what they made, in the first run alone
            changes.append(str(arguments[0]))
            if last_change is None or len(changes) < last_change or arguments[0] == COUNTED:
                return
            if fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            elif event not in ("os.remove", "os.rmdir"):
                raise OSError(fault, os.strerror(fault), str(arguments[0]))

    sys.addaudithook(count)
    sys.argv = ["logitwise", *words]
    try:
        cli.main()
    finally:
        with suppress(OSError), open(COUNTED, "w", encoding="utf-8") as file:
            json.dump(changes[:-1], file)  # the last is this file


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbs.

    Args:
        files: its checkpoint.
        changes: what it changes on the disk, in order.
        seconds: how long it takes.
    """

    files: dict[str, bytes]
    changes: list[str]
    seconds: float


def make_model(place: Path) -> None:
    """A tiny Llama whose weights are large enough to make its answers sure."""
    model = random_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    save(model, place / "model")


def run_undisturbed(place: Path) -> Undisturbed:
    """Runs the command, and removes what it made."""
    began = time.monotonic()
    process = start(place, QUANTIZE)
    process.join(120)
    seconds = time.monotonic() - began
    assert process.exitcode == 0, (place / HEARD).read_text()
    files = contents(place / "out")
    shutil.rmtree(place / "out")
    return Undisturbed(files, changes_of(place), seconds)


def changes_of(place: Path) -> list[str]:
    """What the last process changed on the disk, in order; it ended by itself."""
    changes: list[str] = json.loads((place / COUNTED).read_text())
    return changes


def contents(out: Path) -> dict[str, bytes]:
    """The files of a checkpoint, but for the reports, which tell how long it took."""
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name not in REPORTS}


def finish(place: Path, expected: dict[str, bytes]) -> None:
    """The same command, undisturbed, gives the same checkpoint and leaves nothing else."""
    process = start(place, QUANTIZE)
    process.join(120)
    assert process.exitcode == 0, (place / HEARD).read_text()
    assert contents(place / "out") == expected
    assert {file.name for file in place.iterdir()} == AT_REST | {"out"}
    shutil.rmtree(place / "out")
