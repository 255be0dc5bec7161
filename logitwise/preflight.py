"""Everything that can be refused is refused here, before any work; what passes is a `Job`."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from logitwise.audit import Fate, audit, keeper, matches
from logitwise.calibration import check_spec, file_of, writes
from logitwise.errors import FormatError, RecipeError, SourceError
from logitwise.formats import FORMATS, Described, Format, choose, unfusable
from logitwise.formats.checkpoint import check_output
from logitwise.machine import choose_machine
from logitwise.memory import enough_memory
from logitwise.objectives import OBJECTIVES
from logitwise.polish import POLISHED
from logitwise.quantizers import INFORMED, QUANTIZERS, STARTS
from logitwise.recipe import Choice, Learning, Recipe, not_possible
from logitwise.remedies import more_memory
from logitwise.rewrites import Fold, find_folds, takes
from logitwise.skeleton import Skeleton, Slot
from logitwise.source import QuantizedSource, check_tokenizer, check_weights, open_source
from logitwise.source.base import Source
from logitwise.watch import Watcher
from logitwise.windows import check_windows, roles_of

OF_THE_REFIT = (
    "choose_last",
    "final_blocks",
    "fresh_last",
    "shrink",
    "teacher_last",
    "start_last",
    "learning_last",
    "objective_settings",
)
OF_THE_WINDOWS = ("window", "stride", "grow", "left_out", "windows", "stages")
OF_THE_POLISH = ("polish_steps", "polish_batch", "polish_learning", "polish_rows")


@dataclass(frozen=True)
class Outline:
    """What is known of a job before a weight is read.

    Args:
        source: the model as it came.
        skeleton: its modules, and the weights that are quantized: the source's own, or those of its rewrites.
        format: what is written.
        model: what it says of the model.
        kept: slots that stay in full precision.
        every: those, and all that are quantized.
        choices: what was chosen automatically.
    """

    source: Source
    skeleton: Skeleton
    format: Format
    model: Described
    kept: Callable[[Slot], bool]
    every: list[Slot]
    choices: dict[str, Choice]

    @property
    def slots(self) -> list[Slot]:
        """Those that are quantized."""
        return [slot for slot in self.every if not self.kept(slot)]


@dataclass(frozen=True)
class Job(Outline):
    """A model that can be quantized as asked.

    Args:
        fates: what becomes of each tensor of the input.
        digest: of the weights.
        replay_difference: between the model's own logits and those computed block by block.
        folds: what rewrites may use.
        left_alone: folds that they may not use, since a matrix of theirs stays in full precision.
    """

    fates: list[Fate]
    digest: str
    replay_difference: float
    folds: list[Fold]
    left_alone: list[Fold]


def check(
    model: str | Path,
    out: Path,
    recipe: Recipe,
    overwrite: bool,
    reads_text: bool,
    revision: str | None,
    watcher: Watcher,
) -> Job:
    """A job, or the first reason why not; nothing is written.

    Errors: InputError.
    """
    check_output(out, overwrite, model, file_of(recipe.calibration))
    outlined = outline(model, recipe, reads_text, revision)
    source, skeleton, kept = outlined.source, outlined.skeleton, outlined.kept
    with (
        watcher.stage("Checking weights", len(source.names())) as stage,
        enough_memory(more_memory(on_gpu=False), begun=False),
    ):
        digest = check_weights(source, lambda done, total: stage.advance())
    remedy = more_memory(skeleton.device.type == "cuda")
    with watcher.stage("Proving the replay", 1) as stage, enough_memory(remedy, begun=False):
        difference = skeleton.prove()
        stage.advance()
    folds, left_alone = _folds(recipe, skeleton, kept, watcher) if recipe.rewrites else ([], [])
    fates = audit(source, outlined.every, kept)
    return Job(
        **vars(outlined),
        fates=fates,
        digest=digest,
        replay_difference=difference,
        folds=folds,
        left_alone=left_alone,
    )


def check_shared(recipe: Recipe, processes: int) -> None:
    """Refuses what so many processes cannot share.

    Errors: RecipeError.
    """
    if processes > 1 and ":" in recipe.device:
        raise RecipeError(
            f"--device {recipe.device} is one device",
            f"there are {processes} processes, each with its own",
            "choose --device cuda, or cpu",
        )
    counts = {"rows": recipe.rows, "held_out": recipe.held_out, "batch": recipe.batch}
    counts |= recipe.model_dump(include={"rows_last", "batch_last", "polish_rows", "polish_batch"})
    for index, window in enumerate(recipe.windows):
        counts |= {f"windows.{index}.rows": window.rows, f"windows.{index}.batch": window.batch}
    for key, count in counts.items():
        if count and count < processes:
            raise RecipeError(
                f"{key} = {count} cannot be shared by {processes} processes",
                "each has at least one of the rows",
                f"choose a larger {key}, or fewer processes",
            )


def outline(model: str | Path, recipe: Recipe, reads_text: bool, revision: str | None) -> Outline:
    """What can be said of a job, or refused, before a weight is read.

    Errors: InputError.
    """
    _check_names(recipe)
    check_roles(_tables(recipe))
    _check_read(recipe)
    check_settings(recipe)
    if reads_text:
        check_spec(recipe.calibration)
    choices = choose_machine(recipe)
    source = open_source(model, revision)
    if isinstance(source, QuantizedSource):
        raise SourceError(f"{model} is quantized already", "its weights are codes", "give the original model")
    check_tokenizer(source)
    device, dtype = torch.device(choices["device"].value), getattr(torch, choices["compute_dtype"].value)
    skeleton = Skeleton(source, device, dtype)
    if reads_text:
        skeleton.check_positions(recipe.row_tokens)
    check_windows(recipe, len(skeleton))
    kept = keeper(recipe.keep)
    every = [slot for block in range(len(skeleton)) for slot in skeleton.slots(block)]
    _check_keep(recipe.keep, [*(slot.module for slot in every), *skeleton.linear_modules()])
    choices["format"] = _check_slots([slot for slot in every if not kept(slot)], recipe, skeleton.linear_modules())
    form, described = FORMATS[choices["format"].value], describe(source, skeleton)
    if (reason := form.holds_model(described)) is not None:
        raise FormatError(f"{form.name} cannot hold {source.name}", reason, "choose another --format")
    if recipe.symmetric is None and recipe.grid.symmetric:
        choices["symmetric"] = Choice(True, "transformers loads layers on several grids only where all are symmetric")
    return Outline(source, skeleton, form, described, kept, every, choices)


def describe(source: Source, skeleton: Skeleton) -> Described:
    """What a checkpoint of a model says beside its tensors."""
    source.config.architectures = [type(skeleton.model).__name__]
    return Described(source.name, source.config, source.dtype, source.tokenizer(), skeleton.linear_modules())


def _folds(
    recipe: Recipe, skeleton: Skeleton, kept: Callable[[Slot], bool], watcher: Watcher
) -> tuple[list[Fold], list[Fold]]:
    """The folds that the recipe's rewrites may use, and those that they may not.

    A matrix in full precision would be rounded to its stored type, and the model would no longer be the same.

    Errors: RecipeError where one of the rewrites has nothing to use.
    """
    with watcher.stage("Looking for folds", len(skeleton)) as stage:
        exact = Skeleton(skeleton.source, skeleton.device, torch.float32)
        found = find_folds(exact, stage)
    usable = [fold for fold in found if not any(kept(slot) for slot in fold.slots)]
    for rewrite in recipe.rewrites:
        if not any(takes(rewrite, fold) for fold in usable):
            there = any(takes(rewrite, fold) for fold in found)
            why = "--keep has a matrix of every fold there is" if there else "no scale can move in any of its blocks"
            raise RecipeError(
                f"{rewrite} finds nothing to rewrite in {skeleton.source.name}", why, f"leave {rewrite} out of rewrites"
            )
    return usable, [fold for fold in found if fold not in usable]


def _check_names(recipe: Recipe) -> None:
    names: dict[str, list[str]] = {
        "method": [*QUANTIZERS],
        "objective": [*OBJECTIVES],
        "start": [*STARTS, *INFORMED],
        "format": ["auto", *FORMATS],
    }
    for key, known in names.items():
        value = getattr(recipe, key)
        if value not in known:
            raise RecipeError(
                f"{key} {value} is not known", f"it is none of {', '.join(known)}", f"choose one of them as --{key}"
            )


def _tables(recipe: Recipe) -> dict[str, tuple[Mapping[str, Learning] | None, Collection[str]]]:
    roles = roles_of(recipe)
    tables = {"learning": (recipe.learning, roles), "learning_last": (recipe.learning_last, roles)}
    tables |= {f"windows.{i}.learning": (own.learning, roles) for i, own in enumerate(recipe.windows)}
    return {**tables, "polish_learning": (recipe.polish_learning, POLISHED)}


def check_roles(tables: Mapping[str, tuple[Mapping[str, Learning] | None, Collection[str]]]) -> None:
    """Refuses what no parameter learns by, given the roles that each table is read for.

    Errors: RecipeError.
    """
    for table, (given, read) in tables.items():
        for role in given or {}:
            if role not in read:
                raise RecipeError(
                    f"[{table}.{role}] is not read",
                    f"what is learned is {', '.join(read) or 'nothing'}",
                    "name one of these roles, or remove it",
                )


def _check_read(recipe: Recipe) -> None:
    """Refuses what is asked for, by a value that is not the default, and would be ignored."""
    method, objective = QUANTIZERS[recipe.method], OBJECTIVES[recipe.objective]
    cases: list[tuple[tuple[str, ...], bool, str, str]] = [  # keys, whether they are read, why not, what would help
        (OF_THE_REFIT, method.learns, f"{recipe.method} learns nothing", "choose another --method"),
        (
            OF_THE_REFIT,
            objective.reads_head,
            f"{recipe.objective} fits final blocks as all others",
            "choose another --objective",
        ),
        (OF_THE_WINDOWS, method.learns, f"{recipe.method} learns nothing", "choose another --method"),
        (("stride", "grow"), recipe.window > 1, "windows of one block do not overlap", "choose a larger window"),
        (("shrink",), recipe.final_blocks != 1, "one final block is alone already", "ask for more --final-blocks"),
        (OF_THE_POLISH, recipe.polish, "there is no polish without --polish", "add --polish"),
        (("polish_fresh",), recipe.polish, "there is no polish without --polish", "add --polish"),
        (
            ("polish_fresh", "fresh_last", "temperature"),
            writes(recipe.calibration),
            f"{recipe.calibration} is read, not written",
            "choose --calibration self or server",
        ),
        (("layers",), recipe.target_bits is None, "--target-bits gives each layer its bits", "choose one of the two"),
        (("bits",), recipe.target_bits is None, "--target-bits gives each layer its bits", "choose one of the two"),
        (("sensitivity",), recipe.target_bits is not None, "there is no --target-bits", "add --target-bits"),
        (("fresh_last",), not recipe.shrink, "a window that shrinks has no fresh rows", "choose one of the two"),
        (
            ("fresh_last",),
            not method.reads_progress,
            f"{recipe.method} goes by the share of its steps that is done, and fresh rows end when nothing is gained",
            "choose another --method",
        ),
    ]
    for keys, read, why, instead in cases:
        for key in keys:
            if not read and getattr(recipe, key) != Recipe.model_fields[key].default:
                raise RecipeError(
                    f"{key} is not read", why, f"{instead}, or leave {key} out (a preset or file may have it)"
                )


def check_settings(recipe: Recipe) -> None:
    """Refuses settings that the objective does not have, or not with such values.

    Errors: RecipeError.
    """
    objective = OBJECTIVES[recipe.objective]
    known = {field.name: field.default for field in fields(objective)}  # type: ignore[arg-type]
    for setting in recipe.objective_settings:
        if setting not in known:
            raise RecipeError(
                f"objective_settings.{setting} is not read",
                f"{recipe.objective} has {', '.join(known) or 'no settings'}",
                "name one of these, or remove it",
            )
    try:
        TypeAdapter(objective).validate_python(recipe.objective_settings)
    except ValidationError as error:
        setting = str(error.errors()[0]["loc"][0])
        remedy = f"change it, or leave it out for {known[setting]}"
        raise not_possible(f"objective_settings.{setting}", error, remedy) from error


def _check_keep(patterns: tuple[str, ...], modules: list[str]) -> None:
    """Refuses a pattern that keeps nothing: what was meant would be quantized."""
    for pattern in patterns:
        if not any(matches(pattern, module) for module in modules):
            near = difflib.get_close_matches(pattern, modules, 1, cutoff=0)
            why = "it is a shell pattern of a name, or of a part from one dot to another"
            raise RecipeError(f"--keep {pattern} names no layer", why, f"one that is there is {near[0]}")


def _check_slots(slots: list[Slot], recipe: Recipe, linear: list[str]) -> Choice:
    """The format that holds every layer on its grid, on each that it may come to have."""
    if not slots:
        raise RecipeError("nothing is left to quantize", "--keep matches every layer", "keep fewer layers")
    for pattern in recipe.layers:
        if not any(fnmatch(slot.module, pattern) for slot in slots):
            near = difflib.get_close_matches(pattern, [slot.module for slot in slots], 1, cutoff=0)
            raise RecipeError(
                f"[layers] {pattern} names no layer that is quantized",
                "it is matched with whole names, as *down_proj is",
                f"one is called {near[0]}",
            )
    grids = {slot: recipe.grids_of(slot.module) for slot in slots}
    together = {grid for found in grids.values() for grid in found}
    apart = unfusable({slot.module: found[0] for slot, found in grids.items()}, linear)
    form, why = choose(together, apart) if recipe.format == "auto" else (FORMATS[recipe.format], "as asked")
    reason = form.holds_grids(together)
    if reason is not None:
        raise FormatError(f"{form.name} cannot hold this grid", reason, "change the grid or --format")
    for slot, found in grids.items():
        for grid in found:
            reason = form.holds_layer(slot.module, slot.out_features, slot.in_features, slot.transposed, grid)
            if reason is not None:
                raise FormatError(
                    f"{slot.module} cannot be quantized so",
                    reason,
                    "choose another --group-size, --per-channel, or --keep this layer"
                    if not slot.transposed
                    else "no format holds this architecture yet",
                )
    _check_target(slots, recipe, form)
    return Choice(form.name, why)


def _check_target(slots: list[Slot], recipe: Recipe, form: Format) -> None:
    """Refuses a size that no bits come to."""
    if recipe.target_bits is None:
        return
    weights = sum(slot.out_features * slot.in_features for slot in slots)
    sizes = []
    for bits in (recipe.candidates[0], recipe.candidates[-1]):
        grid = replace(recipe.grid, bits=bits)
        sizes.append(sum(form.bits_stored(grid, slot.out_features, slot.in_features) for slot in slots) / weights)
    if not sizes[0] < recipe.target_bits < sizes[1]:
        raise RecipeError(
            f"--target-bits {recipe.target_bits:g} cannot be met",
            f"scales included, layers at {recipe.candidates[0]} bits take {sizes[0]:.3f} bits a weight, those at "
            f"{recipe.candidates[-1]} take {sizes[1]:.3f}",
            "choose a number between, or another --group-size",
        )
