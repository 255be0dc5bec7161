"""What there is of an unfinished part of a run: how far a descent is, and the text that was written so far."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from logitwise.calibration.batches import Keep
from logitwise.descent import Halfway
from logitwise.errors import MachineError
from logitwise.runfolder import RunFolder, chain

SECONDS = 30.0
"""How long a descent goes on, at least, before how far it is is kept."""


def halfway(folder: RunFolder, key: str) -> Halfway:
    """Where the descent of a part keeps how far it is, where it takes long.

    Every step that is kept has files of its own, and those of earlier ones go once they are there: a kill at any moment
    leaves one whole. A disk that has no room for them is no reason to stop; it is said.
    """
    began = time.monotonic()

    def due() -> bool:
        return folder.ranks.agree(time.monotonic() - began >= SECONDS)

    def save(tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        nonlocal began
        own = f"{key}-step-{figures['step']:08}"
        with folder.ranks.first_alone() as mine:
            try:
                if mine:
                    folder.write(own, tensors, figures)
                    folder.discard(f"{key}-step-*", but=own)
            except MachineError as error:
                folder.watcher.say(f"how far it is at step {figures['step']} could not be kept: {error.why}")
        began = time.monotonic()

    def load() -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        newest = 0
        with folder.ranks.first_alone() as mine:  # others may not see the same files yet
            if mine:
                steps = sorted((file.stem for file in folder.path.glob(f"{key}-step-*.json")), reverse=True)
                newest = int(next(filter(folder.has, steps), "0").rpartition("-")[2])
        (newest,) = map(int, folder.ranks.total(newest if folder.ranks.first else 0))
        own = f"{key}-step-{newest:08}"
        return (folder.load_tensors(own), folder.record(own)) if newest else None

    return Halfway(due, save, load)


def batches(folder: RunFolder, key: str) -> Keep:
    """Where the batches of a part's text are kept, each as soon as it is written: that takes milliseconds.

    A batch's key is a hash of the one before it and of what it asks, so that other prompts find nothing.
    """
    last = key

    def keep(asked: Sequence[Any], write: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        nonlocal last
        last = chain(last, asked=asked)
        own = f"{key}-batch-{last}"
        if not folder.has(own):
            folder.write(own, write(), {})
        return folder.load_tensors(own)

    return keep
