"""One run from a model to a checkpoint: the file to read first.

source -> calibration rows -> stream of blocks -> fit -> run folder -> format -> audit -> report
"""

import gc
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from logitwise.calibration import prepare
from logitwise.calibration.rows import Rows
from logitwise.errors import CalibrationError
from logitwise.export import export
from logitwise.fit import Window
from logitwise.grid import Quantized
from logitwise.machine import repeatable, versions
from logitwise.preflight import Job, check
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.recipe import Choice, Recipe
from logitwise.runfolder import RunFolder, chain, digest_of
from logitwise.skeleton import Slot, load_whole
from logitwise.stream import Step, Walk, plan_steps
from logitwise.watch import SILENT, Watcher


@dataclass(frozen=True)
class Result:
    """What a run made.

    Args:
        out: the checkpoint.
        recipe: the settings in force.
        choices: every value that was chosen automatically, with its reason.
        fitted_by: the objective whose fit of the final blocks was kept.
        held_out_kl: KL to full precision in nats a token on the held-out rows, of each fit of the final blocks.
        unmet: what was asked for and not met, in sentences.
        report: everything that is in OUT/logitwise.json.
    """

    out: Path
    recipe: Recipe
    choices: dict[str, Choice]
    fitted_by: str
    held_out_kl: dict[str, float]
    unmet: list[str]
    report: dict[str, Any] = field(repr=False)


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    rows: Rows | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    keep_run: bool = False,
    run_folder: str | Path | None = None,
    revision: str | None = None,
    watcher: Watcher = SILENT,
) -> Result:
    """Quantizes a model block by block and writes a checkpoint.

    Args:
        model: a folder of safetensors, a .gguf file or a hub id.
        out: the folder to write; it appears only when complete.
        recipe: what to do; the standard preset by default.
        rows: calibration rows in place of those that `recipe.calibration` names; the last ones are held out.
        overwrite: replace what OUT holds.
        fresh: do not reuse finished windows of an earlier run.
        keep_run: leave the run folder in place.
        run_folder: where finished windows are; `OUT.run` by default.
        revision: of a hub id.
        watcher: hears what is being done.

    Errors: InputError for what is refused before the work; MachineError where the machine fails, to be resumed.
    """
    recipe, out, began = recipe or Recipe.load(), Path(out), time.monotonic()
    learns = QUANTIZERS[recipe.method].learns if recipe.method in QUANTIZERS else False
    if rows is not None and learns:
        _split(rows, recipe)
    with repeatable():
        job = check(model, out, recipe, overwrite, learns and rows is None, revision, watcher)
        for name, choice in job.choices.items():
            watcher.say(f"{name.replace('_', ' ')}: {choice.value} ({choice.why})")
        if dropped := [fate.tensor for fate in job.fates if fate.fate == "dropped"]:
            names = ", ".join(dropped[:3]) + (", ..." if len(dropped) > 3 else "")
            watcher.say(f"left out, since the model has no place for them: {len(dropped)} tensors ({names})")
        folder = RunFolder(Path(run_folder) if run_folder else out.with_name(f"{out.name}.run"))
        if fresh:
            folder.remove()
        settings = {name: job.choices[name].value for name in ("device", "compute_dtype")}
        root = chain("logitwise", model=job.digest, versions=versions(), **settings)
        if learns:
            steps, calibration = _fit(job, recipe, rows, folder, root, watcher)
        else:
            steps, calibration = _round(job, recipe, folder, root, watcher), {}
        made_by, held_out_kl, unmet = _verdict(folder, steps, recipe, len(job.skeleton), watcher)

        def codes(slot: Slot) -> Quantized:
            return folder.load(made_by[slot.block].key, recipe.grid, slot.name)

        report = {
            "model": {"name": job.source.name, "sha256": job.digest, "dtype": str(job.source.dtype)[6:]},
            "recipe": recipe.model_dump(),
            "choices": {name: asdict(choice) for name, choice in job.choices.items()},
            "replay_difference": job.replay_difference,
            "calibration": calibration,
            "windows": [folder.record(step.key) for step in steps],
            "fitted_by": made_by[-1].objective,
            "held_out_kl": held_out_kl,
            "unmet": unmet,
            "versions": versions(),
            "seconds": round(time.monotonic() - began, 1),
        }
        report = export(job, out, recipe.grid, codes, report, overwrite, watcher)
        if not keep_run:
            folder.remove()
    return Result(out, recipe, job.choices, made_by[-1].objective, held_out_kl, unmet, report)


def _fit(
    job: Job, recipe: Recipe, rows: Rows | None, folder: RunFolder, root: str, watcher: Watcher
) -> tuple[list[Step], dict[str, Any]]:
    """Every window fitted and in the run folder; what the calibration was."""
    if rows is None:
        train, held, calibration = _calibrate(job, recipe, folder, root, watcher)
    else:
        train, held = _split(rows, recipe)
        calibration = {"rows": len(train), "held_out_rows": len(held), "counted_tokens": train.counted()}
    counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in calibration.items() if name != "first")
    watcher.say(f"calibration: {counts}")
    last = recipe.rows_last and min(recipe.rows_last, len(train))
    fewer = recipe.but(rows=min(recipe.rows, len(train)), rows_last=last)
    both = Rows.join([train, held])
    root = chain(root, rows=digest_of(both.ids, both.following, both.weights), held_out=len(held))
    steps = plan_steps(fewer, len(job.skeleton), root)
    Walk(job.skeleton, fewer, both, len(held), folder, job.kept).run(steps, watcher)
    return steps, calibration


def _split(rows: Rows, recipe: Recipe) -> tuple[Rows, Rows]:
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


def _calibrate(
    job: Job, recipe: Recipe, folder: RunFolder, root: str, watcher: Watcher
) -> tuple[Rows, Rows, dict[str, Any]]:
    """Calibration and held-out rows, from the run folder or made now."""
    most = max(recipe.rows, recipe.rows_last or 0)
    asked = recipe.model_dump(include={"calibration", "row_tokens", "seed"})
    key = chain(root, most=most, held_out=recipe.held_out_rows, **asked)
    if not folder.has(key):
        own = recipe.calibration.partition(":")[0] == "self"
        title = "Writing calibration text" if own else "Reading calibration text"
        total = (most + recipe.held_out_rows) * recipe.row_tokens
        with watcher.stage(title, total) as stage:
            made = prepare(
                recipe.calibration,
                job.source.tokenizer(),
                lambda: load_whole(job.source, job.skeleton.device, job.skeleton.dtype),
                rows=most,
                held_out=recipe.held_out_rows,
                row_tokens=recipe.row_tokens,
                seed=recipe.seed,
                progress=lambda done, total: stage.reach(done),
            )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folder.save_rows(key, made.rows, made.held_out, {**made.counts, "first": made.first_row_text})
        folder.note("first_row.txt", made.first_row_text)
    return *folder.load_rows(key), folder.record(key)


def _round(job: Job, recipe: Recipe, folder: RunFolder, root: str, watcher: Watcher) -> list[Step]:
    """Every block by a method that learns nothing; no text is read."""
    steps = plan_steps(recipe.but(objective="mse"), len(job.skeleton), root)
    with watcher.stage("Rounding blocks", len(steps)) as stage:
        for step in steps:
            if not folder.has(step.key):
                window = Window(job.skeleton, step.blocks, [], job.kept)
                starts = window.quantizers(QUANTIZERS[recipe.method], recipe.grid, STARTS[recipe.start])
                folder.save(step.key, {slot.name: q.freeze() for slot, q in starts.items()}, {"objective": "none"})
            stage.advance()
    return steps


def _verdict(
    folder: RunFolder, steps: list[Step], recipe: Recipe, depth: int, watcher: Watcher
) -> tuple[list[Step], dict[str, float], list[str]]:
    """Which step each block's codes come from; held-out KL by objective; what was not met.

    The objective's fit of the final blocks is kept only where its held-out KL is below that of the MSE fit.
    """
    made_by, refit = list(steps[:depth]), steps[depth:]
    kl = {s.objective: r["held_out_kl"] for s in steps[depth - 1 :] if "held_out_kl" in (r := folder.record(s.key))}
    if not refit:
        return made_by, kl, []
    final = refit[0]
    if kl and not kl[final.objective] < kl["mse"]:
        sentence = (
            f"{final.title} fitted by {final.objective} has a held-out KL of {kl[final.objective]:.4f}, not below the "
            f"{kl['mse']:.4f} of the MSE fit: the MSE fit was kept"
        )
        watcher.say(sentence)
        return made_by, kl, [sentence]
    if not kl:
        watcher.say(f"no rows were held out: the fit by {final.objective} was kept without a verdict")
    made_by[final.blocks[0] :] = [final] * len(final.blocks)
    return made_by, kl, []
