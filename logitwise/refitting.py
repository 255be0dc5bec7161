"""`refit`: a checkpoint that any tool quantized, made better in place: same format, grid, size, other codes and scales.

The final blocks are learned further by the token probabilities of the original (`quantizers/reopened.py`), on what
enters them in the checkpoint; with `polish` then the scales of all blocks, their codes frozen. The verdict is that of
`evaluate`, on held-out rows, of the checkpoint as it is read back from disk beside the one that came.
"""

import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitwise.calibrate import RunRows, rows_of_run, split
from logitwise.calibration import check_spec, file_of, writes
from logitwise.calibration.rows import Rows
from logitwise.descent import Schedule
from logitwise.errors import CalibrationError, RecipeError, UnmetError
from logitwise.evaluation import measure_models
from logitwise.fit import Data, Window, fit
from logitwise.formats.checkpoint import check_output, staged, write_json
from logitwise.fused import pays
from logitwise.grid import Quantized
from logitwise.head import Head
from logitwise.machine import choose_machine, repeatable, versions
from logitwise.measure.figure import Figure, figure_as_json
from logitwise.measure.likelihood import Likelihood, as_json, kl_difference
from logitwise.memory import only_new_collected
from logitwise.objectives import OBJECTIVES
from logitwise.pair import Pair, open_pair
from logitwise.polish import POLISHED, Polish
from logitwise.preflight import check_roles, check_settings
from logitwise.quantizers.reopened import ROLES, Reopened
from logitwise.recipe import REFIT, Learning, Recipe
from logitwise.runfolder import RunFolder, chain, run_folder_of
from logitwise.skeleton import Slot
from logitwise.source import open_stored
from logitwise.unfinished import halfway
from logitwise.watch import SILENT, Watcher
from logitwise.windows import NUMERICS, check_windows, final_blocks
from logitwise.writing import REFIT_REPORT, read_back, write_changed

READ = frozenset(
    {
        *("objective", "objective_settings", "final_blocks", "learning", "steps", "batch", "checks"),
        *("calibration", "temperature", "rows", "row_tokens", "held_out", "seed", "device", "compute_dtype"),
        *("polish", "polish_steps", "polish_batch", "polish_learning", "polish_rows"),
    }
)
"""The recipe's keys that a refit reads; the checkpoint decides all others."""


@dataclass(frozen=True)
class Refitted:
    """What a refit came to.

    Args:
        out: the checkpoint.
        before, after: figures of both checkpoints beside the original, on the held-out rows.
        less: how much lower KL is, row by row.
        changed: how many tensors of the model are no longer what they were.
        report: everything that is in OUT/refit.json.
    """

    out: Path
    before: Likelihood
    after: Likelihood
    less: Figure
    changed: int
    report: dict[str, Any]


def refit(
    checkpoint: str | Path,
    out: str | Path,
    *,
    original: str | Path,
    recipe: Recipe | None = None,
    rows: Rows | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    keep_run: bool = False,
    run_folder: str | Path | None = None,
    revision: str | None = None,
    verify: bool = True,
    watcher: Watcher = SILENT,
) -> Refitted:
    """Refits the final blocks of a quantized checkpoint and, where asked, polishes all scales.

    Args:
        checkpoint: a folder or .gguf file in any format that is read.
        out: the folder to write; it appears only when complete, and only if it is better.
        original: the model that the checkpoint was quantized from, in full precision.
        recipe: what to do; the preset `refit` by default. Only the keys in `READ` may be others than theirs.
        rows: calibration rows in place of those that `recipe.calibration` names; the last ones are held out.
        overwrite: replace what OUT holds.
        fresh: do not reuse finished parts of an earlier run.
        keep_run: leave the run folder in place.
        run_folder: where finished parts are; `OUT.run` by default.
        revision: of a hub id.
        verify: read the written checkpoint back and compare it, bit for bit, before it appears.
        watcher: hears what is being done.

    Errors: InputError for what is refused before the work; UnmetError where nothing was gained: then nothing is
    written. MachineError where the machine fails, to be resumed.
    """
    recipe, out, began = recipe or Recipe.load(REFIT), Path(out), time.monotonic()
    check_output(out, overwrite, checkpoint, original, file_of(recipe.calibration))
    _check(recipe, rows)
    with repeatable(), ExitStack() as running:
        choices = choose_machine(recipe)
        device, dtype = torch.device(choices["device"].value), getattr(torch, choices["compute_dtype"].value)
        pair = open_pair(checkpoint, original, revision, device, dtype, watcher)
        check_windows(recipe, len(pair.student))
        folder = RunFolder(Path(run_folder) if run_folder else run_folder_of(out), watcher)
        running.enter_context(folder.alone())
        if fresh:
            folder.empty()
        machine = {name: choice.value for name, choice in choices.items()}
        root = chain("refit", pair=pair.fingerprints(), versions=versions(), numerics=NUMERICS, **machine)
        data = rows_of_run(pair.teacher, recipe, rows, folder, root, watcher)
        running.enter_context(only_new_collected())
        changed, key = _final_blocks(pair, recipe, data, folder, root, watcher)
        if recipe.polish:
            changed |= _polish(pair, recipe, data, folder, key, changed, watcher)
        with staged(out, overwrite) as staging:
            written = write_changed(staging, pair.checkpoint, changed, verify, watcher)
            if verify:
                read_back(staging, pair.checkpoint.format, written, watcher)
            made = open_stored(staging)
            made.name = "the refit"
            original_source = pair.teacher.source
            before, after = measure_models(
                [pair.checkpoint, made], original_source, data.held_out, str(device), watcher
            )
            less = kl_difference(before, after)
            if not less.mean > 0:
                raise UnmetError(
                    f"the refit is no better than {checkpoint}",
                    f"on {len(data.held_out)} held-out rows KL was {before.kl.mean:.4f} and is {after.kl.mean:.4f}; "
                    "nothing was written",
                    f"give more rows or steps, more --final-blocks or --polish; {folder.path} has what is finished",
                )
            report = {
                "original": {"name": original_source.name, "sha256": pair.digests[0]},
                "recipe": recipe.model_dump(include=set(READ)),
                "choices": {name: vars(choice) for name, choice in choices.items()},
                "calibration": data.counts,
                "rescaled": sorted(slot.module for slot in pair.rescaled),
                "window": folder.record(key),
                "changed": sorted(changed),
                "before": as_json(before),
                "after": as_json(after),
                "less": figure_as_json(less),
                "versions": versions(),
                "seconds": round(time.monotonic() - began, 1),
            }
            write_json(staging / REFIT_REPORT, report)
        if not keep_run:
            folder.remove()
    return Refitted(out, before, after, less, len(changed), report)


def _check(recipe: Recipe, rows: Rows | None) -> None:
    """Refuses what a refit does not read, before any work."""
    usual = Recipe.load(REFIT)
    for key in sorted(Recipe.model_fields.keys() - READ):
        if getattr(recipe, key) != getattr(usual, key):
            raise RecipeError(
                f"{key} is not read by refit",
                "the checkpoint decides it, or there is nothing to decide",
                "leave it out",
            )
    polish = {key for key in READ if key.startswith("polish_")}
    for key in sorted(polish if not recipe.polish else ()):
        if getattr(recipe, key) != getattr(usual, key):
            raise RecipeError(f"{key} is not read", "there is no polish without --polish", "add --polish")
    if not OBJECTIVES[recipe.objective].reads_head if recipe.objective in OBJECTIVES else True:
        raise RecipeError(
            f"objective {recipe.objective} cannot refit",
            "final blocks are refitted by the token probabilities",
            f"choose {', '.join(name for name, one in OBJECTIVES.items() if one.reads_head)}",
        )
    check_roles({"learning": (recipe.learning, ROLES), "polish_learning": (recipe.polish_learning, POLISHED)})
    if recipe.temperature != usual.temperature and (rows is not None or not writes(recipe.calibration)):
        why = f"{recipe.calibration if rows is None else 'text'} is read, not written"
        raise RecipeError("temperature is not read", why, "choose --calibration self or server")
    check_settings(recipe)
    if recipe.held_out_rows == 0:
        raise CalibrationError("no rows are held out", "they decide whether a refit is better", "give --held-out 16")
    if rows is None:
        check_spec(recipe.calibration)
    else:
        split(rows, recipe)


def _learning_of(recipe: Recipe) -> dict[str, Learning]:
    """How each role is learned: the preset's way, where the recipe has no own."""
    return {**(Recipe.load(REFIT).learning or {}), **(recipe.learning or {})}


def _final_blocks(
    pair: Pair, recipe: Recipe, data: RunRows, folder: RunFolder, root: str, watcher: Watcher
) -> tuple[dict[str, Tensor | Quantized], str]:
    """What the final blocks' slots become, from the run folder or now, and under which key it is there."""
    depth = len(pair.student)
    blocks = range(depth - final_blocks(recipe, depth), depth)
    slots = [slot for slot in pair.slots if slot.block in blocks]
    train = data.train[: recipe.rows]
    asked = recipe.model_dump(include={"objective", "objective_settings", "steps", "batch", "checks", "seed"})
    learned = _learning_of(recipe)
    learning = {role: vars(learned[role]) for role in ROLES}
    rows = [part.digest() for part in (train, data.held_out)]
    key = chain(root, blocks=list(blocks), rows=rows, learning=learning, **asked)
    if not folder.has(key):
        _fit(pair, recipe, blocks, slots, Rows.join([train, data.held_out]), len(data.held_out), folder, key, watcher)
    found: dict[str, Tensor | Quantized] = {}
    for slot in slots:
        stored = pair.stored(slot)
        made = folder.load(key, stored.grid, slot.name)
        if not made.same_as(stored):
            found[slot.name] = made
    return found, key


def _fit(
    pair: Pair,
    recipe: Recipe,
    blocks: range,
    slots: list[Slot],
    rows: Rows,
    held_out: int,
    folder: RunFolder,
    key: str,
    watcher: Watcher,
) -> None:
    """Fits the final blocks, and leaves the result in the run folder."""
    teacher, student, device = pair.teacher, pair.student, pair.student.device
    at_once = student.rows_at_once(recipe.batch, rows.ids.shape[1])
    calls = student.calls(rows.ids.shape[1])
    with watcher.stage("Running both models", len(calls)) as stage, torch.no_grad():
        taught, entering = teacher.embed(rows.ids, batch=at_once), student.embed(rows.ids, batch=at_once)
        for block, call in enumerate(calls):
            teacher.advance(block, teacher.load_block(block), taught, call, at_once)
            if block < blocks[0]:
                student.advance(block, student.load_block(block), entering, call, at_once)
            stage.advance()
    head, weights = student.head(), rows.weights.to(device)
    teacher_head = _where_another(teacher.head(), head)
    compiled = device.type == "cuda" and pays(
        recipe.steps * len(slots), recipe.steps * sum(slot.out_features * slot.in_features for slot in slots)
    )
    window = Window(student, blocks, calls, pair.kept, compiled)
    quantizers = {slot: Reopened(pair.stored(slot).to(device), pair.target(slot).to(device)) for slot in slots}
    following, train = rows.following.to(device), len(rows) - held_out
    given = Data(entering, taught, weights, following, train, held_out, teacher_head=teacher_head)
    schedule = Schedule(recipe.steps, recipe.batch, recipe.checks, _learning_of(recipe).__getitem__, recipe.seed)
    objective = OBJECTIVES[recipe.objective](**recipe.objective_settings)
    of_them = f"the last {len(blocks)} blocks" if len(blocks) > 1 else "the last block"
    with watcher.stage(f"Refitting {of_them}", recipe.steps) as stage:
        fitted = fit(window, dict(quantizers), objective, head, given, schedule, stage, halfway=halfway(folder, key))
    codes = {slot.name: quantized for slot, quantized in fitted.quantized.items()}
    folder.save(key, codes, {"blocks": [blocks[0], blocks[-1]], **vars(fitted.course), "tokens": fitted.tokens})
    del window, quantizers, fitted
    gc.collect()


def _where_another(original: Head, head: Head) -> Head | None:
    """The original's head, where a polish has moved the checkpoint's norms or the projection was rounded."""
    norms = zip(original.after.parameters(), head.after.parameters(), strict=True)
    if not torch.equal(original.weight, head.weight):
        return original
    original.weight = head.weight  # once in memory
    return None if all(torch.equal(*both) for both in norms) else original


def _polish(
    pair: Pair,
    recipe: Recipe,
    data: RunRows,
    folder: RunFolder,
    fitted: str,
    made: Mapping[str, Tensor | Quantized],
    watcher: Watcher,
) -> dict[str, Tensor | Quantized]:
    """What the polish changes: slots with other scales, norms and biases."""

    def stored(slot: Slot) -> Quantized:
        found = made.get(slot.name)
        return found if isinstance(found, Quantized) else pair.stored(slot)

    rows = Rows.join([data.train[: recipe.polish_rows], data.held_out])
    learning = {role: vars(recipe.polish_learning_of(role)) for role in POLISHED}
    asked = recipe.model_dump(include={"polish_steps", "polish_batch", "batch", "checks", "seed"})
    key = chain(fitted, polish=True, rows=rows.digest(), learning=learning, **asked)
    if not folder.has(key):
        with watcher.stage("Polishing all scales", recipe.polish_steps) as stage:
            polish = Polish(pair.student, recipe, rows, len(data.held_out), stored, pair.kept, pair.teacher)
            folder.save_polished(key, polish.run(stage, halfway=halfway(folder, key)))
        del polish
        gc.collect()
    polished = folder.load_polished(key)
    found: dict[str, Tensor | Quantized] = {}
    if not polished.kept:
        watcher.say("the polish lowered KL on the held-out rows at no step: the scales were left as they were")
        return found
    for slot in pair.slots:
        before = stored(slot)
        tuned = polished.of(slot.name, before)
        if slot.name in made or not tuned.same_as(before):
            found[slot.name] = tuned
    for name, vector in polished.vectors.items():
        if not torch.equal(pair.checkpoint.read(name), vector):
            found[name] = vector
    return found
