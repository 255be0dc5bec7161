"""One run from a model to a checkpoint: the file to read first.

source -> calibration rows -> rewrites -> stream of blocks -> fit -> run folder -> format -> audit -> report
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from logitwise.activations import Streams, choose_place
from logitwise.allocation import with_bits
from logitwise.calibrate import RunRows, rows_of_run, split
from logitwise.calibration import fresh_rows
from logitwise.calibration.batches import keep_nothing
from logitwise.calibration.rows import Rows
from logitwise.errors import CalibrationError
from logitwise.fit import Window
from logitwise.grid import Quantized
from logitwise.launch import started_here
from logitwise.machine import repeatable, versions
from logitwise.memory import enough_memory, only_new_collected
from logitwise.polish import POLISHED, Polish, Polished
from logitwise.preflight import Job, check, check_shared
from logitwise.probe import TRIED_ON, bytes_of_streams, try_memory
from logitwise.quantizers import INFORMED, QUANTIZERS, STARTS
from logitwise.ranks import joined
from logitwise.recipe import Choice, Recipe
from logitwise.remedies import smaller_fit
from logitwise.rewrites import READ_INPUTS
from logitwise.rewriting import rewritten_job
from logitwise.runfolder import POLISH_FIGURES, RunFolder, chain, run_folder_of
from logitwise.skeleton import Slot, load_whole
from logitwise.source import fingerprint
from logitwise.stream import Walk, compiles
from logitwise.unfinished import batches, halfway
from logitwise.watch import SILENT, Watcher
from logitwise.windows import NUMERICS, Step, made_by_mse, plan_steps
from logitwise.writing import read_report, write

ROWS_AT_A_TIME = 8
"""Steps whose fresh rows are written together: a model writes many answers at once in little more time."""

PARTS_OF_THE_BLOCKS = 1 << 20
"""Parts of fresh text that are the final blocks'; the polish has those after."""

RUN_AGAIN = (
    "and run again: finished blocks that do not depend on it are kept (`logitwise plan` says beforehand what a run "
    "takes)"
)


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
    verify: bool = True,
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
        verify: read the written checkpoint back and compare it, bit for bit, before it appears.
        watcher: hears what is being done.

    Errors: InputError for what is refused before the work; MachineError where the machine fails, to be resumed.
    """
    recipe, out, began = recipe or Recipe.load(), Path(out), time.monotonic()
    learns = QUANTIZERS[recipe.method].learns if recipe.method in QUANTIZERS else False
    fits = learns or recipe.start in INFORMED
    reads = fits or recipe.polish or recipe.target_bits is not None or bool(set(recipe.rewrites) & set(READ_INPUTS))
    if rows is not None and reads:
        split(rows, recipe)
    with (
        enough_memory(f"{smaller_fit(recipe)}, {RUN_AGAIN}"),
        joined(recipe.device) as ranks,
        repeatable(),
        ExitStack() as running,
    ):
        watcher = watcher if ranks.first else SILENT
        if not reads and recipe.calibration != Recipe.model_fields["calibration"].default:
            watcher.say(f"{recipe.method} reads no text: --calibration is not used")
        check_shared(recipe, ranks.world)
        job = check(model, out, recipe, overwrite, reads and (rows is None or recipe.writes_on), revision, watcher)
        for name, choice in job.choices.items():
            watcher.say(f"{name.replace('_', ' ')}: {choice.value} ({choice.why})")
        if dropped := [fate.tensor for fate in job.fates if fate.fate == "dropped"]:
            names = ", ".join(dropped[:3]) + (", ..." if len(dropped) > 3 else "")
            watcher.say(f"left out, since the model has no place for them: {len(dropped)} tensors ({names})")
        folder = RunFolder(Path(run_folder) if run_folder else run_folder_of(out), watcher, ranks)
        running.enter_context(folder.alone())
        if fresh:
            folder.empty()
        settings = {name: job.choices[name].value for name in ("device", "compute_dtype")}
        model_found = fingerprint(job.source, job.digest)
        root = chain("logitwise", model=model_found, versions=versions(), numerics=NUMERICS, **settings)
        ranks.refuse_others(root)
        data = rows_of_run(job.skeleton, recipe, rows, folder, root, watcher) if reads else None
        if data and any(0 < len(part) < ranks.world for part in (data.train, data.held_out)):
            raise CalibrationError(
                f"{len(data.train)} rows and {len(data.held_out)} held out cannot be shared by {ranks.world} processes",
                "each has at least one of either",
                "give more text, shorter --row-tokens, or fewer processes",
            )
        running.enter_context(only_new_collected())
        recipe, allocation = with_bits(job, recipe, data, folder, root, watcher) if data else (recipe, None)
        job, root, rewritten = rewritten_job(job, recipe, data, folder, root, watcher)
        streams = _streams(job, recipe, data, folder, watcher) if data else None
        if fits and data and streams:
            still = {} if learns else {"objective": "mse", "steps": 0, "steps_last": 0}
            steps = _fit(job, recipe.but(**still), data, folder, root, streams, watcher)
        else:
            steps = _round(job, recipe, folder, root, watcher)
        made_by, held_out_kl, unmet = _verdict(folder, steps, recipe, len(job.skeleton), watcher)

        def codes(slot: Slot) -> Quantized:
            return folder.load(made_by[slot.block].key, recipe.grid_of(slot.module), slot.name)

        keys = [step.key for step in made_by]
        polished = _polish(job, recipe, data, folder, keys, codes, streams, watcher) if data else None
        if polished and polished.held_out:
            held_out_kl["polish"] = dict(polished.held_out)[polished.kept]
            if not polished.kept:
                unmet.append("the polish lowered KL on the held-out rows at no step: the scales were left as they were")
                watcher.say(unmet[-1])

        report = {
            "model": {"name": job.source.name, "sha256": job.digest, "dtype": str(job.source.dtype)[6:]},
            "recipe": recipe.model_dump(),
            "allocation": allocation,
            "choices": {name: asdict(choice) for name, choice in job.choices.items()},
            "replay_difference": job.replay_difference,
            "calibration": data.counts if data else {},
            "rewrites": rewritten,
            "windows": [folder.record(step.key) for step in steps],
            "polish": polished and {name: getattr(polished, name) for name in POLISH_FIGURES},
            "fitted_by": made_by[-1].objective,
            "held_out_kl": held_out_kl,
            "unmet": unmet,
            "versions": versions(),
            "seconds": round(time.monotonic() - began, 1),
        }
        with ranks.first_alone() as mine:
            if mine:
                report = write(job, out, recipe.grid_of, codes, polished, report, overwrite, verify, watcher)
        report = report if mine else read_report(out) or report
        if not keep_run:
            folder.remove()
        return Result(out, recipe, job.choices, made_by[-1].objective, held_out_kl, unmet, report)


def _streams(job: Job, recipe: Recipe, data: RunRows, folder: RunFolder, watcher: Watcher) -> Streams:
    """Where hidden states are."""
    most = min(recipe.most_rows, len(data.train))
    if recipe.polish:
        most = max(most, len(data.train[: recipe.polish_rows]))
    rows, device = folder.ranks.count(most) + folder.ranks.count(len(data.held_out)), job.skeleton.device
    place = choose_place(recipe.streams, bytes_of_streams(recipe, job.skeleton, rows), device, started_here())
    if place.value != "device":
        watcher.say(f"streams: {place.value} ({place.why})")
    return Streams(place.value, device, folder.path)


def _fit(
    job: Job, recipe: Recipe, data: RunRows, folder: RunFolder, root: str, streams: Streams, watcher: Watcher
) -> list[Step]:
    """Every window fitted and in the run folder."""
    most = min(recipe.most_rows, len(data.train))
    ranks = folder.ranks
    both = Rows.join([data.train[:most][ranks.share(most)], data.held_out[ranks.share(len(data.held_out))]])

    @cache
    def digest(count: int) -> str:
        return chain(data.train[:count].digest(), held_out=data.held_out.digest())

    steps = plan_steps(recipe, len(job.skeleton), root, digest, most)
    if compiled := compiles(job.skeleton, steps):  # which may differ in the last bit
        steps = plan_steps(recipe, len(job.skeleton), chain(root, compiled=True), digest, most)
    batch = recipe.batch_last or recipe.batch
    fresh = _fresh(job, recipe, data, batch, folder, steps[-1].key) if recipe.fresh_last else None
    held_out = ranks.count(len(data.held_out))
    last = [step for step in steps if step.refit and not folder.has(step.key)]
    if last and job.skeleton.device.type in TRIED_ON:  # what does not fit is to show in the first minute, not the last
        with watcher.stage("Trying the last fit", 1) as stage:
            step = replace(last[0], batch=ranks.count(last[0].batch))
            beside = bytes_of_streams(recipe, job.skeleton, len(both)) if streams.place == "device" else 0
            try_memory(job.skeleton, recipe, step, job.kept, beside, compiled)
            stage.advance()
    Walk(job.skeleton, recipe, both, held_out, folder, job.kept, fresh, ranks, streams).run(steps, watcher)
    if recipe.fresh_last:
        record = folder.record(steps[-1].key)
        _say_flat(
            watcher, "final blocks", record["flat"], len(record["losses"]), record["tokens"], bool(record["held_out"])
        )
    return steps


def _round(job: Job, recipe: Recipe, folder: RunFolder, root: str, watcher: Watcher) -> list[Step]:
    """Every block by a method that learns nothing; no text is read."""
    steps = plan_steps(recipe.but(objective="mse"), len(job.skeleton), root)
    if done := sum(folder.has(step.key) for step in steps):
        watcher.say(f"{done} of {len(steps)} blocks were rounded before")
    with watcher.stage("Rounding blocks", len(steps)) as stage:
        for step in steps:
            if not folder.has(step.key):
                window = Window(job.skeleton, step.blocks, [], job.kept)
                starts = window.quantizers(QUANTIZERS[recipe.method], recipe.grid_of, STARTS[recipe.start])
                folder.save(step.key, {slot.name: q.freeze() for slot, q in starts.items()}, {"objective": "none"})
            stage.advance()
    return steps


def _polish(
    job: Job,
    recipe: Recipe,
    data: RunRows,
    folder: RunFolder,
    made_by: list[str],
    codes: Callable[[Slot], Quantized],
    streams: Streams | None,
    watcher: Watcher,
) -> Polished | None:
    """All scales tuned together, from the run folder or now; None where that is not asked for."""
    if not recipe.polish:
        return None
    ranks, train = folder.ranks, data.train[: recipe.polish_rows]
    rows = Rows.join([train, data.held_out])
    learning = {role: vars(recipe.polish_learning_of(role)) for role in POLISHED}
    asked = recipe.model_dump(include={"polish_steps", "polish_batch", "batch", "checks", "seed", "polish_fresh"})
    if recipe.polish_fresh:
        asked |= recipe.model_dump(include={"calibration", "temperature"})
    key = chain("polish", made_by=made_by, rows=rows.digest(), held_out=len(data.held_out), learning=learning, **asked)
    if not folder.has(key):
        with watcher.stage("Polishing all scales", recipe.polish_steps) as stage:
            own = [part[ranks.share(len(part))] for part in (train, data.held_out)]
            polish = Polish(
                job.skeleton, recipe, Rows.join(own), len(own[1]), codes, job.kept, ranks=ranks, streams=streams
            )
            batch = recipe.polish_batch or recipe.batch
            after = PARTS_OF_THE_BLOCKS
            fresh = _fresh(job, recipe, data, batch, folder, key, after) if recipe.polish_fresh else None
            folder.save_polished(key, polish.run(stage, fresh, halfway(folder, key)))
        del polish, fresh
        gc.collect()  # recorded blocks hold themselves in cycles
    polished = folder.load_polished(key)
    if recipe.polish_fresh:
        _say_flat(watcher, "polish", polished.flat, len(polished.losses), polished.tokens, bool(polished.held_out))
    return polished


def _say_flat(watcher: Watcher, what: str, flat: int | None, steps: int, tokens: int, asked: bool) -> None:
    end = f"flat after {flat} of {steps} steps" if flat is not None else f"not flat yet after {steps} steps"
    curve = f"held-out KL was {end}" if asked else "no rows were held out"
    watcher.say(f"{what}: {curve}; {tokens:,} tokens were learned from")


def _fresh(
    job: Job, recipe: Recipe, data: RunRows, batch: int, folder: RunFolder, key: str, after: int = 0
) -> Iterator[Rows]:
    """Calibration rows without end, those after so many parts; the whole model is loaded once, and let go with them."""
    loader = cache(lambda: load_whole(job.source, job.skeleton.device, job.skeleton.dtype))
    asked = recipe.model_dump(include={"row_tokens", "seed", "temperature"})
    ranks, tokenizer = folder.ranks, job.source.tokenizer()
    keep = batches(folder, key) if ranks.world == 1 else keep_nothing  # ranks write at moments of their own
    parts = {"rows": ROWS_AT_A_TIME * ranks.count(batch), "after": after + ranks.rank, "every": ranks.world}
    return fresh_rows(recipe.calibration, tokenizer, loader, data.held_out, keep=keep, **parts, **asked)


def _verdict(
    folder: RunFolder, steps: list[Step], recipe: Recipe, depth: int, watcher: Watcher
) -> tuple[list[Step], dict[str, float], list[str]]:
    """Which step each block's codes come from; held-out KL by objective; what was not met.

    The objective's fit of the final blocks is kept only where its held-out KL is below that of the MSE fit, unless the
    recipe does not choose by held-out rows.
    """
    of_block, refit = made_by_mse(steps), [step for step in steps if step.refit]
    made_by = [of_block[block] for block in range(depth)]
    ends = [made_by[-1], *refit[-1:]]
    kl = {s.objective: r["held_out_kl"] for s in ends if "held_out_kl" in (r := folder.record(s.key))}
    if not refit:
        return made_by, kl, []
    final = refit[-1]
    if kl and recipe.choose_last == "held_out" and not kl[final.objective] < kl["mse"]:
        sentence = (
            f"{refit[0].title} fitted by {final.objective} has a held-out KL of {kl[final.objective]:.4f}, not below "
            f"the {kl['mse']:.4f} of the MSE fit: the MSE fit was kept"
        )
        watcher.say(sentence)
        return made_by, kl, [sentence]
    if not kl:
        watcher.say(f"no rows were held out: the fit by {final.objective} was kept without a verdict")
    for step in refit:
        made_by[step.blocks[0] :] = [step] * len(step.blocks)
    return made_by, kl, []
