"""What the parts of a run take, measured on made-up weights of the model's own shapes.

Of its own weights the first block and the largest tensor are read. Everything runs through the code of the run itself,
a few steps of it. Times are of one unit each (a step, a row through a block, a written token, a parameter that is
read); how many there are is costs.py's to say.
"""

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Literal

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logitwise.calibration import ANSWER_TOKENS
from logitwise.calibration.generate import write_answers
from logitwise.calibration.prompts import shipped_prompts
from logitwise.calibration.rows import Document
from logitwise.descent import Schedule
from logitwise.fit import Data, Window, fit, measure, weights_of
from logitwise.formats import Format
from logitwise.grid import Grid
from logitwise.objectives import OBJECTIVES
from logitwise.quantizers import INFORMED, QUANTIZERS, STARTS
from logitwise.recipe import Recipe
from logitwise.skeleton import Skeleton, Slot, load_whole
from logitwise.source import Source, check_tokenizer, check_weights, open_source
from logitwise.stages import widest_end
from logitwise.watch import Stage
from logitwise.windows import Step, final_blocks
from logitwise.writing import digest_of

WRITTEN = (16, 48)
"""Tokens of each answer that is written, to see what a token takes and what the prompts do."""
SECONDS_WRITTEN = 3.0
"""Seconds of answers of either length that are timed: from few blocks to all, a bad moment would be many times one."""
BLOCKS_WRITTEN_WITH, BYTES_WRITTEN_WITH = 4, 1 << 28
"""Blocks of a model that text is written with: these, or as many as have so many bytes."""
LONG_ENOUGH = 1.0
"""Seconds of steps that are timed, at most `MOST_STEPS` of them."""
MOST_STEPS = 40
ENOUGH = 4
"""Steps of which the time of one is found beside what comes before them."""
DRAWN = 1 << 16
"""Weights of a matrix that are drawn, the others being these again: to draw all would take longer than to read them."""
TIMES = 3
"""How often what takes little is timed."""
ONCE = 20.0
"""Seconds of opening a window that are not spent again: what a first one takes longer is little of them."""
TRIED_ON = ("cuda",)
"""Devices on which two steps of the last fit come first; where memory of another runs out, the process is ended."""


class MadeUp(Source):
    """The names, shapes and config of a source with made-up weights, perhaps of its first blocks alone.

    Args:
        source: whose shapes they are.
        depth: how many blocks; all by default.
    """

    def __init__(self, source: Source, depth: int | None = None) -> None:
        self.source, self.name, self.dtype, self.config = source, source.name, source.dtype, deepcopy(source.config)
        if depth is not None:
            text = self.config.get_text_config()
            text.num_hidden_layers = depth
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:depth]

    def names(self) -> list[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        shape, generator = self.shape(name), torch.Generator().manual_seed(len(name))
        if len(shape) < 2:
            return torch.ones(shape, dtype=self.dtype)
        count = torch.Size(shape).numel()
        drawn = torch.empty(min(count, DRAWN), dtype=self.dtype).normal_(std=0.02, generator=generator)
        return drawn.repeat(-(-count // DRAWN))[:count].view(shape)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.source.tokenizer()

    def extra_files(self) -> list[Path]:
        return self.source.extra_files()

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes


@dataclass(frozen=True)
class OfReading:
    """What reading the model takes.

    Args:
        checked: seconds a parameter at first, from wherever it is, and looking at it.
        again: the same once more, when the files may be in memory, but are decoded as before.
        peak: bytes of RAM for the moment in which the largest tensor is read: what is mapped, decoded and copied.
    """

    checked: float
    again: float
    peak: int


@dataclass(frozen=True)
class OfWindow:
    """What fitting a window takes.

    Args:
        first: seconds that the first window of its kind takes longer than others: kernels are loaded and compiled.
        opening: seconds until it can learn: its weights in place, the start of every scale, on a GPU a recording.
        step: seconds of an optimiser step.
        held_out_row: seconds of measuring one held-out row.
        peak: bytes at most, without the streams: of a GPU beside what was there before, of RAM by the whole process.
        learned: numbers that are learned.
    """

    first: float
    opening: float
    step: float
    held_out_row: float
    peak: int
    learned: int


@dataclass(frozen=True)
class OfText:
    """What writing text takes.

    Args:
        first: seconds more at first, as for a window.
        prompts: seconds of reading the prompts that are answered together.
        token: seconds of a token that is written.
        counted: share of positions that count, those of prompts being the others; of answers as long as they may be.
        peak: bytes at most, as for a window.
    """

    first: float
    prompts: float
    token: float
    counted: float
    peak: int


class _Trial:
    """A window that a few steps of its fit can be taken of, on text of random tokens.

    Args:
        skeleton: whose window it is.
        recipe, step: how it is fitted.
        rows: rows of text at most, and at least those of a step.
        counted: share of their positions that count.
        compiled: as of any window.
    """

    def __init__(
        self, skeleton: Skeleton, recipe: Recipe, step: Step, rows: int, counted: float = 1.0, compiled: bool = False
    ) -> None:
        self.skeleton, self.recipe, self.step, self.compiled = skeleton, recipe, step, compiled
        ids, self.calls = _ids(skeleton, max(step.batch, rows), recipe.row_tokens), skeleton.calls(recipe.row_tokens)
        student = skeleton.embed(ids, batch=step.batch)
        weights = torch.ones(ids.shape, device=skeleton.device)
        weights[:, int(counted * ids.shape[1]) :] = 0
        self.held_out = min(len(ids), recipe.held_out_rows) or step.batch
        self.data = Data(student, student.clone(), weights, ids.to(skeleton.device), len(ids), self.held_out)
        self.head = skeleton.head() if OBJECTIVES[step.objective].reads_head else None
        self.objective = OBJECTIVES[step.objective](**(recipe.objective_settings if step.refit else {}))

    def open(self, kept: Callable[[Slot], bool]) -> None:
        """Puts the window's weights and quantizers in place."""
        recipe, step = self.recipe, self.step
        self.window = Window(self.skeleton, step.blocks, self.calls, kept, self.compiled)
        start = STARTS["minmax"] if recipe.start in INFORMED else STARTS[recipe.start]
        others = {}
        if recipe.start in INFORMED:
            informed, moments = INFORMED[recipe.start], self.window.moments(self.data.inputs, step.batch)
            others = {s: (lambda w, grid, own=moments[s]: informed(w, grid, own)) for s in self.window.slots}
        self.quantizers = self.window.quantizers(QUANTIZERS[recipe.method], recipe.grid_of, start, others)

    def close(self) -> None:
        """Lets go of them."""
        del self.window, self.quantizers

    def learn(self, steps: int) -> None:
        """So many steps, and nothing else."""
        self._fit(steps, "last", replace(self.data, held_out=0))

    def learn_and_choose(self, steps: int) -> None:
        """So many steps beside the best iterate so far, by rows that are held out."""
        self._fit(steps, "held_out", self.data)

    def _fit(self, steps: int, choose: Literal["held_out", "last"], data: Data) -> None:
        schedule = Schedule(steps, self.step.batch, 1, self.step.learning.__getitem__, self.recipe.seed, choose)
        fit(self.window, self.quantizers, self.objective, self.head, data, schedule, Stage())

    def ask(self) -> None:
        """Measures the held-out rows."""
        weights = weights_of(self.quantizers, 1.0)
        measure(self.window, weights, self.objective, self.head, self.data, self.step.batch)


def of_opening(model: str | Path, revision: str | None) -> float:
    """Seconds of opening a model that has been opened before, so that nothing has to be fetched, and its tokenizer."""
    return _seconds(torch.device("cpu"), lambda: check_tokenizer(open_source(model, revision)))


def of_reading(source: Source, skeleton: Skeleton) -> OfReading:
    """What reading takes: time of the first block, memory of the largest tensor.

    Errors: SourceError where either cannot be read, or the block holds NaN or infinity.
    """
    names = [f"{skeleton.blocks_name}.0.{key}" for key, _ in skeleton.blocks[0].named_parameters()]
    count, cpu = sum(torch.Size(source.shape(name)).numel() for name in names), torch.device("cpu")
    checked = _seconds(cpu, lambda: check_weights(source, only=names))
    again = _least(cpu, lambda: deque(map(source.read, names), maxlen=0))
    with _peak(cpu) as peak:
        before = psutil.Process().memory_info().rss
        source.read(max(source.names(), key=lambda name: torch.Size(source.shape(name)).numel()))
    return OfReading(checked / count, again / count, max(0, peak() - before))


def of_storing(
    source: Source, recipe: Recipe, step: Step, form: Format, grids: Mapping[str, Grid], kept: Callable[[Slot], bool]
) -> float:
    """Seconds a weight of laying it out as a format does and of comparing it when it is read back, without the disk.

    Args:
        step: the window whose first block is laid out that is not kept whole.
    """
    skeleton = _skeleton(source, recipe.but(device="cpu"))
    block = next(block for block in step.blocks if not all(map(kept, skeleton.slots(block))))
    window = Window(skeleton, range(block, block + 1), [], kept)
    quantizers = window.quantizers(QUANTIZERS["rtn"], grids.__getitem__, STARTS["minmax"])
    codes = {slot.module: quantizer.freeze() for slot, quantizer in quantizers.items()}

    def store() -> None:
        for module, quantized in codes.items():
            digest_of(quantized, form)
            form.tensors(module, quantized)

    weights = sum(quantized.codes.numel() for quantized in codes.values())
    return 2 * _least(torch.device("cpu"), store) / weights  # reading it back is as much again


def of_window(
    source: Source,
    recipe: Recipe,
    step: Step,
    kept: Callable[[Slot], bool],
    rows: int,
    counted: float = 1.0,
    compiled: bool = False,
) -> OfWindow:
    """What one window takes; on `rows` rows at most, and at least a step's, of whose positions a share counts."""
    skeleton = _skeleton(source, recipe)
    device = skeleton.device
    with _peak(device) as peak:
        trial = _Trial(skeleton, recipe, step, rows, counted, compiled)
        first = opening = _seconds(device, lambda: trial.open(kept))

        def again() -> None:
            trial.close()
            trial.open(kept)

        if opening < ONCE:  # of which much may have been kernels that were loaded
            opening = min(first, _least(device, again))
        first -= opening
        if not step.steps:
            return OfWindow(first, opening, 0.0, 0.0, peak(), 0)
        slow = _seconds(device, lambda: trial.learn(2))
        few = _least(device, lambda: trial.learn(2))
        more = max(1, min(MOST_STEPS, int(LONG_ENOUGH / (few / 2))))
        many = _seconds(device, lambda: trial.learn(2 + more))
        trial.ask()
        asked = _seconds(device, trial.ask)
    # A difference of few steps would be as noisy as they are.
    each = (many - few) / more if more >= ENOUGH and many > few else min(few / 2, many / (2 + more))
    groups = [group for quantizer in trial.quantizers.values() for group in quantizer.groups().values()]
    learned = sum(parameter.numel() for group in groups for parameter in group)
    first, opening = first + max(0.0, slow - few), opening + max(0.0, few - 2 * each)
    best = 4 * learned  # bytes of the best iterate, which steps that are only timed do not keep
    return OfWindow(first, opening, each, asked / trial.held_out, peak() + best, learned)


def try_memory(
    skeleton: Skeleton, recipe: Recipe, step: Step, kept: Callable[[Slot], bool], streams: int, compiled: bool
) -> None:
    """Takes two steps of a window beside so many bytes of streams, so that memory that is not enough shows now.

    Errors: torch.OutOfMemoryError.
    """
    held = torch.empty(streams, dtype=torch.uint8, device=skeleton.device)
    trial = _Trial(skeleton, recipe, step, step.batch, compiled=compiled)
    trial.open(kept)
    trial.learn_and_choose(2)
    del held, trial
    gc.collect()  # recorded blocks hold themselves in cycles
    if skeleton.device.type == "cuda":
        torch.cuda.empty_cache()


def bytes_of_streams(recipe: Recipe, skeleton: Skeleton, rows: int) -> int:
    """What the activations of so many rows take: of teacher and student, at the fork, and inside a block."""
    width = skeleton.model.config.get_text_config().hidden_size
    at_fork = final_blocks(recipe, len(skeleton)) > 1 or recipe.teacher_last == "quantized"
    inside = widest_end(recipe.block_stages, skeleton.slots(0), width)
    return int(((2 + at_fork) * width + inside) * rows * recipe.row_tokens * skeleton.dtype.itemsize)


def of_forward(source: Source, recipe: Recipe, rows: int) -> float:
    """Seconds of a row through a block without a gradient, of `rows` rows at most."""
    skeleton = _skeleton(source, recipe)
    ids = _ids(skeleton, rows, recipe.row_tokens)
    hidden, calls, weights = skeleton.embed(ids), skeleton.calls(recipe.row_tokens), skeleton.load_block(0)
    at_once = skeleton.rows_at_once(recipe.batch, recipe.row_tokens)
    with torch.no_grad():
        skeleton.advance(0, weights, hidden[:at_once], calls[0], at_once)
        seconds = _seconds(skeleton.device, lambda: skeleton.advance(0, weights, hidden, calls[0], at_once))
    return seconds / len(ids)


def of_text(source: Source, recipe: Recipe, batch: int, skeleton: Skeleton) -> OfText:
    """What the model's own text takes: of a small one itself, else from one block and a few, in a line to all."""
    depth = len(skeleton)
    of_block = sum(p.numel() for p in skeleton.blocks[0].parameters()) * source.dtype.itemsize
    blocks = min(max(BLOCKS_WRITTEN_WITH, BYTES_WRITTEN_WITH // of_block), depth)
    many = _writing(MadeUp(source, blocks), recipe, batch)
    few = many if blocks == depth else _writing(MadeUp(source, 1), recipe, batch)
    more = (depth - 1) / max(1, blocks - 1)
    token = few.token + more * max(0.0, many.token - few.token)
    prompts = few.prompts + more * max(0.0, many.prompts - few.prompts)
    config = source.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * heads * width * depth * getattr(torch, recipe.compute_dtype).itemsize  # keys and values of a token
    longer = batch * (ANSWER_TOKENS - WRITTEN[-1]) * cache
    return OfText(few.first, prompts, token, few.counted, int(few.peak + more * max(0, many.peak - few.peak)) + longer)


def _writing(source: Source, recipe: Recipe, batch: int) -> OfText:
    device, dtype = torch.device(recipe.device), getattr(torch, recipe.compute_dtype)
    with _peak(device) as peak:
        model = load_whole(source, device, dtype)

        documents = dict[int, list[Document]]()

        def write(length: int) -> None:
            documents[length] = write_answers(
                model,
                source.tokenizer(),
                shipped_prompts(batch, recipe.seed),
                tokens=batch * 10 * length,
                answer_tokens=length,
                batch=batch,
                seed=recipe.seed,
            )

        first = _seconds(device, lambda: write(WRITTEN[0]))
        short, long = (_least(device, partial(write, length), SECONDS_WRITTEN) for length in WRITTEN)
        short = min(first, short)
    del model
    gc.collect()
    written = documents[WRITTEN[1]]
    few, many = (sum(sum(document.counts) for document in documents[length]) for length in WRITTEN)
    more = (long - short) / (many - few) if many > few and long > short else math.inf
    token = min(more, short / few)  # answers may end early
    prompt = (sum(len(document.ids) for document in written) - many) / len(written)
    counted = ANSWER_TOKENS / (ANSWER_TOKENS + prompt)
    return OfText(first - short, short - token * few, token, counted, peak())


def _skeleton(source: Source, recipe: Recipe) -> Skeleton:
    return Skeleton(MadeUp(source), torch.device(recipe.device), getattr(torch, recipe.compute_dtype))


def _ids(skeleton: Skeleton, rows: int, tokens: int) -> Tensor:
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    began = _now(device)
    work()
    return _now(device) - began


def _least(device: torch.device, work: Callable[[], object], seconds: float = LONG_ENOUGH) -> float:
    """Seconds of what takes little, the least of some times: what every window takes must not be one bad moment's.

    No time begins after so many `seconds`.
    """
    took = [_seconds(device, work)]
    while len(took) < TIMES and sum(took) < seconds:
        took.append(_seconds(device, work))
    return min(took)


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """A function that says, afterwards, how many bytes were in use at most: of a GPU more than before, of RAM in all.

    What was given back to the allocator is the process's RAM still, as it is in a run: a difference would miss it.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    process, ended = psutil.Process(), Event()
    most = process.memory_info().rss

    def look() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, process.memory_info().rss)

    looking = Thread(target=look, daemon=True)
    looking.start()
    try:
        yield lambda: most
    finally:
        ended.set()
        looking.join()
