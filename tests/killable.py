"""The command line in processes that can be killed, forked from one in which everything is imported already."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401 (transformers loads it late)

from logitwise import cli, evaluation, pipeline, refit  # noqa: F401 (the command line loads them late)

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
HEARD, COUNTED = "heard.txt", "changes.txt"
"""What the last process said, and how often it changed something on the disk, where it ended by itself."""


def start(place: Path, words: tuple[str, ...], last_change: int | None = None) -> ForkServerProcess:
    """Starts a command in a folder.

    Args:
        place: the folder.
        words: the command.
        last_change: before the so manyth file or folder is opened for writing, renamed or removed, the process is
            killed; never where None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])
    process = context.Process(target=_run, args=(place, words, last_change))
    process.start()
    return process


def _run(place: Path, words: tuple[str, ...], last_change: int | None) -> None:
    os.chdir(place)
    heard = os.open(HEARD, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(heard, 1), os.dup2(heard, 2)
    changes = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        if event in CHANGES or (event == "open" and set(str(arguments[1])) & set("wax+")):
            changes += 1
            if changes == last_change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sys.argv = ["logitwise", *words]
    try:
        cli.main()
    finally:
        Path(COUNTED).write_text(str(changes), encoding="utf-8")
