"""Which windows a run fits, in which order, and from where each starts.

First all blocks by mean squared error: one by one, or in windows of several that slide over the model, so that a block
is fitted again together with those behind it (SliderQuant, arXiv 2603.25284, whose first windows grow from one block).
Then the last K together by the objective, perhaps in windows that shrink towards the last block.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from logitwise.errors import RecipeError
from logitwise.objectives import OBJECTIVES
from logitwise.quantizers import QUANTIZERS, STARTS
from logitwise.recipe import Learning, Recipe
from logitwise.runfolder import chain

NUMERICS = 5
"""Raised when the same settings give another result, so that finished windows of before are not reused."""


@dataclass(frozen=True)
class Step:
    """One window to fit.

    Args:
        blocks: its blocks.
        objective: what it is fitted by.
        steps, batch, train: how long, how many rows a step, on how many rows.
        learning: by role, how the method's parameters are learned.
        refit: whether it fits final blocks once more, by the recipe's objective.
        starts: for each block the key of the step whose learned state it starts from, or None: the recipe's start.
        keeps_state: whether a later step starts from its learned state.
        key: names its result in the run folder.
    """

    blocks: range
    objective: str
    steps: int
    batch: int
    train: int
    learning: dict[str, Learning]
    refit: bool
    starts: tuple[str | None, ...]
    keeps_state: bool
    key: str

    @property
    def title(self) -> str:
        """How people call it."""
        first, last = self.blocks[0] + 1, self.blocks[-1] + 1
        return f"block {last}" if first == last else f"blocks {first} to {last}"


def plan_steps(
    recipe: Recipe, depth: int, root: str, digest: Callable[[int], str] = str, most: int = sys.maxsize
) -> list[Step]:
    """The windows of a run in order.

    Args:
        root: the key of what all depend on (model, versions).
        digest: of the first so many rows and of those held out.
        most: rows that there are.

    The final blocks' MSE fits have the steps, rows and batch of the final blocks, but those of the other blocks where
    they are only what the objective's fit starts from.
    """
    fork, roles = depth - final_blocks(recipe, depth), roles_of(recipe)
    common = dict(
        grid=vars(recipe.grid),
        layers=recipe.model_dump()["layers"],
        method=recipe.method,
        start=recipe.start,
        checks=recipe.checks,
        seed=recipe.seed,
        keep=recipe.keep,
        stages=[stage.model_dump() for stage in recipe.block_stages],
    )
    fits = [(blocks, False) for blocks in _sliding(recipe, depth)]
    if OBJECTIVES[recipe.objective].reads_head:
        fits += [(range(first, depth), True) for first in range(fork, depth if recipe.shrink else fork + 1)]
    is_start = recipe.start_last == "mse" and OBJECTIVES[recipe.objective].reads_head
    sources = _sources(fits, is_start)
    steps: list[Step] = []
    for index, (blocks, refit) in enumerate(fits):
        last = refit or (blocks[-1] >= fork and not is_start)
        length = recipe.steps_last if last and recipe.steps_last is not None else recipe.steps
        batch = (last and recipe.batch_last) or recipe.batch
        train = min((last and recipe.rows_last) or recipe.rows, most)
        learning = {role: recipe.learning_of(role, refit) for role in roles}
        for settings in () if refit else recipe.windows:
            if settings.covers(blocks[-1], depth):
                length = length if settings.steps is None else settings.steps
                batch, train = settings.batch or batch, min(settings.rows or train, most)
                learning |= settings.learning
        objective = recipe.objective if refit else "mse"
        starts = tuple(None if source is None else steps[source].key for source in sources[index])
        # The last fit keeps it for a later run by another objective, too.
        is_last = not refit and blocks[-1] >= fork and recipe.start_last == "mse"
        keeps_state = is_last or any(index in own for own in sources[index + 1 :])
        own = dict(blocks=[blocks[0], blocks[-1]], objective=objective, steps=length, batch=batch, rows=train)
        own |= dict(learning={role: vars(how) for role, how in learning.items()})
        own |= dict(digest=digest(train), starts=starts, keeps_state=keeps_state)
        before = steps
        if not refit or recipe.block_stages:
            own |= dict(left_out=recipe.left_out)
        if refit:
            own |= dict(settings=recipe.objective_settings, teacher=recipe.teacher_last, choose=recipe.choose_last)
            own |= dict(fresh=recipe.fresh_last and [recipe.calibration, recipe.temperature])
            # What the blocks before these are; of earlier fits of these themselves only `starts` counts.
            before = [step for step in steps if step.refit or step.blocks[0] < fork]
        key = chain(before[-1].key if before else root, **common, **own)
        steps.append(Step(blocks, objective, length, batch, train, learning, refit, starts, keeps_state, key))
    return steps


def _sliding(recipe: Recipe, depth: int) -> list[range]:
    """The windows of the fit by mean squared error; the last one ends at the last block."""
    size, stride = recipe.window, recipe.stride
    grown = [range(last) for last in range(1, size)] if recipe.grow else []
    firsts = [*range(0, depth - size, stride), depth - size]
    return grown + [range(first, first + size) for first in firsts]


def _sources(fits: list[tuple[range, bool]], goes_on: bool) -> list[list[int | None]]:
    """For each block of each fit, the number of the fit whose learned state it starts from; None: the recipe's start.

    `goes_on`: whether the objective's fit starts from what was learned by mean squared error.
    """
    latest: dict[int, int] = {}
    found: list[list[int | None]] = []
    for index, (blocks, refit) in enumerate(fits):
        if refit and not fits[index - 1][1] and not goes_on:
            latest = {}
        found.append([latest.get(block) for block in blocks])
        latest |= dict.fromkeys(blocks, index)
    return found


def made_by_mse(steps: list[Step]) -> dict[int, Step]:
    """For each block, the last step that fitted it by mean squared error."""
    return {block: step for step in steps if not step.refit for block in step.blocks}


def check_windows(recipe: Recipe, depth: int) -> None:
    """Refuses windows that a model of so many blocks cannot have, or that cannot have the recipe's stages.

    Errors: RecipeError.
    """
    for key in ("final_blocks", "window"):
        asked = getattr(recipe, key)
        if asked != "all" and asked > depth:
            more = ", or all" if key == "final_blocks" else ""
            raise RecipeError(
                f"{key} {asked} is too many", f"the model has {depth} blocks", f"choose 1 to {depth}{more}"
            )
    for settings in recipe.windows:
        if not any(settings.covers(block, depth) for block in range(depth)):
            raise RecipeError(
                f"[[windows]] blocks = {list(settings.blocks)} means no block",
                f"the model has {depth}, from 0 to {depth - 1}; negative numbers count from its end",
                "give the first and the last of the blocks that these windows end with",
            )
    if recipe.stride > recipe.window:
        raise RecipeError(
            f"a stride of {recipe.stride} leaves blocks out",
            f"a window has {recipe.window}",
            f"choose a stride of 1 to {recipe.window}",
        )
    together = max(recipe.window, final_blocks(recipe, depth) if OBJECTIVES[recipe.objective].reads_head else 1)
    if recipe.block_stages and together > 1:
        raise RecipeError(
            f"{together} blocks together cannot be fitted in stages",
            f"the stages{f' of {recipe.method}' if recipe.stages is None else ''} are those of one block",
            "choose windows of one block and --final-blocks 1, or --set stages=[] to learn whole windows at once",
        )


def final_blocks(recipe: Recipe, depth: int) -> int:
    """How many blocks are final."""
    return depth if recipe.final_blocks == "all" else recipe.final_blocks


def roles_of(recipe: Recipe) -> list[str]:
    """The roles of the method's parameters, read off a weight of one group."""
    method = QUANTIZERS[recipe.method]
    sample = method.start(torch.tensor([[-1.0, 1.0] * 4]), replace(recipe.grid, group_size=None), STARTS["minmax"])
    return [str(role) for role in sample.groups()]
