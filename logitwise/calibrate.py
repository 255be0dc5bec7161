"""The rows of a run: those to learn from and those held out, made once and kept in the run folder."""

import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from logitwise.calibration import file_digest, prepare, writes, writes_own
from logitwise.calibration.rows import Rows
from logitwise.errors import CalibrationError
from logitwise.memory import enough_memory
from logitwise.recipe import Recipe
from logitwise.remedies import other_text
from logitwise.runfolder import FIRST_ROW, RunFolder, chain
from logitwise.skeleton import Skeleton, load_whole
from logitwise.unfinished import batches
from logitwise.watch import Watcher


@dataclass(frozen=True)
class RunRows:
    """What a run reads.

    Args:
        train: rows to learn from.
        held_out: rows that choose.
        counts: how much of what there is, and the first row as text.
    """

    train: Rows
    held_out: Rows
    counts: dict[str, Any]


def rows_of_run(
    skeleton: Skeleton, recipe: Recipe, given: Rows | None, folder: RunFolder, root: str, watcher: Watcher
) -> RunRows:
    """The rows given in Python, or those that the recipe names, from the run folder or made now by the model.

    Errors: CalibrationError.
    """
    if given is not None:
        train, held = split(given, recipe)
        counts = {"rows": len(train), "held_out_rows": len(held), "counted_tokens": train.counted()}
        found = RunRows(train, held, counts)
    else:
        found = _calibrate(skeleton, recipe, folder, root, watcher)
    watcher.say(
        f"calibration: {len(found.train)} rows of {found.train.ids.shape[1]} tokens, {found.train.counted():,} of them "
        f"to predict, and {len(found.held_out)} rows held out"
    )
    return found


def split(rows: Rows, recipe: Recipe) -> tuple[Rows, Rows]:
    """Given rows as those to learn from and those held out, the last ones.

    Errors: CalibrationError where one of the two is left with nothing that counts.
    """
    count = recipe.held_out if recipe.held_out is not None else max(16, len(rows) // 8)
    cut = max(0, len(rows) - count)
    train, held = rows[:cut], rows[cut:]
    if not train.counted() or (count and not held.counted()):
        raise CalibrationError(
            f"{len(rows)} rows cannot be learned from",
            f"the last {count} are held out, {cut} are left, and in both some position must have a weight above 0",
            "give more rows, or a smaller held_out",
        )
    return train, held


def _calibrate(skeleton: Skeleton, recipe: Recipe, folder: RunFolder, root: str, watcher: Watcher) -> RunRows:
    most = max(recipe.most_rows, (recipe.polish and recipe.polish_rows) or 0)
    asked = recipe.model_dump(include={"calibration", "row_tokens", "seed", "temperature"})
    asked["file"] = file_digest(recipe.calibration)
    key = chain(root, most=most, held_out=recipe.held_out_rows, **asked)
    if not folder.has(key):
        with folder.ranks.first_alone() as mine:
            if mine:
                _make_rows(skeleton, recipe, most, key, folder, watcher)
    return RunRows(*folder.load_rows(key), folder.record(key))


def _make_rows(skeleton: Skeleton, recipe: Recipe, most: int, key: str, folder: RunFolder, watcher: Watcher) -> None:
    """Reads or writes the text, into the run folder."""
    title = "Writing calibration text" if writes(recipe.calibration) else "Reading calibration text"
    own = writes_own(recipe.calibration)
    began = time.monotonic()
    total = (most + recipe.held_out_rows) * recipe.row_tokens
    with watcher.stage(title, total) as stage, enough_memory(other_text(recipe)) if own else nullcontext():
        made = prepare(
            recipe.calibration,
            skeleton.source.tokenizer(),
            lambda: load_whole(skeleton.source, skeleton.device, skeleton.dtype),
            rows=most,
            held_out=recipe.held_out_rows,
            row_tokens=recipe.row_tokens,
            seed=recipe.seed,
            temperature=recipe.temperature,
            progress=lambda done, total: stage.reach(done),
            keep=batches(folder, key),
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    counts = {**made.counts, "seconds": round(time.monotonic() - began), "first": made.first_row_text}
    folder.save_rows(key, made.rows, made.held_out, counts)
    folder.note(FIRST_ROW, made.first_row_text)
