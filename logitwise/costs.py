"""Time and memory of a run: what probe.py measures of one unit of each kind, times how many units the run has."""

import gc
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from logitwise.activations import choose_place
from logitwise.calibration import ANSWER_BATCH, ANSWER_TOKENS, writes_own
from logitwise.grid import Grid
from logitwise.memory import enough_memory, only_new_collected
from logitwise.preflight import Outline
from logitwise.probe import (
    TRIED_ON,
    OfReading,
    OfText,
    OfWindow,
    bytes_of_streams,
    of_forward,
    of_reading,
    of_storing,
    of_text,
    of_window,
)
from logitwise.quantizers import INFORMED, QUANTIZERS
from logitwise.recipe import Recipe
from logitwise.remedies import more_memory, other_text, smaller_fit
from logitwise.skeleton import PROOF_BLOCKS
from logitwise.stream import compiles
from logitwise.unfinished import SECONDS
from logitwise.watch import Watcher
from logitwise.windows import Step, plan_steps

WRITING = 2**28
"""Bytes a second at which a disk is taken to be written to, and what is there to be read back: the only figure that is
not measured."""
WALKED, PROVED = (3, 1), (5, 2)
"""How often a walk through the blocks, and the proof of the replay, read what is around them, and how often the
vocabulary projection: to see how blocks are called, to embed, for the head."""
STATE = 2 * 4 * 4
"""Bytes of disk for each number of a long fit: itself, its best iterate, two of Adam; as many while newer ones come."""
READING = "reading and checking the model"
FIRST = "first steps, loading kernels"
TEXT = "writing calibration text"
FITS, ROUNDING = "fitting blocks", "rounding blocks"
PROOF, STORING = "proving the replay", "reading and writing weights"
"""Parts of a run as its memory has them, some as its time does too."""


@dataclass(frozen=True)
class Work:
    """How many units a run has.

    Args:
        recipe: by which; without steps where its method learns nothing.
        depth: blocks.
        parameters: all of the model's.
        block: those of a block.
        projection: those of the vocabulary projection, which may be the embedding's.
        around: those outside the blocks, without a projection of its own.
        weights: those that are quantized.
        rows: of text, those held out included; none where none is read.
        fits, refits: the windows, and those of the final blocks by the objective.
        largest: the one of `fits` that takes most.
    """

    recipe: Recipe
    depth: int
    parameters: int
    block: float
    projection: int
    around: int
    weights: int
    rows: int
    fits: list[Step]
    refits: list[Step]
    largest: Step

    @property
    def written(self) -> int:
        """Tokens of text that the model writes."""
        writes = self.rows and writes_own(self.recipe.calibration)
        return (self.rows + 2) * self.recipe.row_tokens if writes else 0

    @property
    def fitting(self) -> str:
        """What the fits of all blocks are called: where no text is read they only round."""
        return FITS if self.rows else ROUNDING

    @property
    def answers(self) -> int:
        """In how many answers they are, if each is as long as it may be."""
        return math.ceil(self.written / ANSWER_TOKENS)

    @property
    def answers_together(self) -> int:
        """How many of them are written at a time."""
        return min(ANSWER_BATCH, self.answers)


@dataclass(frozen=True)
class Units:
    """What one of each kind takes, as probe.py says it.

    Args:
        reading: seconds of a parameter, bytes of the largest tensor.
        storing: seconds of a weight that is written and read back, without the disk.
        text: writing text; None where none is written.
        forward: seconds of a row through a block.
        usual, last: the largest window, and the first of the final blocks by the objective, where there is one.
    """

    reading: OfReading
    storing: float
    text: OfText | None
    forward: float
    usual: OfWindow
    last: OfWindow | None


def work_of(outlined: Outline, recipe: Recipe) -> Work:
    """The work of a run by a recipe."""
    source, skeleton = outlined.source, outlined.skeleton
    depth = len(skeleton)
    counts = {name: torch.Size(source.shape(name)).numel() for name in source.names()}
    blocks = sum(count for name, count in counts.items() if name.startswith(skeleton.blocks_name + "."))
    projection = skeleton.model.get_output_embeddings().weight.numel()
    tied = source.config.get_text_config().tie_word_embeddings
    weights = Counter[int]()  # of each block
    for slot in outlined.slots:
        weights[slot.block] += slot.out_features * slot.in_features
    rows = recipe.most_rows + recipe.held_out_rows
    if recipe.polish:  # whose rows may be more
        rows = max(rows, (recipe.polish_rows or 0) + recipe.held_out_rows)
    if not QUANTIZERS[recipe.method].learns:
        rows = rows if recipe.start in INFORMED or recipe.polish else 0
        recipe = recipe.but(objective="mse", steps=0, steps_last=0)
    steps = plan_steps(recipe, depth, "plan")
    fits, refits = ([step for step in steps if step.refit == refit] for refit in (False, True))

    def size(step: Step) -> tuple[bool, int, int, int]:
        inside = sum(weights[block] for block in step.blocks)
        return inside > 0, len(step.blocks), step.batch, inside

    return Work(
        recipe=recipe,
        depth=depth,
        parameters=sum(counts.values()),
        block=blocks / depth,
        projection=projection,
        around=sum(counts.values()) - blocks - (0 if tied else projection),
        weights=weights.total(),
        rows=rows,
        fits=fits,
        refits=refits,
        largest=max(fits, key=size),
    )


def units_of(outlined: Outline, work: Work, grids: Mapping[str, Grid], watcher: Watcher) -> Units:
    """One unit of each kind, measured.

    Errors: SourceError where the first block or the largest tensor cannot be read; RecipeError where memory runs out.
    """
    source, skeleton, recipe, kept = outlined.source, outlined.skeleton, work.recipe, outlined.kept
    at_once = skeleton.rows_at_once(recipe.batch, recipe.row_tokens)
    rows, compiled = min(work.rows, at_once), compiles(skeleton, work.fits + work.refits)
    with only_new_collected(), watcher.stage("Trying a few steps", 5) as stage:
        with enough_memory(more_memory(on_gpu=False), begun=False):
            reading = of_reading(source, skeleton)
            storing = of_storing(source, recipe, work.largest, outlined.format, grids, kept)
        stage.advance()
        with enough_memory(other_text(recipe), begun=False):
            text = of_text(source, recipe, work.answers_together, skeleton) if work.written else None
        stage.advance()
        with enough_memory(smaller_fit(recipe), begun=False):
            forward = of_forward(source, recipe, max(1, rows))
            stage.advance()
            usual = of_window(source, recipe, work.largest, kept, rows, 1.0, compiled)
            stage.advance()
            counted = text.counted if text else 1.0
            last = of_window(source, recipe, work.refits[0], kept, rows, counted, compiled) if work.refits else None
            stage.advance()
    gc.collect()
    return Units(reading, storing, text, forward, usual, last)


def seconds_of(work: Work, units: Units, size: int) -> dict[str, float]:
    """Seconds of each part of a run whose checkpoint has so many bytes."""
    recipe, depth, usual, last = work.recipe, work.depth, units.usual, units.last
    read_block, read_all = work.block * units.reading.again, work.parameters * units.reading.again
    read_walked, read_proved = (
        (around * work.around + projections * work.projection) * units.reading.again
        for around, projections in (WALKED, PROVED)
    )
    proof = read_proved + 2 * min(PROOF_BLOCKS, depth) * read_block
    seconds = {READING: work.parameters * units.reading.checked + proof}
    first = sum(one.first for one in (units.text, usual, last) if one)
    if last and torch.device(recipe.device).type in TRIED_ON:
        first += last.opening + 2 * last.step + read_walked + len(work.refits[0].blocks) * read_block
    if first:
        seconds[FIRST] = first
    if text := units.text:
        prompts = text.prompts * work.answers / work.answers_together
        seconds[TEXT] = read_all + text.token * work.written + prompts

    def of_steps(steps: list[Step], one: OfWindow, like: Step) -> float:
        total = 0.0
        for step in steps:
            share = len(step.blocks) * step.batch / (len(like.blocks) * like.batch)
            held = (min(recipe.checks, step.steps) + 1) * recipe.held_out_rows if step.steps else 0
            total += one.opening * len(step.blocks) / len(like.blocks) + step.steps * one.step * share
            total += held * one.held_out_row
            total += len(step.blocks) * (read_block + work.weights / depth / WRITING)  # a byte a code is kept
        return total

    walk = 2 * depth * work.rows * units.forward + read_walked if work.rows else 0.0
    seconds[work.fitting] = of_steps(work.fits, usual, work.largest) + walk
    if last:
        verdict = 2 * recipe.held_out_rows * last.held_out_row
        of_refits = of_steps(work.refits, last, work.refits[0])
        seconds["fitting the final blocks by " + recipe.objective] = of_refits + verdict
    if recipe.polish:
        batch = recipe.polish_batch or recipe.batch
        block = usual.step / (len(work.largest.blocks) * work.largest.batch)
        head = max(0.0, last.step / work.refits[0].batch - len(work.refits[0].blocks) * block) if last else 0.0
        through = work.rows + 2 * recipe.held_out_rows * (min(recipe.checks, recipe.polish_steps) + 1)
        learning = recipe.polish_steps * batch * (depth * block + head)
        seconds["polishing"] = learning + depth * (through * units.forward + read_block) + read_walked
    kept = (work.parameters - work.weights) * units.reading.again
    seconds["writing and reading back"] = 2 * size / WRITING + work.weights * units.storing + kept
    return seconds


@dataclass(frozen=True)
class Memory:
    """Bytes at most, in each part of a run that may be the one that takes most.

    Args:
        device: of the GPU, by part; None on a CPU.
        ram: of RAM, those of Python and its libraries included, by part.
        disk: beside finished windows.
    """

    device: dict[str, int] | None
    ram: dict[str, int]
    disk: int


def memory_of(outlined: Outline, work: Work, units: Units, size: int) -> Memory:
    """The memory of a run whose checkpoint has `size` bytes."""
    recipe, device = work.recipe, torch.device(work.recipe.device)
    tried = [(work.largest, units.usual), *([(work.refits[0], units.last)] if units.last else [])]
    of_streams = bytes_of_streams(recipe, outlined.skeleton, work.rows)
    where = choose_place(recipe.streams, of_streams, device).value
    there = dict.fromkeys(("device", "cpu", "disk"), 0) | {where: of_streams}
    long = [one.learned for step, one in tried if step.steps * one.step > SECONDS]
    on_disk = there["disk"] + STATE * max(long, default=0)
    writing = units.text.peak if units.text else 0
    fits = max(one.peak for _, one in tried) + there["device"]
    # What is resident now is in the run too; when it writes, a shard is held while the largest tensor is read.
    resident = psutil.Process().memory_info().rss
    reading = resident + units.reading.peak
    storing = reading + min(size, outlined.format.shard_bytes)
    # In the proof all that is around the blocks stands in float32, a tied projection by itself, and beside it a block,
    # or the projection as it was before it was float32.
    beside = max(4 * work.block, work.projection * outlined.source.dtype.itemsize)
    proof = int(4 * (work.around + work.projection) + beside)
    on_gpu = device.type == "cuda"
    if recipe.writes_on:  # the whole model is there beside the fits, of RAM with what is resident in either
        fits += writing if on_gpu else max(0, writing - resident)
    if on_gpu:
        ram = {work.fitting: reading + there["cpu"], STORING: storing}
        return Memory({TEXT: writing, work.fitting: fits, PROOF: proof}, ram, on_disk)
    ram = {TEXT: writing, work.fitting: fits + there["cpu"], PROOF: resident + proof, STORING: storing}
    return Memory(None, ram, on_disk)
